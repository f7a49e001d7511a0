"""PixelPrune: what a lossless image coder would predict never enters the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..functional import predictive
from ..method import Card, Contract, Kept, Picture, UnitMethod
from ._tau import check_tau


@dataclass(frozen=True)
class PixelPrune(UnitMethod):
    """Units that their neighbours predict are dropped before the tower.

    Attributes:
        tau: largest difference of a pixel value, in 0 … 1, between a unit and the one that stands for it; 0 drops
            exact repetitions alone.
    """

    tau: float = 0.0

    card: ClassVar[Card] = Card(
        name="pixelprune",
        title="units whose pixels their neighbours predict are dropped before the tower",
        paper="arXiv 2604.00886",
        venue="preprint",
        formula="drop i if max|P_i - p_i| ≤ τ; p_i = up if corner ~ left and corner ≁ up, else left, all as "
        "reconstructed",
        stage="pixel",
        needs="a vision tower that takes some units of a picture",
        official="Qwen3-VL and Qwen3.5 alone: patches of 16 pixels, statistics of 1/2, images of one frame. A Python "
        "loop over units where τ > 0. Run-length, connected-component and random selectors, and cuts inside and "
        "behind the tower, beside it.",
        departures="Patch size, statistics and units are the model's. Anti-diagonals are decided at once; the units "
        "kept are the same. Every frame of a video by itself. A dropped token's copy, which mass attention counts, "
        "is that of the unit it is reconstructed from.",
        defaults="tau=0, which loses no pixel: the picture can be made again from what is kept.",
        cost="saves work: O(HW) to compare, and only kept units go through the vision tower",
        gives="units",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def units(self, picture: Picture) -> Kept:
        keep, source = predictive(picture.pixels.flatten(3), self.tau)
        frames, rows, columns = picture.shape
        return Kept(keep=keep, source=source + source.new_tensor(range(frames))[:, None, None] * rows * columns)
