"""Resize: the picture made smaller before the vision tower sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import Context


def resize(shape: tuple[int, int], k: int) -> tuple[int, int]:
    """The grid of at most ``k`` tokens that loses the least of a picture, in nearly its proportions.

    In exact proportion, ``k`` tokens would be √(k · rows / columns) rows of √(k · columns / rows). No side gets more
    than that, rounded up; among such grids, that whose coarser side is the finest, then that of most tokens, then the
    wider one.

    Args:
        shape: rows and columns of tokens.
        k: tokens at most; a picture that has no more stays as it is.

    Returns:
        rows and columns.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    if k < 1:
        raise ConfigError(f"k={k}: keep at least one token")
    rows, columns = shape
    if k >= rows * columns:
        return shape
    tallest, widest = _root(k * rows, columns), _root(k * columns, rows)
    sizes = [(h, min(k // h, widest)) for h in range(1, min(tallest, k) + 1)]
    return max(sizes, key=lambda size: (min(size[0] * columns, size[1] * rows), size[0] * size[1], size[1]))


def _root(a: int, b: int) -> int:
    """√(a / b), rounded up."""
    return math.isqrt(-(-a // b) - 1) + 1


@dataclass(frozen=True)
class Resize(Method):
    """The picture, downsampled."""

    card: ClassVar[Card] = Card(
        name="resize",
        title="the picture downsampled until the tower makes no more tokens of it than the budget",
        paper="-",
        venue="baseline",
        formula="h·w ≤ K, h ≤ ⌈√(K·H/W)⌉, w ≤ ⌈√(K·W/H)⌉: the largest min(h/H, w/W), then the largest h·w",
        stage="pixel",
        needs="a vision tower that takes smaller pictures",
        official="Papers resize the picture in front of the processor, to a size of their own choice; positions are "
        "then those of a small picture. Where no grid of K tokens fits, fewer than K remain.",
        departures="The processor's pixels are resized by antialiased bicubic interpolation, which commutes with their "
        "normalisation and neither rounds nor clips. At most K tokens: the finest grid in nearly the proportions of "
        "the picture; one that has no more than K is left alone. Each token stands at the original token nearest the "
        "middle of the cell that it covers, and positions are those of the whole picture. Frames of a video stay as "
        "many as they are. Refused where the processor cuts tiles or the model pools to a fixed number of tokens.",
        defaults="no option",
        cost="saves work: only the smaller picture goes through the vision tower",
        contract=Contract(),
    )

    def picture(self, shape: tuple[int, int], count: int) -> tuple[int, int]:
        return resize(shape, count)

    def select(self, ctx: Context) -> Tensor:
        return ctx.valid
