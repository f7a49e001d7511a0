"""What a calibrator is: measurements of samples, in rounds, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .probe import Probe

Row = dict[str, list[float]]
"""What was measured on one sample: numbers per layer, by name."""
Reading = Callable[[Probe, Mapping[str, Any], int], Row]
"""Measures one sample, given what ``generate()`` takes and the number of the sample."""
Measure = Callable[[str, Reading], list[Row]]
"""Runs a round, named for the file of intermediate results, over all samples."""


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    Attributes:
        curves: layer → number, mean over samples.
        recommended: options of the method; None if nothing suits, for the reason in ``notes``.
        notes: what a reader must know.
    """

    curves: Mapping[str, Mapping[int, float]]
    recommended: dict[str, Any] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrator:
    """Base of all calibrators: subclasses are frozen dataclasses whose fields are the options."""

    method: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """As published, or a reconstruction, and of what."""
    axis: ClassVar[str] = "decoder layer"
    """What the curves are drawn over."""

    def find(self, measure: Measure, config: Any) -> Outcome:
        """Measure, and conclude; ``config`` is the model's."""
        raise NotImplementedError


def mean(rows: list[Row], name: str) -> list[float]:
    """Per layer, over samples."""
    columns = zip(*(row[name] for row in rows), strict=True)
    return [sum(column) / len(rows) for column in columns]
