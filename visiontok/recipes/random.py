"""Random: the baseline every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..functional import topk
from ..method import Card, Contract, Method

if TYPE_CHECKING:
    from ..context import Context


def random(valid: Tensor, k: int | Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """``k`` tokens of each row, drawn without replacement.

    Args:
        valid: (B, N) bool.
        k: tokens to keep, int or (B,) long.
        generators: one per row; a row's draw depends on its own generator and number of tokens only, not on padding.

    Returns:
        (B, N) bool keep mask.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    scores = torch.zeros(valid.shape, device=valid.device)
    for row, tokens, generator in zip(scores, valid, generators, strict=True):
        draw = torch.rand(int(tokens.sum()), generator=generator, device=generator.device)
        row[tokens] = draw.to(row.device)
    return topk(scores, k, valid)


@dataclass(frozen=True)
class Random(Method):
    """Tokens drawn at random, seeded per image."""

    card: ClassVar[Card] = Card(
        name="random",
        title="tokens drawn at random",
        paper="-",
        venue="baseline",
        formula="uniform over the K-subsets of the N tokens",
        stage="prompt",
        needs="nothing",
        departures="The draw depends on the seed and the image's place in its own prompt, never on its batch.",
        defaults="seed=0, of compress(); no other option",
        cost="O(N log N)",
        stochastic=True,
        contract=Contract(question_independent=False, sync_free=False),  # draws are seeded by the prompt
    )

    def select(self, ctx: Context) -> Tensor:
        return random(ctx.valid, ctx.count, [ctx.generator(u) for u in range(len(ctx.valid))])
