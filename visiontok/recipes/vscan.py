"""VScan: the best tokens of every window and of the whole image, the rest merged into them; then a cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..functional import absorb, nearest_kept, rank, rank_within
from ..method import Card, Contract, Layer, Method, Needs, Selection, Stage, Tower
from .pyramiddrop import PyramidDrop

if TYPE_CHECKING:
    from ..context import Context


def vscan(
    features: Tensor,
    shallow: Tensor,
    deep: Tensor,
    grid: Tensor,
    k: int | Tensor,
    *,
    window: int = 6,
    rounded_down: bool = False,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the budget by windows of a shallow layer, the other half by a deep one; dropped tokens are merged.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        shallow: (N,) or (B, N), attention of a shallow tower layer.
        deep: (N,) or (B, N), attention of a deep tower layer.
        grid: (N, 3) or (B, N, 3) long, (t, row, column), -1 off the grid; such tokens come last and are not merged.
        k: tokens to keep, int or (B,) long.
        window: rows and columns of a window.
        rounded_down: every window keeps the same number, rounded down, so that fewer than ``k`` remain, as in the
            published code for LLaVA; otherwise at most the number rounded up, and the best of these.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N); features of the shape given, each kept token the mean of those that resemble it
        most and its own; and long (N,) or (B, N), the place of the kept token each went to, -1 for none.
    """
    ok = torch.ones_like(deep, dtype=torch.bool) if valid is None else valid
    count = torch.minimum(torch.as_tensor(k, device=ok.device), ok.sum(-1))
    half = count // 2
    placed = ok & (grid >= 0).all(-1)
    cell = torch.cat([grid[..., :1], grid[..., 1:] // window], -1)
    across = torch.cat([torch.where(placed[..., None], cell, 0).flatten(0, -2), cell.new_zeros(1, 3)]).amax(0) + 1
    code = torch.where(placed, (cell[..., 0] * across[1] + cell[..., 1]) * across[2] + cell[..., 2], -1)
    place = rank_within(shallow, code, placed)
    windows = (placed & (place == 0)).sum(-1).clamp_min(1)
    cap = half // windows if rounded_down else (half + windows - 1) // windows
    local = placed & (place < cap[..., None])
    if not rounded_down:
        local = local & (rank(shallow, local) < half[..., None])

    others = ok & ~local
    room = count - (half if rounded_down else local.sum(-1))
    keep = local | (others & (rank(deep, others) < room[..., None]))
    group = nearest_kept(features, keep, placed | keep)
    merged, _ = absorb(features, group, torch.ones_like(deep), 1.0)
    return keep, merged, group


@dataclass(frozen=True)
class VScan(Method):
    """Local tokens of a shallow layer and global tokens of a deep one take over the rest.

    Attributes:
        window: rows and columns of a window; by default 6 on towers with CLS and 4 elsewhere.
        scorer: ``cls`` (CLS attention) or ``received`` (mean attention received); by default what the tower offers.
        shallow_layer: tower layer of the local tokens; by default 5/24 of the depth, on towers with windowed attention
            the first layer without windows.
        deep_layer: tower layer of the global tokens; by default the one the features come from.
        cut: decoder layer of the second stage, which keeps what the last token would look at there; None for none.
        left: share of the first stage's tokens that the cut leaves.
    """

    window: int | None = None
    scorer: Literal["cls", "received"] | None = None
    shallow_layer: Layer | None = None
    deep_layer: Layer | None = None
    cut: Layer | None = None
    left: float = 1 / 3

    card: ClassVar[Card] = Card(
        name="vscan",
        title="local and global tokens by attention of two tower layers, the others merged into them",
        paper="arXiv 2505.22654",
        venue="TMLR 2026",
        formula="K/2 best of a^shallow, at most ⌈K/2/windows⌉ per window; K/2 best of a^deep; z_j = mean of z over the "
        "tokens nearest to j",
        stage="prompt",
        needs="features, grid; CLS attention of two tower layers, received attention on towers without CLS",
        official="CLIP: 16 windows of 6 × 6 tokens, layers 5 and -2, CLS attention; every window keeps the same "
        "number, rounded down, so that fewer than K remain. Qwen2.5-VL: windows of 4 × 4, layers 7 and 31, received "
        "attention; a window keeps at most the number rounded up. A second stage cuts inside the language model, at "
        "layer 16 of 32 (Qwen: 14 of 28), as pyramiddrop does: a third is left.",
        departures="Exactly K tokens: the rule of the Qwen code everywhere, and where windows are too small the deep "
        "layer fills up (fidelity='official' rounds down on towers with CLS). Stage 1 alone, which needs nothing "
        "inside the language model, unless cut names a layer; a budget is the average over all layers then. Tokens off "
        "the grid, such as image_newline, come last and are merged into none. One budget per image.",
        defaults="LLaVA: window=6, shallow_layer=5 of 24, deep_layer=-2. Qwen2.5-VL: window=4, 7 and 31 of 32.",
        cost="O(HNd) for two attention rows, O(HN²d) on towers without CLS; O(NKD) to merge",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.scorer not in (None, "cls", "received"):
            raise ConfigError(f"scorer={self.scorer!r}: use 'cls' or 'received'")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window!r}: a window has at least one row and column")
        if not 0 < self.left <= 1:
            raise ConfigError(f"left={self.left!r}: a share lies in (0, 1]")

    def adapt(self, tower: Tower) -> VScan:
        windowed = len(tower.full_attention) < tower.depth
        shallow = tower.full_attention[0] if windowed and tower.full_attention else tower.depth * 5 // 24
        return replace(
            self,
            window=self.window or (6 if tower.has_cls else 4),
            scorer=self.scorer or ("cls" if tower.has_cls else "received"),
            shallow_layer=shallow if self.shallow_layer is None else self.shallow_layer,
            deep_layer=tower.feature_layer if self.deep_layer is None else self.deep_layer,
        )

    def stages(self) -> tuple[Stage, ...]:
        if self.cut is None:
            return super().stages()
        first = 1 / 6  # of LLaVA's 576 tokens 96, of which 32 are left: 64 on average
        return (
            Stage(kind="prompt", method=self, keep=Budget.ratio(first)),
            Stage(kind="cut", layer=self.cut, method=PyramidDrop(), keep=Budget.ratio(first * self.left)),
        )

    def needs(self) -> Needs:
        layers = tuple(i for i in (self.shallow_layer, self.deep_layer) if i is not None)
        return Needs(vision_received=layers) if self.scorer == "received" else Needs(vision_cls=layers)

    def select(self, ctx: Context) -> Selection:
        read = ctx.attention.received if self.scorer == "received" else ctx.attention.cls
        keep, features, into = vscan(
            ctx.features,
            read(5 / 24 if self.shallow_layer is None else self.shallow_layer),
            ctx.scored(read(-1 if self.deep_layer is None else self.deep_layer)),
            ctx.need_grid(),
            ctx.count,
            window=self.window or 6,
            rounded_down=ctx.fidelity == "official" and self.scorer != "received",
            valid=ctx.valid,
        )
        return Selection(keep=keep, features=features, into=into)
