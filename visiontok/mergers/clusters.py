"""Spherical k-means: groups of tokens that point the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Seeding, greedy, nearest, segment_mean, unit
from ..kernels.batching import budget, largest, mask, rows, unrow
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
    order = greedy(Seeding(x, ok, chance), counts, most, ok).order
    exists = (order >= 0)[:, None]  # (B, 1, K)
    centre = x.gather(1, order.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))
    likeness, group = nearest(x, centre, exists)
    for _ in range(rounds):
        mean, size = segment_mean(x, torch.where(ok, group, -1), most, ok)
        centre = torch.where((size > 0)[..., None], unit(mean), centre)
        likeness, group = nearest(x, centre, exists)

    # The best member stands for its group; where a group has none, so does the token that is worst off.
    here = torch.arange(x.shape[1], device=x.device).expand_as(group)
    place = rank(likeness, ok)
    best = torch.full((len(x), most + 1), x.shape[1], device=x.device)
    best.scatter_reduce_(1, torch.where(ok, group, most), place, "amin")
    stands = (best.gather(1, group) == place) & ok
    lone = rank(-likeness, ok & ~stands) < (counts - stands.sum(-1))[:, None]
    member = torch.where(stands, group, 0), torch.where(stands, here, 0)
    token = torch.zeros_like(order).scatter_reduce(1, *member, "amax")
    home = torch.where(stands | lone, here, token.gather(1, group))
    return unrow(torch.where(ok, home, -1), features, 2)
