"""FastV: after a few decoder layers keep what the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage

if TYPE_CHECKING:
    from ..context import Context


def fastv(last_row: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` visual tokens with the most attention from the last prompt token.

    Args:
        last_row: (N,) or (B, N), attention of the last prompt token in the layer before the cut, mean over heads,
            softmax over all keys.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``last_row``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(last_row, k, valid)


@dataclass(frozen=True)
class FastV(Method):
    """One cut in the decoder by the attention of the last prompt token.

    Attributes:
        layer: decoder layer whose input is cut; an index, or a fraction of the depth (never below layer 1).
    """

    layer: Layer = 2 / 32

    card: ClassVar[Card] = Card(
        name="fastv",
        title="cut after the first decoder layers by the last token's attention",
        paper="arXiv 2403.06764",
        venue="ECCV 2024",
        formula="top-K of mean_h softmax(q_last·k/√d)_hi, i visual, in the layer before the cut",
        stage="decoder",
        needs="attention of the last prompt token in the layer before the cut",
        official="K=2 of 32 layers, kept tokens keep their positions; batch 1, one image at a fixed place, eager "
        "attention. The paper speaks of all queries, the code uses the last.",
        bugs="The port with a key-value cache runs layer K-1 twice.",
        departures="Any number of images, each with its own budget; only one attention row is computed; the layer "
        "before the cut runs once.",
        defaults="layer=2/32 of the depth; the lmms-eval port uses 3/32.",
        cost="O(HNd) for one attention row, O(N log N) to select",
        contract=Contract(question_independent=False, per_image=False),
    )

    def needs(self) -> Needs:
        return Needs(decoder_last_row=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cut", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        return fastv(ctx.scored(ctx.attention.last_row(-1)), ctx.count, valid=ctx.valid)
