"""EADP: coverage of what the question's telling words point at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, blur, facility, minmax, rank
from ..kernels import cosine, unit
from ..method import Card, Contract, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def relevance(
    features: Tensor,
    text: Tensor,
    grid: Tensor,
    *,
    temperature: float = 0.05,
    quantile: float = 0.5,
    spread: float = 0.1,
    mix: float = 0.5,
    power: float = 2.0,
    text_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """How much of the question each token is about, from words that point at few places.

    Args:
        features: (B, N, D), in the space of ``text``.
        text: (B, T, D).
        grid: (B, N, 3) long, (t, row, column), -1 off the grid.
        temperature: of the softmax over tokens whose entropy tells how widely a word points.
        quantile: share of the words, those of lowest entropy, that count.
        spread: temperature of the weights of words, in units of log N.
        mix: weight of the cosine to the mean of the words against the weighted cosines to single ones.
        power: exponent of the smoothed scores; more than 1 sharpens.
        text_valid: (B, T) bool; without words all tokens are equally relevant.
        valid: (B, N) bool.

    Returns:
        (B, N) float32 in [0, 1].
    """
    ok = torch.ones_like(features[..., 0], dtype=torch.bool) if valid is None else valid
    asked = torch.ones_like(text[..., 0], dtype=torch.bool) if text_valid is None else text_valid
    similarity = cosine(text, features)  # (B, T, N)
    points = (similarity / temperature).masked_fill(~ok[:, None], -torch.inf).softmax(-1)
    entropy = torch.special.entr(points).sum(-1) / ok.sum(1).clamp_min(2).log()[:, None]
    telling = rank(-entropy, asked) < (quantile * asked.sum(1, keepdim=True)).ceil().clamp_min(1)
    weight = (-entropy / spread).masked_fill(~(telling & asked), -torch.inf).softmax(-1)
    dense = (weight.nan_to_num(0.0)[:, None] @ similarity)[:, 0]
    whole = torch.where(asked[..., None], unit(text), 0.0).sum(1, keepdim=True)
    fused = mix * cosine(whole, features)[:, 0] + (1 - mix) * dense
    scores = blur(minmax(fused, ok), grid, ok) ** power
    return torch.where(asked.any(1, keepdim=True), scores, 1.0)


def eadp(features: Tensor, weight: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """Facility location in which relevant tokens are the ones to be represented.

    Args:
        features: (N, D) or (B, N, D), behind the projector.
        weight: (N,) or (B, N), relevance.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return facility(features, k, weight=weight, valid=valid)


@dataclass(frozen=True)
class EADP(Method):
    """Entropy-filtered words, smoothed relevance, weighted coverage.

    Attributes:
        temperature, quantile, spread, mix, power: of the relevance; see :func:`relevance`.
    """

    temperature: float = 0.05
    quantile: float = 0.5
    spread: float = 0.1
    mix: float = 0.5
    power: float = 2.0

    card: ClassVar[Card] = Card(
        name="eadp",
        title="coverage of what the question's telling words point at",
        paper="arXiv 2607.02484",
        venue="ECCV 2026",
        stage="prompt",
        needs="features, grid, the question's embeddings",
        official="No code is published, and the constants were not read. Words are tokens of CLIP's text tower.",
        departures="Words are the question's tokens in the language model's embedding space, with the sign of a "
        "similarity, hence eadp[embedding]. Entropies in units of log N. The constants are ours.",
        defaults="temperature=0.05, quantile=0.5, spread=0.1, mix=0.5, power=2.",
        cost="O(N(N+T)D) once, at most O(N²) per pick",
        contract=Contract(question_independent=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        for name in ("temperature", "spread", "power"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be positive")
        for name in ("quantile", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a share lies in [0, 1]")

    @property
    def label(self) -> str:
        return "eadp[embedding]"

    def needs(self) -> Needs:
        return Needs(question=True)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        weight = relevance(
            ctx.features,
            text,
            ctx.need_grid(),
            temperature=self.temperature,
            quantile=self.quantile,
            spread=self.spread,
            mix=self.mix,
            power=self.power,
            text_valid=asked,
            valid=ctx.valid,
        )
        return eadp(ctx.features, weight, ctx.count, valid=ctx.valid).keep
