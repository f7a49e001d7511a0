"""Maximal marginal relevance: importance against redundancy."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks, RunningMax, cosines, greedy, running_max
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def mmr(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    balance: float = 0.5,
    valid: Tensor | None = None,
    per_round: int = 1,
) -> Picks:
    """Greedily keep the token of largest λ·score - (1-λ)·(largest cosine to those kept); the first by score alone.

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N), on the scale of a cosine; see :func:`visiontok.functional.minmax`.
        k: tokens to keep, int or (B,) long.
        balance: λ in [0, 1]; 1 is top-k by score.
        valid: (N,) or (B, N) bool; other tokens are not kept.
        per_round: picks made at once after the first round; more than 1 is faster and may keep duplicates.

    Returns:
        Picks with the gain above.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        Carbonell and Goldstein, SIGIR 1998; IDPruner, arXiv 2602.13315.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores").float()
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    slope = s.new_full((1,), 1 - balance)
    similarity, usable = cosines(x)
    if per_round > 1:
        state = RunningMax(similarity, balance * s, slope, start=s)
        return unrow_picks(greedy(state, counts, most, ok, usable, per_round), features, 2)
    return unrow_picks(running_max(similarity, balance * s, slope, s, counts, most, ok, usable), features, 2)
