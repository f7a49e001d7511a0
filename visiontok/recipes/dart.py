"""DART: tokens unlike a few pivots, as a rule before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import least_similar, rank
from ..method import Card, Contract, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def dart(
    features: Tensor,
    scores: Tensor,
    text: Tensor,
    text_scores: Tensor,
    k: int | Tensor,
    *,
    image_pivots: int = 4,
    text_pivots: int = 4,
    text_valid: Tensor | None = None,
    valid: Tensor | None = None,
    official: bool = False,
) -> Tensor:
    """The tokens of highest score and, for each of them and of the best text tokens, those least similar to it.

    Args:
        features: (B, N, D).
        scores: (B, N).
        text: (B, T, D), in the space of ``features``.
        text_scores: (B, T).
        k: tokens to keep, int or (B,) long.
        image_pivots: visual tokens among the pivots; they are kept.
        text_pivots: text tokens among the pivots.
        text_valid: (B, T) bool.
        valid: (B, N) bool.
        official: every pivot chooses ⌊k / pivots⌋ tokens, which are not exactly ``k`` with the image pivots.

    Returns:
        (B, N) bool keep mask.
    """
    ok = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    asked = torch.ones_like(text_scores, dtype=torch.bool) if text_valid is None else text_valid
    budget = torch.minimum(torch.as_tensor(k, device=ok.device).expand(len(ok)), ok.sum(1))

    image_place, text_place = rank(scores, ok), rank(text_scores, asked)
    of_image = torch.minimum(budget, ok.sum(1)).clamp_max(image_pivots)
    of_text = asked.sum(1).clamp_max(text_pivots)
    keep = (image_place < of_image[:, None]) & ok
    first = image_place.argsort(-1)[:, :image_pivots]
    second = text_place.argsort(-1)[:, :text_pivots]
    pivots = torch.cat([_rows(features, first), _rows(text, second)], 1)

    # Pivots that do not exist choose nothing; the others share what is left, the first of them one more.
    number = torch.cat(
        [torch.arange(first.shape[1], device=ok.device), torch.arange(second.shape[1], device=ok.device) + image_pivots]
    )
    there = torch.where(number < image_pivots, number < of_image[:, None], number - image_pivots < of_text[:, None])
    order, total = there.long().cumsum(1) - 1, there.sum(1, keepdim=True)
    rest = budget[:, None] if official else (budget - of_image)[:, None]
    share = rest.div(total.clamp_min(1), rounding_mode="floor")
    if not official:
        share = share + (order < rest - share * total)
    return least_similar(features, pivots, torch.where(there, share, 0), keep, ok)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, P, D): rows ``index`` (B, P) of x (B, N, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Dart(Method):
    """Duplication instead of importance: what is least like the pivots stays.

    Attributes:
        image_pivots: pivots among the visual tokens.
        text_pivots: pivots among the tokens of the question.
    """

    image_pivots: int = 4
    text_pivots: int = 4

    card: ClassVar[Card] = Card(
        name="dart",
        title="tokens least similar to a few pivots of image and question",
        paper="arXiv 2502.11494",
        venue="EMNLP 2025",
        formula="P = the 4 tokens and 4 words of largest ‖·‖₁; for p in P the next (K-4)/8 free tokens of lowest "
        "cos(z_i, p)",
        stage="prompt",
        needs="features, question tokens",
        official="In the decoder, behind layer 2: pivots have the longest keys in the 1-norm, those of the text come "
        "from behind the image. Every pivot chooses ⌊K/8⌋ tokens, so that another number than K remain (4 + "
        "8·⌊K/8⌋).",
        bugs="Pivots choose in the order of a CPython set, on which the result depends.",
        departures="Before the language model, where no keys exist: the 1-norm of the embedding stands in, hence "
        "dart[norm]. Text pivots come from behind the last image, too, but without special tokens. Exactly K tokens; "
        "pivots choose in descending order of their score, those of the image first. fidelity='official' brings the "
        "count back, not the order of the set.",
        defaults="image_pivots=4, text_pivots=4, for every family and budget.",
        cost="O(PND) for P pivots",
        contract=Contract(question_independent=False),
    )

    def __post_init__(self) -> None:
        for name, value, least in (("image_pivots", self.image_pivots, 1), ("text_pivots", self.text_pivots, 0)):
            if value < least:
                raise ConfigError(f"{name}={value!r}: at least {least}")

    @property
    def label(self) -> str:
        return "dart[norm]"

    def needs(self) -> Needs:
        return Needs(question=True)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        return dart(
            ctx.features,
            ctx.features.float().abs().sum(-1),
            text,
            text.float().abs().sum(-1),
            ctx.count,
            image_pivots=self.image_pivots,
            text_pivots=self.text_pivots,
            text_valid=asked,
            valid=ctx.valid,
            official=ctx.fidelity == "official",
        )
