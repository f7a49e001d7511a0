"""Answer an exam picture by picture: tower and selection once for each, then all questions about it in one forward.

Only for a choice that does not depend on the question and is made before the language model. What that is given in
front of the questions is read off the model in use, with whatever is attached to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .measure import Sheet
from .model import Prefix
from .packing import Packed, answer_logits, answered, pack
from .questions import FORMS

_ANY = FORMS["background"]  # a question without gaps; which one does not matter


@dataclass(frozen=True)
class Part:
    """Some prompts of an exam.

    Attributes:
        inputs: what the processor makes of their pictures and one question.
        text: number of tokens of that question, behind the pictures.
        packed: the questions asked about them, Q each, and the conversations before those.
        many: Q.
        asked: bool (B, Q), the questions that count.
    """

    inputs: Any
    text: int
    packed: Packed
    many: int
    asked: Tensor


def parts(processor: Any, sheets: Sequence[Sheet], asked: Sequence[Tensor]) -> Iterator[Part]:
    """Prepare an exam.

    Args:
        processor: of the model.
        sheets: its questions.
        asked: bool (B, Q) for each sheet, those that count.
    """

    def chat(pictures: int) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": _ANY}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text

    start = len(processor.tokenizer("<user>").input_ids)  # <s> and <user> stand before the pictures
    behind = len(processor.tokenizer(chat(0)).input_ids) - start
    for sheet, counts in zip(sheets, asked, strict=True):
        pictures = [Image.fromarray(pixels) for pixels in sheet.pixels.numpy()]
        text = [chat(sheet.pictures)] * len(sheet.questions)
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        together = (sheet.talk[..., None] == sheet.talk[:, None]) & counts[:, None]
        form = torch.where(together.any(-1), sheet.questions.form, -1)
        packed = pack(
            replace(sheet.questions, form=form, answer=sheet.questions.answer * (form >= 0)[..., None]), sheet.talk
        )
        yield Part(inputs, behind, packed, form.shape[1], counts)


def prefix(model: Any, inputs: Mapping[str, Any], text: int) -> Prefix:
    """What the first layers are given but for the last `text` tokens, which are the same in every row.

    Args:
        model: the model.
        inputs: what it takes.
        text: number of tokens to leave out.
    """
    language_model = model.model.language_model
    given: dict[str, Any] = {}

    def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        given.update(embeddings=kwargs["inputs_embeds"], positions=kwargs.get("position_ids"))

    def first(_: Any, __: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        given.update(mask=kwargs.get("attention_mask"), left=output)

    def second(_: Any, args: tuple[Tensor]) -> None:
        given.update(entered=args[0])

    hooks = [
        language_model.register_forward_pre_hook(enter, with_kwargs=True),
        language_model.layers[0].register_forward_hook(first, with_kwargs=True),
        language_model.layers[1].register_forward_pre_hook(second),
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    embeddings, positions, mask = given["embeddings"], given["positions"], given["mask"]
    batch, length, _ = embeddings.shape
    end = length - text
    if positions is None:
        positions = torch.arange(length)[None]
    positions = positions[None] if positions.ndim == 2 else positions[-3:]  # before them may stand those of the text
    positions = positions.expand(-1, batch, -1)
    bias = None
    if mask is not None:  # the last token sees everything, under the bias that everyone sees it
        bias = mask[:, 0, -1, :end]
        bias = torch.zeros(batch, end).masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else bias
        bias = bias.masked_fill(bias < torch.finfo(bias.dtype).min / 2, -torch.inf)
    before = Prefix(embeddings[:, :end], positions[..., :end], positions[0, :, end], bias)
    added = (given["entered"] - given["left"])[:, :end]  # DeepStack adds to the tokens between two layers
    if not added.any():
        return before
    return replace(before, visual=torch.ones(batch, end, dtype=torch.bool), planes=(added.flatten(0, 1),))


@torch.inference_mode()
def marks(model: Any, part: Part, inputs: Mapping[str, Any]) -> np.ndarray:
    """Which of the questions that count are answered rightly, every word of it: bool, row by row.

    Args:
        model: the model, in evaluation mode.
        part: the questions.
        inputs: the part's own, or shorter ones.
    """
    logits, labelled = answer_logits(model, prefix(model, inputs, part.text), part.packed)
    right: np.ndarray = answered(logits, labelled, part.packed, part.many)[part.asked].numpy()
    return right
