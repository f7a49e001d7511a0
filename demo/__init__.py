"""The embedded models and their pictures: small, real vision-language models that need no download.

They are a test bench. They answer questions about rendered scenes, so that pruning visual tokens has something to
break; what a method does here predicts nothing about a large model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from .questions import Question

__all__ = ["WEIGHTS", "examples", "load", "measured", "models", "scene"]

WEIGHTS = Path(__file__).parent / "weights"
_CANDIDATES = 16  # scenes from which `scene` takes the one with most kinds of questions


def models() -> tuple[str, ...]:
    """The names of the embedded models, the one that is meant where none is named first."""
    found = sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors"))
    return tuple(sorted(found, key=lambda name: name != "llava"))


def _folder(name: str) -> Path:
    if not (WEIGHTS / name / "model.safetensors").is_file():
        known = ", ".join(models()) or "none is installed"
        raise FileNotFoundError(f"there is no embedded model {name!r}; there are: {known}")
    return WEIGHTS / name


def load(name: str = "llava") -> tuple[Any, Any]:
    """An embedded model, in evaluation mode and float32 on the CPU, and its processor; works offline.

    Args:
        name: one of `models()`.

    Returns:
        `(model, processor)`. The processor takes pictures of any size and plain questions.

    Raises:
        FileNotFoundError: there are no such weights.
    """
    folder = _folder(name)
    from .model import load as load_folder

    return load_folder(folder)


def measured(name: str = "llava") -> dict[str, Any]:
    """What the weights of an embedded model were measured at, and how they were made (its `accuracy.json`)."""
    import json

    result: dict[str, Any] = json.loads((_folder(name) / "accuracy.json").read_text())
    return result


def examples() -> dict[Path, list[tuple[str, str]]]:
    """Pictures that no generator of scenes has drawn, each with questions and their answers."""
    import json

    folder = Path(__file__).parent / "examples"
    listed = json.loads((folder / "questions.json").read_text())
    return {folder / name: [(text, answer) for text, answer in pairs] for name, pairs in listed.items()}


def scene(seed: int = 0) -> tuple[Image, list[Question]]:
    """A picture that no model has been trained on, with one question of each kind that it allows.

    Args:
        seed: from 0; the same seed gives the same pixels and questions everywhere.

    Returns:
        The picture, RGB 144 x 144, and its questions (`text`, `answer`, `kind`), reading a glyph first.

    Raises:
        ValueError: `seed` is negative or too large.
    """
    from PIL import Image

    from .questions import USUAL, ask
    from .raster import paint
    from .scenes import SPLITS, Style, lay_out, seeds

    most = len(SPLITS["heldout"]) // _CANDIDATES - 1
    if not 0 <= seed <= most:
        raise ValueError(f"seed must be between 0 and {most}, got {seed}")
    style = Style(objects=(4, 6))
    candidates = lay_out(seeds("heldout", range(seed * _CANDIDATES, (seed + 1) * _CANDIDATES)), style)
    questions = ask(candidates, dict.fromkeys(USUAL, 1))
    best = int((questions.form >= 0).sum(1).argmax())
    order = ("read", "color", "count", "position", "shape", "exist")
    row = sorted(questions.rows()[best], key=lambda q: order.index(q.kind) if q.kind in order else len(order))
    return Image.fromarray(paint(candidates[best : best + 1]).pixels[0].numpy()), row
