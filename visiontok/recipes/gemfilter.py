"""GemFilter: look ahead to an early decoder layer, then begin again with what the last token looks for there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Layer, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def smooth(scores: Tensor, width: int, *, valid: Tensor | None = None, official: bool = False) -> Tensor:
    """Mean over ``width`` neighbours in the sequence.

    Args:
        scores: (N,) or (B, N).
        width: odd.
        valid: (N,) or (B, N) bool; other tokens are nobody's neighbours.
        official: missing neighbours count as zeros, as in the published code, instead of not at all.

    Returns:
        float32 of the shape of ``scores``.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    rows = torch.where(ok, scores.float(), 0.0).view(-1, 1, scores.shape[-1])
    total = F.avg_pool1d(rows, width, stride=1, padding=width // 2)
    if not official:
        there = F.avg_pool1d(ok.float().view_as(rows), width, stride=1, padding=width // 2)
        total = total / there.clamp_min(1e-6)
    return total.view_as(scores)


def gemfilter(
    logits: Tensor, k: int | Tensor, *, width: int = 5, official: bool = False, valid: Tensor | None = None
) -> Tensor:
    """The ``k`` tokens of the largest smoothed logits.

    Args:
        logits: (N,) or (B, N), products of the last prompt token's query with the keys, mean over heads.
        k: tokens to keep, int or (B,) long.
        width: of the mean over neighbours in the sequence, odd.
        official: see :func:`smooth`.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``logits``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    pooled = smooth(logits, width, valid=valid, official=official)
    return topk(torch.where(logits.isnan(), torch.nan, pooled), k, valid)


@dataclass(frozen=True)
class GemFilter(Method):
    """What the last prompt token looks for in an early layer enters the language model, nothing else does.

    Attributes:
        layer: decoder layer that is looked at; an index, or a fraction of the depth.
        width: tokens over which scores are averaged along the sequence, odd.
    """

    layer: Layer = 13 / 32
    width: int = 5

    card: ClassVar[Card] = Card(
        name="gemfilter",
        title="look ahead to an early decoder layer, then begin again with what the last token looks for there",
        paper="arXiv 2409.17422",
        venue="preprint",
        formula="top-K of mean over 5 neighbours of Σ_h q_last·k_i in one layer, without softmax",
        stage="prompt",
        needs="query of the last prompt token and keys of a decoder layer that is looked ahead at",
        official="Filters all tokens of a long text, at layer 13 of 32 (Llama 3.1) or 19 of 40 (Mistral Nemo), and "
        "runs the model again on them with new positions. Neighbours beyond the ends count as zeros, so that the ends "
        "rank low. Batch 1.",
        departures="Filters visual tokens only, of every image its own number; kept tokens keep their positions, in "
        "M-RoPE models the grid. Missing neighbours do not count (fidelity='official': zeros). The first layers run "
        "twice, which the report counts.",
        defaults="layer=13/32, width=5.",
        cost="the decoder layers below the one looked at, on the whole prompt",
        contract=Contract(question_independent=False, per_image=False, order_free=False),
    )

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % 2 == 0:
            raise ConfigError(f"width={self.width!r}: an odd number of neighbours")

    def needs(self) -> Needs:
        return Needs(decoder_ahead=(self.layer,))

    def select(self, ctx: Context) -> Tensor:
        logits = ctx.scored(ctx.attention.ahead(self.layer))
        official = ctx.fidelity == "official"
        return gemfilter(logits, ctx.count, width=self.width, official=official, valid=ctx.valid)
