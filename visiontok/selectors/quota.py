"""The best tokens of each group, as many as the group may keep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def quota(scores: Tensor, group: Tensor, counts: Tensor, valid: Tensor | None = None) -> Tensor:
    """Keep of each group the tokens with the highest scores; ties go to the lowest index.

    Args:
        scores: (N,) or (B, N).
        group: (N,) or (B, N) long in 0 … G-1.
        counts: (G,) or (B, G) long, tokens to keep of each group.
        valid: (N,) or (B, N) bool; other tokens are not kept, and their group is not read.

    Returns:
        bool keep mask, shape of ``scores``.
    """
    s, g, most = rows(scores, 1, "scores"), rows(group, 1, "group"), rows(counts, 1, "counts")
    ok, n = mask(valid, s), s.shape[1]
    g = torch.where(ok, g, most.shape[1])  # one more group takes what does not count
    place = rank(-(g * n + rank(s, ok)))  # in the order of group, then score
    size = torch.zeros(len(g), most.shape[1] + 1, dtype=torch.long, device=g.device)
    size = size.scatter_add(1, g, torch.ones_like(g))
    start = size.cumsum(1) - size
    allowed = torch.cat([most, most.new_zeros(len(most), 1)], 1)
    return unrow(place - start.gather(1, g) < allowed.gather(1, g), scores, 1)
