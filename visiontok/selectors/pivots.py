"""Tokens that are least like a few pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cosine, finite
from ..kernels.batching import mask, rows, unrow
from .topk import rank


def least_similar(features: Tensor, pivots: Tensor, share: Tensor, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    """For one pivot after the other, keep the free tokens of lowest cosine to it.

    Args:
        features: (N, D) or (B, N, D).
        pivots: (P, D) or (B, P, D), in the order in which they choose.
        share: (P,) or (B, P) long, how many tokens each pivot chooses.
        keep: (N,) or (B, N) bool, tokens kept beforehand.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        bool keep mask of the shape of ``keep``, those of before included.

    Reference:
        DART, arXiv 2502.11494, duplication-aware reduction.
    """
    x = rows(features, 2, "features")
    ok, kept, counts = mask(valid, x), rows(keep, 1, "keep"), rows(share, 1, "share")
    similarity = cosine(rows(pivots, 2, "pivots"), x)  # (B, P, N)
    similarity = torch.where(finite(x)[:, None], similarity, torch.nan)  # NaN ranks last
    for p in range(similarity.shape[1]):
        free = ok & ~kept
        kept = kept | ((rank(-similarity[:, p], free) < counts[:, p : p + 1]) & free)
    return unrow(kept, keep, 1)
