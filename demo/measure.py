"""How well the model answers: per kind of question, with the picture, without it, and by the most frequent answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .packing import answer_logits, pack, pixel_values, see
from .scenes import KINDS, Question, Scene, questions, render

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_CHUNK = 16  # pictures per forward pass


@torch.inference_mode()
def predict(
    model: LlavaForConditionalGeneration,
    scenes: Sequence[Scene],
    rows: Sequence[Sequence[Question]],
    blind: bool = False,
) -> list[list[bool]]:
    """Which questions are answered rightly.

    Args:
        model: the model, in evaluation mode.
        scenes: B scenes.
        rows: the questions about each.
        blind: leave the picture out of the prompt.

    Returns:
        One list per scene, one bool per question: answer and end of sequence are both the model's first choice.
    """
    right: list[list[bool]] = []
    for start in range(0, len(scenes), _CHUNK):
        chunk, asked = scenes[start : start + _CHUNK], rows[start : start + _CHUNK]
        features, _ = see(model, pixel_values([scene.pixels for scene in chunk]))
        logits, labels = answer_logits(model, features[:, :0] if blind else features, pack(asked))
        correct = (logits.argmax(-1) == labels).view(-1, 2).all(-1).tolist()
        for row in asked:
            right.append(correct[: len(row)])
            del correct[: len(row)]
    return right


def majority(rows: Sequence[Sequence[Question]]) -> dict[str, str]:
    """The most frequent answer of each kind."""
    answers = Counter((question.kind, question.answer) for row in rows for question in row)
    best: dict[str, str] = {}
    for (kind, answer), _ in answers.most_common():
        best.setdefault(kind, answer)
    return best


def _by_kind(rows: Sequence[Sequence[Question]], right: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Accuracy in percent, by kind and over all questions."""
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for row, marks in zip(rows, right, strict=True):
        for question, mark in zip(row, marks, strict=True):
            hits[question.kind].append(mark)
    table = {kind: round(100 * float(np.mean(marks)), 1) for kind, marks in hits.items() if marks}
    table["all"] = round(100 * float(np.mean([mark for marks in right for mark in marks])), 1)
    return table


def _interval(right: Sequence[Sequence[bool]]) -> list[float]:
    """95 % interval of the overall accuracy in percent: bootstrap over scenes, since questions about one are alike."""
    hits = np.array([sum(marks) for marks in right])
    asked = np.array([len(marks) for marks in right])
    draws = np.random.RandomState(0).randint(0, len(right), (2000, len(right)))
    return np.percentile(100 * hits[draws].sum(1) / asked[draws].sum(1), [2.5, 97.5]).round(1).tolist()


def accuracy(
    model: LlavaForConditionalGeneration, split: str = "heldout", scenes: int = 160, per_scene: int = 12
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: the model, in evaluation mode.
        split: whose scenes are asked about.
        scenes: how many, from number 0.
        per_scene: questions about each.

    Returns:
        Accuracies in percent by kind and over all: "full", "full_interval" (95 % over scenes), "swapped" (shown the
        picture of another scene), "blind" (no picture in the prompt, which training never does), "majority" (the most
        frequent answer of the kind), and "questions", how many there were of each.
    """
    pictures = [render(split, index) for index in range(scenes)]
    rows = [questions(scene, per_scene) for scene in pictures]
    best = majority(rows)
    full = predict(model, pictures, rows)
    counts = Counter(question.kind for row in rows for question in row)
    return {
        "split": split,
        "scenes": scenes,
        "questions": {**{kind: counts[kind] for kind in KINDS}, "all": counts.total()},
        "full": _by_kind(rows, full),
        "full_interval": _interval(full),
        "swapped": _by_kind(rows, predict(model, pictures[1:] + pictures[:1], rows)),
        "blind": _by_kind(rows, predict(model, pictures, rows, blind=True)),
        "majority": _by_kind(rows, [[question.answer == best[question.kind] for question in row] for row in rows]),
    }
