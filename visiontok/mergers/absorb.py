"""Kept tokens take over a share of those they stand for, and remember how many that are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import segment_mean
from ..kernels.batching import rows, unrow


def absorb(tokens: Tensor, group: Tensor, size: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """z'_j = (1 - share) · z_j + share · mean of the tokens of group j, weighted by what each stands for itself.

    Args:
        tokens: (N, D) or (B, N, D); differentiable.
        group: (N,) or (B, N) long, the place of the kept token each token goes to, as
            :func:`~visiontok.functional.nearest_kept` says; -1 leaves a token out.
        size: (N,) or (B, N), how many original tokens each stands for.
        share: in [0, 1].

    Returns:
        tokens of the same shape and dtype, of which those of kept places are new, and the sizes afterwards (N,) or
        (B, N) float32: 0 at places that are not kept.

    Reference:
        mass attention, docs/mass.md; with all sizes 1, proportional attention's merging (ToMe, arXiv 2210.09461).
    """
    x, g = rows(tokens, 2, "tokens"), rows(group, 1, "group")
    means, mass = segment_mean(x, g, x.shape[1], rows(size, 1, "size"))
    out = x
    if share:
        here = (mass > 0)[..., None]
        out = torch.where(here, torch.lerp(x.to(means.dtype), means, share), x.to(means.dtype)).to(x.dtype)
    return unrow(out, tokens, 2), unrow(mass.float(), tokens, 2)
