"""Scores smoothed over neighbours on the patch grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow


def blur(scores: Tensor, grid: Tensor, valid: Tensor | None = None) -> Tensor:
    """3 × 3 binomial mean (1 2 1) ⊗ (1 2 1); at borders over the neighbours that exist.

    Args:
        scores: (N,) or (B, N).
        grid: (N, 3) or (B, N, 3) long, (t, row, column) of each token; tokens at -1 keep their score.
        valid: (N,) or (B, N) bool; other tokens are nobody's neighbours.

    Returns:
        float32, shape of ``scores``.

    Reference:
        EADP, Gaussian smoothing of relevance.
    """
    s, cells = rows(scores, 1, "scores").float(), rows(grid, 2, "grid")
    ok = mask(valid, s) & (cells >= 0).all(-1)
    step = (cells[:, :, None] - cells[:, None]).abs()  # (B, N, N, 3)
    near = (step[..., 0] == 0) & (step[..., 1:] <= 1).all(-1) & ok[:, None] & ok[..., None]
    weight = torch.where(near, 4.0 * 0.5 ** step[..., 1:].sum(-1), 0.0)
    mean = (weight @ torch.where(ok, s, 0.0)[..., None])[..., 0] / weight.sum(-1).clamp_min(1e-30)
    return unrow(torch.where(ok, mean, s), scores, 1)
