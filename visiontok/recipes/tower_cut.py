"""Tower cut: units leave the vision tower on the way, by what its layers say so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Encoding, Layer, Needs, Stage, Tower, UnitMethod, labelled, resolve_layer


@dataclass(frozen=True)
class TowerCut(UnitMethod):
    """Top-k of whole units on the input of a tower layer.

    Attributes:
        scorer: ``norm``, the length of a patch; ``transition``, how far the layer before has moved it; or
            ``received``, the attention that it receives there. Of a unit, the mean of its patches.
        layer: tower layer, an index or a fraction of the depth; at least the second.
    """

    scorer: Literal["norm", "transition", "received"] = "transition"
    layer: Layer = 0.25

    card: ClassVar[Card] = Card(
        name="tower_cut",
        title="top-k of units inside the vision tower",
        paper="-",
        venue="baseline",
        formula="on the input x of tower layer l: top-K of the mean over a unit's patches of ‖x_i‖, ‖x_i - x'_i‖ with "
        "x' the input of the layer before, or mean_{head, j} a_ji of that layer",
        stage="encoder",
        needs="states of a layer of the vision tower; with scorer='received', attention in it",
        official="QuietPrune (CVPR 2026) and CIVIC (arXiv 2605.28115) drop units in the tower by trained parts.",
        departures="Training-free. Attention is that of the layer before the cut, of patches of the same picture or "
        "window.",
        defaults="scorer='transition', layer=0.25",
        cost="saves work: layers from the cut on compute kept units; mergers and projector all",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.scorer not in ("norm", "transition", "received"):
            raise ConfigError(f"scorer={self.scorer!r}: use 'norm', 'transition' or 'received'")

    @property
    def label(self) -> str:
        return labelled("tower_cut", "" if self.scorer == "transition" else self.scorer)

    def adapt(self, tower: Tower) -> TowerCut:
        return replace(self, layer=resolve_layer(self.layer, tower.depth, name="layer", lowest=1))

    def needs(self) -> Needs:
        if self.scorer != "received" or isinstance(self.layer, float):
            return Needs()
        return Needs(vision_received=(self.layer - 1,))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="encoder", method=self, layer=self.layer),)

    def stay(self, encoding: Encoding) -> Tensor:
        if self.scorer == "norm":
            scores = encoding.states.float().norm(dim=-1)
        elif self.scorer == "transition":
            scores = update(encoding)
        elif encoding.received is None:
            raise ConfigError("tower_cut: the attention of the layer before is not there; adapt the method to a model")
        else:
            scores = encoding.received
        return topk(scores.mean(1), encoding.count)


def update(encoding: Encoding) -> Tensor:
    """(n, m): how far the layer before has moved each patch.

    Raises:
        ConfigError: on the input of the first layer.
    """
    if encoding.before is None:
        raise ConfigError("layer=0: nothing has moved yet; use the second layer at least")
    return (encoding.states - encoding.before).float().norm(dim=-1)
