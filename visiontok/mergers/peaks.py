"""Density peaks: tokens in the middle of a crowd, far from any denser one, and the others around them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import budget, largest, mask, rows, unrow
from ..selectors.topk import rank


@torch.no_grad()
def density_peaks(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Exactly ``k`` groups around the tokens of largest density x distance to the nearest denser token.

    Density is exp(-mean of the squared distances to the ``k`` nearest tokens, itself among them, but at least 3, lest
    all are equal; the densest token is as far from a denser one as any two tokens are. Distances are Euclidean, divided
    by sqrt(D).

    Args:
        features: (N, D) or (B, N, D).
        k: number of groups, int or (B,) long; a row with no more valid tokens has one group for each.
        valid: (N,) or (B, N) bool; other tokens are in no group.

    Returns:
        long (N,) or (B, N): the place of the centre of each token's group, -1 for none. Equal distances go to the
        better centre, equal centres to the lowest index.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        Rodriguez and Laio, Science 2014; with k nearest neighbours Du et al., Knowledge-Based Systems 2016.
    """
    x = rows(features, 2, "features")
    ok = mask(valid, x)
    x = torch.where(ok[..., None], x, 0.0).float()
    counts = budget(k, ok)
    pair = ok[:, :, None] & ok[:, None]
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    most = max(3, largest(k, ok.shape[1]))
    nearest = torch.where(pair, distance, torch.inf).sort(-1).values[..., :most]
    neighbours = counts.clamp_min(3)[:, None]
    counted = torch.arange(nearest.shape[-1], device=x.device) < neighbours[..., None]
    squares = torch.where(counted & nearest.isfinite(), nearest.square(), 0.0).sum(-1)
    density = (-squares / neighbours).exp()
    denser = pair & (density[:, None] > density[:, :, None])
    widest = torch.where(pair, distance, 0.0).amax((1, 2))
    lead = torch.where(denser, distance, torch.inf).amin(-1)
    lead = torch.where(lead.isinf(), widest[:, None], lead)

    place = rank(density * lead, ok)
    centre = ok & (place < counts[:, None])
    # nearest centre, the better of equals: compare in the order of the centres
    order = place.argsort(-1)[:, :most]
    reach = torch.where(
        centre.gather(1, order)[:, None], distance.gather(2, order[:, None].expand(-1, x.shape[1], -1)), torch.inf
    )
    group = order.gather(1, reach.argmin(-1))
    here = torch.arange(x.shape[1], device=x.device)
    return unrow(torch.where(ok, torch.where(centre, here, group), -1), features, 2)
