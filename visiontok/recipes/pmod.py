"""p-MoD: in each deep layer a trained router sends some visual tokens through and lets the others pass by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import rank
from ..method import Card, Contract, Method, Selection, Stage
from ..schedules import shifted_cosine
from ..weights import load_routers

if TYPE_CHECKING:
    from ..context import Context


class Routed(NamedTuple):
    """Attributes:
    keep: (B, N) bool, who goes through the layer.
    weights: (B, N) float, everybody's factor.
    """

    keep: Tensor
    weights: Tensor


def pmod(logits: Tensor, ratio: float, valid: Tensor, *, scale: float = 0.2) -> Routed:
    """The ⌊n·ratio⌋ largest logits of the n valid tokens of a row, equals by index; 1 + scale · tanh(logit).

    Args:
        logits: (B, N).
        ratio: share that goes through.
        valid: (B, N) bool.
        scale: how far a weight may be from 1.

    Reference:
        p-MoD, arXiv 2412.04449, TanhNorm.
    """
    weights = 1 + scale * torch.where(valid, logits, -torch.inf).tanh()
    count = (valid.sum(1).double() * ratio).long()
    return Routed(valid & (rank(logits, valid) < count[:, None]), weights)


@dataclass(frozen=True)
class PMoD(Method):
    """Progressive mixture of depths.

    Attributes:
        weights: a .safetensors file (or a folder with one) of the routers, ``layers.L.weight`` (1, D) and
            ``layers.L.bias`` (1,) for each layer L that some tokens pass by.
        shift: of the cosine that says how many go through.
        most: the largest share that is not everything.
        least: the smallest share.
    """

    weights: str | None = None
    shift: float = 0.5
    most: float = 0.85
    least: float = 0.15

    card: ClassVar[Card] = Card(
        name="pmod",
        title="a trained router in each deep layer sends some visual tokens through, the others pass it by",
        paper="arXiv 2412.04449",
        venue="ICCV 2025",
        formula="r = w·x + b, w' = 1 + 0.2 tanh r; the top ⌊N · max(cos(πl/(L-1))/2 + 0.5, 0.15)⌋ by r become "
        "res + w' · MLP(res), the others w' · x, in layers where the cosine is at most 0.85",
        stage="decoder",
        needs="features on the input of each layer",
        official="LLaVA-1.5 and LLaVA-NeXT, routers in layers 8 to 31 of 32 trained with the model. Caches of a layer "
        "hold what went through it; who passed by is back in the next one.",
        bugs="Ranks by tanh, in which saturated logits tie with text; here by the logits.",
        trained="routers, and a language model that was trained with them; given with weights=FILE, refused without",
        departures="Every image has its own share. Weights are constants in training: routers get no gradients.",
        defaults="shift=0.5, most=0.85, least=0.15, for every family.",
        cost="O(ND) for each layer",
        budget=False,
        contract=Contract(question_independent=False, sync_free=False, keeps_some=False, prefix_cacheable=True),
    )

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise ConfigError(f"least={self.least!r}, most={self.most!r}: shares lie in (0, 1], least at most most")

    def check(self) -> None:
        if self.weights is None:
            raise ConfigError(
                "weights=None: pmod routes tokens by trained routers, which a model does not bring along; give "
                "weights=FILE.safetensors with layers.L.weight and layers.L.bias of each routed layer L, of a "
                "checkpoint that was trained with them, or take a training-free method such as 'shortv'"
            )

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="route", method=self, layer=0.0, until=1.0),)

    def select(self, ctx: Context) -> Tensor | Selection:
        layer: int = ctx.layer  # type: ignore[assignment]  # a route has one
        share = shifted_cosine(ctx.depth, shift=self.shift, most=self.most, least=self.least)[layer]
        if share == 1:
            return ctx.valid
        routers, width = load_routers(str(self.weights), ctx.features.device), ctx.features.shape[-1]
        if layer not in routers or routers[layer][0].shape != (width,):
            known = sorted(routers) if layer not in routers else f"{tuple(routers[layer][0].shape)} in layer {layer}"
            raise ConfigError(
                f"weights={self.weights!r}: layer {layer} of {ctx.depth} needs a router of ({width},), the file has "
                f"{known}; give the routers of this model"
            )
        exact = torch.promote_types(ctx.features.dtype, torch.float32)
        weight, bias = (part.to(exact) for part in routers[layer])
        return Selection(**pmod(ctx.features.to(exact) @ weight + bias, share, ctx.valid)._asdict())
