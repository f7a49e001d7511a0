"""Places among the tokens of one group: a window, a crop, a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def rank_within(scores: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Place of every token among those of its group, as :func:`~visiontok.functional.rank` among all.

    Args:
        scores: (N,) or (B, N).
        group: (N,) or (B, N) long, any numbers.
        valid: bool, shape of ``scores``; other tokens come behind the valid ones of their group.

    Returns:
        long, shape of ``scores``; 0 is the best of a group.
    """
    s, g = rows(scores, 1, "scores"), rows(group, 1, "group")
    by_score = rank(s, mask(valid, s)).argsort(-1)
    sorted_group, by_group = g.gather(-1, by_score).sort(dim=-1, stable=True)
    here = torch.arange(s.shape[-1], device=s.device).expand_as(g)
    first = torch.ones_like(g, dtype=torch.bool)
    first[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    place = here - torch.where(first, here, 0).cummax(-1).values
    return unrow(torch.empty_like(g).scatter_(-1, by_score.gather(-1, by_group), place), scores, 1)
