"""Norm: keep the longest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import norm as length
from ..functional import topk
from ..method import Card, VectorMethod, labelled

if TYPE_CHECKING:
    from ..context import Context


def norm(features: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens of largest Euclidean length.

    Args:
        features: (N, D) or (B, N, D), of any space.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(length(features), k, valid)


@dataclass(frozen=True)
class Norm(VectorMethod):
    """Top-k by length: the near-free stand-in for the projector's sensitivity."""

    card: ClassVar[Card] = Card(
        name="norm",
        title="top-k by the length of the projected token",
        paper="-",
        venue="baseline",
        formula="top-K of ‖z_i‖₂",
        stage="prompt",
        needs="features; projector inputs with features='merger_in'",
        official="Rank-Before-Merge (a draft of 2026, unreviewed) takes the length before the patch merger; on "
        "Qwen3-VL that of an earlier block, which the first DeepStack merger reads.",
        departures="norm[merger_in] measures the patches of a token one behind the other, as the last merger reads "
        "them, on Qwen3-VL too.",
        defaults="features='projected'",
        cost="O(ND) to score, O(N log N) to select",
    )

    @property
    def label(self) -> str:
        return labelled("norm", self.space)

    def select(self, ctx: Context) -> Tensor:
        vectors = self.vectors(ctx)
        ctx.scored(length(vectors))
        return norm(vectors, ctx.count, valid=ctx.valid)
