"""Spherical k-means: groups of tokens that point the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Seeding, cosine, greedy, nearest_unit, unit
from ..kernels.batching import budget, largest, mask, rows, unrow
from ..kernels.reference import SAME
from ..selectors.topk import rank


@torch.no_grad()
def clusters(
    features: Tensor, k: int | Tensor, draws: Sequence[Tensor], valid: Tensor | None = None, *, rounds: int = 10
) -> Tensor:
    """k-means in cosine distance, from k-means++ seeds; exactly ``k`` groups.

    Where a group has run empty, the token that resembles its own group least becomes one.

    Args:
        features: (N, D) or (B, N, D).
        k: number of groups, int or (B,) long.
        draws: for each row the random numbers in [0, 1) that choose its seeds, one per group.
        valid: (N,) or (B, N) bool; other tokens are in no group.
        rounds: of assignment and new means.

    Returns:
        long (N,) or (B, N): the place of the member nearest to the mean of each token's group, -1 for no group.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        Arthur and Vassilvitskii, SODA 2007 (seeds); Dhillon and Modha, Machine Learning 2001 (spherical); VQToken,
        arXiv 2503.16980.
    """
    x = rows(features, 2, "features")
    ok = mask(valid, x)
    counts, most = budget(k, ok), max(1, largest(k, ok.shape[1]))
    x = unit(torch.where(ok[..., None], x, 0.0))
    chance = x.new_zeros(len(x), most)
    for row, draw in zip(chance, draws, strict=True):
        row[: len(draw)] = draw[:most].to(row)
    order = greedy(Seeding(cosine(x), ok, chance), counts, most, ok).order
    exists = (order >= 0)[:, None]  # (B, 1, K)
    centre = x.gather(1, order.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))
    likeness, group = nearest_unit(x, centre, exists)
    index = torch.arange(most, device=x.device)
    for _ in range(rounds):
        member = (group[..., None] == index) & ok[..., None]  # (B, N, K)
        with torch.autocast(x.device.type, enabled=False):
            mean = unit(member.mT.to(x) @ x)
        centre = torch.where(member.any(1)[..., None], mean, centre)
        likeness, group = nearest_unit(x, centre, exists)

    # Of the members nearest to the mean the first stands for its group, whatever rounding makes of equal ones. Where a
    # group has none, so does the token that is worst off.
    n = x.shape[1]
    here = torch.arange(n, device=x.device).expand_as(group)
    likeness = torch.where(ok, likeness, -torch.inf)
    top = torch.full_like(chance, -torch.inf).scatter_reduce(1, group, likeness, "amax")
    close = ok & (likeness >= top.gather(1, group) - SAME)
    token = torch.full_like(order, n).scatter_reduce(1, group, torch.where(close, here, n), "amin")
    stands = close & (token.gather(1, group) == here)
    lone = rank(-likeness, ok & ~stands) < (counts - stands.sum(-1))[:, None]
    home = torch.where(stands | lone, here, token.gather(1, group))
    return unrow(torch.where(ok, home, -1), features, 2)
