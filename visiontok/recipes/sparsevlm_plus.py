"""SparseVLM+: the heads that look at the picture most, freed of what rotary positions add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import rank, topk
from ..method import Card, Contract, Layer, Method, Needs, Stage
from ._cuts import cuts, listed
from .sparsevlm import rating

if TYPE_CHECKING:
    from ..context import Context

LEAST_PULL = 0.05
"""Sums of cosines come near 0 at some distances; dividing by less than this would make a score of rounding."""


def sparsevlm_plus(
    heads: Tensor,
    raters: Tensor,
    pull: Tensor,
    *,
    share: float = 14 / 32,
    valid: Tensor | None = None,
) -> Tensor:
    """Scores: attention of the raters, mean over the heads that look at the picture most, over the rotary pull.

    Args:
        heads: (N, H, Q) or (B, N, H, Q), attention of each word, softmax over all keys.
        raters: (Q,) or (B, Q) bool, the words that count.
        pull: (N, Q) or (B, N, Q), as :meth:`visiontok.context.Attention.rotary_pull` gives it.
        share: of the heads that count, at least one; those with the most attention on valid tokens, lowest index first.
        valid: (N,) or (B, N) bool.

    Returns:
        (N,) or (B, N).
    """
    number = max(1, round(share * heads.shape[-2]))
    seen = torch.ones_like(heads[..., 0, 0], dtype=torch.bool) if valid is None else valid
    told = torch.where(seen[..., None, None] & raters[..., None, None, :], heads, 0.0)
    best = rank(told.sum((-3, -1))) < number  # (B, H)
    words = (told * best[..., None, :, None]).sum(-2) / number
    return (words / pull.clamp_min(LEAST_PULL)).sum(-1) / raters.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class SparseVLMPlus(Method):
    """Three cuts by the attention of fitting words, without merging.

    Attributes:
        layers: decoder layers whose input is cut; indices, or fractions of the depth (never below layer 1).
        shares: of the original tokens, what is left after each cut.
        heads: share of the heads that count.
    """

    layers: tuple[Layer, ...] = (3 / 32, 7 / 32, 16 / 32)
    shares: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    heads: float = 14 / 32

    card: ClassVar[Card] = Card(
        name="sparsevlm_plus",
        title="several cuts by the attention of fitting words in the heads that look at the picture, freed of distance",
        paper="arXiv 2410.04417 (version 2 of the code)",
        venue="ICML 2025",
        formula="top of mean_{h in H, t in R} softmax(q_t·k/√d)_hi / c_ti, R as in sparsevlm, H the heads of largest "
        "Σ_{t in R, i} softmax, c_ti the mean of cos((p_t - p_i)·θ) over the rotary frequencies θ",
        stage="decoder",
        needs="attention of every head and question token in the layer before each cut, question tokens and embeddings "
        "before the language model",
        official="LLaVA: behind layers 2, 6 and 15 of 32 the 300, 200 and 118 best tokens stay, with their positions; "
        "14 of 32 heads.",
        bugs="The correction divides by sums of cosines, which can be 0; with flash attention decoding counts "
        "positions by each layer's cache.",
        departures="The correction divides by 0.05 of its largest value at least. With M-RoPE all axes have equal "
        "weight. The words are the question without special tokens, every image has its own raters and heads. A budget "
        "is the average over all decoder layers. Written from a description of the code.",
        defaults="layers=3/32, 7/32, 16/32; shares=300/576, 200/576, 118/576; heads=14/32.",
        cost="O(HQNd) for the question's attention",
        contract=Contract(question_independent=False, per_image=False),
    )

    def __post_init__(self) -> None:
        listed(self, "layers", "shares")
        if not 0 < self.heads <= 1:
            raise ConfigError(f"heads={self.heads!r}: a share lies in (0, 1]")
        self.stages()

    def needs(self) -> Needs:
        return Needs(decoder_text_heads=(-1,), question=True)

    def stages(self) -> tuple[Stage, ...]:
        return cuts(self, self.layers, self.shares)

    def select(self, ctx: Context) -> Tensor:
        asks, _ = rating(ctx)
        attention = ctx.attention
        heads, pull = attention.text_heads(-1), attention.rotary_pull()
        scores = sparsevlm_plus(heads, asks, pull, share=self.heads, valid=ctx.valid)
        return topk(ctx.scored(scores), ctx.count, ctx.valid)
