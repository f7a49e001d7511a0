"""Narrow MLPs: of what a decoder layer's MLP computes of visual tokens, the first inner channels are enough.

The MLP module is called with the other rows alone. The family's own formula then runs once more, on the visual rows and
on slices of the same weights, and both stand in their places again where the MLP returns. So the other channels are not
computed for visual tokens, weights stay as they are, and gradients reach their slices.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, UnsupportedError
from .call import Prefill
from .layout import Parted
from .probe import Tap, attention_and_mlp

if TYPE_CHECKING:
    from .attach import Policy
    from .readings import Host

_INTO = ("gate_proj", "up_proj", "fc1", "c_fc")  # projections to the inner channels
_TWICE = "gate_up_proj"  # two of them in one
_OUT = ("down_proj", "fc2", "c_proj")  # from there
_FORMS = ({"gate_proj", "up_proj", "down_proj"}, {_TWICE, "down_proj"}, {"fc1", "fc2"}, {"c_fc", "c_proj"})
_WHAT = "visual tokens cannot be given a part of its channels; leave the narrow stage out ('vtw' is yopo's exit alone)"


class _Thread(threading.local):
    def __init__(self) -> None:
        self.parted: Parted | None = None  # attention module → MLP of the same layer, which gets no keywords
        self.running: tuple[torch.Tensor, Parted] | None = None  # MLP pre-hook → post-hook: what came in


_thread = _Thread()


def first_channels(host: Host, index: int, shrink: float) -> int:
    """How many inner channels of the MLP of decoder layer ``index`` are left if their number is divided by ``shrink``.

    Raises:
        UnsupportedError: if the MLP is not made of plain linear maps of known names.
        ConfigError: if none is left.
    """
    layer, model = host.layers[index], host.adapter.base.config.model_type
    _, mlp = attention_and_mlp(layer, index, _WHAT)
    parts: dict[str, Any] = {name: part for name, part in mlp.named_children() if [*part.parameters()]}
    if set(parts) not in _FORMS or not all(_is_plain(part) for part in parts.values()):
        found = ", ".join(f"{name}: {type(part).__name__}" for name, part in parts.items())
        raise UnsupportedError(
            f"{model}: a narrow stage needs an MLP of gate, up and down or of two projections, in floating-point "
            f"nn.Linear that are loaded; the {type(mlp).__name__} of decoder layer {index} has {found}, so {_WHAT}"
        )
    inner = next(part.in_features for name, part in parts.items() if name in _OUT)
    if inner < shrink:
        raise ConfigError(f"shrink={shrink:g}: the MLP of decoder layer {index} has {inner} channels, so none is left")
    return int(inner / shrink)


def _is_plain(part: Any) -> bool:
    """Not a quantised or adapted one, whose weight cannot be sliced, and not offloaded."""
    if type(part) is not nn.Linear:
        return False
    packed = hasattr(part.weight, "__tensor_flatten__")  # a tensor that is made of others, as torchao's are
    return not packed and not part.weight.is_meta


def narrow_mlp(layer: nn.Module, index: int, policy: Policy) -> list[Any]:
    """Hooks by which the MLP of a decoder layer computes ``policy.channels`` of that layer for visual tokens.

    They stand next to the module: hooks of others see the rows of all tokens before and behind it.
    """
    attention, mlp = attention_and_mlp(layer, index, _WHAT)
    first: Any = _First(mlp, policy.channels[index])
    return [
        Tap(attention, functools.partial(_attended, index, policy)),
        mlp.register_forward_pre_hook(_enters),
        mlp.register_forward_hook(functools.partial(_leaves, first), prepend=True),
    ]


class _First:
    """Stands for an MLP that has the first ``channels`` only; slices are made anew, for weights may move."""

    def __init__(self, mlp: nn.Module, channels: int) -> None:
        self._mlp, self._channels = mlp, channels

    def __getattr__(self, name: str) -> Any:
        part, n = getattr(self._mlp, name), self._channels
        if name in _OUT:
            return functools.partial(F.linear, weight=part.weight[:, :n], bias=part.bias)
        if name not in (*_INTO, _TWICE):
            return part
        first = (lambda x: x[:n]) if name != _TWICE else lambda x: x.unflatten(0, (2, -1))[:, :n].flatten(0, 1)
        bias = None if part.bias is None else first(part.bias)
        return functools.partial(F.linear, weight=first(part.weight), bias=bias)


def _attended(index: int, policy: Policy, call: Any, *seen: Any) -> None:
    mine = isinstance(call, Prefill) and call.policy is policy
    _thread.parted = call.parted.get(index) if mine else None


@torch.compiler.disable
def _enters(module: nn.Module, args: tuple[Any, ...]) -> Any:
    parted, _thread.parted = _thread.parted, None
    if parted is None:
        return None
    x = args[0]
    _thread.running = x, parted
    return (x.flatten(0, 1)[None, parted.others.to(x.device)], *args[1:])


@torch.compiler.disable
def _leaves(first: Any, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    running, _thread.running = _thread.running, None
    if running is None:
        return None
    x, parted = running
    narrow = type(module).forward(first, x.flatten(0, 1)[None, parted.visual.to(x.device)])
    joined = output.new_empty(x.shape[0] * x.shape[1], output.shape[-1])
    for rows, result in ((parted.others, output), (parted.visual, narrow)):
        joined.index_copy_(0, rows.to(x.device), result[0])
    return joined.view(*x.shape[:2], -1)
