"""IPCV: units leave the vision tower early and are reconstructed behind it from their neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Encoding, Layer, Rebuild, Stage, Tower, UnitMethod, resolve_layer
from .tower_cut import update


@dataclass(frozen=True)
class Ipcv(UnitMethod):
    """The units that a layer moves least leave the tower; behind it they are back.

    Attributes:
        drop: share of the units that leave.
        layer: tower layer, an index or a fraction of the depth; at least the second.
        stabilised: tower layers from there on whose attention sees what left as its neighbours have moved it.
        neighbours: how many.
    """

    drop: float = 0.65
    layer: Layer = 3 / 32
    stabilised: int = 7
    neighbours: int = 10

    card: ClassVar[Card] = Card(
        name="ipcv",
        title="units leave the tower early, their neighbours tell what they would have become",
        paper="arXiv 2512.18747",
        venue="preprint",
        formula="stay: top of ‖x_i^l - x_i^{l-1}‖; x̂_r = x_r^l + mean_{j in kNN(r)}(x_j - x_j^l) for attention in the "
        "next layers, and behind the last",
        stage="encoder",
        needs="states of two layers of the vision tower",
        official="Patches are dropped one by one, over all images and frames together. DART or FastV then drop tokens "
        "in the language model.",
        bugs="The first patch of a frame counts to the frame before.",
        departures="Whole units, by the mean of their patches, of each image or video by itself; neighbours are of the "
        "same image or video. All tokens reach the language model; add a recipe that drops some.",
        defaults="The published setting: drop=0.65, layer 3 of 32, stabilised=7, neighbours=10.",
        cost="O(R·K·D) distances between R patches that leave and K that stay; saves the MLP of the stabilised layers "
        "and everything behind them",
        budget=False,
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop={self.drop!r}: a share lies in [0, 1)")
        for name, least in (("stabilised", 0), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}: at least {least}")

    @property
    def rebuild(self) -> Rebuild:
        return Rebuild(neighbours=self.neighbours, layers=self.stabilised)

    def adapt(self, tower: Tower) -> Ipcv:
        return replace(self, layer=resolve_layer(self.layer, tower.depth, name="layer", lowest=1))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="encoder", method=self, layer=self.layer),)

    def stay(self, encoding: Encoding) -> Tensor:
        count = max(math.floor(len(encoding.states) * (1 - self.drop) + 1e-9), 1)
        return topk(update(encoding).mean(1), count)
