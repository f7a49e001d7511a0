"""HiDrop: visual tokens join the decoder late, leave it early, and are few in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ..schedules import concave
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context

PRESETS: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {
    48: ((10 / 32, 14 / 32, 16 / 32, 18 / 32), (87, 10, 5, 1)),
    64: ((10 / 32, 14 / 32, 16 / 32, 18 / 32), (215, 10, 5, 1)),
    80: ((10 / 32, 13 / 32, 16 / 32, 19 / 32), (453, 10, 5, 1)),
}
"""Average over the layers → layers of the cuts and tokens behind each, of 576."""


@dataclass(frozen=True)
class HiDrop(Method):
    """Late injection, a concave pyramid of cuts and an early exit.

    Attributes:
        preset: 48, 64 or 80, the published schedules by the average number of tokens of LLaVA-1.5; for what the other
            options leave open.
        inject: decoder layer on whose input the visual tokens join, as the projector left them.
        layers: decoder layers whose input is cut.
        shares: of the original tokens, what is left after each cut.
        exit: first decoder layer without visual tokens.
    """

    preset: int = 48
    inject: Layer = 8 / 32
    layers: tuple[Layer, ...] | None = None
    shares: tuple[float, ...] | None = None
    exit: Layer = 24 / 32

    card: ClassVar[Card] = Card(
        name="hidrop",
        title="visual tokens join the decoder late, are cut several times and leave early",
        paper="HiDrop, ICLR 2026 (github.com/EIT-NLP/HiDrop)",
        venue="ICLR 2026",
        formula="no visual token below layer e and from layer x on; between, at the input of layer c: top-K_c of "
        "mean_h softmax(q_last·k/√d)_hi, q and k those of layer c for all tokens still there",
        stage="decoder",
        needs="attention of the last prompt token in the layer behind each cut, before the cut",
        official="LLaVA-1.5: tokens join at layer 8 of 32, are cut at 10, 14, 16 and 18 (or 10, 13, 16 and 19) and "
        "leave at 24, with their positions. Text behind the picture keeps a gap for it. In training the rows are those "
        "before an answer.",
        bugs="Its top-k is cut off from the gradient: indices alone are used. Samples without a picture shift the list "
        "of counts; one picture of 576 tokens; without position ids decoding counts by the first layer's cache.",
        trained="published with fine-tuned weights; without them late injection costs accuracy, and the layers have to "
        "be calibrated",
        departures="Any number of images of any size, heads may share keys. Layers are fractions of the depth; cuts "
        "that meet in a shallow model are one. Differentiable top-k is visiontok.functional.soft_topk, in which the "
        "gradient reaches the scores. Trained within compress(), the row is the last one. A budget is the average over "
        "all decoder layers: the shares behind the first cut stay, as in the presets, and it gets the rest; what "
        "exceeds all tokens goes to the others.",
        defaults="preset=48, inject=8/32, exit=24/32.",
        cost="per cut: queries, keys and values of one layer again, O(ND²), and one attention row, O(HNd)",
        contract=Contract(question_independent=False, per_image=False),
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset={self.preset!r}: use one of {', '.join(map(str, PRESETS))}")
        listed(self, *(name for name in ("layers", "shares") if getattr(self, name) is not None))
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_last_row=(0,))

    def stages(self) -> tuple[Stage, ...]:
        layers, tokens = PRESETS[self.preset]
        shares = tuple(n / 576 for n in tokens) if self.shares is None else self.shares
        return (
            Stage(kind="inject", layer=self.inject),
            *cuts(self, layers if self.layers is None else self.layers, shares),
            Stage(kind="exit", layer=self.exit),
        )

    def shared_out(
        self, n: int, average: float, *, cuts: Sequence[int], shape: Sequence[float], **limits: int
    ) -> list[int]:
        tail = [max(round(share * n), 1) for share in shape[1:]]
        counts = concave(n, average, cuts=cuts, tail=tail, **limits)
        if counts[0] < n or not tail:
            return counts
        return [n, *super().shared_out(n, average, cuts=cuts[1:], shape=shape[1:], **limits)]

    def select(self, ctx: Context) -> Tensor:
        return topk(ctx.scored(ctx.attention.last_row(0)), ctx.count, ctx.valid)
