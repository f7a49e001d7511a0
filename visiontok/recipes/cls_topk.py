"""CLS top-k: keep what the vision tower's CLS token looks at (FasterVLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import topk
from ..method import Card
from ._attended import Attended

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
class ClsTopK(Attended):
    """Attention of the CLS token; on towers that have none, the mean attention a token receives."""

    card: ClassVar[Card] = Card(
        name="cls_topk",
        title="top-k by attention of the vision tower's CLS token",
        paper="arXiv 2412.01818 (FasterVLM)",
        venue="ICCV 2025, as VisPruner",
        formula="top-K of a_i = mean_h softmax(q_CLS·k/√d)_hi",
        stage="prompt",
        needs="CLS attention of one tower layer; received attention on towers without CLS",
        official="Attention inside the feature layer, mean over heads, the CLS key in the denominator; a fixed "
        "budget per crop, image_newline tokens disabled.",
        departures="One budget per image. Towers without CLS (SigLIP, Qwen) are scored by received attention, a "
        "substitute that is not in the paper and is named: cls_topk[received].",
        defaults="the layer the features come from: -2 for CLIP towers in LLaVA, -1 elsewhere.",
        cost="O(HNd) for one attention row, O(N log N) to select; O(HN²d) on towers without CLS",
    )

    def select(self, ctx: Context) -> Tensor:
        return cls_topk(self.attention(ctx), ctx.count, valid=ctx.valid)
