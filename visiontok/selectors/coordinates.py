"""Tokens whose rotary phase is nearest to no turn, or to a quarter turn: a model's implicit coordinate axes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def coordinates(cos: Tensor, sin: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens with the largest mean cosine and the ``k`` with the largest mean sine; at most 2k together.

    Args:
        cos: (N, R) or (B, N, R), rotary table of every token; R rotary dimensions, of all position axes.
        sin: the same of the sine.
        k: tokens of each kind, int or (B,) long; may be 0.
        valid: (N,) or (B, N) bool; other tokens are never kept.

    Returns:
        bool keep mask (N,) or (B, N).

    Reference:
        IVC-Prune, arXiv 2602.03060, implicit visual coordinates V(m) and U(m).
    """
    c, s = rows(cos, 2, "cos"), rows(sin, 2, "sin")
    ok = mask(valid, c)
    most = torch.as_tensor(k, device=c.device).expand(len(c))[:, None]
    # tokens that mirror each other's row and column have equal phases, which rounding must not tell apart
    kept = [rank(table.double().mean(-1).round(decimals=6), ok) < most for table in (c, s)]
    return unrow((kept[0] | kept[1]) & ok, cos, 2)
