"""AIM: merge before the language model, then fewer tokens with every deep layer, by where attention leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ._cuts import cuts, listed
from .aim_merge import AimMerge

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class Aim(Method):
    """Bipartite merging, a linear pyramid of cuts by PageRank over attention, and an exit.

    Attributes:
        merged: share of the tokens that merging leaves.
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the merged tokens, what is left after each cut.
        exit: first decoder layer without visual tokens.
    """

    merged: float = 0.25
    layers: tuple[Layer, ...] = tuple(layer / 28 for layer in range(15, 22))
    shares: tuple[float, ...] = tuple(n / 8 for n in range(7, 0, -1))
    exit: Layer = 22 / 28

    card: ClassVar[Card] = Card(
        name="aim",
        title="bipartite merging, then a cut per deep layer by where attention leads, down to nothing",
        paper="arXiv 2412.03248",
        venue="ICCV 2025",
        formula="as aim_merge; then at the input of layer c: top-K_c of √mean_h p_hi², p = 1/n · M_hⁿ for n = 5 steps, "
        "M_h = softmax(10·q·k/√d) in layer c-1",
        stage="decoder",
        needs="features and grid for merging; where attention leads in the layer before each cut",
        official="LLaVA-OneVision: a quarter of the tokens after merging; from layer 14 of 28 on every layer loses an "
        "eighth of these, counted at its end. Tokens are hidden by a mask and never dropped, so that neither time nor "
        "memory is saved. Needs eager attention.",
        bugs="Costs are reported as if the layer that scores saw the smaller set already.",
        departures="Tokens are dropped. Attention is computed some rows at a time and never held; tokens of earlier "
        "turns, which have no rows, are left out of the walk. The layers, which are numbers in the paper, are "
        "fractions of the depth; those that meet in a shallow model are one. A budget is the average over all decoder "
        "layers. Merging as in aim_merge.",
        defaults="merged=0.25, layers=15/28 … 21/28, shares=7/8 … 1/8, exit=22/28.",
        cost="aim_merge; O(HN²d) five times per cut",
        contract=Contract(question_independent=False, per_image=False, sync_free=False, order_free=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        if not 0 < self.merged <= 1:
            raise ConfigError(f"merged={self.merged!r}: a share lies in (0, 1]")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_flow=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        pyramid = cuts(self, self.layers, tuple(self.merged * share for share in self.shares))
        merge = Stage(kind="prompt", method=AimMerge(), keep=Budget.ratio(self.merged))
        return (merge, *pyramid, Stage(kind="exit", layer=self.exit))

    def select(self, ctx: Context) -> Tensor:
        return topk(ctx.scored(ctx.attention.flow(-1)), ctx.count, ctx.valid)
