"""In which layers visual tokens need not be computed: ShortV's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..api import compress
from ..errors import ConfigError
from ..method import Stage
from ..recipe import Recipe
from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe, divergence


@dataclass(frozen=True)
class LayerKL(Calibrator):
    """The layers that change the next token least when the visual tokens pass them unchanged.

    Text goes on attending to the visual tokens, with the keys and values that the layer makes of them.

    Attributes:
        share: of the layers to freeze.

    Reference:
        ShortV (ICCV 2025); 19 of 32 layers of LLaVA-1.5-7B.
    """

    share: float = 19 / 32

    method: ClassVar[str] = "shortv"
    title: ClassVar[str] = "divergence of the next token when one layer leaves visual tokens as they are"
    source: ClassVar[str] = (
        "as published: layers in ascending order of KL(frozen, stock) in nats, each frozen alone; how many to freeze "
        "is chosen by hand"
    )

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share!r}: a share of the layers lies between 0 and 1, such as 0.6")

    def find(self, measure: Measure, config: Any) -> Outcome:
        curve = dict(enumerate(mean(measure("kl", self._kl), "kl")))
        order = sorted(curve, key=lambda layer: (curve[layer], -layer))  # between equals the deeper
        return Outcome({"kl": curve}, {"layers": sorted(order[: max(round(self.share * len(curve)), 1)])})

    @staticmethod
    def _kl(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
        stock, found = probe.log_probabilities(inputs), []
        for layer in range(len(probe.layers)):
            with compress(probe.model, Recipe(stages=(Stage(kind="freeze", layer=layer),), name="calibration")):
                found.append(divergence(probe.log_probabilities(inputs), stock))
        return {"kl": found}
