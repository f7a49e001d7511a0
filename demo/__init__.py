"""The embedded model and its pictures: a small, real vision-language model that needs no download.

It is a test bench. It answers questions about rendered scenes, so that pruning visual tokens has something to break;
what a method does here predicts nothing about a large model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from .scenes import Question

__all__ = ["WEIGHTS", "load", "measured", "scene"]

WEIGHTS = Path(__file__).parent / "weights"


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded model, in evaluation mode and float32 on the CPU, and its processor; works offline.

    Returns:
        `(model, processor)`. The processor takes pictures of any size (144 visual tokens each) and plain questions.

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    from .model import load as load_folder

    return load_folder(WEIGHTS)


def measured() -> dict[str, Any]:
    """What the shipped weights were measured at, and how they were made (`weights/accuracy.json`)."""
    import json

    result: dict[str, Any] = json.loads((WEIGHTS / "accuracy.json").read_text())
    return result


def scene(seed: int = 0) -> tuple[Image, list[Question]]:
    """A picture the model has never seen, with one question of each kind.

    Args:
        seed: from 0; the same seed gives the same pixels and questions everywhere.

    Returns:
        The picture, RGB 144 x 144, and its questions (`text`, `answer`, `kind`), reading a glyph first.

    Raises:
        ValueError: `seed` is negative or too large.
    """
    from PIL import Image

    from .scenes import KINDS, SPLITS, Style, questions, render

    tries = 16
    most = len(SPLITS["heldout"]) // tries - 1
    if not 0 <= seed <= most:
        raise ValueError(f"seed must be between 0 and {most}, got {seed}")
    style = Style(objects=(4, 6))
    for index in range(seed * tries, (seed + 1) * tries):
        drawn = render("heldout", index, style)
        by_kind = {question.kind: question for question in questions(drawn, 40)}
        if len(by_kind) == len(KINDS):
            break
    order = ("read", "color", "count", "position", "shape", "exist", "background")
    return Image.fromarray(drawn.pixels), [by_kind[kind] for kind in order if kind in by_kind]
