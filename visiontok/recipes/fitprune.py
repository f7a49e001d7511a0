"""FitPrune: cuts in many decoder layers, by the peaks of attention from the image and from the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


def fitprune(own: Tensor, text: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens of the largest product of the attention that image and text pay to them.

    Args:
        own: (N,) or (B, N), attention from the tokens of the image, the largest of all heads, mean over the rows.
        text: (N,) or (B, N), the same from the text behind the image.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``own``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(own.double() * text.double(), k, valid)  # small numbers, whose product float32 might lose


@dataclass(frozen=True)
class FitPrune(Method):
    """A schedule of cuts that was fitted to keep the distribution of attention.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, left behind each cut.
    """

    layers: tuple[Layer, ...] = tuple(n / 32 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 20, 22))
    shares: tuple[float, ...] = (0.976, 0.918, 0.764, 0.701, 0.639, 0.604, 0.509, 0.472, 0.441, 0.337, 0.267, 0.229)

    card: ClassVar[Card] = Card(
        name="fitprune",
        title="a fitted schedule of cuts in the decoder, by the attention of image and text",
        paper="arXiv 2409.10197",
        venue="AAAI 2025",
        formula="top-K of Σ_{visual j} max_h A_hji · Σ_{text t} max_h A_hti, in the layer before the cut",
        stage="decoder",
        needs="peaks of attention from the image and peaks of attention from the text, in the layer before the cut",
        official="LLaVA-1.5: counts per layer for reductions of 10 to 90 % of the FLOPs. Tokens leave inside a layer, "
        "behind its attention: they are in its cache and skip its MLP. Kept tokens keep their positions; eager "
        "attention, batch 1, one image at a fixed place.",
        bugs="The fit deletes where both orders agree, the model ranks by the product.",
        departures="Ranks by the product. Tokens leave on the input of the next layer. The default schedule is that of "
        "60 %, with small deletions put together in twelve cuts; fit your own. Rows are counted in tiles, no "
        "N × N map of a head is held. Image rows are those of the same image. Any number of images, each with its own "
        "budget. On a shallow model cuts that fall on one layer become one.",
        defaults="twelve cuts from layer 1/32 (97.6 % left) to 22/32 (22.9 %), for every family.",
        cost="O(HN²d) for each cut",
        contract=Contract(question_independent=False, per_image=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_own_peaks=(-1,), decoder_text_peaks=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def select(self, ctx: Context) -> Tensor:
        own, text = ctx.attention.own_peaks(-1), ctx.attention.text_peaks(-1)
        return fitprune(own, text, ctx.count, valid=ctx.valid)
