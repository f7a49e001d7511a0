"""TextMonkey: drop tokens that come again later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk, uniqueness
from ..method import Card, Contract, Method

if TYPE_CHECKING:
    from ..context import Context


def textmonkey(features: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens whose largest cosine to a later token is smallest.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N); the last token is always kept.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(uniqueness(features, valid), k, valid)


@dataclass(frozen=True)
class TextMonkey(Method):
    """The uniqueness filter of TextMonkey's token resampler, without the trained resampler behind it."""

    card: ClassVar[Card] = Card(
        name="textmonkey",
        title="tokens that no later token resembles",
        paper="arXiv 2403.04473",
        venue="preprint",
        formula="top-K of -max_{j>i} cos(z_i, z_j)",
        stage="prompt",
        needs="features",
        official="512 tokens of all crops of a picture together, in the model's dtype; a trained cross-attention "
        "resampler then gathers what was dropped. Of duplicates the last is kept.",
        trained="the cross-attention resampler that gathers what was dropped; published for TextMonkey alone.",
        departures="The filter alone, without the resampler. Every image has its own budget; selects in float32.",
        defaults="The paper keeps 512 tokens of all crops, 256 per crop of 448 × 448 pixels.",
        cost="O(N²D) once, in tiles",
        contract=Contract(order_free=False),
    )

    def select(self, ctx: Context) -> Tensor:
        return textmonkey(ctx.features, ctx.count, valid=ctx.valid)
