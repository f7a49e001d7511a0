"""SnapKV: keep in the cache what the end of the prompt looks at, every key head for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..method import Card, Contract, Method, Needs, labelled
from ._heads import each_head
from .gemfilter import gemfilter

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class SnapKV(Method):
    """The keys and values of the visual tokens that the last tokens of the prompt look at stay, the others are freed.

    Attributes:
        window: number of last prompt tokens that look; fewer where less text is behind the last image.
        width: tokens over which scores are averaged along the sequence, odd.
        joined: one choice per layer, by the sum over the heads, instead of one for each key head.
    """

    window: int = 32
    width: int = 5
    joined: bool = False

    card: ClassVar[Card] = Card(
        name="snapkv",
        title="thin the cache behind the prefill, by what the end of the prompt looks at, each key head for itself",
        paper="arXiv 2404.14469",
        venue="NeurIPS 2024",
        formula="per layer and key head g: top-K of the mean over 5 neighbours of Σ_{h of g} Σ_{last W rows t} A_hti",
        stage="cache",
        needs="what the end of the prompt looks at, per key head",
        official="Language models: windows of 32 or 64 tokens, which stay; kernel 5, or 7 with the maximum; all tokens "
        "in front of the window are candidates, neighbours along the text. Heads that share keys get copies of them. "
        "Scores beyond the ends count as zeros. No prefill is saved.",
        departures="Text stays; visual tokens are the candidates, each image for itself, neighbours being the next "
        "ones of the image in raster order (one dimension, as published). Missing neighbours do not count "
        "(fidelity='official': zeros). Rows are text behind the last image, however short. Heads that share keys are "
        "summed and share a choice, so that nothing is copied.",
        defaults="window=32, width=5, for every family.",
        cost="O(HW(N + T)d) per layer; no FLOPs of the prefill are saved, and one layer at a time is stored whole",
        contract=Contract(question_independent=False, per_image=False, order_free=False),
    )

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window={self.window!r}: at least one token must look")
        if self.width < 1 or self.width % 2 == 0:
            raise ConfigError(f"width={self.width!r}: an odd number of neighbours")

    @property
    def label(self) -> str:
        return labelled(self.card.name, "joined" if self.joined else "")

    def needs(self) -> Needs:
        return Needs(cache_window=(self.window,))

    def select(self, ctx: Context) -> Tensor:
        scores = ctx.attention.cache_window(self.window)
        official = ctx.fidelity == "official"

        def best(scores: Tensor, count: Tensor, valid: Tensor) -> Tensor:
            return gemfilter(scores, count, width=self.width, official=official, valid=valid)

        return each_head(best, scores.sum(2, keepdim=True) if self.joined else scores, ctx)
