"""Max-min diversity (farthest-point selection) in cosine distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Picks, cosines, running_max
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def maxmin(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Picks:
    """Greedily keep the token farthest from those already kept.

    The first is the token whose nearest neighbour is farthest away. Tokens with non-finite features come last.

    Args:
        features: (N, D) or (B, N, D).
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are neither kept nor anybody's neighbour.

    Returns:
        Picks; the gain is the distance 1 - cos to the nearest token kept before.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        DivPrune, arXiv 2503.02175, the max-min diversity problem (MMDP) and its greedy solution.
    """
    x = rows(features, 2, "features")
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    similarity, usable = cosines(x)
    similarity.diagonal(dim1=1, dim2=2).fill_(-1.0)  # nobody is its own neighbour
    others = torch.where(ok, 0.0, -torch.inf)[:, None]
    start = 1 - (similarity + others).amax(-1).clamp_min(-1.0)
    one = similarity.new_ones(1)
    picks = running_max(similarity, one, one, start, counts, most, ok, usable)
    return unrow_picks(picks, features, 2)
