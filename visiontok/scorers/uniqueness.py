"""How unlike a token is to those behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import nearest_later
from ..kernels.batching import mask, rows, unrow


def uniqueness(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Minus the largest cosine to a token of higher index; infinite for the last token.

    Of equal tokens the last has the highest score.

    Args:
        features: (N, D) or (B, N, D).
        valid: (N,) or (B, N) bool; other tokens are nobody's likeness.

    Returns:
        (N,) or (B, N) float32; NaN where a token holds NaN or infinity.

    Reference:
        TextMonkey, arXiv 2403.04473, token filter.
    """
    x = rows(features, 2, "features")
    scores = -nearest_later(x, mask(valid, x))
    return unrow(torch.where(x.isfinite().all(-1), scores, torch.nan), features, 2)
