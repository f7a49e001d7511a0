"""Tokens spread evenly over the patch grid, whatever they show."""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocators import apportion
from ..kernels.batching import budget, mask, rows, unrow


def stride(n: int, k: int) -> list[int]:
    """``k`` of the places 0 … n-1 at equal distances, each in the middle of its share; all of them if k >= n."""
    return list(range(n)) if k >= n else [(2 * i + 1) * n // (2 * k) for i in range(k)]


def _shares(total: int, sizes: list[int]) -> list[int]:
    caps = torch.tensor(sizes)
    return apportion(caps, total, caps).tolist()


def _plane(lines: list[list[int]], k: int) -> list[int]:
    """``k`` tokens of a plane given as its rows of tokens: some rows at equal distances, and in these equal steps."""
    cells = sum(len(line) for line in lines)
    if k >= cells:
        return [token for line in lines for token in line]
    width = cells / len(lines)
    # Square spacing takes √(k·rows/columns) rows; more where so few rows do not hold k tokens.
    for count in range(min(max(1, round((k * len(lines) / width) ** 0.5)), len(lines)), len(lines) + 1):
        chosen = [lines[i] for i in stride(len(lines), count)]
        if sum(len(line) for line in chosen) >= k:
            break
    shares = _shares(k, [len(line) for line in chosen])
    return [line[i] for line, share in zip(chosen, shares, strict=True) for i in stride(len(line), share)]


def uniform(grid: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Keep exactly ``k`` tokens, spread as evenly as a row-wise pattern can over time, rows and columns.

    Args:
        grid: (N, 3) or (B, N, 3) long, (t, row, column) of each token; tokens at -1 lie on no grid and come last.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept.

    Returns:
        bool keep mask (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    cells = rows(grid, 2, "grid")
    ok = mask(valid, cells)
    counts = budget(k, ok).tolist()
    keep = torch.zeros(ok.shape, dtype=torch.bool)
    for b, (cell, usable, count) in enumerate(zip(cells.tolist(), ok.tolist(), counts, strict=True)):
        planes: dict[int, dict[int, list[int]]] = {}
        loose: list[int] = []
        for token in sorted((i for i, u in enumerate(usable) if u), key=lambda i: (cell[i], i)):
            t, row, column = cell[token]
            if min(t, row, column) < 0:
                loose.append(token)
            else:
                planes.setdefault(t, {}).setdefault(row, []).append(token)
        times = [list(lines.values()) for lines in planes.values()]
        sizes = [sum(len(line) for line in lines) for lines in times]
        placed = min(count, sum(sizes))
        shares = _shares(placed, sizes) if sizes else []
        tokens = [token for lines, share in zip(times, shares, strict=True) if share for token in _plane(lines, share)]
        keep[b, tokens + loose[: count - placed]] = True
    return unrow(keep.to(cells.device), grid, 2)
