"""IDPruner: importance against redundancy, by maximal marginal relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..functional import Picks, minmax, mmr, norm
from ..method import Card, Contract, Layer, Method, Needs

if TYPE_CHECKING:
    from ..context import Context

SCORERS = ("cls", "received", "norm")


def idpruner(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    balance: float = 0.5,
    per_round: int = 1,
    valid: Tensor | None = None,
) -> Picks:
    """Maximal marginal relevance on min-max normalised importance.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        scores: (N,) or (B, N), importance on any scale.
        k: tokens to keep, int or (B,) long.
        balance: λ, the weight of importance against redundancy.
        per_round: picks at once; more than 1 may keep duplicates.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return mmr(features, minmax(scores, valid), k, balance=balance, per_round=per_round, valid=valid)


@dataclass(frozen=True)
class IDPruner(Method):
    """MMR over a scorer of your choice.

    Attributes:
        scorer: ``cls`` (CLS attention), ``received`` (mean attention received) or ``norm`` (length of the token).
        layer: tower layer of the attention scorers.
        balance: λ in [0, 1], the weight of importance against redundancy.
    """

    scorer: Literal["cls", "received", "norm"] = "cls"
    layer: Layer = -2
    balance: float = 0.5

    card: ClassVar[Card] = Card(
        name="idpruner",
        title="maximal marginal relevance: importance against redundancy",
        paper="arXiv 2602.13315",
        venue="-",
        stage="prompt",
        needs="features; CLS or received attention of one tower layer unless scorer='norm'",
        official="Scores come from the trained VisionSelector head; all images of a prompt share one pool; several "
        "picks per round on request.",
        departures="Training-free: the scorer is a substitute and is named with the method, as in idpruner[cls]. "
        "Every image has its own budget. One pick per round.",
        defaults="scorer=cls, layer=-2 for CLIP towers (LLaVA); scorer=received, layer=-1 for towers without CLS.",
        cost="O(N²D) once, O(N) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ConfigError(f"scorer={self.scorer!r}: use one of {', '.join(SCORERS)}")
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance={self.balance!r}: the weight of importance lies in [0, 1]")

    @property
    def label(self) -> str:
        return f"idpruner[{self.scorer}]"

    def needs(self) -> Needs:
        return Needs(
            vision_cls=(self.layer,) if self.scorer == "cls" else (),
            vision_received=(self.layer,) if self.scorer == "received" else (),
        )

    def select(self, ctx: Context) -> Tensor:
        if self.scorer == "cls" and not ctx.has_cls:
            raise UnsupportedError(
                f"{ctx.model_type}: its vision tower has no CLS token, which idpruner[cls] scores by; "
                "give scorer='received' (attention received) or scorer='norm'"
            )
        if self.scorer == "norm":
            scores = norm(ctx.features)
        elif self.scorer == "cls":
            scores = ctx.attention.cls(self.layer)
        else:
            scores = ctx.attention.received(self.layer)
        return idpruner(ctx.features, scores, ctx.count, balance=self.balance, valid=ctx.valid).keep
