"""The K best tokens by score."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import budget, mask, rows, unrow


def rank(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Place of every token in the order (valid first, score descending, index ascending); NaN scores are -inf.

    Args:
        scores: (N,) or (B, N).
        valid: bool, shape of ``scores``.

    Returns:
        long, shape of ``scores``; 0 is the best.
    """
    s = rows(scores, 1, "scores")
    s = torch.where(s.isnan(), -torch.inf, s) if s.is_floating_point() else s
    order = s.sort(dim=-1, descending=True, stable=True).indices
    if valid is not None:
        last = ~mask(valid, s).gather(-1, order)
        order = order.gather(-1, last.long().sort(dim=-1, stable=True).indices)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(s.shape[-1], device=s.device).expand_as(order))
    return unrow(place, scores, 1)


def topk(scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Keep the ``k`` tokens with the highest scores; ties go to the lowest index, NaN ranks last.

    Args:
        scores: (N,) or (B, N).
        k: tokens to keep, int or (B,) long; a row with no more than ``k`` valid tokens keeps them all.
        valid: bool, shape of ``scores``; other tokens are never kept.

    Returns:
        bool keep mask, shape of ``scores``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    s = rows(scores, 1, "scores")
    ok = mask(valid, s)
    counts = budget(k, ok)
    return unrow(rank(s, ok) < counts[:, None], scores, 1)
