"""The patch grid cut into cells of equal mass, to be pooled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocators import apportion
from ..kernels.batching import budget, mask, rows, unrow

Cell = tuple[int, int, int]  # (row, column, token)


def _parts(total: int, count: int) -> list[slice]:
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]


def _shares(total: int, sizes: list[int]) -> list[int]:
    caps = torch.tensor(sizes)
    return apportion(caps, total, caps).tolist()


def _bands(plane: list[Cell], k: int) -> list[list[Cell]]:
    """``k`` cells of a plane: bands of whole rows, each cut into parts of equally many tokens, column by column."""
    lines: dict[int, list[Cell]] = {}
    for cell in sorted(plane):
        lines.setdefault(cell[0], []).append(cell)
    height = len(lines)
    # Square cells take √(k·rows/columns) bands.
    count = min(max(1, round(height * (k / len(plane)) ** 0.5)), height, k)
    parts = [[cell for line in list(lines.values())[part] for cell in line] for part in _parts(height, count)]
    cells = []
    for band, share in zip(parts, _shares(k, [len(band) for band in parts]), strict=True):
        across = sorted(band, key=lambda cell: (cell[1], cell[0], cell[2]))
        cells += [across[part] for part in _parts(len(band), share)] if share else []
    return cells


def _squares(plane: list[Cell], side: int) -> list[list[Cell]]:
    """Whole squares of ``side`` rows and columns; what is left over at the lower and right edge belongs to none."""
    size = [max(cell[axis] for cell in plane) + 1 for axis in (0, 1)]
    side = min(side, *size)
    squares: dict[tuple[int, int], list[Cell]] = {}
    for cell in sorted(plane):
        row, column = cell[0] // side, cell[1] // side
        if row < size[0] // side and column < size[1] // side:
            squares.setdefault((row, column), []).append(cell)
    return list(squares.values())


def _centre(cell: list[Cell]) -> int:
    """The token nearest the mean place of a cell."""
    mean = [sum(c[axis] for c in cell) / len(cell) for axis in (0, 1)]
    return min(cell, key=lambda c: (abs(c[0] - mean[0]) + abs(c[1] - mean[1]), c))[2]


def cells(grid: Tensor, k: int | Tensor, valid: Tensor | None = None, *, whole: bool = False) -> Tensor:
    """Cut every plane of the grid into cells, as square and as equal in number of tokens as can be.

    Where k is a square that divides a square grid, these are the cells of average pooling.

    Args:
        grid: (N, 3) or (B, N, 3) long, (t, row, column) of each token; tokens at -1 lie in no cell, unless ``k``
            exceeds the number of tokens on the grid: then some stand for themselves.
        k: how many cells, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens lie in no cell.
        whole: squares of ⌊√(n/k)⌋ tokens a side on every plane, whose number is only about ``k``, and nothing for the
            tokens at the edges that fill none.

    Returns:
        long (N,) or (B, N): the place of the token in the middle of each token's cell, -1 for no cell.

    Raises:
        ConfigError: if ``k`` < 1.

    Reference:
        Matryoshka Multimodal Models, arXiv 2405.17430, for dividing k.
    """
    places = rows(grid, 2, "grid")
    ok = mask(valid, places)
    centre = torch.full(ok.shape, -1)
    for b, (cell, usable, count) in enumerate(zip(places.tolist(), ok.tolist(), budget(k, ok).tolist(), strict=True)):
        planes: dict[int, list[Cell]] = {}
        loose = []
        for token in (i for i, u in enumerate(usable) if u):
            t, row, column = cell[token]
            if min(t, row, column) < 0:
                loose.append(token)
            else:
                planes.setdefault(t, []).append((row, column, token))
        ordered = [planes[t] for t in sorted(planes)]
        sizes = [len(plane) for plane in ordered]
        placed = min(count, sum(sizes))
        if whole:
            side = max(1, int((sum(sizes) / count) ** 0.5))
            found = [square for plane in ordered for square in _squares(plane, side)]
        else:
            shares = _shares(placed, sizes) if sizes else []
            found = [c for plane, share in zip(ordered, shares, strict=True) if share for c in _bands(plane, share)]
        for group in found:
            centre[b, [token for *_, token in group]] = _centre(group)
        for token in loose[: count - placed]:
            centre[b, token] = token
    return unrow(centre.to(places.device), grid, 2)
