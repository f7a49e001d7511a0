"""PruneSID: principal components as groups, near-duplicates suppressed in each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..functional import apportion, components, quota, rank, suppress, topk
from ..kernels import cosine
from ..method import Card, Contract, Needs
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def prunesid(
    features: Tensor, scores: Tensor, k: int | Tensor, *, valid: Tensor, factor: Tensor, official: bool = False
) -> Tensor:
    """Group tokens by principal component, suppress near-duplicates, and share the budget out by what survives.

    Args:
        features: (B, N, D), before the projector.
        scores: (B, N), attention.
        k: tokens to keep, int or (B,) long.
        valid: (B, N) bool.
        factor: (B,) float, how many times the mean cosine of the image makes two tokens of a group near-duplicates.
        official: the published rounding, with one token of the budget given to CLS: ``k`` - 1 visual tokens.

    Returns:
        (B, N) bool keep mask.
    """
    count = torch.minimum(torch.as_tensor(k, device=valid.device).expand(len(valid)), valid.sum(1))
    groups = (count.div(4, rounding_mode="floor")).clamp_min(1)
    group = components(features, groups, valid)

    similarity = cosine(features)
    pairs = (valid[:, :, None] & valid[:, None]).triu(1)
    mean = torch.where(pairs, similarity, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    close = similarity > (factor * mean)[:, None, None]
    survives = suppress(close & (group[:, :, None] == group[:, None]), scores, valid)

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(group).scatter_add(1, group, (x & valid).long())

    size, survivors = total(valid), total(survives)  # (B, N), groups that do not exist are empty
    least = size.clamp_max(1)
    most = torch.minimum(5 * (count[:, None] + 63).div(64, rounding_mode="floor"), survivors)
    most = _raise(most, size, count)
    if official:
        share = _published(survivors, least, most, count)
    else:
        share = least + apportion(survivors, count - least.sum(1), most - least)
    order = torch.where(survives, 0, valid.shape[1]) + rank(scores, valid)
    return quota(-order, group, share, valid)


def _raise(caps: Tensor, size: Tensor, total: Tensor) -> Tensor:
    """The caps, all raised by as little as lets them hold ``total``, but none above its size."""
    low, high = torch.zeros_like(total), total.clone()
    for _ in range(int(caps.shape[1]).bit_length() + 1):  # the least that is enough lies in low … high
        middle = (low + high).div(2, rounding_mode="floor")
        enough = torch.minimum(caps + middle[:, None], size).sum(1) >= total
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return torch.minimum(caps + high[:, None], size)


def _published(survivors: Tensor, least: Tensor, most: Tensor, count: Tensor) -> Tensor:
    """Cumulative rounding, clipped, what is missing filled into the groups with most survivors."""
    rest = (count - least.sum(1) - 1).clamp_min(0)[:, None]  # one for CLS
    ends = (survivors.cumsum(1) / survivors.sum(1, keepdim=True).clamp_min(1) * rest).round().long()
    share = torch.minimum(least + ends.diff(dim=1, prepend=torch.zeros_like(rest)), most)
    missing = rest + least.sum(1, keepdim=True) - share.sum(1, keepdim=True)
    order = survivors.sort(dim=1, descending=True, stable=True).indices
    room = (most - share).gather(1, order)
    filled = torch.minimum(room, (missing - (room.cumsum(1) - room)).clamp_min(0))
    return share + torch.zeros_like(share).scatter(1, order, filled)


@dataclass(frozen=True)
class PruneSID(Attended):
    """Semantic groups by principal components; intra-group suppression."""

    card: ClassVar[Card] = Card(
        name="prunesid",
        title="principal components as groups, near-duplicates suppressed in each",
        paper="arXiv 2603.09480",
        venue="ICLR 2026",
        formula="group(i) = argmax_c |V_ic|, V = PCA(sigmoid(x)), K/4 components; suppressed in groups: cos(x_i, "
        "x_j) > K/32·mean cos; 1 + share ∝ survivors",
        stage="prompt",
        needs="projector inputs; CLS attention of one tower layer, received attention on towers without CLS",
        official="Randomised PCA with K/4 components, so that results depend on the state of the random numbers; CLS "
        "is one of the K tokens, so that K-1 visual ones, fewer than K remain; tokens come group by group. "
        "Suppression starts at K/32 times the mean cosine, which is never reached for K >= 128.",
        departures="An exact eigendecomposition: the same picture gives the same groups. Exactly K visual tokens in "
        "raster order, shared out by largest remainders. Towers without CLS: prunesid[received]. fidelity='official' "
        "has the published rounding and K-1 tokens.",
        defaults="Suppression at K/32 times the mean cosine on CLIP towers, at max(18K/N, 1) times it elsewhere "
        "(Qwen); the layer the features come from.",
        cost="O(N²D + min(N, D)³) once, O(N) per token",
        contract=Contract(sync_free=False),
    )

    def needs(self) -> Needs:
        return replace(super().needs(), encoder_features=True)

    def select(self, ctx: Context) -> Tensor:
        scores = self.attention(ctx)
        features = ctx.need_encoder_features()
        seen = ctx.valid & (scores >= 0) & features.isfinite().all(-1)  # what has no patch belongs to no group
        factor = ctx.count / 32 if ctx.has_cls else (18 * ctx.count / seen.sum(1).clamp_min(1)).clamp_min(1)
        official = ctx.fidelity == "official"
        keep = prunesid(features, scores, ctx.count, valid=seen, factor=factor, official=official)
        return keep if official else topk(keep.float(), ctx.count, ctx.valid)
