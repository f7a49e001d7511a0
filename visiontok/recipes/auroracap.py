"""AuroraCap: ToMe by a share of tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Merging
from ..schedules import merge_rates
from .tome import MergeMethod


@dataclass(frozen=True)
class AuroraCap(MergeMethod):
    """The merging of AuroraCap.

    Attributes:
        ratio: share of tokens to keep where there is no budget.
    """

    ratio: float = 0.8

    card: ClassVar[Card] = Card(
        name="auroracap",
        title="ToMe at one rate for all layers, from the share of tokens to keep",
        paper="arXiv 2410.03051",
        venue="ICLR 2025",
        formula="tome, r = ⌊N·(1 - ρ)/L⌋ per layer",
        stage="merge",
        needs="as tome",
        official="The rate is rounded down, and that of the last layer, whose output is not read, is counted too: more "
        "than K remain. The first frame of a video is not merged.",
        departures="As many tokens as the budget says (fidelity='official': the published rate). Pictures only.",
        defaults="ρ = 0.8; the authors advise 0.2 to 0.4 for captions and above 0.5 for questions.",
        cost="as tome",
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio={self.ratio}: a share of tokens lies in (0, 1]")

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        left = max(round(tokens * self.ratio), 1) if count is None else count
        if official:
            return Merging(r=(max(tokens - left, 0) // layers,) * depth, rounds=False)
        return Merging(r=tuple(merge_rates(max(tokens - left, 0), depth)))
