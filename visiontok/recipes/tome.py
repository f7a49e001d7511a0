"""ToMe: merge the most similar tokens in every layer of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Merging, Method
from ..schedules import merge_rates

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import Context


@dataclass(frozen=True)
class MergeMethod(Method):
    """Base of methods that merge in the vision tower: in the prompt, one token of each group stays."""

    def select(self, ctx: Context) -> Tensor:
        return ctx.valid


@dataclass(frozen=True)
class ToMe(MergeMethod):
    """Bipartite soft matching of the keys in every layer.

    Attributes:
        r: tokens that each layer merges away, or one number for each layer; without, they follow from ``keep``.
        inflect: slope of the rates that follow from ``keep``, in [-1, 1]: -1 merges early, 1 late.
        proportional: whether tokens are attended to in proportion to what they stand for.
    """

    r: int | tuple[int, ...] | None = None
    inflect: float = 0.0
    proportional: bool = True

    card: ClassVar[Card] = Card(
        name="tome",
        title="in every layer of the vision tower, the most similar pairs of tokens merge",
        paper="arXiv 2210.09461",
        venue="ICLR 2023",
        formula="per layer, between attention and MLP: the r pairs (even, odd) of largest cosine of the keys' mean "
        "over heads become their mean by size; log(size) is added to the attention logits",
        stage="merge",
        needs="a CLIP or SigLIP tower, or a ViT of timm or open_clip",
        official="A rate r per layer, or r and an inflection, at most half of the tokens, so that another number than "
        "K remain; the order that matching leaves.",
        departures="With a budget, rates are solved for exactly as many tokens, and a layer that is to merge more than "
        "half of them matches in rounds (fidelity='official': at most half). In a prompt, a group stands where its "
        "member nearest the middle of it stood; tokens of no patch, such as image_newline, are dropped. Of a tiled "
        "picture, each tile has its part of the budget, and what lies in the padding is not in the prompt.",
        defaults="The paper merges 8 to 16 of 197 tokens per layer.",
        cost="O(N²d/4) per layer, d the width of a head; saves attention, MLP and projector",
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if isinstance(self.r, list):  # from JSON
            object.__setattr__(self, "r", tuple(self.r))
        rates = self.r if isinstance(self.r, tuple) else (self.r or 0,)
        if not rates or min(rates) < 0:
            raise ConfigError(f"r={self.r}: give one number of at least 0, or one for each layer of the tower")
        merge_rates(0, 1, self.inflect)

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        if self.r is None:
            rates = merge_rates(0 if count is None else max(tokens - count, 0), depth, self.inflect)
        elif isinstance(self.r, int):
            rates = [self.r] * depth
        elif len(self.r) == layers:
            rates = list(self.r[:depth])
        else:
            raise ConfigError(f"r={list(self.r)}: give one number, or one for each of the {layers} layers of the tower")
        if count is not None and self.r is not None:
            raise ConfigError(f"r={self.r}: the budget says how many tokens merge; leave keep or r out")
        return Merging(r=tuple(rates), rounds=not official, proportional=self.proportional)
