"""Where visual tokens become alike: a calibration for EntropyPrune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe


@dataclass(frozen=True)
class EntropyCollapse(Calibrator):
    """The first layer behind the largest drop of the matrix entropy of the visual hidden states.

    Reference:
        EntropyPrune (EMNLP 2026 Findings), which names the layer but has no code for it.
    """

    method: ClassVar[str] = "entropyprune"
    title: ClassVar[str] = "matrix entropy of the visual tokens on the input of each layer"
    source: ClassVar[str] = (
        "a reconstruction, the published code does not contain it: entropy in nats of the normalised spectrum of the "
        "covariance of visual hidden states on the input of each layer; the cut is the input behind the largest drop"
    )

    def find(self, measure: Measure, config: Any) -> Outcome:
        curve = dict(enumerate(mean(measure("entropy", self._entropy), "entropy")))
        layer = max(range(1, len(curve)), key=lambda layer: curve[layer - 1] - curve[layer])
        if curve[layer] >= curve[layer - 1]:
            return Outcome({"entropy": curve}, None, ("the entropy never drops",))
        return Outcome({"entropy": curve}, {"layer": layer})

    @staticmethod
    def _entropy(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
        return {"entropy": [matrix_entropy(states) for states in probe.states(inputs)]}


def matrix_entropy(states: Tensor) -> float:
    """-Σ p·log p of (N, D) tokens, p the spectrum of their covariance over its trace; 0 if all are equal."""
    centred = (states - states.mean(0)).double()
    gram = centred @ centred.mT if len(states) <= states.shape[1] else centred.mT @ centred  # the spectrum is the same
    power = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0)
    if not power.any():
        return 0.0
    p = power / power.sum()
    return float(torch.special.entr(p).sum())
