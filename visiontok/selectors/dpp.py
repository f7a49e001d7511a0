"""Determinantal point process: a set that is relevant and diverse at once."""

from __future__ import annotations

from torch import Tensor

from ..kernels import Picks, cosines, determinant
from ..kernels.batching import budget, largest, mask, rows, unrow_picks


def dpp(features: Tensor, relevance: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Picks:
    """Greedy maximum a posteriori set of the DPP with kernel r_i · cos_ij · r_j.

    Where the kernel's rank is smaller than ``k``, the tokens that add nothing follow by relevance, so that always
    exactly ``k`` are kept.

    Args:
        features: (N, D) or (B, N, D).
        relevance: (N,) or (B, N), r >= 0.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        Picks; the gain is the conditional variance, negative for tokens that add nothing.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        Chen, Zhang and Zhou, NeurIPS 2018, fast greedy MAP; CDPruner, arXiv 2506.10967.
    """
    x, r = rows(features, 2, "features"), rows(relevance, 1, "relevance").float()
    ok = mask(valid, x)
    counts, most = budget(k, ok), largest(k, ok.shape[1])
    similarity, known = cosines(x)
    usable, r = known & ~r.isnan(), r.nan_to_num(nan=0.0).clamp_min(0)
    kernel = similarity.mul_(r[:, None]).mul_(r[..., None])
    return unrow_picks(determinant(kernel, r, counts, most, ok, usable), features, 2)
