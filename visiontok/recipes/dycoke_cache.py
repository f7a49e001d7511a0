"""DyCoke, second stage: free what the last prompt token does not look at, in the cache of all later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage, labelled

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class DyCokeCache(Method):
    """One layer chooses what all later ones keep of the visual tokens for decoding.

    Attributes:
        layer: first decoder layer whose cache is thinned; an index, or a fraction of the depth (never below layer 1).
    """

    layer: Layer = 3 / 28

    card: ClassVar[Card] = Card(
        name="dycoke_cache",
        title="thin the cache of later layers behind the prefill, by what the last token looks at in an early one",
        paper="arXiv 2411.15024 (stage 2)",
        venue="CVPR 2025",
        formula="for all layers l >= layer: top-K of mean_h A_h,last,i in layer - 1",
        stage="cache",
        needs="attention of the last prompt token in the layer before the first one that is thinned",
        official="LLaVA-OneVision, videos: layer 3 of 28 keeps 20 or 30 %. In every decoding step the row of the new "
        "token is compared with the one before, and below a cosine of 0.9 another set is chosen of all tokens. The "
        "whole cache is kept and gathered from in each layer and step. Frames are merged before the language model "
        "(stage 1).",
        bugs="No memory is freed. A step whose row resembles the one before runs on the whole cache. What was chosen "
        "is kept on the config, and goes over to the next prompt.",
        departures="What is not chosen is freed, so that it cannot come back: the set is chosen once, by the last "
        "token of the prompt, whose row gives the first new token. The published stage, which chooses again while "
        "decoding, saves attention and no memory, and is not offered; nor is stage 1. Each image or video has its own "
        "budget.",
        defaults="layer=3/28 of the depth; published with keep=0.2 and 0.3.",
        cost="one attention row, O(H(N + T)d); no FLOPs of the prefill are saved, and one layer at a time is stored "
        "whole",
        contract=Contract(question_independent=False, per_image=False),
    )

    @property
    def label(self) -> str:
        return labelled(self.card.name, "freed")

    def needs(self) -> Needs:
        return Needs(decoder_last_row=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cache", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        return topk(ctx.attention.last_row(-1), ctx.count, ctx.valid)
