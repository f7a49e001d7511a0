"""ToDRE, first stage: from the token the tower looks at most, outwards to the least similar."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, maxsum, mmr
from ..method import Card, Contract, Layer, Needs, VectorMethod, labelled
from ._attended import Attended

if TYPE_CHECKING:
    from ..context import Context


def todre(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    objective: Literal["maxsum", "maxmin"] = "maxsum",
    valid: Tensor | None = None,
) -> Picks:
    """The token of highest score, then greedily the token of smallest summed (or largest) cosine to those kept.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        scores: (N,) or (B, N), used for the first pick only.
        k: tokens to keep, int or (B,) long.
        objective: ``maxsum`` (second version of the paper) or ``maxmin`` (greedy k-center, first version).
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    if objective == "maxsum":
        return maxsum(features, scores, k, valid)
    return mmr(features, scores, k, balance=0.0, valid=valid)


@dataclass(frozen=True)
class ToDRE(Attended, VectorMethod):
    """Diversity that starts at the most attended token.

    Attributes:
        objective: ``maxsum`` or ``maxmin``.
        scorer: ``cls`` or ``received``, for the first pick; by default what the tower offers.
        layer: tower layer of the scorer.
    """

    objective: Literal["maxsum", "maxmin"] = "maxsum"
    layer: Layer | None = -1

    card: ClassVar[Card] = Card(
        name="todre",
        title="from the most attended token to those least similar to all kept",
        paper="arXiv 2505.18757",
        venue="preprint",
        formula="first argmax a, then argmin_i Σ_{j∈S} cos(z_i, z_j)",
        stage="prompt",
        needs="features, projector inputs with features='merger_in'; CLS attention of the last tower layer, received "
        "attention on towers without CLS",
        official="No code is published. The first version of the paper writes a greedy k-center (max-min), the second "
        "the sum of similarities (max-sum), which may keep near-duplicates.",
        departures="Stage 1 only; its second stage, dropping what is left late in the decoder, is todre_exit. On tiled "
        "pictures the first pick may lie in any tile, not in the thumbnail alone. Towers without CLS start at the "
        "token that receives most attention, where the paper draws one: todre[received]. todre[merger_in] compares the "
        "patches of a token, one behind the other, before the merger.",
        defaults="objective=maxsum, layer=-1; the paper keeps 10 % or 25 % of LLaVA-NeXT's tokens.",
        cost="O(ND) per pick for maxsum, without a Gram matrix; O(N²D) once and O(N) per pick for maxmin",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        Attended.__post_init__(self)
        VectorMethod.__post_init__(self)
        if self.objective not in ("maxsum", "maxmin"):
            raise ConfigError(f"objective={self.objective!r}: use 'maxsum' or 'maxmin'")

    @property
    def label(self) -> str:
        return labelled(super().label, "maxmin" if self.objective == "maxmin" else "", self.space)

    def needs(self) -> Needs:
        return replace(super().needs(), encoder_features=VectorMethod.needs(self).encoder_features)

    def select(self, ctx: Context) -> Tensor:
        scores = self.attention(ctx)
        return todre(self.vectors(ctx), scores, ctx.count, objective=self.objective, valid=ctx.valid).keep
