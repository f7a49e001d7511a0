"""Merge tokens by groups, and spread merged tokens back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import segment_mean
from ..kernels.batching import rows, unrow


def merge(tokens: Tensor, group: Tensor, count: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of every group. Mass is conserved: Σ size·token is the same before and after.

    ``group`` is the record of which source went where; :func:`unmerge` reads it.

    Args:
        tokens: (N, D) or (B, N, D).
        group: (N,) or (B, N) long in 0 … count-1; tokens at -1 are dropped.
        count: number of groups M.
        size: (N,) or (B, N), how many original tokens each token stands for; 1 by default.

    Returns:
        merged tokens (M, D) or (B, M, D) in the dtype of ``tokens``, 0 for an empty group, and their sizes (M,) or
        (B, M) float32.

    Raises:
        ConfigError: if a group lies outside -1 … count-1.

    Reference:
        ToMe, arXiv 2210.09461, section 3.
    """
    x, g = rows(tokens, 2, "tokens"), rows(group, 1, "group")
    if g.numel() and (int(g.min()) < -1 or int(g.max()) >= count):
        raise ConfigError(f"group spans {int(g.min())} … {int(g.max())}: with count={count}, give -1 … {count - 1}")
    weight = torch.ones(g.shape, device=x.device) if size is None else rows(size, 1, "size")
    merged, mass = segment_mean(x, g, count, weight)
    return unrow(merged.to(x.dtype), tokens, 2), unrow(mass, tokens, 2)


def unmerge(merged: Tensor, group: Tensor) -> Tensor:
    """Give every source token the value of the group it went to.

    Args:
        merged: (M, D) or (B, M, D).
        group: (N,) or (B, N) long; tokens at -1 become 0.

    Returns:
        (N, D) or (B, N, D).
    """
    x, g = rows(merged, 2, "merged"), rows(group, 1, "group")
    spread = x.gather(1, g.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))
    return unrow(torch.where((g >= 0)[..., None], spread, torch.zeros_like(spread)), merged, 2)
