"""AgilePruner: attended tokens on simple pictures, diverse ones on complex pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, effective_rank, topk, widening
from ..method import Card, Contract, Needs
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def agile(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    rate: float = 0.01,
    typical: float = 92.0,
    most: float = 0.5,
    valid: Tensor | None = None,
) -> Picks:
    """In order of attention, each pick clearing a larger radius than the last, and the larger the richer the image.

    Args:
        features: (N, D) or (B, N, D), before the projector.
        scores: (N,) or (B, N), attention.
        k: tokens to keep, int or (B,) long.
        rate: what the cosine distance that a pick clears grows by, on a typical image.
        typical: effective rank of a typical image.
        most: largest distance cleared.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    step = rate * effective_rank(features, valid) / typical
    return widening(features, scores, k, step, most=most, valid=valid)


@dataclass(frozen=True)
class Agile(Attended):
    """Saliency or diversity, image by image, by the effective rank of the features.

    Attributes:
        rate: growth of the cleared cosine distance per pick, on a typical image; 0 is top-k by attention.
        typical: effective rank of a typical image at this tower.
        most: largest distance cleared, in [0, 2].
    """

    rate: float = 0.01
    typical: float = 92.0
    most: float = 0.5

    card: ClassVar[Card] = Card(
        name="agile",
        title="attended tokens on simple pictures, diverse ones on complex ones",
        paper="arXiv 2603.01236",
        venue="ICLR 2026",
        formula="in order of attention, the n-th pick removes i with 1 - cos(z_i, z_n) < min(n·0.01·erank(Z)/92, 1/2)",
        stage="prompt",
        needs="projector inputs; CLS attention of one tower layer, received attention on towers without CLS",
        official="No code is published. The rule: in descending order of CLS attention, a kept token removes all whose "
        "cosine distance to it is below its order times 0.01 times the image's effective rank over the average one, up "
        "to a largest distance. Neither the average rank nor the largest distance is given.",
        departures="A reconstruction. The order of a token is its place among the picks, from 1. Once nothing stands, "
        "what was removed follows by attention, so that exactly K remain. The constants that the paper keeps to itself "
        "are options: typical=92 lies between the ranks it reports for OCR (78) and POPE (106) on LLaVA-1.5 and should "
        "be measured anew for other towers, most=0.5 is ours. Attention entropy, which the paper analyses too, is no "
        "part of its rule. Towers without CLS: agile[received].",
        defaults="rate=0.01; the layer the features come from.",
        cost="O(ND min(N, D)) for the rank, O(ND) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate={self.rate!r}: must be at least 0")
        if self.typical <= 0:
            raise ConfigError(f"typical={self.typical!r}: must be positive")
        if not 0 <= self.most <= 2:
            raise ConfigError(f"most={self.most!r}: cosine distances lie in [0, 2]")
        super().__post_init__()

    def needs(self) -> Needs:
        return replace(super().needs(), encoder_features=True)

    def select(self, ctx: Context) -> Tensor:
        scores = self.attention(ctx)
        seen = ctx.valid & (scores >= 0)  # what has no patch comes last
        options = {"rate": self.rate, "typical": self.typical, "most": self.most}
        keep = agile(ctx.need_encoder_features(), scores, ctx.count, valid=seen, **options).keep
        return topk(keep.float(), ctx.count, ctx.valid)
