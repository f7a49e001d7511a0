"""YOPO: visual tokens use a part of every MLP and leave half-way; what is computed of them is pruned once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Card, Contract, Layer, Method, Stage


@dataclass(frozen=True)
class YOPO(Method):
    """Narrow MLPs for visual tokens, and an early exit.

    Attributes:
        shrink: by what the number of the MLP's inner channels is divided for visual tokens, rounded down; 1 leaves all.
        layer: first decoder layer that sees no visual token; an index or a fraction of the depth.
    """

    shrink: float = 2.0
    layer: Layer = 0.5

    card: ClassVar[Card] = Card(
        name="yopo",
        title="visual tokens use the first channels of every MLP and leave the decoder half-way",
        paper="arXiv 2410.06169",
        formula="MLP(x_i) = W_down[:, :m] (act(W_gate[:m] x_i) · W_up[:m] x_i) for visual tokens i, m = ⌊channels / "
        "shrink⌋; no visual token in layers l >= layer",
        venue="arXiv 2024",
        stage="decoder",
        needs="nothing",
        official="LLaVA-1.5-13B: half of each MLP, layer 20 of 40, 20 or 30 heads of 40 blind to the picture, and "
        "visual tokens that attend to a window of 5 x 5 neighbours, on both sides. All four are simulated: activations "
        "beyond m are set to 0 and attention weights are masked at full width, so that nothing is saved. 576 tokens at "
        "a fixed place.",
        bugs="While decoding, blind heads and the exit are masked in the first row of a batch only.",
        trained="the language model, fine-tuned with it; the accuracy that it claims rests on that",
        departures="What is pruned is not computed. The window and the blind heads are left out: they are masks, and "
        "with the stock attention kernels they save nothing. From the exit on the attention of text is normalised over "
        "what it sees; published, what it gave to the picture is lost. Any number of rows and images.",
        defaults="shrink=2, layer=0.5, for every family.",
        cost="none; up to the exit a visual token costs its attention and 1/shrink of the MLP",
        budget=False,
        contract=Contract(),
    )

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(kind="narrow", layer=0.0, until=1.0, shrink=self.shrink),
            Stage(kind="exit", layer=self.layer),
        )
