"""FEATHER: meaning without places, and an even grid beside it, so that no region of the picture is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import rank, topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


def strided(grid: Tensor, step: int | Tensor) -> Tensor:
    """Every ``step``-th row and column, from the first of each.

    Args:
        grid: (N, 3) or (B, N, 3) long, (t, row, column); tokens at -1 are none of them.
        step: int or (B,) long.

    Returns:
        bool (N,) or (B, N).
    """
    by = torch.as_tensor(step, device=grid.device)[..., None, None]
    return (grid >= 0).all(-1) & (grid[..., 1:] % by == 0).all(-1)


def feather(scores: Tensor, grid: Tensor, k: int | Tensor, *, stride: int = 3, valid: Tensor | None = None) -> Tensor:
    """An even grid, and the best of the others.

    Args:
        scores: (N,) or (B, N).
        grid: (N, 3) or (B, N, 3) long, (t, row, column), -1 off the grid.
        k: tokens to keep, int or (B,) long.
        stride: of the grid, in rows and columns; wider where it would take more than half of ``k``.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``scores``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = torch.as_tensor(k, device=ok.device).expand(ok.shape[:-1])
    wide = (2 * ok.sum(-1) / count.clamp_min(1)).sqrt().ceil().long().clamp_min(stride)
    even = strided(grid, wide) & ok & ~scores.isnan()
    first = rank(scores, even) + torch.where(even, 0, ok.shape[-1])  # the grid, then the best of the others
    return topk(-torch.where(even, first, rank(scores, ok & ~even) + ok.shape[-1]), k, ok)


@dataclass(frozen=True)
class Feather(Method):
    """Two cuts by attention without rotary positions, the first with an even grid.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, what is left after each cut.
        stride: of the grid that the first cut keeps, in rows and columns.
        reduction: for ``fidelity="official"``: share of the tokens that attention drops at the first cut; at the second
            this is its square of what is left that stays, whatever the budget.
        part: which of the cuts this is.
    """

    layers: tuple[Layer, ...] = (8 / 32, 16 / 32)
    shares: tuple[float, ...] = (0.3733, 0.0329)
    stride: int = 3
    reduction: float = 0.7
    part: Literal["first", "later"] = "first"

    card: ClassVar[Card] = Card(
        name="feather",
        title="two cuts in the decoder by the last token's attention without positions, the first with an even grid",
        paper="arXiv 2412.13180",
        venue="ICCV 2025",
        formula="mean_h softmax_{i visual}(q_last·k/√d)_hi with q and k before rotary positions, in the layer before "
        "the cut; first cut: every third row and column and the best of the others; second: the best",
        stage="decoder",
        needs="grid; attention without rotary positions of the last prompt token in the layer before each cut",
        official="Prismatic, 576 tokens: at layer 8 of 32 the union of the best 30 % and a grid of stride 3, at layer "
        "16 the best 9 % of those, so another number than K remain. One image, a square grid.",
        bugs="Comments say that the second cut spares the grid; the code does not.",
        departures="Exactly K tokens: what the grid and the best have in common is filled with the next best "
        "(fidelity='official' keeps their union and ignores keep). A grid that would take more than half of K is "
        "wider. Any grid, several images: the softmax is over the visual tokens of the prompt. A budget is the average "
        "over all decoder layers.",
        defaults="layers=8/32, 16/32; shares=0.3733, 0.0329, which is what the published code leaves on 576 tokens; "
        "stride=3.",
        cost="per cut: queries, keys and values of one layer again, O(ND²), and one attention row, O(HNd)",
        contract=Contract(question_independent=False, per_image=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        if self.stride < 1:
            raise ConfigError(f"stride={self.stride!r}: at least 1")
        if not 0 < self.reduction < 1:
            raise ConfigError(f"reduction={self.reduction!r}: a share between 0 and 1")
        if self.part not in ("first", "later"):
            raise ConfigError(f"part={self.part!r}: use 'first' or 'later'")
        cuts(self, self.layers, self.shares)

    def needs(self) -> Needs:
        return Needs(decoder_unturned_row=(-1,))

    def stages(self) -> tuple[Stage, ...]:
        first, *others = cuts(self, self.layers, self.shares)
        return (first, *(replace(stage, method=replace(self, part="later")) for stage in others))

    def select(self, ctx: Context) -> Tensor:
        scores, left = ctx.scored(ctx.attention.unturned_row(-1)), 1 - self.reduction
        if self.part == "later":
            official = (ctx.valid.sum(-1).double() * left * left + 1e-9).long().clamp_min(1)
            return topk(scores, official if ctx.fidelity == "official" else ctx.count, ctx.valid)
        if ctx.fidelity == "official":
            best = topk(scores, (ctx.valid.sum(-1).double() * left + 1e-9).long().clamp_min(1), ctx.valid)
            return best | (strided(ctx.need_grid(), self.stride) & ctx.valid)
        return feather(scores, ctx.need_grid(), ctx.count, stride=self.stride, valid=ctx.valid)
