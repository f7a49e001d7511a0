"""Trim: padding and empty margins never enter the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Card, Contract, Kept, Picture, UnitMethod
from ._tau import check_tau


@dataclass(frozen=True)
class Trim(UnitMethod):
    """Rows and columns of units at the edges of a picture that show one colour are dropped before the tower.

    Attributes:
        tau: largest difference of pixel values, in 0 … 1, from the colour of a margin.
    """

    tau: float = 0.0

    card: ClassVar[Card] = Card(
        name="trim",
        title="margins of one colour, such as padding, are dropped before the tower",
        paper="-",
        venue="baseline",
        formula="from each edge inwards, drop rows and columns while max|P_i - c| ≤ τ for all their units, c the "
        "colour of the first pixel (top, left) or of the last (bottom, right)",
        stage="pixel",
        needs="a vision tower that takes some units of a picture",
        official="-",
        defaults="tau=0",
        departures="A picture of one colour keeps its first unit. Margins of a video are those of all its frames.",
        cost="saves work: O(HW) to compare, and only kept units go through the vision tower",
        gives="units",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def units(self, picture: Picture) -> Kept:
        pixels = picture.pixels.flatten(4)  # (t, rows, columns, 3, pixels)
        begins, ends = (
            ((pixels - corner[:, None, None, :, None]).abs() > self.tau).flatten(3).any(-1).any(0)
            for corner in (pixels[:, 0, 0, :, 0], pixels[:, -1, -1, :, -1])
        )
        rows, columns = (_between(begins.any(axis), ends.any(axis)) for axis in (1, 0))
        keep = (rows[:, None] & columns).expand(picture.shape).clone()
        if not keep.any():
            keep[0, 0, 0] = True
        return Kept(keep=keep)


def _between(begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(n,) bool: from the first place that ``begins`` to the last that ``ends``."""
    return (begins.cumsum(0) > 0) & (ends.flip(0).cumsum(0) > 0).flip(0)
