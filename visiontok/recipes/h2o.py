"""H2O: keep in the cache the heavy hitters, tokens that the whole prompt looks at, every key head for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Method, Needs, labelled
from ._heads import each_head

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class H2O(Method):
    """The keys and values of the visual tokens that gathered most attention in the prefill stay, the others are freed.

    Attributes:
        joined: one choice per layer, by the sum over the heads, instead of one for each key head.
    """

    joined: bool = False

    card: ClassVar[Card] = Card(
        name="h2o",
        title="thin the cache behind the prefill, by the attention of the whole prompt, each key head for itself",
        paper="arXiv 2306.14048",
        venue="NeurIPS 2023",
        formula="per layer and key head g: top-K of Σ_{h of g} Σ_t A_hti over all rows t of the prompt",
        stage="cache",
        needs="what all of the prompt looks at, per key head",
        official="Language models: half of the budget for heavy hitters, half for the most recent tokens; sums go on, "
        "and tokens leave, in every decoding step. The whole attention map is held.",
        bugs="Sums favour early tokens, which more rows can see.",
        departures="Text stays, which is all that is recent; visual tokens are the candidates, each image for itself. "
        "They leave once, behind the prefill, whose attention alone is summed: visual tokens come with the prompt, so "
        "the cache grows by text only, which H2O on visual tokens keeps. Sums are taken over tiles of rows, no map is "
        "held. Heads that share keys are summed and share a choice. That early tokens are seen by more rows is left as "
        "published.",
        defaults="every family alike.",
        cost="O(H(N + T)²d) per layer, some rows at a time, as much as the attention itself; no FLOPs of the prefill "
        "are saved, and one layer at a time is stored whole",
        contract=Contract(question_independent=False, per_image=False),
    )

    @property
    def label(self) -> str:
        return labelled(self.card.name, "joined" if self.joined else "")

    def needs(self) -> Needs:
        return Needs(cache_received=(0,))

    def select(self, ctx: Context) -> Tensor:
        scores = ctx.attention.cache_received()
        return each_head(topk, scores.sum(2, keepdim=True) if self.joined else scores, ctx)
