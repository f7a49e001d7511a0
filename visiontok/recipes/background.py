"""Background: the empty parts of a page never enter the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..functional import background
from ..method import Card, Contract, Kept, Picture, UnitMethod, labelled


@dataclass(frozen=True)
class Background(UnitMethod):
    """Units all of whose patches are background are dropped before the tower.

    Attributes:
        near: how far a grey level, in 0 … 1, may be from the picture's commonest one to be background.
        share: share of background above which a patch is dropped.
    """

    near: float = 0.05
    share: float = 0.98

    card: ClassVar[Card] = Card(
        name="background",
        title="units of the page's commonest grey are dropped before the tower",
        paper="arXiv 2604.22281 (stage 1)",
        venue="CVPR 2026",
        formula="keep a unit if R_i ≤ share for one of its patches, R_i = share of pixels with |g - m| < near, m the "
        "commonest grey",
        stage="pixel",
        needs="a vision tower that takes some units of a picture",
        official="The first of DocPrune's three stages; no public code. Thresholds per number of pages are not "
        "published; that any patch keeps its unit is the choice of an independent reconstruction.",
        departures="Thresholds are ours. The commonest grey is that of the picture as the processor made it, of all "
        "frames of a video. A picture that is all background keeps the unit that is the least.",
        defaults="near=0.05, share=0.98",
        cost="saves work: O(HW) for one histogram, and only kept units go through the vision tower",
        gives="units",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    @property
    def label(self) -> str:
        return labelled("background", "own thresholds")

    def __post_init__(self) -> None:
        for name, value in (("near", self.near), ("share", self.share)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value!r}: must lie in [0, 1]")

    def units(self, picture: Picture) -> Kept:
        patches = picture.pixels.movedim(3, 4)  # (t, rows, columns, m, 3, P)
        ratio = background(patches.flatten(0, 3), self.near).view(patches.shape[:4]).amin(-1)
        first = torch.zeros_like(ratio, dtype=torch.bool).flatten()
        first[ratio.argmin()] = True
        return Kept(keep=(ratio <= self.share) | first.view(ratio.shape))
