"""Scores that shrink as similar tokens are taken."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Discount, Picks, Rows, greedy
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def discount(features: Tensor, scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Picks:
    """Greedily keep the token of largest score_i · Π_{j kept} (1 - cos²_ij).

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N), non-negative.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks with the logarithm of the discounted score.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        SIEVE, residual-space diversity; 1 - cos² is what a projection on the kept token leaves.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores").float()
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    table = Rows(x, most)
    return unrow_picks(greedy(Discount(table, s), counts, most, ok, table.finite), features, 2)
