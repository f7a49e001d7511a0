"""Units of a picture that their neighbours predict: the rule of a lossless image coder, applied to whole units."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError

_BLOCKS = 16
"""Pieces of a unit whose smallest and largest values decide most comparisons without a look at the others."""


def predictive(x: Tensor, tau: float = 0.0) -> tuple[Tensor, Tensor]:
    """Drop each unit that is within ``tau`` of what its neighbours predict.

    With the units to the left (A), above (B) and above left (C) as far as they are reconstructed, the prediction is B
    if C is similar to A and not to B, and else A; the first row has A alone, the first column B. A dropped unit is
    reconstructed as its prediction, so comparisons are anchored: every unit is within ``tau`` of the kept one that
    stands for it, however long the chain. Similar means that no value differs by more than ``tau``.

    A unit needs those left of it and above it only, so an anti-diagonal is decided at once, in rows + columns - 1
    steps. With ``tau=0`` the reconstruction is the picture itself, and all units are decided at once.

    Args:
        x: (…, rows, columns, D).
        tau: largest difference, at least 0.

    Returns:
        (…, rows, columns) bool, units that stay; and long, the kept unit of the same picture, row · columns + column,
        that each one is reconstructed from, its own of a kept one.

    Raises:
        ConfigError: if ``tau`` is negative or NaN.

    Reference:
        PixelPrune, arXiv 2604.00886, ``pred_2d``, after the predictor of JPEG-LS.
    """
    if not tau >= 0:
        raise ConfigError(f"tau={tau}: the largest difference must be at least 0")
    *batch, rows, columns, width = x.shape
    units = x.reshape(-1, rows, columns, width)
    keep, source = _exact(units) if tau == 0 else _wavefront(units, tau)
    return keep.view(*batch, rows, columns), source.view(*batch, rows, columns)


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    _, rows, columns, _ = x.shape
    keep = x.new_ones(x.shape[:-1], dtype=torch.bool)
    here = torch.arange(rows * columns, device=x.device).view(rows, columns)
    source = here.expand(keep.shape).clone()
    left = (x[:, :, 1:] == x[:, :, :-1]).all(-1)  # (B, rows, columns - 1)
    above = (x[:, 1:] == x[:, :-1]).all(-1)  # (B, rows - 1, columns)
    from_above = torch.zeros_like(keep)  # whether the prediction is the unit above
    from_above[:, 1:, 0] = True
    from_above[:, 1:, 1:] = above[:, :, :-1] & ~left[:, :-1]
    same = torch.zeros_like(keep)
    same[:, :, 1:] = left & ~from_above[:, :, 1:]
    same[:, 1:] |= above & from_above[:, 1:]
    source -= same * torch.where(from_above, columns, 1)
    source = source.flatten(1)
    while not torch.equal(further := source.gather(1, source), source):  # each step doubles the length of a chain
        source = further
    return ~same, source.view(keep.shape)


def _wavefront(x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    number, rows, columns, width = x.shape
    units, total = x.reshape(-1, width), rows * columns
    start = torch.arange(number, device=x.device)[:, None] * total  # of each picture
    source = torch.arange(number * total, device=x.device).view(number, total)

    blocks = [block.aminmax(dim=-1) for block in units.chunk(_BLOCKS, -1)]
    low, high = (torch.stack([block[i] for block in blocks], -1) for i in (0, 1))

    def similar(a: Tensor, b: Tensor) -> Tensor:
        first, second = a.flatten(), b.flatten()
        low_a, low_b, high_a, high_b = low[first], low[second], high[first], high[second]
        found = first == second
        found |= torch.maximum(high_a - low_b, high_b - low_a).amax(-1) <= tau  # even the extremes are near
        apart = torch.maximum((low_a - low_b).abs(), (high_a - high_b).abs()).amax(-1) > tau
        asked = (~found & ~apart).nonzero()[:, 0]
        differences = units[first[asked]] - units[second[asked]]
        found[asked] = torch.linalg.vector_norm(differences, torch.inf, -1) <= tau
        return found.view(a.shape)

    for step in range(1, rows + columns - 1):
        row = torch.arange(max(0, step - columns + 1), min(rows, step + 1), device=x.device)
        column, here = step - row, row * columns + step - row
        # at an edge the neighbour that exists stands for those that do not
        left = torch.where(column > 0, here - 1, here - columns)
        above = torch.where(row > 0, here - columns, here - 1)
        corner = torch.where((column > 0) & (row > 0), here - columns - 1, left)
        a, b, c = source[:, left], source[:, above], source[:, corner]
        predicted = torch.where(similar(c, a) & ~similar(c, b), b, a)
        found = similar(start + here, predicted)
        source[:, here] = torch.where(found, predicted, source[:, here])
    source = source - start
    keep = source == torch.arange(total, device=x.device)
    return keep.view(number, rows, columns), source.view(number, rows, columns)
