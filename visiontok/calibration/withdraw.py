"""From which layer on the image is no longer needed: VTW's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..api import compress
from ..errors import ConfigError
from ..method import Layer, resolve_layer
from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe, divergence


@dataclass(frozen=True)
class ExitKL(Calibrator):
    """The first layer from which on all visual tokens can go and the next token stays nearly as likely.

    Attributes:
        eta: largest divergence, in nats.
        first: first layer that is tried; an index or a fraction of the depth.

    Reference:
        VTW, arXiv 2405.05803; eta 0.003 for LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-NeXT-7B.
    """

    eta: float = 0.003
    first: Layer = 5 / 32

    method: ClassVar[str] = "vtw"
    title: ClassVar[str] = "divergence of the next token when the image leaves at a layer"
    source: ClassVar[str] = (
        "as published: the first layer whose mean divergence from the stock model, KL(withdrawn, stock) in nats, is at "
        "most eta"
    )

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ConfigError(f"eta={self.eta!r}: a divergence above 0, such as 0.003")

    def find(self, measure: Measure, config: Any) -> Outcome:
        curve = dict(enumerate(mean(measure("kl", self._kl), "kl"), 1))
        start = resolve_layer(self.first, len(curve) + 1, name="first", lowest=1)
        layer = next((layer for layer, kl in curve.items() if layer >= start and kl <= self.eta), None)
        if layer is None:
            least = min(kl for layer, kl in curve.items() if layer >= start)
            note = f"in no layer from {start} on is the divergence at most eta={self.eta:g}; the least is {least:.3g}"
            return Outcome({"kl": curve}, None, (note,))
        return Outcome({"kl": curve}, {"layer": layer})

    @staticmethod
    def _kl(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
        stock = probe.log_probabilities(inputs)
        found = []
        for layer in range(1, len(probe.layers)):
            with compress(probe.model, "vtw", layer=layer):
                found.append(divergence(probe.log_probabilities(inputs), stock))
        return {"kl": found}
