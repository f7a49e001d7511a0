"""Importance by two trained linear maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow

Linear = tuple[Tensor, Tensor]
"""Weight (H, D) and bias (H,) of a linear map."""


def learned(features: Tensor, query: Linear, key: Linear, valid: Tensor | None = None) -> Tensor:
    """Mean over all tokens j of q_i·k_j / √H, with q and k linear in the features; no softmax.

    The mean is taken of the features, so that no table of N² products is needed.

    Args:
        features: (N, D) or (B, N, D).
        query: makes q.
        key: makes k.
        valid: (N,) or (B, N) bool; other tokens have no say.

    Returns:
        (N,) or (B, N) float32.

    Reference:
        VisionSelector, arXiv 2510.16598, learnable importance scorer.
    """
    x = rows(features, 2, "features").detach().float()
    counts = (mask(valid, x) & x.isfinite().all(-1))[..., None]
    mean = torch.where(counts, x, 0.0).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    (wq, bq), (wk, bk) = (tuple(part.float() for part in linear) for linear in (query, key))
    with torch.autocast(x.device.type, enabled=False):
        asked = mean @ wk.mT + bk  # (B, 1, H)
        scores = (x @ (asked @ wq).mT)[..., 0] + (asked @ bq[:, None])[..., 0]
    return unrow(scores / len(bq) ** 0.5, features, 2)
