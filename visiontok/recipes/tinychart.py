"""TinyChart: ToMe at a constant rate in a high-resolution tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Card, Contract, Merging
from ..schedules import merge_rates
from .tome import MergeMethod

_MERGED, _OF = 26 * 84, 2916


@dataclass(frozen=True)
class TinyChart(MergeMethod):
    """The merging of TinyChart; without a budget, the published share of tokens is left."""

    card: ClassVar[Card] = Card(
        name="tinychart",
        title="ToMe at one rate for all layers, down to a quarter of the tokens",
        paper="arXiv 2404.16635",
        venue="EMNLP 2024",
        formula="tome, r = 84 per layer of 2916 tokens in 26 layers",
        stage="merge",
        needs="as tome",
        official="SigLIP-SO400M at 768 pixels, 54 × 54 = 2916 patches to 732; tokens reach the language model by "
        "falling similarity, in which order it was trained. At most half of the tokens merge in a layer, so that more "
        "than K remain where that is too few.",
        trained="a language model that was trained on merged tokens, in the order that matching leaves.",
        departures="Without keep, the same share of tokens in any tower. As tome, in raster order.",
        defaults="keep = 25.1 %",
        cost="as tome",
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        left = tokens - round(tokens * _MERGED / _OF) if count is None else count
        return Merging(r=tuple(merge_rates(max(tokens - left, 0), depth)), rounds=not official)
