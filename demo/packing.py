"""Many questions about one picture in one forward pass.

The prompt up to the first question is computed once; every conversation, of one question or several, follows as a
block that sees the prompt and itself, at the positions it would have if it were alone. The answers equal those of
separate calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Prefix
from .questions import TOKEN_ID, Questions

_IGNORE = -100
_FILLER = -2  # conversation of what fills a prompt up
_BLIND_NEXT = 2  # position of the first word of a prompt without a picture, after <s> and <user>


@dataclass(frozen=True)
class Packed:
    """B rows of packed conversations, padded to a common length T.

    Attributes:
        ids: int64 (B, T), token ids.
        talk: int64 (B, T), 1 + index of the conversation in its row, -1 for padding.
        offset: int64 (B, T), position of a token inside its conversation.
        sees: bool (B, T), whether its conversation sees the picture.
        labels: int64 (B, T), the token to predict, -100 where nothing is.
        question: int64 (B, T), index of the question it belongs to, in the order given to `pack`.
    """

    ids: Tensor
    talk: Tensor
    offset: Tensor
    sees: Tensor
    labels: Tensor
    question: Tensor


def pack(questions: Questions, talk: Tensor | None = None, blind: Tensor | None = None) -> Packed:
    """Lay the questions about each picture out one after the other.

    Args:
        questions: Q questions about each of B pictures.
        talk: int64 (B, Q), which conversation each belongs to, not decreasing; each is one of its own by default.
        blind: bool (B, Q), questions whose conversation does not see the picture; none by default.
    """
    asked = questions.form >= 0
    batch, many = asked.shape
    device = asked.device
    index = torch.arange(many, device=device).expand(batch, many)
    talk = index if talk is None else talk
    blind = torch.zeros_like(asked) if blind is None else blind
    words, answer = questions.token_ids(), questions.answer
    end, user, assistant = (
        torch.full((batch, many, 1), TOKEN_ID[token], device=device) for token in ("</s>", "<user>", "<assistant>")
    )
    # A later turn begins with the end of the answer before it.
    earlier = asked[..., None] & (talk[..., None] == talk[:, None]) & asked[:, None]
    later = earlier.tril(-1).any(-1)[..., None]
    opening = torch.where(later, torch.cat([end, user], -1), 0)
    ids = torch.cat([opening, words, torch.where(asked[..., None], assistant, 0), answer], -1)  # (B, Q, S)
    # <assistant> predicts the first word of the answer, that one the second, the last one the end.
    after = F.pad(answer, (0, 1))
    follows = torch.where((after == 0) & (F.pad(after, (1, 0), value=1)[..., :-1] > 0), TOKEN_ID["</s>"], after)
    follows = torch.where(asked[..., None] & (follows > 0), follows, _IGNORE)
    labels = F.pad(follows, (ids.shape[-1] - follows.shape[-1], 0), value=_IGNORE)
    columns = [ids, labels, *(value[..., None].expand_as(ids) for value in (talk, index, ~blind))]
    ids, labels, talks, index, sees = (column.flatten(1) for column in columns)

    present = ids > 0
    length = int(present.sum(1).max())
    order = (~present).to(torch.int8).argsort(dim=1, stable=True)[:, :length]
    ids, labels, talks, index, sees, present = (
        column.gather(1, order) for column in (ids, labels, talks, index, sees, present)
    )
    place = torch.arange(length, device=device).expand_as(ids)
    begins = F.pad(talks[:, 1:] != talks[:, :-1], (1, 0), value=True)
    offset = place - torch.where(begins, place, 0).cummax(1).values
    return Packed(ids, torch.where(present, talks + 1, -1), offset, sees, labels, index)


def answer_logits(model: Any, prefix: Prefix, packed: Packed) -> tuple[Tensor, Tensor]:
    """Run the language model over pictures and their packed questions.

    Args:
        model: the model.
        prefix: what stands before the questions.
        packed: the questions.

    Returns:
        Logits (A, vocabulary) at the labelled places, row by row, and those places as bool (B, T).
    """
    language_model = model.model.language_model
    first = prefix.embeddings.shape[1]
    embeddings = torch.cat([prefix.embeddings, language_model.embed_tokens(packed.ids)], 1)  # (B, P + T, D)
    after = torch.where(packed.sees, prefix.next[:, None], _BLIND_NEXT) + packed.offset
    positions = torch.cat([prefix.positions, after.expand(len(prefix.positions), -1, -1)], -1)
    talk = F.pad(packed.talk, (first, 0))  # the prompt is conversation 0
    if prefix.bias is not None:
        talk[:, :first].masked_fill_(prefix.bias.isneginf(), _FILLER)
    sees = F.pad(packed.sees, (first, 0), value=True)
    place = torch.arange(talk.shape[1], device=talk.device)
    readable = (talk[:, None] == 0) & (sees[:, :, None] | (place < _BLIND_NEXT))
    visible = (readable | (talk[:, None] == talk[:, :, None])) & (place <= place[:, None])
    if prefix.bias is not None:
        bias = F.pad(prefix.bias.masked_fill(prefix.bias.isneginf(), 0.0), (0, packed.ids.shape[1]))
        visible = torch.where(visible, bias[:, None].to(embeddings.dtype), -torch.inf)
    planes = {}
    if prefix.visual is not None:
        visual = F.pad(prefix.visual, (0, packed.ids.shape[1]))
        planes = {"visual_pos_masks": visual, "deepstack_visual_embeds": list(prefix.planes)}
    hidden = language_model(
        inputs_embeds=embeddings,
        attention_mask=visible[:, None],
        position_ids=positions.squeeze(0),
        use_cache=False,
        **planes,
    ).last_hidden_state[:, first:]
    labelled = packed.labels != _IGNORE
    return model.lm_head(hidden[labelled]), labelled


def answered(logits: Tensor, labelled: Tensor, packed: Packed, many: int) -> Tensor:
    """Which questions are answered rightly: every word and the end are the model's first choice.

    Args:
        logits: (A, vocabulary), from `answer_logits`.
        labelled: bool (B, T), from there.
        packed: the questions.
        many: how many questions there are about a picture, Q.

    Returns:
        bool (B, Q); true where there is no question.
    """
    wrong = torch.zeros(len(labelled), many, dtype=torch.int64, device=logits.device)
    missed = torch.zeros_like(packed.ids)
    missed[labelled] = (logits.argmax(-1) != packed.labels[labelled]).long()
    return wrong.scatter_add_(1, packed.question, missed) == 0
