"""HiPrune: anchors with their neighbours from a middle layer, registers from a deep one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import anchors, rank, topk
from ..method import Card, Contract, Layer, Method, Needs, Tower

if TYPE_CHECKING:
    from ..context import Context


def hiprune(
    object_scores: Tensor,
    deep_scores: Tensor,
    grid: Tensor,
    k: int | Tensor,
    *,
    alpha: float = 0.1,
    valid: Tensor | None = None,
) -> Tensor:
    """The best tokens of a middle layer with their four neighbours, filled up with the best of a deep layer.

    Args:
        object_scores: (N,) or (B, N), received attention of the object layer.
        deep_scores: (N,) or (B, N), received attention of the deep layer.
        grid: (N, 3) or (B, N, 3) long, (t, row, column), -1 off the grid.
        k: tokens to keep, int or (B,) long.
        alpha: share of the budget that goes to anchors and neighbours: round(alpha·k/5) anchors.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``object_scores``, exactly ``k`` true.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    count = (torch.as_tensor(k, device=grid.device).double() * alpha / 5).round().long()  # half to even, as published
    anchor, neighbour = anchors(object_scores, count, grid, valid)
    # Tiers, each ranked by its own layer: anchors, neighbours, registers.
    n = object_scores.shape[-1]
    tier = torch.where(anchor, 0, torch.where(neighbour, n, 2 * n))
    return topk(-(tier + torch.where(anchor, rank(object_scores, valid), rank(deep_scores, valid))), k, valid)


def hiprune_official(
    object_scores: Tensor, deep_scores: Tensor, grid: Tensor, k: Tensor, *, alpha: float, valid: Tensor
) -> Tensor:
    """The published selection with its quirks, for one layout of scores per call.

    Neighbours are index ±1 and ±width, clamped to the image, so that they wrap around row ends and gather in the
    corners. Chosen tokens lose 1 of their deep score, which only excludes them while scores stay below 1; with scores
    that are sums over queries, as on Qwen, a token can be chosen twice and fewer than ``k`` remain.

    Args:
        object_scores: (B, N).
        deep_scores: (B, N), on the scale of the published code: means over queries, or sums.
        grid: (B, N, 3) long, read for the width of the image only.
        k: (B,) long.
        alpha: as in :func:`hiprune`.
        valid: (B, N) bool.

    Returns:
        (B, N) bool keep mask, at most ``k`` true.
    """
    keep = torch.zeros_like(valid)
    for b, budget in enumerate(k.tolist()):
        slots = valid[b].nonzero()[:, 0]
        width = int(grid[b, slots, 2].max()) + 1
        number = round(budget * alpha / 5)
        best = topk(object_scores[b], number, valid[b]).nonzero()[:, 0] if number else slots[:0]
        steps = torch.tensor([0, 1, -1, width, -width], device=slots.device)
        chosen = (best[:, None] + steps).clamp(0, len(slots) - 1).unique()
        deep = deep_scores[b].clone()
        deep[chosen] -= 1
        keep[b, chosen] = True
        if budget > len(chosen):
            keep[b] |= topk(deep, budget - len(chosen), valid[b])
    return keep


@dataclass(frozen=True)
class HiPrune(Method):
    """Hierarchical attention of the vision tower: objects in the middle, the whole scene in the deep layers.

    Attributes:
        object_layer: tower layer of the anchors; by default a third of the depth, on towers without CLS the last
            full-attention layer of the first half.
        deep_layer: tower layer of the registers; by default the one the features come from.
        alpha: share of the budget for anchors and their neighbours.
    """

    object_layer: Layer | None = None
    deep_layer: Layer | None = None
    alpha: float = 0.1

    card: ClassVar[Card] = Card(
        name="hiprune",
        title="anchors, their neighbours and registers from two layers of vision attention",
        paper="arXiv 2508.00553",
        venue="ACL 2026 Findings",
        formula="round(αK/5) best of r^middle, their 4 neighbours, then the best of r^deep; r_j = mean_h mean_i "
        "softmax(q_i·k/√d)_hj",
        stage="prompt",
        needs="received attention of two tower layers; grid",
        official="Object layer 9 of 24 (LLaVA) and 16 of 32 (Qwen2.5-VL), counted from 1; the budget is split over "
        "the crops of an image.",
        bugs="Neighbours wrap around row ends and are clamped into the corners; on Qwen the scores are sums, so that "
        "chosen tokens can be chosen again and fewer than K remain.",
        departures="Neighbours follow the grid; exactly K tokens; on Qwen the attention the tower really uses, not a "
        "softmax over all patches in windowed layers. fidelity='official' brings wrap, clamp and double choice back.",
        defaults="LLaVA: object_layer=8 of 24, deep_layer=-2. Qwen2.5-VL: object_layer=15 of 32, deep_layer=-1.",
        cost="O(HN²d) for the two attention maps, O(N log N) to select",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r}: a share of the budget lies in [0, 1]")

    def adapt(self, tower: Tower) -> HiPrune:
        middle = [i for i in tower.full_attention if i < tower.depth / 2]
        default = tower.depth // 3 if tower.has_cls or not middle else middle[-1]
        return replace(
            self,
            object_layer=default if self.object_layer is None else self.object_layer,
            deep_layer=tower.feature_layer if self.deep_layer is None else self.deep_layer,
        )

    def needs(self) -> Needs:
        return Needs(vision_received=tuple(i for i in (self.object_layer, self.deep_layer) if i is not None))

    def select(self, ctx: Context) -> Tensor:
        middle = ctx.attention.received(1 / 3 if self.object_layer is None else self.object_layer)
        deep = ctx.scored(ctx.attention.received(-1 if self.deep_layer is None else self.deep_layer))
        if ctx.fidelity == "fixed":
            return hiprune(middle, deep, ctx.need_grid(), ctx.count, alpha=self.alpha, valid=ctx.valid)
        if not ctx.has_cls:
            # The published Qwen code sums over queries where we average: its scores have mean 1 over the tokens.
            deep = deep / (torch.where(ctx.valid, deep, 0.0).sum(-1, keepdim=True) / ctx.valid.sum(-1, keepdim=True))
        return hiprune_official(middle, deep, ctx.need_grid(), ctx.count, alpha=self.alpha, valid=ctx.valid)
