"""What an answer rests on: gradient and attention of every decoder layer, rolled out from the answer to the prompt.

The stock model runs forward and backward once, with its own attention kernel. Taps keep queries, keys and values, and
add zeros to what a kernel puts out, whose gradient is that of the output: no parameter gets one, whatever it requires.
The attention maps are made anew from those, layer by layer, some rows at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UnsupportedError
from ..functional import relevance
from .probe import visible_keys

if TYPE_CHECKING:
    from .call import Prefill


class _Thread(threading.local):
    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, ...]] | None = None  # per decoder layer, while this thread rolls out


_thread = _Thread()


def note(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, kwargs: Any, out: Any) -> Any:
    """Behind the tap of ``layer``: remember what it is given, and let its output be differentiated."""
    if _thread.seen is None:
        return out
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UnsupportedError(
            f"decoder layer {layer}: its attention is no plain softmax (a soft cap or sinks), so its map cannot be "
            "made anew; use a method that does not ask for relevance"
        )
    zeros = torch.zeros_like(out[0], requires_grad=True)
    _thread.seen[layer] = (q.detach(), k.detach(), v.detach(), mask, kwargs, zeros)
    return (out[0] + zeros, *out[1:])


def rollout(run: Callable[[], torch.Tensor], weight: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows of R = (1 + Ā_L) … (1 + Ā_1), with Ā = mean over heads of max(0, A ⊙ ∂y/∂A), for the prompt tokens' states.

    Args:
        run: runs a model in whose decoder layers :func:`note` stands behind taps; returns y, the sum over its prompts.
        weight: (B, N), which rows of R: where the answer is predicted.
        valid: (B, N) bool, tokens that are no padding.

    Returns:
        (B, N) float32, the rows' sum by ``weight``.
    """
    seen: dict[int, tuple[Any, ...]] = {}
    _thread.seen = seen
    try:
        with torch.inference_mode(False), torch.enable_grad():
            y = run()
            layers = sorted(seen)
            slopes = torch.autograd.grad(y, [seen[layer][-1] for layer in layers])
    finally:
        _thread.seen = None
    total = weight.float()
    with torch.no_grad():
        for layer, slope in zip(reversed(layers), reversed(slopes), strict=True):
            q, k, v, mask, kwargs, _ = seen[layer]
            everyone = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
            sees = visible_keys(mask, q, k, valid, kwargs.get("sliding_window")).of(everyone)
            slope = slope.transpose(1, 2)  # (B, H, N, d)
            total = total + relevance(total, q, k, v, slope, scale=kwargs.get("scaling"), visible=sees)
    return total


def fresh(x: Any) -> Any:
    """Tensors, in whatever holds them, that autograd may keep even if they come from inference mode."""
    return tree_map(lambda part: part.detach().clone() if torch.is_tensor(part) else part, x)


def next_token(text: nn.Module, head: nn.Module | None, given: Mapping[str, Any], call: Prefill) -> torch.Tensor:
    """What the stock model's next token rests on.

    Args:
        text: the language model, in whose layers :func:`note` stands behind taps.
        head: makes logits of its last states; None if the model has none.
        given: the keywords that the stock model calls ``text`` with, for the whole prompt.
        call: the prefill.

    Returns:
        (B, N) float32, in prompt positions.

    Raises:
        UnsupportedError: on a cache that holds something, and without a head.
    """
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            "past_key_values: it holds an earlier turn, on which an answer rests, too; start again without the cache, "
            "or use a method that cuts inside the language model, such as 'fastv'"
        )
    if head is None:
        raise UnsupportedError(
            f"{type(text).__name__}: no output embeddings around it, so it says no next token; give the scores, or "
            "attach to the model with its head"
        )
    kwargs = {**given, "past_key_values": None, "use_cache": False}
    kwargs |= {name: False for name in ("output_hidden_states", "output_attentions") if given.get(name)}
    if kwargs.get("attention_mask") is None:  # without cache and mask, gaps in positions look like packed sequences
        kwargs["attention_mask"] = torch.ones(call.batch, call.length, dtype=torch.long, device=call.visual.device)
    place = torch.arange(call.length, device=call.visual.device)
    last = torch.where(call.attended, place, 0).amax(1)
    rows = torch.arange(call.batch, device=last.device)

    def run() -> torch.Tensor:
        states = text(**fresh(kwargs)).last_hidden_state
        at: torch.Tensor = head(states[fresh(rows), fresh(last)])
        return at.amax(1).sum()

    return rollout(run, (place == last[:, None]).float(), call.attended)
