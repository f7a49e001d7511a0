"""EADP: coverage of what the question's telling words point at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, blur, facility, rank
from ..kernels import cosine, unit
from ..method import Card, Contract, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def importance(
    features: Tensor,
    text: Tensor,
    grid: Tensor,
    *,
    sign: int = -1,
    sharpness: float = 100.0,
    telling: float = 0.2,
    spread: float = 0.01,
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
        sign: of the cosines.
        sharpness: factor on the cosines in the softmax over tokens whose entropy tells how widely a word points.
        telling: share of the words, those of lowest entropy, that count; at least one does.
        spread: temperature of the softmax over minus their entropies, in nats, that weighs them.
        mix: weight of the mean word against the weighted single ones.
        power: exponent of the smoothed importance.
        text_valid: (B, T) bool; without words all tokens are equally important.
        valid: (B, N) bool.

    Returns:
        (B, N) float32, at least 0.
    """
    ok = torch.ones_like(features[..., 0], dtype=torch.bool) if valid is None else valid
    asked = torch.ones_like(text[..., 0], dtype=torch.bool) if text_valid is None else text_valid
    similarity = sign * cosine(text, features)  # (B, T, N)
    points = (sharpness * similarity).masked_fill(~ok[:, None], -torch.inf).softmax(-1)
    entropy = torch.special.entr(points).sum(-1)
    count = (telling * asked.sum(1, keepdim=True)).floor().clamp_min(1)
    chosen = asked & (rank(-entropy, asked) < count)
    weight = (-entropy / spread).masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0.0)  # no word: no weights
    mean = torch.where(asked[..., None], text.float(), 0.0).sum(1, keepdim=True)
    with torch.autocast(features.device.type, enabled=False):
        single = (weight[:, None] @ similarity)[:, 0]
        fused = mix * sign * (unit(mean) @ unit(features).mT)[:, 0] + (1 - mix) * single
    low = torch.where(ok, fused, torch.inf).amin(-1, keepdim=True)
    high = torch.where(ok, fused, -torch.inf).amax(-1, keepdim=True)
    scores = blur((fused - low + 1e-6) / (high - low + 1e-6), grid, valid=ok) ** power
    return torch.where(asked.any(1, keepdim=True), scores, 1.0)


def eadp(features: Tensor, weight: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """Facility location on (1 + cos) / 2 in which important tokens are the ones to be represented.

    Args:
        features: (B, N, D), behind the projector.
        weight: (B, N), importance.
        k: tokens to keep, int or (B,) long.
        valid: (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return facility(features, k, weight=weight / 2, start=-1.0, valid=valid)


@dataclass(frozen=True)
class EADP(Method):
    """Entropy-filtered words, smoothed importance, weighted coverage.

    Attributes:
        sign: of the cosines, -1 as published or 1.
        sharpness: factor on the cosines in the softmax whose entropy tells how widely a word points.
        telling: share of the words that count.
        spread: temperature of the weights of words.
        mix: weight of the mean word against single ones.
        power: exponent of the importance.
    """

    sign: int = -1
    sharpness: float = 100.0
    telling: float = 0.2
    spread: float = 0.01
    mix: float = 0.5
    power: float = 2.0

    card: ClassVar[Card] = Card(
        name="eadp",
        title="coverage of what the question's telling words point at",
        paper="arXiv 2607.02484",
        venue="ECCV 2026",
        formula="greedy argmax_S Σ_j w_j·max_{i∈S} (1 + cos(z_i, z_j))/2, w = blur(minmax(μ·g + (1-μ)·Σ_t "
        "softmax(-H/γ)_t·c_t))^β, c_t = ∓cos(q_t, z), g = ∓cos(mean q, z), H_t the entropy of softmax(c_t/τ), t of "
        "the lowest fifth",
        stage="prompt",
        needs="features, grid, question tokens",
        official="Words are tokens of CLIP's text tower for LLaVA, the instruction's embeddings for Qwen; minus the "
        "cosine in both. The power is 1 in the constructor and 2 in the authors' own runs. On tiles the budget is "
        "shared out by importance, rounded down, at least one each. Pictures that are no square of patches are not "
        "smoothed for LLaVA.",
        trained="CLIP's text tower, for LLaVA's form; it cannot be given here. The form for Qwen needs none.",
        departures="Words are the question's tokens in the language model's embedding space on every family, hence "
        "eadp[embedding] with the published sign. One budget and one normalisation per image; every grid is "
        "smoothed. Gains in float64.",
        defaults="sign=-1, sharpness=100, telling=0.2, spread=0.01, mix=0.5, power=2, for every family and budget.",
        cost="O(N(N+T)D) once, at most O(N²) per pick",
        contract=Contract(question_independent=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise ConfigError(f"sign={self.sign!r}: use -1 or 1")
        for name in ("sharpness", "spread", "power"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be positive")
        for name in ("telling", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a share lies in [0, 1]")

    @property
    def label(self) -> str:
        return "eadp[embedding]"

    def needs(self) -> Needs:
        return Needs(question=True)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        weight = importance(
            ctx.features,
            text,
            ctx.need_grid(),
            sign=self.sign,
            sharpness=self.sharpness,
            telling=self.telling,
            spread=self.spread,
            mix=self.mix,
            power=self.power,
            text_valid=asked,
            valid=ctx.valid,
        )
        return eadp(ctx.features, ctx.scored(weight), ctx.count, valid=ctx.valid).keep
