"""What a cut may know of the layers before it, beside their attention: states, heads, and what modules do to tokens.

Everything is noted per image, for the visual rows only, and lives as long as the call.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..functional import transition
from .call import Prefill
from .probe import CALL, attention_and_mlp

if TYPE_CHECKING:
    from .readings import DecoderReadings

HEADS = ("decoder_queries", "decoder_keys", "decoder_values")
"""What a tap of an attention module shows, in the order in which it does."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.call: Prefill | None = None  # attention module → MLP of the same layer, which gets no keywords
        self.x: torch.Tensor  # what that MLP was given, of which others may give it a part


_thread = _Thread()


def watch_modules(layer: nn.Module, index: int, readings: DecoderReadings) -> list[Any]:
    """Hooks that show ``readings`` what attention and MLP of a decoder layer make of their inputs.

    Raises:
        UnsupportedError: if the layer has no single attention module or no module of the name ``mlp``.
    """
    what = "what they do to a token cannot be told apart; use a method that reads states, such as 'v2drop'"
    attention, mlp = attention_and_mlp(layer, index, what)
    return [
        attention.register_forward_hook(functools.partial(_attended, index, readings), with_kwargs=True),
        mlp.register_forward_pre_hook(_given),
        mlp.register_forward_hook(functools.partial(_transformed, index, readings)),
    ]


@torch.compiler.disable
def _attended(
    index: int,
    readings: DecoderReadings,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any = None,
) -> None:
    if output is None:  # called without keywords, which another thread is taking away at this moment
        return
    call = kwargs.get(CALL)
    _thread.call = call if isinstance(call, Prefill) and call.policy.decoder is readings else None
    if _thread.call is not None:
        x = args[0] if args else kwargs["hidden_states"]
        readings.note_module(_thread.call, index, x, output[0] if isinstance(output, tuple) else output)


@torch.compiler.disable
def _given(module: Any, args: tuple[Any, ...]) -> None:
    if _thread.call is not None:
        _thread.x = args[0]


@torch.compiler.disable
def _transformed(index: int, readings: DecoderReadings, module: Any, args: tuple[Any, ...], output: Any) -> None:
    call, _thread.call = _thread.call, None
    if call is not None:
        readings.note_module(call, index, _thread.x, output[0] if isinstance(output, tuple) else output)
        del _thread.x


def visual(call: Prefill, layer: int, x: torch.Tensor) -> torch.Tensor:
    """(B, M, …) in the slots of ``layer`` → (U, N, …), the visual tokens of each image."""
    return call.units.gather(call.to_prompt(layer, x))


def heads(call: Prefill, layer: int, x: torch.Tensor) -> torch.Tensor:
    """(B, H, P + M, d), whose last M are this call's → (U, N, H, d)."""
    mine = x[:, :, -call.slots(layer) :].transpose(1, 2)
    return visual(call, layer, mine.flatten(2)).unflatten(2, mine.shape[2:])


def turned(call: Prefill, layer: int, x: torch.Tensor, y: torch.Tensor, *, official: bool) -> torch.Tensor:
    """(U, N) the transition from ``x`` to ``y`` (B, M, D) among the tokens of an image that ``layer`` holds.

    ``official`` is the published scale: among all tokens of the batch, text too.
    """
    if official:
        layout = call.layouts[layer]
        valid = call.entry_valid_or_ones() if layout is None else layout.valid
        everyone = transition(x.flatten(0, 1), y.flatten(0, 1), None if valid is None else valid.flatten())
        return visual(call, layer, everyone.view(*x.shape[:2], 1))[..., 0]
    here = call.units.gather(call.alive[layer][..., None])[..., 0] & call.units.valid
    return transition(visual(call, layer, x), visual(call, layer, y), here)
