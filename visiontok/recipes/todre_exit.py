"""ToDRE, second stage: leave the decoder once text and picture look at each other no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..method import Card, Contract, Layer, Method, Needs, Stage

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class ToDREExit(Method):
    """All visual tokens of a prompt go at one layer, if little attention passes between them and the text.

    Attributes:
        layer: decoder layer whose input is cut; an index, or a fraction of the depth (never below layer 1).
        threshold: both shares of attention must lie below it.
    """

    layer: Layer = 7 / 8
    threshold: float = 0.1

    card: ClassVar[Card] = Card(
        name="todre_exit",
        title="withdraw all visual tokens late in the decoder, if text and picture no longer look at each other",
        paper="arXiv 2505.18757 (stage 2)",
        venue="preprint",
        formula="no visual token in layers l >= layer of a prompt whose text pays less than τ of its attention to the "
        "pictures and whose pictures pay less than τ to the text, in layer - 1",
        stage="decoder",
        needs="attention of the text rows, and attention to text, in the layer before the cut",
        official="No code is published. Layer 7/8 of the depth, τ = 0.1.",
        departures="A reconstruction from the paper: means over heads and over the rows; text behind the last picture. "
        "All pictures of a prompt stay or go together. Compose with todre for both stages: recipe('todre', keep=...) + "
        "recipe('todre_exit').",
        defaults="layer=7/8, threshold=0.1.",
        cost="O(HN(N + T)d), some rows at a time; what is saved depends on the prompt",
        budget=False,
        contract=Contract(
            count_from_grid=False, question_independent=False, per_image=False, sync_free=False, keeps_some=False
        ),
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold!r}: a share of attention lies in (0, 1]")

    def needs(self) -> Needs:
        return Needs(decoder_text_rows=(-1,), decoder_to_text=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cut", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        from_text = torch.where(ctx.valid, ctx.attention.text_rows(-1), 0.0).sum(1)
        to_text = torch.where(ctx.valid, ctx.attention.to_text(-1), 0.0).sum(1)
        together = (ctx.row[:, None] == ctx.row).to(from_text)  # images of one prompt
        to_text = together @ to_text / (together @ ctx.valid.sum(1).to(to_text)).clamp_min(1)
        gone = (together @ from_text < self.threshold) & (to_text < self.threshold)
        return ctx.valid & ~gone[:, None]
