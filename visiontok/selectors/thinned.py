"""Thinning out: drop, a few at a time, the tokens most similar to another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cosine, thin
from ..kernels.batching import mask, rows, unrow
from .topk import rank


def thinned(
    features: Tensor, scores: Tensor, k: int | Tensor, valid: Tensor | None = None, *, per_round: int = 8
) -> Tensor:
    """Keep ``k`` tokens that differ, by rounds over a list that begins in order of falling score.

    In each round the tokens at even places of the list look for the most similar token at an odd place, and the
    ``per_round`` most similar of them are dropped; the list goes on with the other even ones, most similar first, and
    then the odd ones. The result is chaotic: rounding noise changes orders, orders change pairs.

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N).
        k: tokens to keep, int or (B,) long; 0 is allowed.
        valid: (N,) or (B, N) bool; other tokens are not kept.
        per_round: tokens dropped per round, fewer in the last one.

    Returns:
        bool keep mask (N,) or (B, N).

    Reference:
        VisPruner, arXiv 2412.01818, removal of duplicates.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores")
    ok = mask(valid, x)
    sizes = ok.sum(-1).tolist()
    goals = torch.as_tensor(k).expand(len(x)).tolist()
    order = rank(s, ok).argsort(-1)[:, : max(sizes, default=0)]
    goals = [min(goal, n) for goal, n in zip(goals, sizes, strict=True)]
    return unrow(thin(cosine(x), order, sizes, goals, per_round), scores, 1)
