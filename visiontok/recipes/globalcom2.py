"""GlobalCom2: the thumbnail decides how much each crop keeps, and helps to choose what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import apportion, rank, rank_within, topk
from ..method import Card, Contract, Layer, Tower, labelled
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


class Crops(NamedTuple):
    """A picture's thumbnail and crops, as groups of tokens.

    Attributes:
        group: (B, N) long, 0 for the thumbnail, 1 … for the crops in raster order; -1 off the grid.
        size: (B, G) long, tokens of each group, without padding.
        weight: (B, G), what a group is to keep in relation to the average; 0 for groups that are not there.
        score: (B, N), what ranks the tokens of a group.
    """

    group: Tensor
    size: Tensor
    weight: Tensor
    score: Tensor


def crops(logits: Tensor, grid: Tensor, *, temperature: float = 10.0, valid: Tensor | None = None) -> Crops:
    """Weigh the crops of pictures by what their thumbnail says, and score tokens by crop and thumbnail together.

    Args:
        logits: (B, N), attention logits of the CLS token.
        grid: (B, N, 3) long, (t, row, column): t = 0 the thumbnail, t = 1 the picture tiled from crops of the
            thumbnail's size, padding removed on both sides alike; -1 off the grid.
        temperature: of the softmax over the crops' sums of logits.
        valid: (B, N) bool.

    Returns:
        Crops.

    Reference:
        GlobalCom2, arXiv 2501.05179.
    """
    b = len(logits)
    g = logits.float()
    ok = torch.ones_like(g, dtype=torch.bool) if valid is None else valid
    placed = ok & (grid >= 0).all(-1)
    whole = placed & (grid[..., 0] == 0)
    tiled = placed & ~whole
    g = torch.where(placed, g, 0.0)
    at = torch.where(placed[..., None], grid[..., 1:], 0)
    side = torch.where(whole[..., None], at, 0).amax(1) + 1  # (B, 2) rows and columns of the thumbnail
    canvas = torch.where(tiled[..., None], at, -1).amax(1) + 1  # 0 where a picture is not tiled
    tiles = (canvas + side - 1) // side
    padding = (tiles * side - canvas) // 2
    crop = (at + padding[:, None]) // side[:, None]
    group = torch.where(tiled, 1 + crop[..., 0] * tiles[:, None, 1] + crop[..., 1], 0)
    groups = 1 + int(tiles.prod(-1).max()) if b else 1

    def total(x: Tensor, index: Tensor, where: Tensor) -> Tensor:
        """(B, G) sums of x (B, N) by group."""
        return x.new_zeros(b, groups).scatter_add(1, torch.where(where, index, 0), torch.where(where, x, 0))

    # The thumbnail cut into as many cells as there are crops; the last ones take what division leaves.
    cell = torch.minimum(at // (side // tiles.clamp_min(1)).clamp_min(1)[:, None], (tiles - 1).clamp_min(0)[:, None])
    shown = whole & (canvas > 0).all(-1, keepdim=True)
    mass = total(g, 1 + cell[..., 0] * tiles[:, None, 1] + cell[..., 1], shown)
    number = tiles.prod(-1, keepdim=True)
    here = torch.arange(groups, device=g.device)
    here = (here > 0) & (here <= number)
    share = (mass / temperature).masked_fill(~here, -torch.inf).softmax(-1).nan_to_num()  # no crops: NaN
    weight = torch.where(here, 1 + share - 1 / number.clamp_min(1), 0.0)
    weight[:, 0] = 1.0

    # Each tile of the picture also gets what the thumbnail, stretched to its size, says there.
    widest = side.amax(0).tolist() if b else [1, 1]
    flat = torch.where(whole, at[..., 0] * widest[1] + at[..., 1], widest[0] * widest[1])
    picture = g.new_zeros(b, widest[0] * widest[1] + 1).scatter(1, flat, g)
    source = ((at + 0.5) * (side / canvas.clamp_min(1))[:, None] - 0.5).clamp_min(0)
    low = torch.minimum(source.long(), (side - 1)[:, None])
    high = torch.minimum(low + 1, (side - 1)[:, None])
    step = source - low

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        return picture.gather(1, rows * widest[1] + columns)

    (up, left), (down, right), (y, x) = low.unbind(-1), high.unbind(-1), step.unbind(-1)
    above, below = (torch.lerp(read(line, left), read(line, right), x) for line in (up, down))
    stretched = torch.where(tiled, torch.lerp(above, below, y), 0.0)

    def scaled(x: Tensor) -> Tensor:
        length = total(x.square(), group, placed).sqrt().clamp_min(1e-12)
        return x / length.gather(1, group)

    score = torch.where(tiled, scaled(g) + scaled(stretched), g)
    size = total(torch.ones_like(group), group, placed)
    return Crops(torch.where(placed, group, -1), size, weight, score)


def globalcom2(
    logits: Tensor,
    grid: Tensor,
    k: Tensor,
    *,
    temperature: float = 10.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Exactly ``k`` tokens of the thumbnail and the crops.

    Args:
        logits: as in :func:`crops`.
        grid: as in :func:`crops`; tokens off the grid come last.
        k: (B,) long, tokens to keep.
        temperature: of the softmax over the crops.
        valid: (B, N) bool.

    Returns:
        (B, N) bool keep mask.
    """
    parts = crops(logits, grid, temperature=temperature, valid=valid)
    ok = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
    on = parts.size.sum(-1)
    quota = apportion(parts.size * parts.weight, torch.minimum(k, on), parts.size)
    keep = _best(parts, quota)
    loose = ok & (parts.group < 0)
    return keep | (loose & (rank(torch.zeros_like(logits), loose) < (k - on)[:, None]))


def globalcom2_official(
    logits: Tensor, grid: Tensor, ratio: Tensor, *, temperature: float = 10.0, valid: Tensor | None = None
) -> Tensor:
    """The published counts: every group rounded down, surplus of full crops lost, all tokens off the grid kept.

    Args:
        logits: as in :func:`crops`.
        grid: as in :func:`crops`.
        ratio: (B,), the share of the thumbnail that stays, and of the average crop.
        temperature: of the softmax over the crops.
        valid: (B, N) bool.

    Returns:
        (B, N) bool keep mask.
    """
    parts = crops(logits, grid, temperature=temperature, valid=valid)
    ok = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
    quota = (parts.size * (ratio[:, None] * parts.weight).clamp_max(1)).long()
    quota[:, 0] = quota[:, 0].clamp_min(1)
    return _best(parts, quota) | (ok & (parts.group < 0))


def _best(parts: Crops, quota: Tensor) -> Tensor:
    """(B, N) bool: the best tokens of each group, as many as it may keep."""
    placed = parts.group >= 0
    most = quota.gather(1, parts.group.clamp_min(0))
    return placed & (rank_within(parts.score, parts.group, placed) < most)


@dataclass(frozen=True)
class GlobalCom2(Attended):
    """Budgets for the crops of a picture, and choice of their tokens, by its thumbnail.

    Attributes:
        temperature: of the softmax that turns the crops' sums of logits into shares.
        scorer: ``cls`` (logits of the CLS token) or ``received`` (log of the mean attention received); by default what
            the tower offers.
        layer: tower layer of the attention; by default the last.
        tiled: whether pictures come as a thumbnail and crops; by default what the model does. Otherwise all tokens of a
            picture compete by their logits.
    """

    temperature: float = 10.0
    layer: Layer | None = -1
    tiled: bool | None = None

    of_cls = "cls_logits"

    card: ClassVar[Card] = Card(
        name="globalcom2",
        title="crop budgets and token choice by the thumbnail of a tiled picture",
        paper="arXiv 2501.05179",
        venue="AAAI 2026",
        formula="K_c ∝ n_c·(1 + softmax(g/T)_c - 1/C), g_c = sum of the thumbnail's logits over crop c; in c the "
        "top-K_c of l2(logits) + l2(stretched thumbnail)",
        stage="prompt",
        needs="grid; CLS logits of one tower layer, log of received attention on towers without CLS",
        official="The last tower layer with features of the one before; the thumbnail and every crop round their "
        "share down, what a full crop cannot take is lost, and all image_newline tokens stay, so that more than K "
        "remain.",
        bugs="One picture only; kept tokens of padded crops are written back at wrong places, so that newlines stand "
        "between wrong tokens; thumbnail tokens come in the order of their scores. Sums of 144 logits saturate the "
        "softmax.",
        departures="Exactly K tokens per picture: shares by largest remainders, surplus to the others, image_newline "
        "tokens last (fidelity='official' restores the published counts). Crops that the model scales down before it "
        "tiles them are taken as tiles of the thumbnail's size. Towers without CLS use the log of received "
        "attention, a substitute: globalcom2[received]. Models without thumbnail and crops rank all tokens by their "
        "logits, and say so: globalcom2[untiled].",
        defaults="temperature=10; the last tower layer; the paper's ratios are 0.25 and 0.1.",
        cost="O(HNd) for one attention row, O(N log N) to select",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r}: give a positive number")

    @property
    def label(self) -> str:
        return labelled(super().label, "untiled" if self.tiled is False else "")

    def adapt(self, tower: Tower) -> GlobalCom2:
        return replace(super().adapt(tower), tiled=tower.thumbnail if self.tiled is None else self.tiled)

    def select(self, ctx: Context) -> Tensor:
        grid = ctx.need_grid()
        logits = self.attention(ctx)
        if self.scorer == "received":
            logits = logits.clamp_min(1e-30).log()
        if not self.tiled:
            return topk(torch.where((grid >= 0).all(-1), logits, -torch.inf), ctx.count, ctx.valid)
        if ctx.fidelity == "official":
            ratio = ctx.count / (ctx.valid & (grid >= 0).all(-1)).sum(-1)
            return globalcom2_official(logits, grid, ratio, temperature=self.temperature, valid=ctx.valid)
        return globalcom2(logits, grid, ctx.count, temperature=self.temperature, valid=ctx.valid)
