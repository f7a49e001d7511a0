"""VisionZip: dominant tokens stay, contextual tokens gather the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import absorb, nearest_kept, spaced, topk
from ..method import Card, Contract, Needs, Selection, Tower
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def visionzip(
    features: Tensor,
    keys: Tensor,
    scores: Tensor,
    k: int | Tensor,
    contextual: int | Tensor,
    *,
    valid: Tensor | None = None,
    official: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens with the most attention, and some of the others, at equal steps, that take over all the rest.

    Args:
        features: (N, D) or (B, N, D), what is merged.
        keys: (N, d) or (B, N, d), head means of the tower's keys, compared by cosine.
        scores: (N,) or (B, N), attention; a negative score marks a token without a patch, which is kept only where
            nothing else is left, and merged into none.
        k: tokens to keep, int or (B,) long.
        contextual: how many of them gather the others, int or (B,) long, less than ``k``.
        valid: (N,) or (B, N) bool.
        official: add the mean of the gathered tokens to the contextual one, which doubles its length, instead of
            taking the mean of all.

    Returns:
        bool keep mask (N,) or (B, N); features of the shape given, of which the contextual ones are new; and long (N,)
        or (B, N), the place of the contextual token each went to, -1 for dominant tokens and those merged into none.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    patch = ok & (scores >= 0)
    count = torch.minimum(torch.as_tensor(k, device=ok.device), ok.sum(-1))
    gathering = torch.where(count <= patch.sum(-1), torch.as_tensor(contextual, device=ok.device), 0)
    dominant = topk(scores, count - gathering, ok)
    rest = patch & ~dominant
    target = spaced(rest, gathering, step=(rest.sum(-1) // gathering.clamp_min(1)).clamp_min(1))

    gathered = rest & ~target & (gathering > 0)[..., None]
    group = nearest_kept(keys, target, gathered | target, most=ok.shape[-1])
    if official:
        mean, size = absorb(features, torch.where(gathered, group, -1), torch.ones_like(scores), 1.0)
        merged = torch.where((size > 0)[..., None], features + mean, features)
    else:
        merged, _ = absorb(features, group, torch.ones_like(scores), 1.0)
    return dominant | target, merged, group


@dataclass(frozen=True)
class VisionZip(Attended):
    """Dominant tokens by attention, contextual tokens by merging.

    Attributes:
        share: part of the budget that goes to contextual tokens.
        scorer: ``cls`` (CLS attention) or ``received`` (mean attention received); by default what the tower offers.
        layer: tower layer of attention and keys; by default the one the features come from.
        space: what is averaged: ``tower``, its outputs, which then go through the projector, or ``projected`` tokens.
            By default the first where the tower has a CLS token, as in the code for LLaVA, and the second elsewhere, as
            in the Qwen ports.
    """

    share: float = 10 / 64
    space: Literal["tower", "projected"] | None = None

    card: ClassVar[Card] = Card(
        name="visionzip",
        title="dominant tokens by CLS attention, the others merged into contextual tokens",
        paper="arXiv 2412.04467",
        venue="CVPR 2025",
        formula="top-(K-C) of a; z_t = M(mean of x over t and the rest whose nearest target by key cosine is t), t "
        "each ⌊N'/C⌋-th of the N' others",
        stage="prompt",
        needs="features, projector inputs, the projector; CLS attention and keys of one tower layer; received "
        "attention on towers without CLS",
        official="Merges the tower's outputs before the projector; a contextual token is its target plus the mean of "
        "what it gathers, about twice as long as any other; the CLS token is one of the dominant tokens; budgets "
        "hold per crop, and contextual tokens come last.",
        departures="A contextual token is the mean of its group (fidelity='official' adds instead). On towers "
        "without CLS projected tokens are merged, as in the Qwen ports (space='projected'). The CLS token has no "
        "place in the prompt, so all K are patches, in raster order. One budget per image. Towers without CLS "
        "(SigLIP, Qwen) are scored by received attention, as in the Qwen ports, and named: visionzip[received]; "
        "their keys carry rotary positions.",
        defaults="share=10/64, as in the published 54+10, 108+20 and 162+30; the layer the features come from; "
        "space='tower' with CLS, 'projected' without.",
        cost="O(HNd) for one attention row, O(N²d) over keys of one head's width, one more pass of the projector",
        contract=Contract(order_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space not in (None, "tower", "projected"):
            raise ConfigError(f"space={self.space!r}: use 'tower' or 'projected'")
        if not 0 <= self.share < 1:
            raise ConfigError(f"share={self.share!r}: the part of contextual tokens lies in [0, 1)")

    def adapt(self, tower: Tower) -> VisionZip:
        return replace(super().adapt(tower), space=self.space or ("tower" if tower.has_cls else "projected"))

    def needs(self) -> Needs:
        layers = () if self.layer is None else (self.layer,)
        return replace(super().needs(), vision_keys=layers, projector=self.space == "tower")

    def select(self, ctx: Context) -> Selection:
        layer = -1 if self.layer is None else self.layer
        contextual = (ctx.count.double() * self.share).round().long()
        keep, features, into = visionzip(
            ctx.need_encoder_features() if self.space == "tower" else ctx.features,
            ctx.attention.keys(layer).mean(2),
            self.attention(ctx),
            ctx.count,
            torch.minimum(contextual, ctx.count - 1),
            valid=ctx.valid,
            official=ctx.fidelity == "official",
        )
        if self.space == "tower":
            _, project = ctx.need_projector()
            gathered = torch.zeros_like(into).scatter_add(1, into.clamp_min(0), ((into >= 0) & ~keep).long())
            features = torch.where((gathered > 0)[..., None], project(features).to(ctx.features), ctx.features)
        return Selection(keep=keep, features=features, into=into)
