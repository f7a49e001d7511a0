"""What a method may look at: the documented interface of every method, ours and users'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import ConfigError, UnsupportedError


class Attention:
    """What layers computed of the visual tokens of each image: attention statistics in float32, head means unless said
    otherwise, as (U, N) scores, -1 where a slot has no patch; and at a cut also states, queries, keys and values.

    Only what a method declares in :class:`visiontok.Needs` is computed.
    """

    def __init__(self, read: Callable[[str, int | float], torch.Tensor]) -> None:
        self._read = read

    def cls(self, layer: int | float) -> torch.Tensor:
        """What the CLS token of the vision tower looks at in tower layer ``layer``; softmax over all keys, CLS too.

        Raises:
            UnsupportedError: on towers without a CLS token; use :meth:`received` there.
        """
        return self._read("cls", layer)

    def cls_joined(self, layer: int | float) -> torch.Tensor:
        """As :meth:`cls`, with all heads joined to one: the logit is the product of the full-width query and key."""
        return self._read("cls_joined", layer)

    def cls_logits(self, layer: int | float) -> torch.Tensor:
        """As :meth:`cls`, before the softmax: mean over heads of the scaled products of query and key; 0 where a slot
        has no patch."""
        return self._read("cls_logits", layer)

    def keys(self, layer: int | float) -> torch.Tensor:
        """(U, N, H, d) keys of tower layer ``layer``, rotary positions applied; a token of several patches has their
        mean, a slot without patch 0."""
        return self._read("keys", layer)

    def received(self, layer: int | float) -> torch.Tensor:
        """Mean attention each patch receives from all queries of its crop (or window) in tower layer ``layer``."""
        return self._read("received", layer)

    def last_row(self, offset: int = -1) -> torch.Tensor:
        """What the last prompt token looks at in the decoder layer ``offset`` from the cut (-1: just before it; 0: the
        first layer that sees the reduced set, on its input, with all tokens that are still there)."""
        return self._read("last_row", offset)

    def unturned_row(self, offset: int = -1) -> torch.Tensor:
        """As :meth:`last_row`, of queries and keys without rotary positions, softmax over the visual tokens of the
        prompt alone; ``offset`` below 0."""
        return self._read("unturned_row", offset)

    def text_rows(self, offset: int = -1) -> torch.Tensor:
        """As :meth:`last_row`, averaged over all text tokens behind the last visual token of the prompt."""
        return self._read("text_rows", offset)

    def text_heads(self, offset: int = -1) -> torch.Tensor:
        """(U, N, H, Q): as :meth:`last_row`, of every token of ``ctx.question()``, which the method must ask for, too;
        every head and row for itself."""
        return self._read("text_heads", offset)

    def rotary_pull(self, offset: int = 0) -> torch.Tensor:
        """(U, N, Q): mean over the rotary frequencies of the cosine of the angle between each visual token and each
        token of ``ctx.question()``, what attention would be drawn by if only places counted; 1 at distance 0. All axes
        of M-RoPE have equal weight; the same in every layer."""
        return self._read("rotary_pull", offset)

    def to_text(self, offset: int = -1) -> torch.Tensor:
        """The share of its attention that each visual token pays to text in the decoder layer ``offset`` from the
        cut."""
        return self._read("to_text", offset)

    def cache_window(self, width: int) -> torch.Tensor:
        """(U, N, G) at a cache stage: what the last ``width`` tokens of the prompt look at in the layer, those behind
        its last visual token, one at least; summed over them and over the heads that share each of G key heads."""
        return self._read("cache_window", width)

    def cache_received(self, offset: int = 0) -> torch.Tensor:
        """(U, N, G) at a cache stage: what all tokens of the prompt look at in the layer (``offset`` 0), summed over
        them and over the heads that share each of G key heads."""
        return self._read("cache_received", offset)

    def flow(self, offset: int = -1) -> torch.Tensor:
        """Where attention leads in five steps in the decoder layer ``offset`` from the cut; see
        :func:`visiontok.functional.attention_flow`."""
        return self._read("flow", offset)

    def decoder_received(self, offset: int = -1) -> torch.Tensor:
        """Mean attention each token receives from all prompt tokens in the decoder layer ``offset`` from the cut."""
        return self._read("decoder_received", offset)

    def own_peaks(self, offset: int = -1) -> torch.Tensor:
        """Attention that the tokens of its image pay to each token in the decoder layer ``offset`` from the cut: the
        largest of all heads, mean over the rows."""
        return self._read("own_peaks", offset)

    def text_peaks(self, offset: int = -1) -> torch.Tensor:
        """As :meth:`own_peaks`, from all text tokens behind the last visual token of the prompt."""
        return self._read("text_peaks", offset)

    def decoder_states(self, offset: int = -1) -> torch.Tensor:
        """(U, N, D) hidden states on the input of the decoder layer ``offset`` from the cut."""
        return self._read("decoder_states", offset)

    def decoder_queries(self, offset: int = -1) -> torch.Tensor:
        """(U, N, H, d) queries of the decoder layer ``offset`` from the cut, rotary positions applied."""
        return self._read("decoder_queries", offset)

    def decoder_keys(self, offset: int = -1) -> torch.Tensor:
        """As :meth:`decoder_queries`, the keys, of which there may be fewer heads."""
        return self._read("decoder_keys", offset)

    def decoder_values(self, offset: int = -1) -> torch.Tensor:
        """As :meth:`decoder_keys`, the values."""
        return self._read("decoder_values", offset)

    def ahead(self, layer: int | float) -> torch.Tensor:
        """Before the language model: what the last prompt token would look for in decoder layer ``layer`` (an index, or
        a fraction of the depth) of the stock model: scaled products of its query with the keys."""
        return self._read("ahead", layer)

    def relevance(self, offset: int = 0) -> torch.Tensor:
        """Before the language model: how much the token that the stock model would say next rests on each visual token,
        by a rollout of attention and its gradient over all decoder layers (:func:`visiontok.functional.relevance`), for
        which the language model runs forward and backward. There is no other than ``offset`` 0."""
        return self._read("relevance", offset)

    def transition(self, since: int | float) -> torch.Tensor:
        """What attention and MLP do to each token, summed over the decoder layers from ``since`` (an index, or a
        fraction of the depth) to the one just before the cut: :func:`visiontok.functional.transition` among the tokens
        of its image; with ``fidelity="official"`` among all tokens of the batch."""
        return self._read("transition", since)


@dataclass(frozen=True, kw_only=True)
class Context:
    """All a method may use; U images (or videos), N visual tokens of the largest, D width of the language model.

    Rows shorter than N are padded; ``valid`` tells. At a cut, ``valid`` marks the tokens still alive and ``features``
    are hidden states on the cut layer's input; before the model they are the projected features. At a pixel stage a
    smaller picture's tokens are ``valid``, and the others have the features of the token that covers them; at a merge
    stage one token of each group is, and the others of the group have its features.

    Attributes:
        stage: ``pixel``, ``encoder``, ``merge``, ``prompt``, ``decoder`` or ``cache``.
        layer: decoder layer of the cut or the route, or whose cache is chosen from; None at the others.
        depth: decoder layers of the model.
        features: (U, N, D).
        valid: (U, N) bool, candidates.
        count: (U,) long, how many to keep of each image; at a cache stage in each head.
        budgeted: whether ``count`` is a budget; it is all there is otherwise.
        size: (U,) long, how many visual tokens each image had originally.
        grid: (U, N, 3) long, (t, row, col) in the image; -1 where a slot has no patch or nothing is known.
        has_grid: whether any of ``grid`` is known.
        place: (U, N) long, prompt position of each visual token.
        row: (U,) long, prompt row of each image.
        image: (U,) long, which image of its row it is.
        attention: attention statistics the method asked for.
        has_cls: whether the vision tower has a CLS token.
        model_type: the model family, as its config names it.
        encoder_features: (U, N, E) projector inputs; merged patches are concatenated; None unless asked for.
        project: the projector in float32 or better, (..., E) → (..., D), every token for itself; None unless asked for.
        final_norm: the norm behind the last decoder layer, (..., D) → (..., D), no gradients; None unless asked for.
        pixels: (U, N, 3, P) in 0 ... 1, the pixels each token was made of, of the first of two merged frames; 0 where a
            slot has no patch; None unless asked for.
        text_ids: (B, T) token ids of the whole prompt, or None if the caller gave embeddings.
        text_features: (B, T, D) embeddings of the whole prompt.
        text_valid: (B, T) bool, which of them are text.
        question_features: (B, Q, D) of the question, Q tokens in the longest: the text behind the last visual token of
            the row (all its text if there is none), without the special tokens that the model's config names. Words of
            the chat template that are ordinary tokens cannot be told apart and stay. Embeddings before the model,
            hidden states on the cut layer's input at a cut; None unless asked for.
        question_ids: (B, Q) long, their token ids, or None if the caller gave embeddings or nobody asked.
        question_valid: (B, Q) bool, which of them exist.
        question_place: (B, Q) long, their prompt positions, or None if nobody asked.
        fidelity: ``fixed``, or ``official`` for the published code's behaviour, bugs included.
        generator: image index u → a seeded CPU generator that depends on seed, prompt and image only, not on the
            place in the batch; beams of one prompt get equal ones.
        note: takes what :meth:`scored` is given; None if nobody looks.
    """

    stage: Literal["pixel", "encoder", "merge", "prompt", "decoder", "cache"]
    layer: int | None
    depth: int = 0
    features: torch.Tensor
    valid: torch.Tensor
    count: torch.Tensor
    budgeted: bool
    size: torch.Tensor
    grid: torch.Tensor
    has_grid: bool
    place: torch.Tensor
    row: torch.Tensor
    image: torch.Tensor
    attention: Attention
    has_cls: bool
    model_type: str
    encoder_features: torch.Tensor | None
    project: Callable[[torch.Tensor], torch.Tensor] | None
    final_norm: Callable[[torch.Tensor], torch.Tensor] | None
    pixels: torch.Tensor | None
    text_ids: torch.Tensor | None
    text_features: torch.Tensor
    text_valid: torch.Tensor
    question_features: torch.Tensor | None
    question_ids: torch.Tensor | None
    question_valid: torch.Tensor | None
    question_place: torch.Tensor | None
    fidelity: Literal["fixed", "official"]
    generator: Callable[[int], torch.Generator]
    note: Callable[[torch.Tensor], None] | None = None

    def scored(self, scores: torch.Tensor) -> torch.Tensor:
        """Say how important the method finds each token, for those who look at the call (``ledger.choices``).

        Args:
            scores: (U, N), larger is more important. What is kept may rest on more than that, diversity for one.

        Returns:
            ``scores``, untouched.
        """
        if self.note is not None:
            self.note(scores.detach())
        return scores

    def question(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The question each image is asked, (U, Q, D), and which tokens of it exist, (U, Q) bool.

        Raises:
            ConfigError: if the method's needs() does not declare it.
        """
        if self.question_features is None or self.question_valid is None:
            raise ConfigError("ctx.question(): declare question=True in needs() of the method")
        return self.question_features[self.row], self.question_valid[self.row]

    def before(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings before the language model: (U, N, D) of each image's original tokens, (U, Q, D) of its question.

        Raises:
            ConfigError: if the method's needs() does not declare the question.
        """
        if self.question_place is None:
            raise ConfigError("ctx.before(): declare question=True in needs() of the method")
        row = self.row[:, None]
        return self.text_features[row, self.place], self.text_features[row, self.question_place[self.row]]

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """States (..., D) behind the norm that the language model has behind its last layer, without gradients.

        Raises:
            ConfigError: if the method's needs() does not declare it.
        """
        if self.final_norm is None:
            raise ConfigError("ctx.normed(): declare final_norm=True in needs() of the method")
        return self.final_norm(x)

    def need_grid(self) -> torch.Tensor:
        """``grid``, if it is known.

        Raises:
            UnsupportedError: if the call did not reveal how tokens lie in their image.
        """
        if self.has_grid:
            return self.grid
        raise UnsupportedError(
            f"{self.model_type}: where tokens lie in their image is unknown for this call (features were given "
            "directly, or the family's adapter has no grid); pass pixels, or use a method that needs no grid"
        )

    def need_encoder_features(self) -> torch.Tensor:
        """``encoder_features``, which the method must have asked for in ``needs``.

        Raises:
            ConfigError: if it has not.
        """
        if self.encoder_features is None:
            raise ConfigError("encoder_features: declare encoder_features=True in needs() of the method")
        return self.encoder_features

    def need_projector(self) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """``encoder_features`` and ``project``, which the method must have asked for in ``needs``.

        Raises:
            ConfigError: if it has not, and at a cut, where there is no projector.
        """
        if self.encoder_features is None or self.project is None:
            raise ConfigError(
                "projector: declare projector=True in needs() of the method, and use it in a prompt stage"
            )
        return self.encoder_features, self.project
