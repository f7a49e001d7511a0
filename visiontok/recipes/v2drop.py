"""V2Drop: keep the tokens that a decoder layer still changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk, variation
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


def v2drop(states: Tensor, earlier: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens that the layer before the cut has changed most.

    Args:
        states: (N, D) or (B, N, D), hidden states on the input of the cut layer.
        earlier: the same shape, on the input of the layer before.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(variation(states, earlier), k, valid)


@dataclass(frozen=True)
class V2Drop(Method):
    """Three cuts by the variation of hidden states from layer to layer.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, left behind each cut.
    """

    layers: tuple[Layer, ...] = (3 / 32, 17 / 32, 22 / 32)
    shares: tuple[float, ...] = (0.5, 0.25, 1 / 576)

    card: ClassVar[Card] = Card(
        name="v2drop",
        title="three cuts in the decoder, tokens that a layer hardly changes go",
        paper="V2Drop (no identifier known)",
        venue="CVPR 2026",
        formula="top-K of ‖h_i - h'_i‖, on the inputs of the cut layer and of the one before it",
        stage="decoder",
        needs="features (hidden states); states on the input of the layer before the cut",
        official="LLaVA-1.5: layers 3, 17, 22 of 32 keep 1/2, 1/4 and one of 576 tokens; Qwen2-VL: 3, 16, 22 of 28 "
        "keep 1/4, 1/80 and one. Kept tokens keep their positions; batch 1, one image at a fixed place.",
        bugs="A text of more than 576 tokens is taken for an image; a ratio of 0 keeps one token; states stay on the "
        "module between calls.",
        departures="Any number of images, each with its own budget. Shares are of the original tokens, those of the "
        "code of what the cut before has left; the last cut keeps 1/576, one token of a LLaVA-1.5 image. On a "
        "shallow model cuts that fall on one layer become one.",
        defaults="layers=(3/32, 17/32, 22/32), shares=(0.5, 0.25, 1/576); for Qwen2-VL layers=(3/28, 16/28, 22/28), "
        "shares=(0.25, 0.0125, 0.0016).",
        cost="O(ND) and one copy of the visual states per cut",
        contract=Contract(question_independent=False, per_image=False, prefix_cacheable=True),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_states=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def select(self, ctx: Context) -> Tensor:
        return v2drop(ctx.features, ctx.attention.decoder_states(-1), ctx.count, valid=ctx.valid)
