"""What a module does to a token: how much longer it makes it, and how far it turns it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow


def transition(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """‖y_i‖ / ‖x_i‖ · e^(1 - cos(x_i, y_i)) / Σ_j e^(1 - cos(x_j, y_j)).

    Args:
        x: (N, D) or (B, N, D), a module's inputs, behind the norm.
        y: the same shape, its outputs, before they are added to the residual stream.
        valid: (N,) or (B, N) bool; other tokens are not in the sum, and theirs is 0.

    Returns:
        (N,) or (B, N) float32.

    Reference:
        TransPrune, arXiv 2507.20630, token transition value.
    """
    a, b = rows(x, 2, "x").detach().float(), rows(y, 2, "y").detach().float()
    ok = mask(valid, a)
    before, after = a.norm(dim=-1), b.norm(dim=-1)
    cosine = (a * b).sum(-1) / (before * after).clamp_min(1e-12)
    turn = torch.where(ok, (1 - cosine).exp(), 0.0)
    share = turn / turn.sum(-1, keepdim=True).clamp_min(1e-30)
    return unrow(torch.where(ok, after / before.clamp_min(1e-12) * share, 0.0), x, 2)
