"""Kept tokens gather what their neighbours in the metric say."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import gather_nearest
from ..kernels.batching import mask, rows, unrow


def neighbours(
    tokens: Tensor, metric: Tensor, weight: Tensor, keep: Tensor, count: int, valid: Tensor | None = None
) -> Tensor:
    """z'_i = z_i + Σ_j weight_j · z_j over the ``count`` tokens j of largest cosine to the kept token i, kept or not.

    Args:
        tokens: (N, D) or (B, N, D).
        metric: (N, E) or (B, N, E), compared by cosine.
        weight: (N,) or (B, N).
        keep: (N,) or (B, N) bool.
        count: neighbours of a token; all others where there are fewer.
        valid: (N,) or (B, N) bool; other tokens are nobody's neighbour.

    Returns:
        tokens of the same shape and dtype, of which those of kept places are new.

    Reference:
        LLaVA-PruMerge, arXiv 2403.15388, token supplement.
    """
    x, kept = rows(tokens, 2, "tokens"), rows(keep, 1, "keep")
    most = max([0, *kept.sum(-1).tolist()])
    front = (~kept).long().sort(dim=-1, stable=True).indices[:, :most]  # the kept places
    sums = gather_nearest(x, rows(metric, 2, "metric"), rows(weight, 1, "weight"), front, count, mask(valid, x))
    # places that are not kept stand behind the kept ones of a row and get their own value back
    at = front[..., None].expand_as(sums)
    new = x.to(sums.dtype).gather(1, at) + torch.where(kept.gather(1, front)[..., None], sums, 0.0)
    return unrow(x.scatter(1, at, new.to(x.dtype)), tokens, 2)
