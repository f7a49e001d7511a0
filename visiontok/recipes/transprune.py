"""TransPrune: keep the tokens that modules still move, and those that the instruction looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage, labelled
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


def shares_of(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Non-negative scores (N,) or (B, N) over the sum of those that are ``valid`` and numbers."""
    kept = scores if valid is None else scores.masked_fill(~valid, 0.0)
    return kept / kept.nan_to_num(0.0).sum(-1, keepdim=True).clamp_min(1e-30)


def transprune(transition: Tensor, attention: Tensor | None, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens of the largest transition and attention, each as a share of all tokens.

    Args:
        transition: (N,) or (B, N), transition values summed over modules and layers.
        attention: (N,) or (B, N), what the instruction looks at; None for transitions alone.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``transition``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    scores = shares_of(transition, valid)
    return topk(scores if attention is None else scores + shares_of(attention, valid), k, valid)


@dataclass(frozen=True)
class TransPrune(Method):
    """Three cuts by token transitions and the attention of the instruction.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, left behind each cut.
        since: first layer whose transitions count; an index or a fraction of the depth.
        guided: whether the attention of the instruction counts, too.
    """

    layers: tuple[Layer, ...] = (7 / 32, 9 / 32, 12 / 32)
    shares: tuple[float, ...] = (0.875, 0.625, 0.125)
    since: Layer = 6 / 32
    guided: bool = True

    card: ClassVar[Card] = Card(
        name="transprune",
        title="three cuts in the decoder by how modules turn and stretch a token, and by the instruction's attention",
        paper="arXiv 2507.20630",
        venue="CVPR 2026",
        formula="t_i/Σ_j t_j + a_i/Σ_j a_j; t = Σ over layers l >= since and their modules x → y of ‖y_i‖/‖x_i‖ · "
        "e^(1-cos(x_i, y_i))/Σ_j e^(1-cos(x_j, y_j)), a the mean attention of the text rows",
        stage="decoder",
        needs="inputs and outputs of modules since layer 6 of 32; attention of the text rows in the layer before the "
        "cut (guided)",
        official="LLaVA-1.5 and 1.6: layers 7, 9, 12 of 32 keep 7/8, 5/8, 1/8, transitions summed since layer 6; "
        "attention of the cut layer itself, from its weights, computed for the purpose. Positions are compacted; "
        "batch 1.",
        bugs="The sum below the exponentials runs over text and all rows of the batch; no grouped-query attention; "
        "the mask behind a cut has the length before it.",
        departures="The sum is over the tokens of the image (fidelity='official': over everything). Attention of the "
        "layer before the cut, as the model computes it. Kept tokens keep their positions unless positions='compact'. "
        "Any number of images, "
        "each with its own budget. On a shallow model cuts that fall on one layer become one.",
        defaults="layers=(7/32, 9/32, 12/32), shares=(7/8, 5/8, 1/8), since=6/32, for every family.",
        cost="O(ND) per module, one attention row per text token and cut",
        contract=Contract(question_independent=False, per_image=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        self.stages()

    @property
    def label(self) -> str:
        return labelled(self.card.name, "" if self.guided else "ttv")

    def needs(self) -> Needs:
        return Needs(decoder_transition=(self.since,), decoder_text_rows=(-1,) if self.guided else ())

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def select(self, ctx: Context) -> Tensor:
        attention = ctx.attention.text_rows(-1) if self.guided else None
        return transprune(ctx.attention.transition(self.since), attention, ctx.count, valid=ctx.valid)
