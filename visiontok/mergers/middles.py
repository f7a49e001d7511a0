"""The place at which a group of merged tokens stands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow


def middles(group: Tensor, grid: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Of each token, the member of its group that is nearest to the mean of the places of all of them.

    Args:
        group: (N,) or (B, N) long in 0 … count-1; tokens at -1 are in none.
        grid: (N, C) or (B, N, C), the place of each token.
        count: more than the largest group.
        valid: (N,) or (B, N) bool; others are members of nothing.

    Returns:
        long, shape of ``group``: a place in the list, the lowest of those equally near; -1 for tokens in no group.
    """
    g, at = rows(group, 1, "group"), rows(grid, 2, "grid").double()
    inside = mask(valid, g) & (g >= 0)
    home = torch.where(inside, g, count)
    b, n = g.shape
    each = home[..., None].expand_as(at)
    sums = at.new_zeros(b, count + 1, at.shape[-1]).scatter_add(1, each, at)
    size = at.new_zeros(b, count + 1).scatter_add(1, home, torch.ones_like(home).double())
    means = sums / size.clamp_min(1)[..., None]
    far = (at - means.gather(1, each)).square().sum(-1)
    nearest = far.new_full((b, count + 1), torch.inf).scatter_reduce(1, home, far, "amin")
    here = torch.arange(n, device=g.device).expand(b, -1)
    candidate = torch.where(far == nearest.gather(1, home), here, n)
    first = here.new_full((b, count + 1), n).scatter_reduce(1, home, candidate, "amin")
    return unrow(torch.where(inside, first.gather(1, home), -1), group, 1)
