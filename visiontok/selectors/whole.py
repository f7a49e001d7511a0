"""Groups of tokens that stay whole or go whole: pages, pictures, frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def whole(
    scores: Tensor, sizes: Tensor, k: int | Tensor, most: int | None = None, valid: Tensor | None = None
) -> Tensor:
    """Keep groups, best first: the first one in any case, and each other that fits into what is left of ``k`` tokens.

    Ties go to the lowest index, NaN ranks last.

    Args:
        scores: (G,) or (B, G).
        sizes: (G,) or (B, G) long, tokens of each group; groups without are not kept.
        k: tokens, int or (B,) long.
        most: how many groups to keep at most, at least 1.
        valid: (G,) or (B, G) bool; other groups are not kept.

    Returns:
        bool keep mask of groups, shape of ``scores``.
    """
    s, n = rows(scores, 1, "scores"), rows(sizes, 1, "sizes")
    ok = mask(valid, s) & (n > 0)
    left = torch.as_tensor(k, device=s.device).expand(len(s))
    order = rank(s, ok).argsort(1)
    keep, number = torch.zeros_like(ok), torch.zeros(len(s), dtype=torch.long, device=s.device)
    for group in order.unbind(1):
        here = group[:, None]
        size, there = n.gather(1, here)[:, 0], ok.gather(1, here)[:, 0]
        fits = there & ((size <= left) | (number == 0))
        if most is not None:
            fits = fits & (number < most)
        keep = keep.scatter(1, here, fits[:, None])
        left, number = left - size * fits, number + fits
    return unrow(keep, scores, 1)
