"""DivPrune: keep the most diverse tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, foreground, maxmin
from ..method import Card, Contract, VectorMethod, labelled

if TYPE_CHECKING:
    from ..context import Context


def divprune(features: Tensor, k: int | Tensor, *, valid: Tensor | None = None, official: bool = False) -> Picks:
    """Max-min selection on the projector's outputs.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.
        official: keep duplicates of kept tokens out, so that fewer than ``k`` remain, as the published code does.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    picks = maxmin(features, k, valid)
    if not official:
        return picks
    # The first pick's own gain is 0 where every token has a duplicate; it is new all the same.
    new = picks.gain > 0
    new[..., :1] = True
    repeat = picks.order[..., :1]
    keep = torch.zeros_like(picks.keep).scatter(-1, torch.where(new, picks.order, repeat), True)
    return Picks(keep, torch.where(new, picks.order, -1), picks.gain)


@dataclass(frozen=True)
class DivPrune(VectorMethod):
    """Greedy max-min diversity; no attention, no question.

    Attributes:
        background: what is taken out of the features before they are compared: None nothing, 0 their mean, r > 0 their
            mean and r leading principal directions.
    """

    background: int | None = None

    card: ClassVar[Card] = Card(
        name="divprune",
        title="greedy max-min diversity in cosine distance",
        paper="arXiv 2503.02175",
        venue="CVPR 2025",
        formula="first argmax_i min_{j≠i} (1 - cos(z_i, z_j)), then argmax_i min_{j∈S} (1 - cos(z_i, z_j))",
        stage="prompt",
        needs="features; projector inputs with features='merger_in'",
        official="Selects in the model's dtype, image_newline tokens included.",
        bugs="Picks are not masked, so once only duplicates are left it picks kept tokens again and fewer than K "
        "remain.",
        departures="Selects in float32, and always exactly K: duplicates follow the distinct tokens, lowest index "
        "first. fidelity='official' keeps only tokens that differ from all kept before. With a background taken out "
        "(Cen-Prune, LRCP) it is divprune[centred] or divprune[residual]; divprune[merger_in] compares the patches of "
        "a token, one behind the other, before the merger.",
        defaults="The paper's ratio is 0.098 for LLaVA-1.5 and -NeXT, 0.1 for video.",
        cost="O(N²D) once, O(N) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.background is not None and self.background < 0:
            raise ConfigError(f"background={self.background!r}: at least 0 directions, or None")

    @property
    def label(self) -> str:
        background = "" if self.background is None else "residual" if self.background else "centred"
        return labelled("divprune", background, self.space)

    def select(self, ctx: Context) -> Tensor:
        features = self.vectors(ctx)
        if self.background is not None:
            features = foreground(features, self.background, ctx.valid)
        return divprune(features, ctx.count, valid=ctx.valid, official=ctx.fidelity == "official").keep
