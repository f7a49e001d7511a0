"""PyramidDrop: halve the visual tokens several times on the way through the decoder, each time by its next layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ..schedules import geometric
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Several cuts, each by the attention that the layer behind it would pay.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth.
        shares: of the original tokens, what is left after each cut.
    """

    layers: tuple[Layer, ...] = (8 / 32, 16 / 32, 24 / 32)
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)

    card: ClassVar[Card] = Card(
        name="pyramiddrop",
        title="several cuts in the decoder by what the last token would look at next",
        paper="arXiv 2410.17247",
        venue="CVPR 2025",
        formula="at the input of layer c: top-K_c of mean_h softmax(q_last·k/√d)_hi, q and k those of layer c for all "
        "tokens still there",
        stage="decoder",
        needs="attention of the last prompt token in the layer behind each cut, before the cut",
        official="LLaVA: layers 8, 16 and 24 of 32; 1/2, 1/4 and 1/8 of the tokens, rounded down. Kept tokens are "
        "numbered anew, in every layer by itself. In training the rows are those before an answer.",
        bugs="Queries and keys are multiplied head by head, which fails where heads share keys; one image per row; "
        "masks keep the old length behind a cut.",
        departures="Heads may share keys; any number of images, each with its own budget, rounded half up. Kept tokens "
        "keep their positions; positions='compact' numbers them anew. Trained within compress(), the row is the last "
        "one, too. A budget is the average over all decoder layers, for which another ratio takes the place of 1/2; "
        "shares that are no powers of one number keep their proportion.",
        defaults="layers=8/32, 16/32, 24/32 of the depth, shares=0.5, 0.25, 0.125, without keep.",
        cost="per cut: queries, keys and values of one layer again, O(ND²), and one attention row, O(HNd)",
        contract=Contract(question_independent=False, per_image=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_last_row=(0,))

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def shared_out(
        self, n: int, average: float, *, cuts: Sequence[int], shape: Sequence[float], **limits: int
    ) -> list[int]:
        if any(share != shape[0] ** i for i, share in enumerate(shape, 1)):
            return super().shared_out(n, average, cuts=cuts, shape=shape, **limits)
        return geometric(n, average, cuts=cuts, **limits)

    def select(self, ctx: Context) -> Tensor:
        return topk(ctx.scored(ctx.attention.last_row(0)), ctx.count, ctx.valid)
