"""Facility location: kept tokens that stand in for all tokens."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks, cosines, coverage
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def facility(
    features: Tensor,
    k: int | Tensor,
    *,
    scale: Tensor | None = None,
    bonus: Tensor | None = None,
    weight: Tensor | None = None,
    start: float = 0.0,
    valid: Tensor | None = None,
) -> Picks:
    """Greedily keep the token i of largest scale_i · Σ_j weight_j · max(0, cos_ij - c_j) + bonus_i.

    c_j is the largest cosine of token j to a kept token, at least ``start``.

    Args:
        features: (N, D) or (B, N, D).
        k: tokens to keep, int or (B,) long.
        scale: (N,) or (B, N), importance of a token as a representative; 1 by default.
        bonus: (N,) or (B, N), importance added to the gain; 0 by default.
        weight: (N,) or (B, N), importance of being represented; 1 by default.
        start: cosine at and below which a token is not represented at all; -1 makes every cosine count.
        valid: (N,) or (B, N) bool; other tokens are neither kept nor represented.

    Returns:
        Picks with the gain above.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        SCOPE, arXiv 2510.24214 (scale or bonus: attention); EADP, arXiv 2607.02484 (weight: text relevance; start -1).
    """
    x = rows(features, 2, "features")
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    similarity, usable = cosines(x)
    importance, factor, extra = (None if f is None else rows(f, 1, "weights").float() for f in (weight, scale, bonus))
    known = ok & usable
    represented = known.float() if importance is None else importance.masked_fill(~known, 0.0)
    picks = coverage(similarity, represented, factor, extra, start, counts, most, ok, usable)
    return unrow_picks(picks, features, 2)
