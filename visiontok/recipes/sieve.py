"""SIEVE: attended tokens that the question does not already explain, each new in what is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, discount, residual
from ..method import Card, Contract, Layer, Method, Needs, Stage

if TYPE_CHECKING:
    from ..context import Context


def sieve(
    features: Tensor,
    text: Tensor,
    attention: Tensor | None,
    k: int | Tensor,
    *,
    energy: float = 0.75,
    text_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Picks:
    """Greedily the largest (attention · residual share)², discounted by cos² of residuals to those kept.

    Args:
        features: (N, D) or (B, N, D), hidden states.
        text: (T, D) or (B, T, D), those of the text behind the image.
        attention: (N,) or (B, N), what the text looks at; None counts as 1.
        k: tokens to keep, int or (B,) long.
        energy: share of the text's variance that the ridge leaves in front.
        text_valid: (T,) or (B, T) bool; without text the residual is the feature itself and its share 1.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    rest, share = residual(features, text, energy=energy, valid=text_valid)
    scores = share if attention is None else attention * share
    return discount(rest, scores.square(), k, valid)


@dataclass(frozen=True)
class Sieve(Method):
    """Attention, cross-modal residual and diversity in the residual space, at one cut in the decoder.

    In a prompt stage it works on embeddings, without attention.

    Attributes:
        layer: decoder layer whose input is cut; an index, or a fraction of the depth (never below layer 1).
        energy: share of the text's variance in front of the ridge.
    """

    layer: Layer = 0.5
    energy: float = 0.75

    card: ClassVar[Card] = Card(
        name="sieve",
        title="attended tokens that the text does not explain, diverse in what is left",
        paper="SIEVE, 2026 (no identifier known)",
        venue="preprint",
        formula="argmax_i (a_i·‖r_i‖/‖v_i‖)²·Π_{j∈S} (1 - cos²(r_i, r_j)), r = v - v·Tᵀ(T·Tᵀ + λ)⁻¹T, centred on the "
        "text T",
        stage="decoder",
        needs="features (hidden states), question tokens; attention of the text rows in the layer before the cut",
        official="No code is published. Attention mass is summed over the 12 of 32 heads that look at the image "
        "most; the layers of its several cuts are not stated.",
        departures="One cut. Attention is the mean over all heads; the paper's own ablation finds the number of "
        "heads irrelevant. Text is that behind the last image, without special tokens. Every image has its own "
        "budget.",
        defaults="layer=0.5, energy=0.75, for every family and budget.",
        cost="O(NTD + T³) once, O(ND) per pick",
        contract=Contract(question_independent=False, per_image=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy={self.energy!r}: a share lies in (0, 1]")

    def needs(self) -> Needs:
        return Needs(decoder_text_rows=(-1,), question=True)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cut", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        attention = ctx.attention.text_rows(-1) if ctx.stage == "decoder" else None
        picks = sieve(ctx.features, text, attention, ctx.count, energy=self.energy, text_valid=asked, valid=ctx.valid)
        return picks.keep
