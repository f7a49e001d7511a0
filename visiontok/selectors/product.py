"""Importance times novelty."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks, cosines, running_max
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def product(features: Tensor, scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Picks:
    """Greedily keep the token of largest score·(1 - largest cosine to those kept); the first by score alone.

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N), non-negative; see :func:`visiontok.functional.minmax`.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks with the gain above.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        ZOO-Prune, arXiv 2509.24837, product fusion of sensitivity and diversity.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores").float()
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    similarity, usable = cosines(x)
    return unrow_picks(running_max(similarity, s, s, s, counts, most, ok, usable), features, 2)
