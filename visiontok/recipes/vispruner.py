"""VisPruner: half of the budget by attention, the other half by thinning out duplicates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import rank, thinned
from ..method import Card, Contract, Needs
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def vispruner(
    features: Tensor, scores: Tensor, k: int | Tensor, *, important: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """The tokens with the most attention, and those of the others that are left when duplicates are dropped.

    Args:
        features: (N, D) or (B, N, D), outputs of the vision tower.
        scores: (N,) or (B, N), attention; negative where a token has no patch. Such tokens come last, and so do those
            that hold NaN or infinity.
        k: tokens to keep, int or (B,) long.
        important: share of the budget that attention decides, rounded down.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``scores``, exactly ``k`` true.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = torch.minimum(torch.as_tensor(k, device=ok.device), ok.sum(-1))
    first = (count.double() * important).long()
    patch = ok & (scores >= 0) & features.isfinite().all(-1)
    seen = patch & (rank(scores, patch) < first[..., None])
    rest = patch & ~seen
    keep = seen | thinned(features, scores, torch.minimum(count - first, rest.sum(-1)), rest)
    others = ok & ~keep
    return keep | (others & (rank(scores, others) < (count - keep.sum(-1))[..., None]))


@dataclass(frozen=True)
class VisPruner(Attended):
    """Important tokens by attention, diverse tokens by removal of duplicates.

    Attributes:
        important: share of the budget that goes to tokens with the most attention.
        scorer: ``cls`` (CLS attention) or ``received`` (mean attention received); by default what the tower offers.
        layer: tower layer of the attention; by default the one the features come from.
    """

    important: float = 0.5

    card: ClassVar[Card] = Card(
        name="vispruner",
        title="top-k by CLS attention, then removal of duplicates among the rest",
        paper="arXiv 2412.01818",
        venue="ICCV 2025",
        formula="top-⌊rK⌋ of a; of the others, in its order, drop in rounds the 8 even places of largest max_{j odd} "
        "cos(x_i, x_j)",
        stage="prompt",
        needs="projector inputs; CLS attention of one tower layer, received attention on towers without CLS",
        official="A fixed budget per crop. The list of tokens left over is split by alternation and reordered in "
        "every round, so that the result is chaotic: with 576 to 64 tokens, noise of 1e-6 changes more than half of "
        "those the second step keeps.",
        bugs="A list of odd length raises a shape error.",
        departures="Lists of odd length work: places 0, 2, 4, … are candidates. image_newline tokens come last. "
        "Similarities in float32, once. One budget per image. Towers without CLS are scored by received attention: "
        "vispruner[received].",
        defaults="important=0.5; the README's example uses 0.75 for 64 tokens. The layer the features come from.",
        cost="O(N²D) once, then (N-K)/8 rounds of O(N²)",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ConfigError(f"important={self.important!r}: a share of the budget lies in [0, 1]")

    def needs(self) -> Needs:
        return replace(super().needs(), encoder_features=True)

    def select(self, ctx: Context) -> Tensor:
        features, scores = ctx.need_encoder_features(), self.attention(ctx)
        return vispruner(features, scores, ctx.count, important=self.important, valid=ctx.valid)
