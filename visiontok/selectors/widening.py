"""Non-maximum suppression whose radius grows with every pick."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Picks, Widening, greedy
from ..kernels.batching import budget, largest, mask, rows, unrow_picks
from .topk import rank


def widening(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    step: float | Tensor,
    *,
    most: float = 2.0,
    valid: Tensor | None = None,
) -> Picks:
    """Greedily keep the best token that none kept is too close to: the t-th pick clears the cosine distance t·step.

    Tokens that were cleared away follow, by score, once no other is left. ``step`` = 0 is top-k.

    Args:
        features: (N, D) or (B, N, D).
        scores: (N,) or (B, N).
        k: tokens to keep, int or (B,) long.
        step: growth of the radius, float, () or (B,).
        most: largest radius.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks; the gain is the place of the token among the N, counted from behind, plus N while it stands.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        AgilePruner, arXiv 2603.01236, adaptive similarity threshold.
    """
    x, s = rows(features, 2, "features"), rows(scores, 1, "scores")
    ok = mask(valid, x)
    counts, count = budget(k, ok), largest(k, ok.shape[1])
    usable = x.isfinite().all(-1) & ~s.isnan()
    growth = step.float() if isinstance(step, Tensor) else torch.full((), float(step), device=x.device)
    state = Widening(x, (s.shape[1] - rank(s, ok)).float(), growth.expand(len(x)), most)
    return unrow_picks(greedy(state, counts, count, ok, usable), features, 2)
