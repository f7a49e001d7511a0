"""Tokens at equal steps through the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import rows, unrow


def spaced(candidates: Tensor, k: int | Tensor, step: int | Tensor | None = None) -> Tensor:
    """``k`` of the candidates, in order of index, beginning with the first.

    Args:
        candidates: (N,) or (B, N) bool.
        k: how many, int or (B,) long; 0 is allowed, and more than there are takes all.
        step: take candidates 0, step, 2·step, …, which may be fewer than ``k``; by default places ⌊i·n/k⌋ of the n
            candidates, which are ``k`` and reach the end.

    Returns:
        bool mask of the shape of ``candidates``.

    Reference:
        VisionZip, arXiv 2412.04467, contextual targets (by step); PruMerge+, arXiv 2403.15388, spatial tokens.
    """
    able = rows(candidates, 1, "candidates")
    place = able.cumsum(-1) - 1
    count = torch.as_tensor(k, device=able.device).expand(len(able))[:, None]
    if step is None:
        n = able.sum(-1, keepdim=True).clamp_min(1)
        count = torch.minimum(count, n)
        # ⌊i·n/k⌋ = p for some i exactly where ⌈p·k/n⌉ grows
        taken = (place * count + count + n - 1) // n > (place * count + n - 1) // n
    else:
        width = torch.as_tensor(step, device=able.device).expand(len(able))[:, None]
        taken = (place % width == 0) & (place // width < count)
    return unrow(able & taken, candidates, 1)
