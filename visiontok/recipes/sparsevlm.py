"""SparseVLM: words that fit the picture say which tokens stay; some of the others are merged into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import density_peaks, rank, topk
from ..method import Card, Contract, Layer, Method, Needs, Selection, Stage
from ._cuts import cuts, listed

if TYPE_CHECKING:
    from ..context import Context


def raters(
    visual: Tensor, text: Tensor, *, valid: Tensor | None = None, text_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The words that fit the picture better than the average word does.

    Args:
        visual: (N, D) or (B, N, D), embeddings before the language model.
        text: (Q, D) or (B, Q, D).
        valid: (N,) or (B, N) bool.
        text_valid: (Q,) or (B, Q) bool.

    Returns:
        bool (Q,) or (B, Q), every word where all fit alike; and how much each fits, mean over visual tokens of the
        softmax over words of the products.
    """
    there = torch.ones_like(text[..., 0], dtype=torch.bool) if text_valid is None else text_valid
    seen = torch.ones_like(visual[..., 0], dtype=torch.bool) if valid is None else valid
    with torch.autocast(visual.device.type, enabled=False):
        products = (
            torch.where(seen[..., None], visual, 0.0).float() @ torch.where(there[..., None], text, 0.0).float().mT
        )
    shares = products.masked_fill(~there[..., None, :], -torch.inf).softmax(-1).nan_to_num(0.0)
    fit = (shares * seen[..., None]).sum(-2) / seen.sum(-1, keepdim=True).clamp_min(1)
    mean = (fit * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
    above = there & (fit > mean)
    return torch.where(above.any(-1, keepdim=True), above, there), fit


def recycle(
    features: Tensor, scores: Tensor, keep: Tensor, clusters: int | Tensor, *, share: float = 0.3, valid: Tensor
) -> Tensor:
    """The better of the tokens that are not kept, in groups around their density peaks.

    Args:
        features: (B, N, D) hidden states.
        scores: (B, N).
        keep: (B, N) bool.
        clusters: number of groups, int or (B,) long.
        share: of the dropped tokens, rounded down and one more, are grouped.
        valid: (B, N) bool.

    Returns:
        (B, N) long, the place of the token around which each is grouped, -1 for none.
    """
    gone = valid & ~keep
    again = torch.where(gone.any(-1), (gone.sum(-1).double() * share).long() + 1, 0)
    # The best first, so that of equal peaks the one with more attention counts.
    order = rank(scores, gone).argsort(-1)[:, : max([1, *again.tolist()])]
    there = torch.arange(order.shape[1], device=order.device) < again[:, None]
    number = torch.as_tensor(clusters, device=order.device).expand(len(order))
    group = density_peaks(
        features.gather(1, order[..., None].expand(-1, -1, features.shape[-1])), number.clamp_min(1), there
    )
    home = torch.where((group >= 0) & (number > 0)[:, None], order.gather(1, group.clamp_min(0)), -1)
    return torch.full_like(gone, -1, dtype=torch.long).scatter(1, order, home)


def shared_out(count: Tensor, size: Tensor, *, share: float = 0.3) -> Tensor:
    """(B,) long: how many of ``count`` (B,) tokens out of ``size`` (B,) are merged ones, one in ten of those merged."""
    clusters = torch.zeros_like(count)
    for _ in range(4):  # one more dropped token is 0.03 more clusters
        dropped = size - count + clusters
        clusters = ((dropped.double() * share).long() + 1) // 10 + 1
    return torch.minimum(clusters, count - 1).clamp_min(0)


@dataclass(frozen=True)
class SparseVLM(Method):
    """Three cuts by the attention of fitting words, each with a few merged tokens for those it drops.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, what is left after each cut, merged ones included.
        recycled: share of the dropped tokens that is merged.
    """

    layers: tuple[Layer, ...] = (3 / 32, 7 / 32, 16 / 32)
    shares: tuple[float, ...] = (0.5365, 0.3542, 0.1962)
    recycled: float = 0.3

    card: ClassVar[Card] = Card(
        name="sparsevlm",
        title="several cuts in the decoder by the attention of words that fit the picture, the rest merged into a few",
        paper="arXiv 2410.04417",
        venue="ICML 2025",
        formula="R = {t: M_t > mean M}, M = mean_i softmax_t(z_i·x_t); top of mean_{h, t in R} softmax(q_t·k/√d)_hi; "
        "the best 30 % of the others become means of groups around density peaks, one for ten",
        stage="decoder",
        needs="features (hidden states), attention of every head and question token in the layer before each cut, "
        "question tokens and embeddings before the language model",
        official="LLaVA: behind layers 2, 6 and 15 of 32 the 300, 200 and 110 best tokens stay and the merged ones "
        "beside them, 206 tokens on average where 192 are named. The paper's share by the rank of the attention map is "
        "replaced by this table. Tokens are numbered anew, merged ones last.",
        bugs="Density has random noise; attention maps of whole layers are built; decoding counts positions by each "
        "layer's cache.",
        departures="The budget counts merged tokens. A merged token stands where the middle of its group stood, with "
        "that position. No noise: of equal peaks the one with more attention counts. The words are the question "
        "without special tokens, and every image has its own raters. A budget is the average over all decoder layers.",
        defaults="layers=3/32, 7/32, 16/32; shares=0.5365, 0.3542, 0.1962, what the table named 192 leaves, merged "
        "tokens included.",
        cost="O(HQNd) for the question's attention, O((0.3N)²D) to merge",
        contract=Contract(question_independent=False, per_image=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        if not 0 <= self.recycled <= 1:
            raise ConfigError(f"recycled={self.recycled!r}: a share lies in [0, 1]")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_text_heads=(-1,), question=True)

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def select(self, ctx: Context) -> Selection:
        asks, _ = rating(ctx)
        scores = (ctx.attention.text_heads(-1).mean(2) * asks[:, None]).sum(-1) / asks.sum(-1, keepdim=True).clamp_min(
            1
        )
        ctx.scored(scores)
        if not self.recycled:
            return Selection(keep=topk(scores, ctx.count, ctx.valid))
        here = ctx.valid.sum(-1)
        merged = torch.where(ctx.count < here, shared_out(ctx.count, here, share=self.recycled), 0)
        keep = rank(scores, ctx.valid) < (ctx.count - merged)[:, None]
        into = recycle(ctx.features, scores, keep & ctx.valid, merged, share=self.recycled, valid=ctx.valid)
        centre = into == torch.arange(into.shape[1], device=into.device)
        return Selection(keep=(keep & ctx.valid) | centre, into=into)


def rating(ctx: Context) -> tuple[Tensor, Tensor]:
    """The words (U, Q) bool that say which tokens of each image stay, and how much each fits."""
    _, asked = ctx.question()
    visual, text = ctx.before()
    original = torch.arange(visual.shape[1], device=visual.device) < ctx.size[:, None]
    return raters(visual, text, valid=original, text_valid=asked)
