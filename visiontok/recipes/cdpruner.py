"""CDPruner: a determinantal point process conditioned on the question."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..functional import Picks, dpp
from ..kernels import cosine
from ..method import Card, Contract, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def cdpruner(
    features: Tensor, relevance: Tensor, k: int | Tensor, *, valid: Tensor | None = None, official: bool = False
) -> Picks:
    """Greedy set of the DPP with kernel r_i · cos_ij · r_j, r the relevance brought to (0, 1].

    Args:
        features: (B, N, D), behind the projector.
        relevance: (B, N), on any scale.
        k: tokens to keep, int or (B,) long.
        valid: (B, N) bool.
        official: smallest and largest relevance of the whole batch, not of each image.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    ok = torch.ones_like(relevance, dtype=torch.bool) if valid is None else valid
    low = torch.where(ok, relevance, torch.inf).amin(-1, keepdim=True)
    high = torch.where(ok, relevance, -torch.inf).amax(-1, keepdim=True)
    if official and len(ok):
        low, high = low.amin(), high.amax()
    # Where all are equally relevant (no question, one token), diversity decides alone.
    r = torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)
    return dpp(features, r, k, valid)


def text_relevance(features: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
    """(B, N) mean cosine of each token (B, N, D) to the text tokens (B, T, D) that exist (B, T); 0 without any."""
    similarity = torch.where(text_valid[..., None], cosine(text, features), 0.0)
    return similarity.sum(1) / text_valid.sum(1, keepdim=True).clamp_min(1)


@runtime_checkable
class ClipPair(Protocol):
    """The CLIP model that the vision tower is one half of."""

    def images(self, features: Tensor) -> Tensor:
        """(…, E) tower features → (…, C) float32, in the space shared with text."""
        ...

    def texts(self, ids: Sequence[int]) -> Tensor:
        """Token ids of the language model → (M, C) float32, one row per piece that CLIP's text tower takes."""
        ...


@dataclass(frozen=True)
class CDPruner(Method):
    """Relevance to the question and diversity, by one determinant.

    Attributes:
        clip: the CLIP pair of the vision tower: an object like :class:`visiontok.clip.OpenClip`, or the name of an
            open_clip model and its weights, ``ViT-L-14-336/openai`` (loaded, and downloaded if need be, at the first
            use). By default relevance is measured in the language model's embedding space.
        tokenizer: with the name of a pair, name or folder of the language model's tokenizer, which turns the question
            back into words.
    """

    clip: ClipPair | str | None = None
    tokenizer: str | None = None

    card: ClassVar[Card] = Card(
        name="cdpruner",
        title="determinantal point process conditioned on the question",
        paper="arXiv 2506.10967",
        venue="NeurIPS 2025",
        formula="greedy argmax_S det(L_S), L_ij = r_i·cos(z_i, z_j)·r_j, r = (rel - min + 10⁻⁶)/(max - min)",
        stage="prompt",
        needs="features, question tokens; with a CLIP pair projector inputs and the ids of the question tokens",
        official="Relevance is minus the mean cosine of CLIP's patches and CLIP's text on LLaVA, where relevant "
        "patches are those least similar, and plus that of the language model's embeddings on Qwen2.5-VL. Smallest "
        "and largest are taken over a whole batch of crops.",
        bugs="Once the kernel's rank is used up, square roots of negative numbers repeat tokens and fewer than K "
        "remain.",
        trained="CLIP's text tower, which LLaVA's checkpoints lack: give it by clip=.",
        departures="Smallest and largest per image; exactly K tokens, those that add nothing to the determinant by "
        "relevance. Without a CLIP pair: cdpruner[embedding], the mean cosine to the question's tokens, sign plus. "
        "The text given to CLIP is that behind the last image, words of the chat template included. "
        "fidelity='official' brings the batch's extremes back, not the repeated tokens, which hang on rounding.",
        defaults="clip=None: nothing is downloaded unasked.",
        cost="O(N²D + K²N); a CLIP text tower where one is given",
        contract=Contract(question_independent=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if not isinstance(self.clip, ClipPair | str | None):
            raise ConfigError(f"clip={self.clip!r}: give a ClipPair, or model/weights of open_clip and a tokenizer")
        if isinstance(self.clip, str) and (self.tokenizer is None or self.clip.count("/") != 1):
            raise ConfigError(
                f"clip={self.clip!r}, tokenizer={self.tokenizer!r}: name model/weights of open_clip and the language "
                "model's tokenizer, as in clip='ViT-L-14-336/openai', tokenizer='llava-hf/llava-1.5-7b-hf'"
            )

    @property
    def label(self) -> str:
        return "cdpruner[embedding]" if self.clip is None else "cdpruner"

    def needs(self) -> Needs:
        return Needs(question=True, encoder_features=self.clip is not None)

    def select(self, ctx: Context) -> Tensor:
        text, asked = ctx.question()
        if self.clip is None:
            relevance = text_relevance(ctx.features, text, asked)
        else:
            pair = _load(self.clip, self.tokenizer or "") if isinstance(self.clip, str) else self.clip
            relevance = self._in_clip(ctx, pair)
        relevance = ctx.scored(relevance)
        return cdpruner(ctx.features, relevance, ctx.count, valid=ctx.valid, official=ctx.fidelity == "official").keep

    @staticmethod
    def _in_clip(ctx: Context, pair: ClipPair) -> Tensor:
        if ctx.encoder_features is None or ctx.question_ids is None or ctx.question_valid is None:
            raise UnsupportedError(
                f"{ctx.model_type}: a CLIP pair needs pixels and token ids; pass them, or leave clip out"
            )
        images = pair.images(ctx.encoder_features)
        ids, asked = ctx.question_ids.tolist(), ctx.question_valid.tolist()
        per_row = [pair.texts([i for i, ok in zip(*row, strict=True) if ok]) for row in zip(ids, asked, strict=True)]
        out = [
            -cosine(per_row[row].to(images.device)[None], image[None])[0].mean(0)
            for row, image in zip(ctx.row.tolist(), images, strict=True)
        ]
        return torch.stack(out) if out else images.new_zeros(images.shape[:2])


@functools.cache
def _load(name: str, tokenizer: str) -> ClipPair:
    from ..clip import OpenClip

    return OpenClip.load(name, tokenizer)
