"""SCOPE: attended tokens that stand in for all others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, facility
from ..method import Card, Contract, Needs
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def scope(
    features: Tensor,
    attention: Tensor,
    k: int | Tensor,
    *,
    alpha: float = 1.0,
    combine: Literal["multiply", "add"] = "multiply",
    valid: Tensor | None = None,
) -> Picks:
    """Facility location weighted by attention: gain_i · a_i^α, or gain_i + a_i^α.

    Args:
        features: (N, D) or (B, N, D), before the projector.
        attention: (N,) or (B, N); negative where a token has no patch, which then comes last.
        k: tokens to keep, int or (B,) long.
        alpha: weight of the attention; 0 leaves coverage alone.
        combine: how gain and attention meet.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    power = torch.where(attention < 0, torch.nan, attention.float()) ** alpha
    power = torch.where(attention < 0, torch.nan, power)  # NaN to the power of 0 is 1
    if combine == "add":
        return facility(features, k, bonus=power, valid=valid)
    return facility(features, k, scale=power, valid=valid)


@dataclass(frozen=True)
class Scope(Attended):
    """Coverage of the encoder's features, weighted by attention.

    Attributes:
        alpha: exponent of the attention.
        combine: ``multiply`` or ``add``.
        scorer: ``cls`` or ``received``; by default what the tower offers.
        layer: tower layer of the scorer; by default the one the features come from.
    """

    alpha: float = 1.0
    combine: Literal["multiply", "add"] = "multiply"

    card: ClassVar[Card] = Card(
        name="scope",
        title="coverage of all tokens by attended ones (facility location)",
        paper="arXiv 2510.24214",
        venue="NeurIPS 2025",
        formula="argmax_i a_i^α·Σ_j max(0, cos(x_i, x_j) - c_j), c_j = max(0, max_{s∈S} cos(x_s, x_j))",
        stage="prompt",
        needs="projector inputs; CLS attention of one tower layer, received attention on towers without CLS",
        official="Selects in the model's dtype, with the attention summed over heads and the budget split over the "
        "crops of an image; every pick computes all gains anew.",
        departures="Gains in float64, kept up to date from the columns a pick changes; head means; one budget per "
        "image. Towers without CLS: scope[received]. Late picks whose gain is 0 go by index.",
        defaults="alpha=1, combine=multiply; the layer the features come from: -2 for CLIP towers in LLaVA.",
        cost="O(N²D) once, at most O(N²) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"alpha={self.alpha!r}: an exponent of at least 0")
        if self.combine not in ("multiply", "add"):
            raise ConfigError(f"combine={self.combine!r}: use 'multiply' or 'add'")

    def needs(self) -> Needs:
        return replace(super().needs(), encoder_features=True)

    def select(self, ctx: Context) -> Tensor:
        picks = scope(
            ctx.need_encoder_features(),
            self.attention(ctx),
            ctx.count,
            alpha=self.alpha,
            combine=self.combine,
            valid=ctx.valid,
        )
        return picks.keep
