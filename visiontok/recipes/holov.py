"""HoloV: the budget shared out over stretches of the picture, the most attended tokens in each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import apportion, quota, rank, topk
from ..kernels import cosine
from ..method import Card, Contract, Tower
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def stretches(place: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """Number of the stretch each place lies in, of ``count`` stretches of equal length, the first ones one longer.

    Args:
        place: (B, N) long, 0 … tokens-1.
        tokens: (B,) long.
        count: (B,) long.
    """
    length, longer = tokens.div(count, rounding_mode="floor")[:, None], tokens.remainder(count)[:, None]
    border = longer * (length + 1)
    behind = longer + (place - border).div(length.clamp_min(1), rounding_mode="floor")
    return torch.where(place < border, place.div(length + 1, rounding_mode="floor"), behind)


def stretch_weights(
    features: Tensor, attention: Tensor, stretch: Tensor, valid: Tensor, *, beta: float = 0.09, official: bool = False
) -> Tensor:
    """Mean over each stretch of attention + β · variance of the cosines to the others of the stretch.

    The variance is scaled to the attention's mean, stretch by stretch; its sum includes the token's own entry, as 0.

    Args:
        features: (B, N, D).
        attention: (B, N).
        stretch: (B, N) long in 0 … N-1.
        valid: (B, N) bool.
        beta: weight of the variance.
        official: the attention of a stretch of one token is not multiplied by 1000, as that of the others is.

    Returns:
        (B, N) float32, per stretch; 0 for stretches without tokens.
    """
    together = (stretch[:, :, None] == stretch[:, None]) & valid[:, :, None] & valid[:, None]
    others = together & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    similarity = torch.where(others, cosine(features), 0.0).double()
    size = together.sum(-1)
    mean = similarity.sum(-1) / (size - 1).clamp_min(1)
    spread = torch.where(together, (similarity - mean[..., None]).square(), 0.0).sum(-1) / (size - 1).clamp_min(1)
    heat = torch.where(valid, attention, 0.0).double() * 1e3

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(1, stretch, torch.where(valid, x, 0.0))

    count = total(valid.double()).clamp_min(1)
    scale = (total(heat.abs()) / count) / (total(spread.abs()) / count + 1e-6)
    weights = total(heat + beta * spread * scale.gather(1, stretch)) / count
    if official:
        weights = torch.where(count == 1, total(heat) / 1e3, weights)
    return weights.float()


def holov(
    features: Tensor,
    attention: Tensor,
    place: Tensor,
    k: int | Tensor,
    *,
    stretches_of: Tensor,
    beta: float = 0.09,
    valid: Tensor,
    official: bool = False,
) -> Tensor:
    """Share the budget out over stretches of the picture and keep the most attended tokens of each.

    Args:
        features: (B, N, D), behind the projector.
        attention: (B, N).
        place: (B, N) long, of each token in raster order.
        k: tokens to keep, int or (B,) long.
        stretches_of: (B,) long, number of stretches of each picture.
        beta: weight of the local variance.
        valid: (B, N) bool.
        official: round down, then one more for each of the best stretches; what a full stretch cannot take is lost, so
            that fewer than ``k`` may remain.

    Returns:
        (B, N) bool keep mask.
    """
    tokens = valid.sum(1)
    count = torch.minimum(torch.as_tensor(k, device=valid.device).expand(len(valid)), tokens)
    n = valid.shape[1]
    stretch = stretches(place, tokens.clamp_min(1), stretches_of.clamp_min(1)).clamp(0, n - 1)
    size = torch.zeros_like(place).scatter_add(1, stretch, valid.long())
    weights = stretch_weights(features, attention, stretch, valid, beta=beta, official=official)
    if official:
        exists = torch.arange(n, device=valid.device) < torch.minimum(tokens, stretches_of)[:, None]
        share = (weights / (weights.sum(1, keepdim=True) + 1e-6) * count[:, None]).floor().long()
        share = torch.where(exists, share, 0)
        share = share + (exists & (rank(weights, exists) < (count - share.sum(1))[:, None]))
        share = torch.minimum(share, size)
    else:
        share = apportion(weights, count, size)
    return quota(attention, stretch, share, valid)


@dataclass(frozen=True)
class HoloV(Attended):
    """Attention inside stretches, stretches by attention and variety.

    Attributes:
        stretches: runs of neighbouring tokens in raster order; by default 16 on CLIP towers, elsewhere about 16/9 of
            the tokens per token kept.
        beta: weight of the variance.
        scorer: ``cls`` or ``received``; by default what the tower offers.
        layer: tower layer of the scorer; by default the one the features come from.
    """

    stretches: int | None = None
    beta: float = 0.09

    card: ClassVar[Card] = Card(
        name="holov",
        title="budget over stretches of the picture by attention and variety, in each the most attended",
        paper="arXiv 2510.02912",
        venue="NeurIPS 2025",
        formula="K_w ∝ mean_{i∈w}(a_i + β·s_w·v_i), v_i = variance of cos(z_i, z_j) over stretch w, s_w = mean "
        "a/mean v; in w the top-K_w of a",
        stage="prompt",
        needs="features, grid; CLS attention of one tower layer, received attention on towers without CLS",
        official="16 stretches in raster order (the paper: crops) and 64 tokens fixed for LLaVA; int(1024/576·N/K) "
        "stretches for Qwen2.5-VL.",
        bugs="What a full stretch cannot take is lost, so that fewer than K remain and zeros (LLaVA) or the last "
        "token (Qwen) fill up; tokens come in order of attention; the attention of a stretch of one token is not "
        "scaled; Qwen's scores stay in window order.",
        departures="Exact apportionment with caps; raster order; all scores on one scale; image_newline tokens lie "
        "in no stretch and come last. Towers without CLS: holov[received]. fidelity='official' brings the lost "
        "tokens and the unscaled stretches back.",
        defaults="beta=0.09; the layer the features come from: -2 for CLIP towers in LLaVA.",
        cost="O(N²D) once",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stretches is not None and self.stretches < 1:
            raise ConfigError(f"stretches={self.stretches!r}: at least 1")
        if self.beta < 0:
            raise ConfigError(f"beta={self.beta!r}: a weight of at least 0")

    def adapt(self, tower: Tower) -> HoloV:
        return replace(super().adapt(tower), stretches=self.stretches or (16 if tower.has_cls else None))

    def select(self, ctx: Context) -> Tensor:
        grid = ctx.need_grid()
        placed = ctx.valid & (grid >= 0).all(-1)
        size = grid.flatten(0, 1).amax(0) + 2 if grid.numel() else grid.new_ones(3)
        code = ((grid[..., 0] + 1) * size[1] + grid[..., 1] + 1) * size[2] + grid[..., 2] + 1
        tokens = placed.sum(1)
        if self.stretches is None:
            number = (1024 * tokens).div(576 * ctx.count, rounding_mode="floor").clamp_min(1)
        else:
            number = torch.full_like(ctx.count, self.stretches)
        keep = holov(
            ctx.features,
            self.attention(ctx),
            rank(-code, placed),
            ctx.count,
            stretches_of=number,
            beta=self.beta,
            valid=placed,
            official=ctx.fidelity == "official",
        )
        if ctx.fidelity == "official":
            return keep
        return topk(keep.float(), ctx.count, ctx.valid)  # where patches are fewer than asked for, others fill up
