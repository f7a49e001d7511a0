"""Many questions about one picture in one forward pass.

The prefix `<s> <user> <image>…` is computed once; every question with its answer follows as a block that sees the
prefix and itself, at the positions it would have if it were alone. The answers equal those of separate calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .model import FEATURE_LAYER, TOKEN_ID
from .scenes import Question

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's, as in CLIPImageProcessor
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
_IGNORE = -100


def pixel_values(pictures: Sequence[np.ndarray]) -> Tensor:
    """What the processor makes of pictures that already have the model's size.

    Args:
        pictures: B arrays, uint8 (SIZE, SIZE, 3).

    Returns:
        float32 (B, 3, SIZE, SIZE).
    """
    stacked = torch.from_numpy(np.stack(pictures)).float() / 255
    return ((stacked - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The eyes of the model, from which gradients flow.

    Args:
        model: the model.
        pixels: (B, 3, SIZE, SIZE).

    Returns:
        Projected visual tokens (B, TOKENS, WIDTH) and the tower's pooled output (B, WIDTH).
    """
    vision = model.model.vision_tower(pixels, output_hidden_states=True)
    features = model.model.multi_modal_projector(vision.hidden_states[FEATURE_LAYER][:, 1:])
    return features, vision.pooler_output


def question_ids(question: Question) -> list[int]:
    """Token ids of a generated question; the tokenizer gives the same."""
    return [TOKEN_ID[word] for word in question.text.rstrip("?").split()]


@dataclass(frozen=True)
class Packed:
    """B rows of packed questions, padded to a common length T.

    Attributes:
        ids: int64 (B, T), token ids.
        offsets: int64 (B, T), position of a token inside its question.
        turns: int64 (B, T), 1 + index of the question in its row, -1 for padding.
        labels: int64 (B, T), the token to predict, -100 where nothing is.
    """

    ids: Tensor
    offsets: Tensor
    turns: Tensor
    labels: Tensor


def pack(rows: Sequence[Sequence[Question]]) -> Packed:
    """Lay the questions of each picture out one after the other."""
    columns: tuple[list[list[int]], ...] = ([], [], [], [])
    for questions in rows:
        ids: list[int] = []
        offsets: list[int] = []
        turns: list[int] = []
        labels: list[int] = []
        for turn, question in enumerate(questions, start=1):
            answer = TOKEN_ID[question.answer]
            tokens = [*question_ids(question), TOKEN_ID["<assistant>"], answer]
            ids += tokens
            offsets += range(len(tokens))
            turns += [turn] * len(tokens)
            labels += [_IGNORE] * (len(tokens) - 2) + [answer, TOKEN_ID["</s>"]]
        for column, values in zip(columns, (ids, offsets, turns, labels), strict=True):
            column.append(values)
    length = max(len(row) for row in columns[0])
    fills = (TOKEN_ID["<pad>"], 0, -1, _IGNORE)
    return Packed(
        *(
            torch.tensor([row + [fill] * (length - len(row)) for row in column])
            for column, fill in zip(columns, fills, strict=True)
        )
    )


def answer_logits(model: LlavaForConditionalGeneration, features: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Run the language model over pictures and their packed questions.

    Args:
        model: the model.
        features: (B, N, D), projected visual tokens; N = 0 asks without a picture.
        packed: the questions of the B pictures.

    Returns:
        Logits (A, vocabulary) and labels (A,) at the labelled places, row by row: answer, end of sequence, answer, …
    """
    language_model = model.model.language_model
    batch, visual = features.shape[:2]
    embed = language_model.embed_tokens
    start = torch.tensor([TOKEN_ID["<s>"], TOKEN_ID["<user>"]]).expand(batch, 2)
    prefix = 2 + visual
    embeddings = torch.cat([embed(start), features, embed(packed.ids)], 1)  # (B, 2 + N + T, D)
    positions = torch.cat([torch.arange(prefix).expand(batch, prefix), prefix + packed.offsets], 1)
    turns = F.pad(packed.turns, (prefix, 0))
    length = turns.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = ((turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])) & causal
    hidden = language_model(
        inputs_embeds=embeddings, attention_mask=visible[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state[:, prefix:]
    labelled = packed.labels != _IGNORE
    return model.lm_head(hidden[labelled]), packed.labels[labelled]
