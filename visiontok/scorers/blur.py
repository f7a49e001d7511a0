"""Scores smoothed over neighbours on the patch grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow


def blur(scores: Tensor, grid: Tensor, sigma: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """3 × 3 Gaussian mean; where the neighbour on one side is missing, the one opposite counts twice (reflection).

    Args:
        scores: (N,) or (B, N).
        grid: (N, 3) or (B, N, 3) long, (t, row, column) of each token; tokens at -1 keep their score.
        sigma: of the Gaussian, in tokens.
        valid: (N,) or (B, N) bool; other tokens are nobody's neighbours.

    Returns:
        float32, shape of ``scores``.

    Reference:
        EADP, arXiv 2607.02484, spatial smoothing.
    """
    s, cells = rows(scores, 1, "scores").float(), rows(grid, 2, "grid")
    ok = mask(valid, s) & (cells >= 0).all(-1)
    size = (torch.cat([cells.flatten(0, 1), cells.new_zeros(1, 3)]).amax(0) + 1).tolist()
    place = ((cells[..., 0] * size[1]) + cells[..., 1]) * size[2] + cells[..., 2]
    place = torch.where(ok, place, math.prod(size))  # one more cell takes what lies nowhere
    canvas = s.new_zeros(len(s), math.prod(size) + 1).scatter(1, place, torch.where(ok, s, 0.0))
    filled = torch.zeros_like(canvas, dtype=torch.bool).scatter(1, place, ok)
    picture, there = canvas[:, :-1].unflatten(1, size), filled[:, :-1].unflatten(1, size)
    weight = math.exp(-0.5 / sigma**2)
    for dim in (2, 3):  # rows, then columns
        picture = _smooth(picture, there, dim, weight)
    smoothed = torch.cat([picture.flatten(1), s.new_zeros(len(s), 1)], 1).gather(1, place)
    return unrow(torch.where(ok, smoothed, s), scores, 1)


def _smooth(x: Tensor, there: Tensor, dim: int, weight: float) -> Tensor:
    """One pass of three taps along ``dim``, over cells that are ``there``."""
    before, after = _beside(x, dim, 1), _beside(x, dim, -1)
    is_before, is_after = _beside(there, dim, 1), _beside(there, dim, -1)
    around = torch.where(is_before, before, after) + torch.where(is_after, after, before)  # 0 where there is neither
    taps = 1 + 2 * weight * (is_before | is_after)
    return torch.where(there, (x + weight * around) / taps, x)


def _beside(x: Tensor, dim: int, step: int) -> Tensor:
    """``x`` moved by one along ``dim``; 0 or False moves in."""
    moved = x.roll(step, dim)
    moved.select(dim, 0 if step > 0 else -1).zero_()
    return moved
