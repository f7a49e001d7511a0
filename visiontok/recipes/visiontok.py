"""visiontok: the most diverse tokens, each of which speaks for those it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import maxmin
from ..method import Card, Contract, Mass, Method, Stage

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class Visiontok(Method):
    """Max-min diversity with mass attention: no attention scores, no question."""

    card: ClassVar[Card] = Card(
        name="visiontok",
        title="greedy max-min diversity with mass attention; our own, and the default",
        paper="visiontok, demo/search.md",
        venue="-",
        formula="divprune's choice; then n_j = number of tokens nearest to j, z'_j = (z_j + their mean)/2, and log n_j "
        "on the attention logits of key j",
        stage="prompt",
        needs="features",
        official="This is it.",
        departures="None. It was the best of the compositions that were tried on the embedded LLaVA's validation "
        "scenes; on other models, compare.",
        defaults="mass attention with beta=1, merge=0.5.",
        cost="O(N²D) once, O(N) per pick; the bias takes decoder layers from flash attention to sdpa",
        contract=Contract(sync_free=False),
    )

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="prompt", method=self, mass=Mass()),)

    def select(self, ctx: Context) -> Tensor:
        return maxmin(ctx.features, ctx.count, ctx.valid).keep
