"""VTW: withdraw all visual tokens from the deep decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Card, Contract, Layer, Method, Stage


@dataclass(frozen=True)
class VTW(Method):
    """Visual tokens withdrawal.

    Attributes:
        layer: first decoder layer that sees no visual token; an index or a fraction of the depth.
    """

    layer: Layer = 0.5

    card: ClassVar[Card] = Card(
        name="vtw",
        title="withdraw all visual tokens from a decoder layer on",
        paper="arXiv 2405.05803",
        venue="AAAI 2025",
        formula="no visual token in layers l >= layer",
        stage="decoder",
        needs="nothing",
        official="Layer 15 of 32 for LLaVA-1.5-7B, found by comparing the last token's distribution with and without "
        "the withdrawal; kept text keeps its positions.",
        departures="The layer is a fraction of the depth; calibrate it per model, text-rich images need it late (26 "
        "of 32 on TextVQA).",
        defaults="layer=0.5.",
        cost="none",
        budget=False,
        contract=Contract(),
    )

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="exit", layer=self.layer),)
