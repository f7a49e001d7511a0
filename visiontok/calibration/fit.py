"""How many tokens each layer can delete: FitPrune's calibration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..api import compress
from ..context import Context
from ..conventions import published_flops
from ..cost import Load, Widths
from ..errors import ConfigError
from .base import Calibrator, Measure, Outcome, Row, mean
from .probe import Probe, cuts

_TOLERANCE = 0.01  # of alpha, as published


@dataclass(frozen=True)
class FitBisect(Calibrator):
    """Deletion counts per layer that bring the FLOPs down while every layer keeps its attention to the image.

    Of the attention mass that a layer of the stock model gives to visual tokens, at most the share alpha may go, both
    of what the visual tokens give (self) and of what the text behind them gives (cross); alpha is bisected until the
    FLOPs (convention B, visual tokens, deleted behind the attention) are met.

    Attributes:
        reduction: share of the FLOPs of the visual tokens to save.

    Reference:
        FitPrune (AAAI 2025), its calibration script.
    """

    reduction: float = 0.6

    method: ClassVar[str] = "fitprune"
    title: ClassVar[str] = "tokens that each layer deletes"
    source: ClassVar[str] = (
        "as published: bisection of the tolerated loss of attention mass; deleted are tokens that are least in self "
        "and in cross attention. Here for any number of tokens and any place of the image, and alpha is the smallest "
        "that meets the FLOPs"
    )

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise ConfigError(f"reduction={self.reduction!r}: a share of the FLOPs lies between 0 and 1, such as 0.6")

    def find(self, measure: Measure, config: Any) -> Outcome:
        stock = measure("mass", _masses)
        widths = Widths.of(config)
        sizes = {int(row["tokens"][0]) for row in stock}
        if len(sizes) > 1:
            raise ConfigError(
                f"data: pictures of {min(sizes)} to {max(sizes)} visual tokens have no deletion counts in common; "
                "calibrate on pictures of one size"
            )
        [n] = sizes
        low, high, best = 0.0, 1.0, None
        while high - low > _TOLERANCE or best is None:
            alpha = (low + high) / 2
            if alpha > 1 - _TOLERANCE / 2:
                return Outcome({}, None, (f"no loss of attention saves a share of {self.reduction:g}; ask for less",))
            rows = measure(f"alpha={alpha}", functools.partial(_deleted, stock=stock, alpha=alpha))
            reached = _until(rows, n, widths, self.reduction)
            if reached is None:
                low = alpha
            else:
                high, best = alpha, (reached, rows)
        reached, rows = best
        lost = mean(rows, "deleted")
        deleted = [int(x) if layer < reached else 0 for layer, x in enumerate(lost)]
        left = [n - sum(deleted[: layer + 1]) for layer in range(len(deleted))]
        curves = {"deleted": dict(enumerate(map(float, deleted))), "left": dict(enumerate(map(float, left)))}
        # What a layer deletes, the method cuts on the input of the next; behind the last there is none.
        cuts = {layer: left[layer - 1] / n for layer in range(1, len(deleted)) if deleted[layer - 1]}
        recommended = {"layers": list(cuts), "shares": list(cuts.values())} if cuts else None
        return Outcome(curves, recommended, (f"alpha={high:.4g}, of {n} tokens",))


def _until(rows: list[Row], n: int, widths: Widths, reduction: float) -> int | None:
    """The first layer in front of which the FLOPs are met if nothing more is deleted; None if they never are."""
    limit = (1 - reduction) * published_flops("B", [Load.all(n)] * widths.layers, widths)
    for layer in range(widths.layers + 1):
        total = 0
        for row in rows:
            counts = [n]
            for gone in row["deleted"]:
                counts.append(counts[-1] - int(gone))
            loads = [Load(a, a, b) for a, b in pairwise(counts[: layer + 1])]
            total += published_flops("B", loads + [Load.all(counts[layer])] * (widths.layers - layer), widths)
        if total / len(rows) <= limit:
            return layer
    return None


def _statistics(weights: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Self and cross attention (n,) of the visual tokens (Q,) bool in (Q, Q) weights."""
    behind = torch.arange(len(visual), device=visual.device) > visual.nonzero().max()
    seen = weights[:, visual]
    return seen[visual].sum(0) / visual.sum(), seen[behind].sum(0) / behind.sum()


def _masses(probe: Probe, inputs: Mapping[str, Any], sample: int) -> Row:
    visual = probe.visual(inputs)
    found: list[tuple[float, float]] = []
    with probe.attention(
        lambda layer, weights: found.append(tuple(float(x.sum()) for x in _statistics(weights, visual)))  # type: ignore[arg-type]
    ):
        probe.log_probabilities(inputs)
    own, cross = (list(column) for column in zip(*found, strict=True))
    return {"self": own, "cross": cross, "tokens": [float(visual.sum())]}


def _deleted(probe: Probe, inputs: Mapping[str, Any], sample: int, *, stock: list[Row], alpha: float) -> Row:
    """How many tokens each layer deletes; they are gone from the next layer on."""
    visual = probe.visual(inputs)
    state = _Deletion(visual, [stock[sample][name] for name in ("self", "cross")], alpha)
    with (
        compress(probe.model, cuts(dict.fromkeys(range(1, len(probe.layers)), state.keep))),
        probe.attention(state.see),
    ):
        probe.log_probabilities(inputs)
    return {"deleted": state.deleted}


@dataclass
class _Deletion:
    """The tokens of one prompt on the way through the layers.

    Attributes:
        visual: (Q,) bool, which of the tokens that the present layer holds are visual.
        masses: self and cross attention mass of each layer of the stock model.
        alpha: share of it that may go.
        deleted: how many each layer has deleted.
    """

    visual: Tensor
    masses: list[list[float]]
    alpha: float
    deleted: list[float] = field(default_factory=list)

    def see(self, layer: int, weights: Tensor) -> None:
        """Choose what ``layer`` deletes."""
        statistics = _statistics(weights, self.visual)
        gone = torch.ones_like(statistics[0], dtype=torch.bool)
        for each, masses in zip(statistics, self.masses, strict=True):
            gone &= _expendable(each, masses[layer] * (1 - self.alpha))
        if gone.all():
            gone[statistics[1].argmax()] = False
        self._gone = gone
        self.deleted.append(float(gone.sum()))

    def keep(self, ctx: Context) -> Tensor:
        """What the layer behind keeps, (U, N) bool."""
        kept = ctx.valid.clone()
        kept[ctx.valid] = ~self._gone
        stays = ~self.visual
        stays[self.visual] = ~self._gone
        self.visual = self.visual[stays]
        return kept


def _expendable(values: Tensor, least: float) -> Tensor:
    """The most of the smallest values that leave at least ``least`` of the sum, bool."""
    order = values.argsort(stable=True)
    enough = values.sum() - values[order].cumsum(0) >= least
    gone = torch.zeros_like(enough)
    gone[order[: int(enough.long().cumprod(0).sum())]] = True
    return gone
