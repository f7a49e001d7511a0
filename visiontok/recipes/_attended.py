"""What methods share that rank tokens by the attention of one layer of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ..errors import ConfigError
from ..method import Layer, Method, Needs, Tower, labelled

if TYPE_CHECKING:
    from ..context import Context

M = TypeVar("M", bound="Attended")


@dataclass(frozen=True)
class Attended(Method):
    """Attention of the tower's CLS token; on towers without one, what a token receives, which the label names.

    Attributes:
        scorer: ``cls`` or ``received``; by default what the tower offers.
        layer: tower layer; None for the one the features come from.
    """

    scorer: Literal["cls", "received"] | None = None
    layer: Layer | None = None

    of_cls: ClassVar[Literal["cls", "cls_joined", "cls_logits"]] = "cls"  # which statistic of the CLS token

    def __post_init__(self) -> None:
        if self.scorer not in (None, "cls", "received"):
            raise ConfigError(f"scorer={self.scorer!r}: use 'cls' or 'received'")

    @property
    def label(self) -> str:
        return labelled(self.card.name, "received" if self.scorer == "received" else "")

    def adapt(self: M, tower: Tower) -> M:
        return replace(
            self,
            scorer=self.scorer or ("cls" if tower.has_cls else "received"),
            layer=tower.feature_layer if self.layer is None else self.layer,
        )

    def needs(self) -> Needs:
        taps: dict[str, Any] = {} if self.layer is None else {f"vision_{self._statistic}": (self.layer,)}
        return Needs(**taps)

    def attention(self, ctx: Context) -> Tensor:
        """(U, N) the scores."""
        scores: Tensor = getattr(ctx.attention, self._statistic)(-1 if self.layer is None else self.layer)
        return ctx.scored(scores)

    @property
    def _statistic(self) -> str:
        return "received" if self.scorer == "received" else self.of_cls
