"""A choice for every key head of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..context import Context


def each_head(choose: Callable[[Tensor, Tensor, Tensor], Tensor], scores: Tensor, ctx: Context) -> Tensor:
    """(U, N, G) bool, what ``choose`` makes of every head's scores, budget and candidates.

    Args:
        choose: (B, N) scores, (B,) counts and (B, N) candidates → (B, N) bool.
        scores: (U, N, G).
        ctx: whose budget and candidates hold for each head.
    """
    heads = scores.shape[2]
    each = scores.transpose(1, 2).flatten(0, 1)
    keep = choose(each, ctx.count.repeat_interleave(heads), ctx.valid.repeat_interleave(heads, 0))
    return keep.unflatten(0, (len(scores), heads)).transpose(1, 2)
