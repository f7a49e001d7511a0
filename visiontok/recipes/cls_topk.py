"""CLS top-k: keep what the vision tower's CLS token looks at (FasterVLM)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Layer, Method, Needs, Tower

if TYPE_CHECKING:
    from ..context import Context


def cls_topk(scores: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The ``k`` tokens with the most attention.

    Args:
        scores: (N,) or (B, N), attention of the CLS token, mean over heads.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask of the shape of ``scores``.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return topk(scores, k, valid)


@dataclass(frozen=True)
class ClsTopK(Method):
    """Attention of the CLS token; on towers that have none, the mean attention a token receives.

    Attributes:
        scorer: ``cls`` or ``received``; by default what the tower offers.
        layer: tower layer; by default the one the features come from.
    """

    scorer: Literal["cls", "received"] | None = None
    layer: Layer | None = None

    card: ClassVar[Card] = Card(
        name="cls_topk",
        title="top-k by attention of the vision tower's CLS token",
        paper="arXiv 2412.01818 (FasterVLM)",
        venue="-",
        stage="prompt",
        needs="CLS attention of one tower layer; received attention on towers without CLS",
        official="Attention inside the feature layer, mean over heads, the CLS key in the denominator; a fixed budget "
        "per crop, image_newline tokens disabled.",
        departures="One budget per image. Towers without CLS (SigLIP, Qwen) are scored by received attention, a "
        "substitute that is not in the paper and is named: cls_topk[received].",
        defaults="the layer the features come from: -2 for CLIP towers in LLaVA, -1 elsewhere.",
        cost="O(HNd) for one attention row, O(N log N) to select; O(HN²d) on towers without CLS",
    )

    def __post_init__(self) -> None:
        if self.scorer not in (None, "cls", "received"):
            raise ConfigError(f"scorer={self.scorer!r}: use 'cls' or 'received'")

    @property
    def label(self) -> str:
        return "cls_topk[received]" if self.scorer == "received" else "cls_topk"

    def adapt(self, tower: Tower) -> ClsTopK:
        return replace(
            self,
            scorer=self.scorer or ("cls" if tower.has_cls else "received"),
            layer=tower.feature_layer if self.layer is None else self.layer,
        )

    def needs(self) -> Needs:
        layers = () if self.layer is None else (self.layer,)
        return Needs(vision_received=layers) if self.scorer == "received" else Needs(vision_cls=layers)

    def select(self, ctx: Context) -> Tensor:
        read = ctx.attention.received if self.scorer == "received" else ctx.attention.cls
        return cls_topk(read(-1 if self.layer is None else self.layer), ctx.count, valid=ctx.valid)
