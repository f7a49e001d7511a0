"""How attention to the image changes from layer to layer: a calibration for HiDrop's schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch.nn.functional import cosine_similarity

from ..errors import ConfigError
from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe


@dataclass(frozen=True)
class InterLayerSimilarity(Calibrator):
    """Late injection, cuts and exit from what the last token looks at in the image, layer by layer.

    Injection is where the share of attention that goes to the image first reaches ``rise`` of its largest; exit where
    it stays below ``fall`` of it; cuts lie between, on the input of the layers that look at other tokens than the layer
    before them.

    Attributes:
        cuts: how many.
        rise: share of the largest mass.
        fall: share of the largest mass.

    Reference:
        HiDrop (ICLR 2026) derives its schedule from a similarity of layers, which its code does not contain.
    """

    cuts: int = 4
    rise: float = 0.5
    fall: float = 0.1

    method: ClassVar[str] = "hidrop"
    title: ClassVar[str] = "likeness of the last token's attention to the image from layer to layer"
    source: ClassVar[str] = (
        "a reconstruction, inter-layer visual attention similarity, not the paper's measure, which is not published: "
        "cosine of the last token's attention over visual tokens in one layer and the next"
    )

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise ConfigError(f"cuts={self.cuts!r}: ask for at least one")
        for name, value in (("rise", self.rise), ("fall", self.fall)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r}: a share of the largest mass lies in (0, 1]")

    def find(self, measure: Measure, config: Any) -> Outcome:
        rows = measure("rows", self._rows)
        mass, alike = mean(rows, "mass"), mean(rows, "similarity")
        curves = {"similarity": dict(enumerate(alike, 1)), "mass": dict(enumerate(mass))}
        most = max(mass)
        inject = next(layer for layer, x in enumerate(mass) if x >= self.rise * most)
        last = max(layer for layer, x in enumerate(mass) if x >= self.fall * most)
        leaves = last + 1
        notes = () if leaves < len(mass) else ("attention to the image never fades: the exit is the last layer",)
        inside = range(inject + 1, leaves)
        if len(inside) < self.cuts:
            said = f"{len(inside)} layers lie between injection at {inject} and exit at {leaves}; ask for fewer cuts"
            return Outcome(curves, None, (said, *notes))
        layers = sorted(sorted(inside, key=lambda layer: curves["similarity"][layer])[: self.cuts])
        if self.cuts != 4:
            notes = (*notes, f"hidrop knows shares for 4 cuts; recommended.shares has to name {self.cuts}")
        return Outcome(curves, {"inject": inject, "layers": layers, "exit": leaves}, notes)

    @staticmethod
    def _rows(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
        rows = probe.last_rows(inputs)
        return {
            "mass": [float(row.sum()) for row in rows],
            "similarity": [float(cosine_similarity(a, b, dim=0)) for a, b in pairwise(rows)],
        }
