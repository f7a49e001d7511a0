"""LLaVA-PruMerge: tokens with outstanding attention gather their neighbours, one more token gathers the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import neighbours as gathered
from ..functional import rank
from ..method import Card, Contract, Layer, Needs, Selection
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context

ONE_HEAD = "the vision tower's attention joined to one head of full width"


def outliers(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """How many scores lie above the third quartile by more than 1.5 times the distance between the quartiles.

    Args:
        scores: (N,) or (B, N).
        valid: bool, shape of ``scores``; negative scores are left out too.

    Returns:
        () or (B,) long; 0 where all are alike.
    """
    ok = scores >= 0 if valid is None else valid & (scores >= 0)
    s = torch.where(ok, scores.float(), torch.nan)
    low, high = (torch.nanquantile(s, q, dim=-1, keepdim=True) for q in (0.25, 0.75))
    return (s > high + 1.5 * (high - low)).sum(-1)


def prumerge(
    features: Tensor,
    keys: Tensor,
    scores: Tensor,
    centres: Tensor,
    *,
    neighbours: int = 32,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Centres gather their neighbours, weighted by attention; one more token is the weighted sum of all the others.

    Args:
        features: (N, D) or (B, N, D), what is merged.
        keys: (N, d) or (B, N, d), full-width keys of the tower, compared by cosine.
        scores: (N,) or (B, N), attention; negative scores mark tokens without a patch, which weigh nothing.
        centres: (N,) or (B, N) bool, the tokens that stay; a row whose tokens are all centres is left as it is.
        neighbours: tokens that a centre gathers, other centres among them.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N), one token more than ``centres``: the sum stands at the place of the token with
        the most attention that is no centre, unless no other token has a patch: then that one stays as it is. And
        features of the shape given, of which those of kept places are new.
    """
    ok = torch.ones_like(centres) if valid is None else valid
    centres = centres & ok
    weight = torch.where(ok, scores, 0.0).clamp_min(0).to(torch.promote_types(features.dtype, torch.float32))
    others = ok & ~centres
    rest = (rank(scores, others) == 0) & others
    known = torch.where(ok[..., None], features, 0.0)
    gathering = centres & (scores >= 0) & others.any(-1, keepdim=True)
    merged = gathered(known, keys, weight, gathering, neighbours, ok)
    total = (torch.where(others, weight, 0.0)[..., None] * known).sum(-2, keepdim=True).to(features.dtype)
    return centres | rest, torch.where((rest & (scores >= 0))[..., None], total, merged)


@dataclass(frozen=True)
class PruMerge(Attended):
    """Outstanding tokens, merged with their neighbours, and one token for the rest.

    Attributes:
        adaptive: keep the outliers of the attention only, at most the budget; otherwise exactly the budget.
        neighbours: how many tokens a kept one gathers.
        scorer: ``cls`` (CLS attention, heads joined) or ``received`` (mean attention received); by default what the
            tower offers.
        layer: tower layer of attention and keys; by default the last.
    """

    adaptive: bool = False
    neighbours: int = 32
    layer: Layer | None = -1

    of_cls = "cls_joined"

    card: ClassVar[Card] = Card(
        name="prumerge",
        title="tokens with outstanding attention gather their neighbours, one token gathers the rest",
        paper="arXiv 2403.15388",
        venue="ICCV 2025",
        formula="z_i = M(x_i + Σ_{j∈kNN(i)} a_j·x_j) for the top-(K-1) of a, 32 neighbours by key cosine; z_rest = "
        "M(Σ_{dropped} a_j·x_j)",
        stage="prompt",
        needs="features, projector inputs, the projector; keys of one tower layer, and CLS attention joined to one "
        "head of full width; received attention on towers without CLS",
        official="The last tower layer with features of the one before; merges before the projector and does not "
        "divide by the weights; tokens come in the order of their attention, the token for the rest last. As many "
        "tokens as the attention has outliers, and one.",
        bugs="Batches share one ratio; without outliers nothing but the last token remains.",
        departures="Exactly K tokens, the one for the rest among them (adaptive=True for the outliers, at least one "
        "of them, at most K tokens), in raster order. One budget per image. Towers without CLS are scored by "
        "received attention, a substitute that is named: prumerge[received]; their keys carry rotary positions. With "
        "mass attention dropped tokens go to the nearest kept one: the sums overlap and are no partition.",
        defaults="32 neighbours; the last tower layer.",
        cost="O(HNd) for one attention row, O(KNd) over keys of full width, one more pass of the projector",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ConfigError(f"neighbours={self.neighbours!r}: give a number of at least 0")
        if self.adaptive:  # what attention decides, the grid does not tell
            contract = replace(self.card.contract, count_from_grid=False)
            object.__setattr__(self, "card", replace(self.card, contract=contract))

    def needs(self) -> Needs:
        return replace(super().needs(), vision_keys=() if self.layer is None else (self.layer,), projector=True)

    def select(self, ctx: Context) -> Selection:
        scores = self.attention(ctx)
        inputs, project = ctx.need_projector()
        keep, merged = prumerge(
            inputs,
            ctx.attention.keys(-1 if self.layer is None else self.layer).flatten(2),
            scores,
            self.centres(ctx, scores),
            neighbours=self.neighbours,
            valid=ctx.valid,
        )
        changed = (ctx.valid & ~keep).any(-1, keepdim=True) & (scores >= 0)
        return Selection(
            keep=keep, features=torch.where(changed[..., None], project(merged).to(ctx.features), ctx.features)
        )

    def centres(self, ctx: Context, scores: Tensor) -> Tensor:
        """(U, N) bool: the tokens that stay; the last of a budget is the token for the rest."""
        count = torch.minimum(outliers(scores, ctx.valid).clamp_min(1) + 1, ctx.count) if self.adaptive else ctx.count
        size = ctx.valid.sum(-1)
        return ctx.valid & (rank(scores, ctx.valid) < torch.where(count < size, count - 1, size)[:, None])
