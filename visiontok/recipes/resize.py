"""Resize: the picture made smaller before the vision tower sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import Context


def resize(shape: tuple[int, int], k: int) -> tuple[int, int]:
    """The largest grid of at most ``k`` tokens in nearly the proportions of ``shape``.

    In exact proportion, ``k`` tokens are √(k · rows / columns) rows of √(k · columns / rows). Both are rounded down, or
    one of them up where that fits; of two such grids the less distorted one is taken, then the wider one. A picture too
    narrow for that keeps one row (or column) of ``k``.

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
    h, w = math.isqrt(k * rows // columns), math.isqrt(k * columns // rows)
    if not h or not w:
        return (min(k, rows), 1) if h else (1, min(k, columns))

    def rank(size: tuple[int, int]) -> tuple[int, Fraction, int]:
        across, down = size[1] * rows, size[0] * columns
        return size[0] * size[1], Fraction(min(across, down), max(across, down)), size[1]

    return max((size for size in ((h, w), (h + 1, w), (h, w + 1)) if size[0] * size[1] <= k), key=rank)


@dataclass(frozen=True)
class Resize(Method):
    """The picture, downsampled."""

    card: ClassVar[Card] = Card(
        name="resize",
        title="the picture downsampled until the tower makes no more tokens of it than the budget",
        paper="-",
        venue="baseline",
        stage="pixel",
        needs="pixels; a vision tower that takes smaller pictures",
        official="Papers resize the picture in front of the processor.",
        departures="The processor's pixels are resized by antialiased bicubic interpolation, which commutes with their "
        "normalisation and neither rounds nor clips. At most K tokens: the largest grid in nearly the proportions of "
        "the picture; one that has no more than K is left alone. Each token stands at the original token nearest the "
        "middle of the cell that it covers, and positions are those of the whole picture. Frames of a video stay as "
        "many as they are. Refused where the processor cuts tiles or the model pools to a fixed number of tokens.",
        cost="saves work: only the smaller picture goes through the vision tower",
        contract=Contract(),
    )

    def picture(self, shape: tuple[int, int], count: int) -> tuple[int, int]:
        return resize(shape, count)

    def select(self, ctx: Context) -> Tensor:
        return ctx.valid
