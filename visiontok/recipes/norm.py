"""Norm: keep the longest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import norm as length
from ..functional import topk
from ..method import Card, Method

if TYPE_CHECKING:
    from ..context import Context


def norm(features: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens of largest Euclidean length.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(length(features), k, valid)


@dataclass(frozen=True)
class Norm(Method):
    """Top-k by length: the near-free stand-in for the projector's sensitivity."""

    card: ClassVar[Card] = Card(
        name="norm",
        title="top-k by the length of the projected token",
        paper="-",
        venue="baseline",
        formula="top-K of ‖z_i‖₂",
        stage="prompt",
        needs="features",
        departures="Features behind the projector.",
        defaults="no option",
        cost="O(ND) to score, O(N log N) to select",
    )

    def select(self, ctx: Context) -> Tensor:
        return norm(ctx.features, ctx.count, valid=ctx.valid)
