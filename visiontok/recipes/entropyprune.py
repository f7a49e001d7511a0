"""EntropyPrune: keep the tokens that the heads of an early layer see in many different ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..functional import head_entropy, topk
from ..method import Card, Contract, Layer, Method, Needs, Stage, labelled

if TYPE_CHECKING:
    from ..context import Context

_WIDTH = 128  # of a head in the published code


def entropyprune(
    heads: Tensor,
    k: int | Tensor,
    *,
    normalise: bool = False,
    official: bool = False,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` tokens whose heads have the largest matrix entropy.

    Args:
        heads: (N, H, d) or (B, N, H, d), queries, keys or values of each token.
        k: tokens to keep, int or (B,) long.
        normalise: see :func:`visiontok.functional.head_entropy`.
        official: average neighbouring channels of heads of a multiple of 128 down to 128, as the published code does.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask and float32 scores, both (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    width = heads.shape[-1]
    if official and width > _WIDTH and not width % _WIDTH:
        heads = heads.float().unflatten(-1, (_WIDTH, -1)).mean(-1)
    scores = head_entropy(heads, normalise=normalise)
    return topk(scores, k, valid), scores


@dataclass(frozen=True)
class EntropyPrune(Method):
    """One early cut by the matrix entropy over the heads of a token.

    Attributes:
        layer: decoder layer whose input is cut; an index, or a fraction of the depth (never below layer 1).
        of: ``queries``, ``keys`` or ``values`` of the layer before the cut, or ``states`` on the cut's input, split
            into as many parts as there are query heads.
        normalise: divide eigenvalues by their sum, so that the length of a vector does not matter.
    """

    layer: Layer = 2 / 32
    of: Literal["queries", "keys", "values", "states"] = "queries"
    normalise: bool = False

    card: ClassVar[Card] = Card(
        name="entropyprune",
        title="cut after the first decoder layers by the matrix entropy over the heads of a token",
        paper="arXiv 2602.17196",
        venue="EMNLP 2026 Findings",
        formula="top-K of -Σ_h λ_h·ln λ_h / ln H, λ the eigenvalues of Z·Zᵀ/H, Z (H × d) the queries of a token in the "
        "layer before the cut less their mean over heads",
        stage="decoder",
        needs="queries of the layer before the cut",
        official="Layer 2 (LLaVA) or 1 (Qwen2.5-VL); queries, by a setting keys, values or hidden states; kept tokens "
        "keep their positions. The budget is an average over all layers, on LLaVA-1.6 the number behind the cut. Heads "
        "wider than 128 are averaged over neighbouring channels. Batch 1.",
        bugs="Keys and values are split into as many heads as there are queries, wrong with grouped-query attention.",
        departures="Keys and values have the heads that they have; heads keep their width (fidelity='official' "
        "averages). The published entropy is of eigenvalues as they are, so that long vectors rank low; normalise "
        "makes it one. keep is the number behind the cut; Budget.layer_average is the published budget. The paper's "
        "choice of the layer by entropy collapse is in no code.",
        defaults="layer=2/32, queries, not normalised; Qwen2.5-VL layer=1/28.",
        cost="O(NH²d) for the Gram matrices, O(NH³) for N eigenvalue problems",
        contract=Contract(question_independent=False, per_image=False, sync_free=False, prefix_cacheable=True),
    )

    def __post_init__(self) -> None:
        if self.of not in ("queries", "keys", "values", "states"):
            raise ConfigError(f"of={self.of!r}: use 'queries', 'keys', 'values' or 'states'")

    @property
    def label(self) -> str:
        return labelled(self.card.name, "" if self.of == "queries" else self.of, "normalised" if self.normalise else "")

    def needs(self) -> Needs:
        if self.of == "keys":
            return Needs(decoder_keys=(-1,))
        if self.of == "values":
            return Needs(decoder_values=(-1,))
        return Needs(decoder_queries=(-1,))  # whose number splits states, too

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cut", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        heads = self._heads(ctx)
        number = heads.shape[2]
        if number < 2 + self.normalise:  # less their mean, two heads are one vector, whose entropy is 0
            raise UnsupportedError(
                f"{ctx.model_type}: of={self.of!r}, but {number} head(s) of these have no spectrum to rank by"
                f"{' once it is normalised' if self.normalise else ''}; use of='queries'"
            )
        official = ctx.fidelity == "official"
        return entropyprune(heads, ctx.count, normalise=self.normalise, official=official, valid=ctx.valid)[0]

    def _heads(self, ctx: Context) -> Tensor:
        """(U, N, H, d)."""
        if self.of == "keys":
            return ctx.attention.decoder_keys(-1)
        if self.of == "values":
            return ctx.attention.decoder_values(-1)
        queries = ctx.attention.decoder_queries(-1)
        if self.of == "queries":
            return queries
        number, width = queries.shape[2], ctx.features.shape[-1]
        if width % number:
            raise UnsupportedError(
                f"{ctx.model_type}: of='states', but {width} channels do not split into {number} heads; use "
                "of='queries'"
            )
        return ctx.features.unflatten(-1, (number, -1))
