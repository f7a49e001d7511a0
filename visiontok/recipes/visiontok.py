"""visiontok: diverse tokens, a little by attention, each of which speaks for those it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Card, Contract, Mass, Stage
from ._attended import Attended
from .idpruner import idpruner

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class Visiontok(Attended):
    """Maximal marginal relevance with mass attention; does not read the question.

    Attributes:
        scorer: ``cls`` or ``received``; by default what the tower offers.
        layer: tower layer of the scorer; by default the one the features come from.
    """

    card: ClassVar[Card] = Card(
        name="visiontok",
        title="diverse tokens, a little by attention, with mass attention; our own, and the default",
        paper="this repository, demo/search.md",
        venue="unpublished",
        formula="argmax_i 0.15·w_i - 0.85·max_{j∈S} cos(z_i, z_j), w as in idpruner; then n_j = number of tokens "
        "nearest to j, z'_j = z_j/4 + 3/4·their mean, and log n_j on the attention logits of key j",
        stage="prompt",
        needs="features; CLS attention of one tower layer, received attention on towers without CLS",
        official="This is it.",
        departures="Towers without CLS: visiontok[received]. The best of the compositions that were tried on the "
        "validation scenes of the embedded LLaVA; on other models, compare.",
        defaults="the layer the features come from; mass attention with beta=1, merge=0.75.",
        cost="O(N²D) once, O(N) per pick; the bias widens the heads of flash attention by 8 columns",
        contract=Contract(sync_free=False),
    )

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="prompt", method=self, mass=Mass(merge=0.75)),)

    def select(self, ctx: Context) -> Tensor:
        attention = self.attention(ctx)
        scores = torch.where(attention < 0, torch.nan, attention)  # what has no patch must not stretch the scale
        return idpruner(ctx.features, scores, ctx.count, balance=0.15, valid=ctx.valid).keep
