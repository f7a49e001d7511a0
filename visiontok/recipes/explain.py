"""Explain: keep the tokens that the model's own answer rests on; an upper bound, not a way to save time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import topk
from ..method import Card, Contract, Method, Needs, labelled

if TYPE_CHECKING:
    from ..context import Context


@dataclass(frozen=True)
class Explain(Method):
    """Top-k by a relevance rollout of attention and gradient through the language model.

    Attributes:
        scores: what :func:`visiontok.explain` has said of the very images of the call, a tensor or a list of numbers
            for each. None to ask the model in the call itself, for the first token of its answer.
    """

    scores: Sequence[Sequence[float]] | None = field(default=None, repr=False)

    card: ClassVar[Card] = Card(
        name="explain",
        title="the tokens that the stock model's answer rests on, by gradient and attention: an oracle for plots",
        paper="arXiv 2506.01097",
        venue="preprint",
        formula="top-K of the answer's rows of R = Π_l (1 + mean_h max(0, A_l ⊙ ∂y/∂A_l)), y the logit of the answer, "
        "over all layers l of the stock language model",
        stage="prompt",
        needs="attention and its gradient in every decoder layer, from a pass of the stock model forward and backward",
        official="No source was read. A small convolutional net learns to predict the relevance from the first layer's "
        "attention, so that serving needs no such pass.",
        trained="the net that predicts relevance from the first layer's attention, which is not here; what it is "
        "taught stands in",
        departures="The trained predictor is out of scope: this is its teacher, an offline oracle that has seen the "
        "stock model's answer. It costs more than it saves, which the report says, and is no strict upper bound: it "
        "says what the answer rests on, not what another choice could do. explain[first_token] asks in the call "
        "itself, for the first token that the stock model would say; scores= takes what visiontok.explain() finds for "
        "a whole answer. Tokens are chosen before the language model. Models keep their own attention kernel; maps "
        "are made anew from queries and keys, some rows at a time.",
        defaults="scores=None; what visiontok.explain() is told of the answer is up to its caller.",
        cost="the language model forward and backward, with its activations in memory, and O(HN²d) per layer",
        contract=Contract(question_independent=False, per_image=False, order_free=False),
    )

    def __post_init__(self) -> None:
        if self.scores is not None:
            object.__setattr__(self, "scores", _plain(self.scores))

    @property
    def label(self) -> str:
        return labelled("explain", "first_token" if self.scores is None else "")

    def needs(self) -> Needs:
        return Needs(relevance=self.scores is None)

    def select(self, ctx: Context) -> Tensor:
        scores = ctx.attention.relevance() if self.scores is None else self._given(ctx)
        return topk(ctx.scored(scores), ctx.count, ctx.valid)

    def _given(self, ctx: Context) -> Tensor:
        """(U, N) the scores that were given.

        Raises:
            ConfigError: if they are of other images.
        """
        given, sizes = self.scores or (), ctx.size.tolist()
        if [len(one) for one in given] != sizes:
            raise ConfigError(
                f"scores: they are of {len(given)} images with {sorted({len(one) for one in given})} tokens, this call "
                f"has {len(sizes)} with {sorted(set(sizes))}; give those that explain() made of these inputs"
            )
        rows = [torch.tensor(one) for one in given]
        wide = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(ctx.valid.shape[1])], batch_first=True)
        return wide[:-1].to(ctx.valid.device)


def _plain(scores: Any) -> tuple[tuple[float, ...], ...]:
    """Numbers, which a recipe can be saved with."""
    try:
        found = tuple(tuple(map(float, one)) for one in scores)
    except TypeError:
        found = ()
    if not found or not all(found) or not all(math.isfinite(value) for one in found for value in one):
        raise ConfigError(
            f"scores={scores!r}: give finite numbers for every visual token of every image, as visiontok.explain() does"
        )
    return found
