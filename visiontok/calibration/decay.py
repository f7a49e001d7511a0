"""When the text has taken from the image what it needs: a calibration for ToDRE's second stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe


@dataclass(frozen=True)
class MassDecay(Calibrator):
    """The first layer of the deeper half in which, as in the next, little attention goes to the image.

    The method looks at the layer before its exit, so it is to act behind the one that is found.

    Attributes:
        share: of the largest mass of any layer that counts as little.

    Reference:
        ToDRE, arXiv 2505.18757, whose code was not available.
    """

    share: float = 0.2

    method: ClassVar[str] = "todre_exit"
    title: ClassVar[str] = "share of the last token's attention that goes to the image"
    source: ClassVar[str] = (
        "a reconstruction, the code was not available: attention mass from the last prompt token to the visual tokens, "
        "of all tokens, mean over heads"
    )

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share!r}: a share of the largest mass lies between 0 and 1, such as 0.2")

    def find(self, measure: Measure, config: Any) -> Outcome:
        mass = mean(measure("mass", self._mass), "mass")
        threshold = self.share * max(mass)
        curves = {"mass": dict(enumerate(mass))}
        deep = range((len(mass) + 1) // 2, len(mass) - 1)
        layer = next((layer for layer in deep if max(mass[layer], mass[layer + 1]) < threshold), None)
        if layer is None:
            return Outcome(curves, None, (f"no two layers of the deeper half have a mass below {threshold:.3g}",))
        return Outcome(curves, {"layer": layer + 1, "threshold": threshold})

    @staticmethod
    def _mass(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
        return {"mass": [float(row.sum()) for row in probe.last_rows(inputs)]}
