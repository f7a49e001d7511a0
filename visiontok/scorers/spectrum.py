"""How many directions an image's tokens really use."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows


def effective_rank(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """exp of the entropy of the singular values, scaled to sum 1: from 1 (all tokens parallel) to min(N, D).

    Args:
        features: (N, D) or (B, N, D); rows that hold NaN or infinity do not count.
        valid: (N,) or (B, N) bool; other tokens do not count.

    Returns:
        () or (B,) float32; 1 where nothing counts.

    Reference:
        Roy and Vetterli, EUSIPCO 2007; AgilePruner, arXiv 2603.01236.
    """
    x = rows(features, 2, "features").detach().double()
    counts = mask(valid, x) & x.isfinite().all(-1)
    x = torch.where(counts[..., None], x, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x  # the smaller of the two
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    rank = torch.special.entr(share).sum(-1).exp().float()
    return rank[0] if features.dim() == 2 else rank
