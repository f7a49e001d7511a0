"""Max-sum diversity: least similar to all kept tokens together."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks, Rows, RunningSum, greedy, running_sum
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def maxsum(features: Tensor, scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Picks:
    """Greedily keep the token with the smallest sum of cosines to those kept; the first has the highest score.

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N), used for the first pick only.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks; the gain is minus the sum of cosines.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        ToDRE stage 1, arXiv 2505.18757 v2.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores").float()
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    table = Rows(x, most)
    if table.whole:
        return unrow_picks(running_sum(table.matrix, s, counts, most, ok, table.finite), features, 2)
    return unrow_picks(greedy(RunningSum(table.row, s), counts, most, ok, table.finite), features, 2)
