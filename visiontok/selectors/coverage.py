"""Maximum coverage of rows of any kind: words, patches, both."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks
from ..kernels import coverage as cover
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def coverage(table: Tensor, k: int | Tensor, *, weight: Tensor | None = None, valid: Tensor | None = None) -> Picks:
    """Greedily keep the token i of largest Σ_r weight_r · max(0, table_ri - best_r), best_r over kept tokens, from 0.

    Args:
        table: (R, N) or (B, R, N), how well token i covers row r; negative counts as 0. Tokens with NaN in their column
            come last.
        k: tokens to keep, int or (B,) long.
        weight: (R,) or (B, R), importance of the rows; 1 by default.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks with the gain above.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        MMTok, arXiv 2508.18264, coverage of text and vision rows together.
    """
    t = rows(table, 2, "table")
    ok = mask(valid, t.mT)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    factor = None if weight is None else rows(weight, 1, "weight").float()
    picks = cover(t.float().nan_to_num(nan=0.0), factor, None, None, 0.0, counts, most, ok, ~t.amax(1).isnan())
    return unrow_picks(picks, table, 2)
