"""Scores brought to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow


def minmax(scores: Tensor, valid: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(score - min) / (max - min + eps) over the valid, finite scores of each row; NaN stays NaN.

    Args:
        scores: (N,) or (B, N).
        valid: bool, shape of ``scores``; other entries become 0.
        eps: keeps constant scores finite.

    Returns:
        float32, shape of ``scores``.

    Reference:
        IDPruner, arXiv 2602.13315, importance normalisation.
    """
    s = rows(scores, 1, "scores").float()
    ok = mask(valid, s)
    finite = ok & s.isfinite()
    low = torch.where(finite, s, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, s, -torch.inf).amax(-1, keepdim=True)
    scaled = (torch.maximum(torch.minimum(s, high), low) - low) / (high - low + eps)
    scaled = torch.where(s.isnan(), torch.nan, scaled)
    return unrow(torch.where(ok, scaled, 0.0), scores, 1)
