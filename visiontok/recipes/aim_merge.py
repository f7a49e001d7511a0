"""AIM: rounds of bipartite matching merge the tokens of every frame before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..functional import apportion, bipartite, merge, rank, rank_within
from ..method import Card, Contract, Method, Selection

if TYPE_CHECKING:
    from ..context import Context


def aim_merge(
    tokens: Tensor, k: int | Tensor, *, valid: Tensor | None = None, official: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens at even places into their most similar one at an odd place, half of them per round, until ``k`` are
    left.

    Args:
        tokens: (B, N, D), the tokens of one frame per row.
        k: tokens to keep, int or (B,) long; at least one is left of every row that has any.
        valid: (B, N) bool, of which the true ones come first.
        official: means of two tokens whatever they stand for already, and the order that matching leaves: what stays,
            by falling similarity, then the odd places. Otherwise means of all original tokens, in raster order.

    Returns:
        merged tokens (B, M, D); (B, M) long, the place of the token that each of them grew from, -1 where a row has no
        more; and (B, N) long, that place for each token given, -1 for invalid ones.
    """
    x, (b, n, _) = tokens, tokens.shape
    ok = torch.ones(b, n, dtype=torch.bool, device=x.device) if valid is None else valid
    goal = torch.as_tensor(k, device=x.device).expand(b).clamp_min(1)
    place = torch.where(ok, torch.arange(n, device=x.device), -1)
    size, at = ok.float(), place  # at: where in the list a token is by now, alone or merged
    while bool(((left := ok.sum(-1)) > goal).any()):
        group = bipartite(x, torch.minimum(left // 2, left - goal), valid=ok)
        at = _read(group, at)
        count = int(group.max()) + 1
        x, mass = merge(x, group, count, None if official else size)
        size = mass.to(size)
        # A group stands where its token at an odd place did, which is written last; the spare one takes what is none.
        home = torch.where(group < 0, count, group)
        stood, place = place, place.new_full((b, count + 1), -1)
        for parity in (0, 1):
            place.scatter_(1, home[:, parity::2], stood[:, parity::2])
        place = place[:, :count]
        ok = torch.arange(count, device=x.device) < (group.amax(-1) + 1)[:, None]
        place = torch.where(ok, place, -1)
        if not official:
            order = torch.where(ok, place, n).argsort(-1)
            x = x.gather(1, order[..., None].expand_as(x))
            size, place, at = size.gather(1, order), place.gather(1, order), _read(order.argsort(-1), at)
    return x, place, _read(place, at)


def _read(table: Tensor, index: Tensor) -> Tensor:
    """Entries of table (B, M) at index (B, N); -1 where the index is."""
    return torch.where(index < 0, -1, table.gather(1, index.clamp_min(0)))


@dataclass(frozen=True)
class AimMerge(Method):
    """The merging of AIM, frame by frame; its pruning inside the language model is another stage."""

    card: ClassVar[Card] = Card(
        name="aim_merge",
        title="bipartite merging of the tokens of each frame, in rounds",
        paper="arXiv 2412.03248",
        venue="ICCV 2025",
        formula="per frame, until K remain: the r = min(⌊n/2⌋, n-K) pairs (even, odd) of largest cosine become their "
        "mean",
        stage="prompt",
        needs="features, grid",
        official="A quarter of the 196 tokens of every video frame, in two rounds. A mean of merged tokens does not "
        "count what they stand for; tokens keep the order that matching leaves.",
        bugs="A round that merges nothing returns nothing.",
        departures="Any K: full rounds, then what is left to do; means of original tokens, in raster order, which "
        "also decides who meets in the next round (fidelity='official' keeps both as published, but tokens stand in "
        "raster order). The budget is split over frames and crops by their size; tokens off the grid, such as "
        "image_newline, are dropped first.",
        defaults="The paper keeps 25 % before the language model of LLaVA-OneVision.",
        cost="O(N²D/4) per frame in the first round, a quarter of that in the next",
        contract=Contract(sync_free=False, order_free=False),
    )

    def select(self, ctx: Context) -> Selection:
        units, n = ctx.valid.shape
        placed = ctx.valid & (ctx.grid >= 0).all(-1)
        placed = torch.where(placed.any(-1, keepdim=True), placed, ctx.valid)  # nothing is known of the grid: one frame
        time = torch.where(placed, ctx.grid[..., 0].clamp_min(0), 0)
        frames = int(time.max()) + 1

        # One row per frame, its tokens in front.
        frame = torch.where(placed, time, -1)
        spot = rank_within(-torch.arange(n, device=time.device).expand_as(time), frame)
        row = torch.arange(units, device=time.device)[:, None] * frames + time
        sizes = torch.zeros(units * frames, dtype=torch.long, device=time.device)
        sizes.scatter_add_(0, row[placed], torch.ones_like(row[placed]))
        token = torch.zeros(units * frames, int(sizes.max()), dtype=torch.long, device=time.device)
        token[row[placed], spot[placed]] = torch.arange(n, device=time.device).expand_as(time)[placed]
        inside = torch.arange(token.shape[1], device=time.device) < sizes[:, None]
        unit = torch.arange(units * frames, device=time.device) // frames

        within = sizes.view(units, frames)
        quota = apportion(within, torch.minimum(ctx.count, placed.sum(-1)), within).flatten()
        merged, place, home = aim_merge(
            ctx.features[unit[:, None], token], quota, valid=inside, official=ctx.fidelity == "official"
        )

        there = (place >= 0) & (quota > 0)[:, None]
        u, kept = unit[:, None].expand_as(place)[there], token.gather(1, place.clamp_min(0))[there]
        keep, features = torch.zeros_like(ctx.valid), ctx.features.clone()
        keep[u, kept] = True
        features[u, kept] = merged[there]
        gone = inside & (quota > 0)[:, None]
        into = torch.full_like(frame, -1)
        into[unit[:, None].expand_as(token)[gone], token[gone]] = token.gather(1, home.clamp_min(0))[gone]
        loose = ctx.valid & ~placed
        spare = rank(torch.zeros_like(frame), loose) < (ctx.count - placed.sum(-1))[:, None]
        return Selection(keep=keep | (loose & spare), features=features, into=into)
