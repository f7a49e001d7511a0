"""MMTok: tokens that cover the words of the question and the other patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, coverage
from ..kernels import cosine, finite
from ..method import Card, Contract, Method, Needs, Tower

if TYPE_CHECKING:
    from ..context import Context


def cover_table(
    text: Tensor,
    features: Tensor,
    encoder_features: Tensor,
    *,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    text_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """How well each token covers each word and each patch: softmax of cosines over the tokens, per row.

    Args:
        text: (B, T, D), the question in the language model's embedding space.
        features: (B, N, D), in the same space.
        encoder_features: (B, N, E), before the projector; 0 where a token has no patch, which then covers none.
        alpha: weight of the patches against the words; both weigh their mean over rows.
        text_temperature: of the softmax of a word.
        vision_temperature: of the softmax of a patch.
        text_valid: (B, T) bool.
        valid: (B, N) bool.

    Returns:
        (B, T + N, N) float32; rows of words and patches that do not exist are 0, columns of tokens that hold NaN or
        infinity NaN.
    """
    asked = torch.ones_like(text[..., 0], dtype=torch.bool) if text_valid is None else text_valid
    ok = torch.ones_like(features[..., 0], dtype=torch.bool) if valid is None else valid
    known = finite(features) & finite(encoder_features)
    ok = ok & known
    seen = ok & (encoder_features != 0).any(-1)
    (b, m, _), n = text.shape, ok.shape[1]
    table = features.new_empty(b, m + n, n, dtype=torch.float32)
    lowest = torch.finfo(table.dtype).min  # as -inf, but no NaN where there is no candidate at all
    for part, similarity, exists, candidates, share in (
        (slice(m), cosine(text, features).div_(text_temperature), asked, ok, 1.0),
        (slice(m, None), cosine(encoder_features).div_(vision_temperature), seen, seen, alpha),
    ):
        similarity += torch.where(candidates, 0.0, lowest)[:, None]
        torch.softmax(similarity, -1, out=table[:, part])
        table[:, part] *= (share * exists / exists.sum(-1, keepdim=True).clamp_min(1))[..., None]
    return table.add_(torch.where(known, 0.0, torch.nan)[:, None])


def mmtok(
    text: Tensor,
    features: Tensor,
    encoder_features: Tensor,
    k: int | Tensor,
    *,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    text_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Picks:
    """Greedy maximum coverage of words and patches; arguments as in :func:`cover_table`.

    Args:
        k: tokens to keep, int or (B,) long.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    table = cover_table(
        text,
        features,
        encoder_features,
        alpha=alpha,
        text_temperature=text_temperature,
        vision_temperature=vision_temperature,
        text_valid=text_valid,
        valid=valid,
    )
    return coverage(table, k, valid=valid)


@dataclass(frozen=True)
class MMTok(Method):
    """Coverage of the question and of the image.

    Attributes:
        alpha: weight of the image.
        text_temperature: of a word's softmax; by default 0.02, on towers without CLS 0.01.
        vision_temperature: of a patch's softmax.
    """

    alpha: float = 0.5
    text_temperature: float | None = None
    vision_temperature: float = 0.2

    card: ClassVar[Card] = Card(
        name="mmtok",
        title="coverage of the question's words and of the patches",
        paper="arXiv 2508.18264",
        venue="ICLR 2026",
        formula="argmax_i Σ_r max(0, T_ri - max_{j∈S} T_rj), T = [softmax(cos(q, z)/τ_t)/m; α·softmax(cos(x, "
        "x)/τ_v)/n]",
        stage="prompt",
        needs="features, projector inputs, question tokens",
        official="Batch 1; the words of the question without stop words (LLaVA), 'Question: …' (Qwen); patches that "
        "are padding can be left out.",
        departures="The question is the text behind the last image, without special tokens; stop words stay, because "
        "token ids alone do not tell words. Without a question only patches are covered. Gains in float64.",
        defaults="alpha=0.5, vision_temperature=0.2; text_temperature=0.02 for LLaVA, 0.01 for Qwen.",
        cost="O(N(N+T)D) once, at most O(N(N+T)) per pick",
        contract=Contract(question_independent=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigError(f"alpha={self.alpha!r}: a weight of at least 0")
        for name, value in (("text", self.text_temperature), ("vision", self.vision_temperature)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name}_temperature={value!r}: must be positive")

    def adapt(self, tower: Tower) -> MMTok:
        return replace(self, text_temperature=self.text_temperature or (0.02 if tower.has_cls else 0.01))

    def needs(self) -> Needs:
        return Needs(encoder_features=True, question=True)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        return mmtok(
            text,
            ctx.features,
            ctx.need_encoder_features(),
            ctx.count,
            alpha=self.alpha,
            text_temperature=self.text_temperature or 0.02,
            vision_temperature=self.vision_temperature,
            text_valid=asked,
            valid=ctx.valid,
        ).keep
