"""LLaVA-PruMerge+: PruMerge with tokens at equal steps beside those with outstanding attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import rank, spaced
from ..method import Card, Contract
from .prumerge import PruMerge, outliers

if TYPE_CHECKING:
    from ..context import Context


def prumerge_plus(scores: Tensor, k: int | Tensor, *, outstanding: float = 0.25, valid: Tensor | None = None) -> Tensor:
    """The centres of PruMerge+: a part of them by attention, the others at equal steps through what is left.

    Args:
        scores: (N,) or (B, N), attention; tokens with negative scores are centres only where there are no others.
        k: how many centres, int or (B,) long; 0 is allowed.
        outstanding: share of them that attention decides.
        valid: (N,) or (B, N) bool.

    Returns:
        bool mask of the shape of ``scores``, exactly ``k`` true.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = torch.minimum(torch.as_tensor(k, device=ok.device), ok.sum(-1))
    first = (count.double() * outstanding).round().long()
    best = ok & (rank(scores, ok) < first[..., None])
    best = best | spaced(ok & ~best & (scores >= 0), count - first)
    rest = ok & ~best
    return best | (rest & (rank(scores, rest) < (count - best.sum(-1))[..., None]))


def prumerge_plus_official(scores: Tensor, count: int) -> Tensor:
    """The published centres: the ``count`` outliers, and every ⌊⌊N / count⌋ / 3⌋-th of the first N - 1 tokens.

    Args:
        scores: (N,).
        count: outliers of the attention, at least one. Where they are more than a third of the tokens the published
            step is 0, which raises; here it is 1.

    Returns:
        (N,) bool.
    """
    n = len(scores)
    centres = rank(scores) < count
    centres[: n - 1 : max(1, n // count // 3)] = True
    return centres


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, with centres all over the picture.

    Attributes:
        outstanding: share of the centres that attention decides; the others stand at equal steps.
    """

    outstanding: float = 0.25

    card: ClassVar[Card] = replace(
        PruMerge.card,
        name="prumerge_plus",
        title="prumerge with further tokens at equal steps",
        formula=f"{PruMerge.card.formula}; of the centres a quarter the top of a, the others at equal steps",
        official=f"{PruMerge.card.official} Beside K outliers of N tokens every ⌊⌊N/K⌋/3⌋-th token stays, about three "
        "for each outlier.",
        bugs=f"{PruMerge.card.bugs} Without outliers the step is a division by zero, with more than N/3 of them 0.",
        departures=f"{PruMerge.card.departures} A quarter of them by attention, the others at equal steps through what "
        "is left, to the end. With adaptive=True and fidelity='official' the published steps, whatever the budget.",
        defaults="outstanding=0.25; 32 neighbours; the last tower layer.",
        contract=Contract(sync_free=False, order_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outstanding <= 1:
            raise ConfigError(f"outstanding={self.outstanding!r}: a share of the centres lies in (0, 1]")

    def centres(self, ctx: Context, scores: Tensor) -> Tensor:
        size, count = ctx.valid.sum(-1), ctx.count
        if self.adaptive:
            standing = outliers(scores, ctx.valid).clamp_min(1)
            if ctx.fidelity == "official":
                centres = torch.zeros_like(ctx.valid)
                for mine, row, n, number in zip(centres, scores, size.tolist(), standing.tolist(), strict=True):
                    mine[:n] = prumerge_plus_official(row[:n], number)
                return centres
            count = torch.minimum((standing / self.outstanding).long() + 1, count)
        return prumerge_plus(
            scores, torch.where(count < size, count - 1, size), outstanding=self.outstanding, valid=ctx.valid
        )
