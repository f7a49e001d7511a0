"""Pixel entropy: the busiest parts of a picture enter the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..functional import pixel_entropy, topk
from ..method import Card, Contract, Kept, Picture, UnitMethod


@dataclass(frozen=True)
class PixelEntropy(UnitMethod):
    """Top-k by the entropy of the grey levels, before the tower."""

    card: ClassVar[Card] = Card(
        name="pixel_entropy",
        title="top-k by the entropy of a unit's grey levels, before the tower",
        paper="arXiv 2605.09982 (its scorer)",
        venue="baseline",
        formula="top-K of h_i = -Σ_g p_ig·ln p_ig over grey levels g",
        stage="pixel",
        needs="a vision tower that takes some units of a picture",
        official="The scorer of ERASE's first stage, which runs behind the tower.",
        departures="Before the tower, and with a budget in the place of ERASE's levels of complexity.",
        defaults="no option",
        cost="saves work: O(HW) for the histograms, and only kept units go through the vision tower",
        gives="units",
        contract=Contract(sync_free=False),
    )

    def units(self, picture: Picture) -> Kept:
        entropy = pixel_entropy(picture.pixels.flatten(4)).flatten()
        return Kept(keep=topk(entropy, picture.count).view(picture.shape))
