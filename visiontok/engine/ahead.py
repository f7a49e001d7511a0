"""Looking ahead: the first decoder layers run on the whole prompt, for what its last token looks for in one of them.

A method before the language model can so choose by what the language model sees; the layers that ran are thrown away,
and the model then runs from its first layer on what is left.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..functional import attention_logits

if TYPE_CHECKING:
    from .call import Prefill


class _Reached(Exception):  # noqa: N818  # no error: the way out of the language model
    def __init__(self, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        self.query, self.key, self.scale = query, key, scale


class _Thread(threading.local):
    def __init__(self) -> None:
        self.layer: int | None = None  # that this thread looks at


_thread = _Thread()


def stop(layer: int, call: Any, query: Any, key: Any, value: Any, mask: Any, kwargs: Mapping[str, Any]) -> None:
    """Sink of the tap of ``layer``: end a look ahead there."""
    if _thread.layer == layer:
        raise _Reached(query, key, kwargs.get("scaling"))


@torch.no_grad()
def look_ahead(text: nn.Module, layer: int, given: Mapping[str, Any], call: Prefill) -> torch.Tensor:
    """Scaled products of the last prompt token's query with every key of ``layer``, mean over heads.

    Args:
        text: the language model, whose ``layer`` has a tap with :func:`stop`.
        layer: decoder layer.
        given: the keywords that the stock model calls ``text`` with, for the whole prompt.
        call: the prefill.

    Returns:
        (B, N) float32, in prompt positions.

    Raises:
        UnsupportedError: on a cache that holds something.
    """
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            "past_key_values: it holds an earlier turn, which a look ahead at a new image would have to run again; "
            "start again without the cache, or use a method that cuts inside the language model, such as 'fastv'"
        )
    kwargs = {**given, "past_key_values": None, "use_cache": False}
    kwargs |= {name: False for name in ("output_hidden_states", "output_attentions") if given.get(name)}
    if kwargs.get("attention_mask") is None:  # without cache and mask, gaps in positions look like packed sequences
        kwargs["attention_mask"] = torch.ones(call.batch, call.length, dtype=torch.long, device=call.visual.device)
    _thread.layer = layer
    try:
        text(**kwargs)
    except _Reached as seen:
        last = torch.where(call.attended, torch.arange(call.length, device=call.visual.device), 0).amax(1)
        query = seen.query[torch.arange(call.batch, device=last.device), :, last][:, :, None]
        return attention_logits(query, seen.key, scale=seen.scale)[:, 0]
    finally:
        _thread.layer = None
    raise UnsupportedError(f"{type(text).__name__}: decoder layer {layer} was not reached; use another layer")
