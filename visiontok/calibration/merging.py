"""How alike two tokens must be to merge, layer by layer of the vision tower: DyMU's calibration."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..api import compress
from ..errors import ConfigError
from ..method import Merging
from ..recipes.dymu import DyMU
from ..schedules import merge_rates
from .base import Calibrator, Measure, Outcome, Row
from .probe import Probe

Cosines = list[list[float]]
"""Of each picture, those of the pairs of one layer."""


@dataclass(frozen=True)
class MergeThresholds(Calibrator):
    """In each layer, the cosine of the first pair that is not to merge if the mean picture is to keep its share.

    Attributes:
        keep: share of the patches to be left on average.
        inflect: slope of the rates over the layers, in [-1, 1], as for tome.

    Reference:
        DyMU, arXiv 2504.17040: rates 8 for CLIP-L of 577 tokens, 537 of 729 in all for SigLIP-SO400M.
    """

    keep: float = 0.5
    inflect: float = 0.0

    method: ClassVar[str] = "dymu"
    title: ClassVar[str] = "cosine above which pairs merge in each layer of the vision tower"
    source: ClassVar[str] = (
        "as published, but over all pictures at once and layer by layer, where the published code averages batches of "
        "64: the cosine of the first pair of all that the rate of the layer would not merge, at least 0"
    )
    axis: ClassVar[str] = "vision layer"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep={self.keep!r}: a share of the patches lies between 0 and 1, such as 0.5")
        merge_rates(0, 1, self.inflect)

    def find(self, measure: Measure, config: Any) -> Outcome:
        options = f"keep={self.keep:g}, inflect={self.inflect:g}"
        shapes = measure("tower", _shape)
        patches, depth = sum(row["patches"][0] for row in shapes) / len(shapes), int(shapes[0]["depth"][0])

        def cosines(found: Sequence[float]) -> Cosines:
            # what a layer shows depends on what the layers before it merge
            rows = measure(f"layer {len(found)}, {options}", functools.partial(_row, found, depth))
            return [picture for row in rows for picture in row.values()]

        thresholds = _find(cosines, patches, depth, self)
        return Outcome({"threshold": dict(enumerate(thresholds))}, {"thresholds": thresholds})


def merge_thresholds(
    model: nn.Module, batches: Sequence[Tensor], *, keep: float = 0.5, inflect: float = 0.0
) -> tuple[float, ...]:
    """DyMU's thresholds for an encoder without a language model.

    Args:
        model: of timm, open_clip or transformers, in evaluation mode, called with a batch; of CLIP models, give the
            vision half.
        batches: (B, 3, H, W) pixels as the model takes them; runs once per layer on each.
        keep: share of the patches to be left on average.
        inflect: slope of the rates over the layers, as for tome.

    Returns:
        one per layer, for ``compress(model, "dymu", thresholds=...)``.

    Raises:
        ConfigError: for a share outside (0, 1), or without a batch.
        UnsupportedError: if tokens cannot be merged in ``model``.
    """
    settings = MergeThresholds(keep=keep, inflect=inflect)
    if not batches:
        raise ConfigError("batches=[]: a calibration needs at least one picture")

    def run(method: _Observed, batch: Tensor) -> _Observed:
        with compress(model, method), torch.inference_mode():
            model(batch)
        return method

    first = run(_Observed(), batches[0])
    depth = first.depth

    def cosines(found: Sequence[float]) -> Cosines:
        runs = (run(_Observed(_so_far(found, depth)), batch) for batch in batches)
        return [picture for one in runs for picture in one.cosines[len(found)]]

    return tuple(_find(cosines, first.patches, depth, settings))


@dataclass(frozen=True)
class _Observed(DyMU):
    """DyMU that notes what it sees; without thresholds nothing merges."""

    thresholds: float | tuple[float, ...] = math.inf
    cosines: dict[int, Cosines] = field(default_factory=dict)
    shape: list[int] = field(default_factory=list)

    @property
    def patches(self) -> int:
        """Of one picture."""
        return self.shape[0]

    @property
    def depth(self) -> int:
        """Layers that may merge."""
        return self.shape[1]

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        self.shape[:] = [tokens, depth]
        plan = super().merging(tokens, count, depth=depth, layers=layers, official=official)
        return replace(plan, observe=self._note)

    def _note(self, layer: int, cosines: Tensor) -> None:
        self.cosines.setdefault(layer, []).extend(row[row > -math.inf].tolist() for row in cosines)


def merge_threshold(cosines: Cosines, r: int) -> float:
    """The cosine of the first pair that is not among the r of each picture that are most alike, over all pictures.

    Args:
        cosines: of the pairs of each picture.
        r: pairs that are to merge, per picture.

    Returns:
        at least 0, and 0 if there are no more pairs than are to merge.
    """
    ranked = sorted((cosine for picture in cosines for cosine in picture), reverse=True)
    first = r * len(cosines)
    return max(ranked[first], 0.0) if first < len(ranked) else 0.0


def _find(
    cosines: Callable[[Sequence[float]], Cosines], patches: float, depth: int, settings: MergeThresholds
) -> list[float]:
    """Layer by layer; ``cosines`` says what the next one shows if those before it merge by the thresholds found."""
    found: list[float] = []
    for r in merge_rates(round(patches * (1 - settings.keep)), depth, settings.inflect):
        found.append(merge_threshold(cosines(found), r))
    return found


def _so_far(found: Sequence[float], depth: int) -> tuple[float, ...]:
    return (*found, *[math.inf] * (depth - len(found)))


def _shape(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
    seen = _Observed()
    with compress(probe.model, seen):
        probe.log_probabilities(inputs)
    return {"patches": [float(seen.patches)], "depth": [float(seen.depth)]}


def _row(found: Sequence[float], depth: int, probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
    seen = _Observed(_so_far(found, depth))
    with compress(probe.model, seen):
        probe.log_probabilities(inputs)
    return {f"picture {number}": row for number, row in enumerate(seen.cosines[len(found)])}
