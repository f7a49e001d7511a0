"""Layers that some tokens pass by: what their MLPs add to the others is scaled, token by token.

Who passes and with which factor is decided on the layer's input (:class:`~visiontok.engine.policy.StagePolicy`); that
they are missing in the layer and back behind it is the layouts' work.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .call import Prefill
from .probe import CALL, Tap, attention_and_mlp

if TYPE_CHECKING:
    from .attach import Policy

_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")  # norms between an MLP and the residual stream


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scale: torch.Tensor | None = None  # attention module → MLP of the same layer, which gets no keywords


_thread = _Thread()


def scale_branch(layer: nn.Module, index: int, policy: Policy) -> list[Any]:
    """Hooks that multiply what the MLP of a decoder layer adds by ``call.scales`` of that layer.

    Raises:
        UnsupportedError: if the layer has no single attention module or no module of the name ``mlp``.
    """
    what = "what the MLP adds to a token cannot be scaled; use a method without routers"
    attention, mlp = attention_and_mlp(layer, index, what)
    branch = next((getattr(layer, name) for name in _BEHIND if hasattr(layer, name)), mlp)
    return [
        Tap(attention, None),  # takes the call from the keywords
        attention.register_forward_hook(functools.partial(_attended, index, policy), with_kwargs=True),
        branch.register_forward_hook(_scaled),
    ]


@torch.compiler.disable
def _attended(
    index: int, policy: Policy, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None
) -> None:
    call = None if output is None else kwargs.get(CALL)
    _thread.scale = None
    if isinstance(call, Prefill) and call.policy is policy and index in call.scales:
        scale, layout = call.scales[index], call.layouts[index]
        _thread.scale = scale if layout is None else layout.gather(scale)


@torch.compiler.disable
def _scaled(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    scale, _thread.scale = _thread.scale, None
    if scale is None:
        return None
    return output * scale if torch.is_tensor(output) else (output[0] * scale, *output[1:])
