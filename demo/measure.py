"""How well a model answers, per kind of question and split: with the picture, without it, and from the form alone."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visiontok import statistics

from .architectures import ARCHITECTURES
from .model import Architecture, load
from .packing import answer_logits, answered, pack
from .questions import FORM_NAMES, KIND_OF_FORM, KINDS, Questions, ask_as, converse
from .raster import paint
from .scenes import NORMAL, STYLES, lay_out, seeds

EXAMS = ("heldout", "composition", "detail", "pairs", "turns")
_TURNS = 4
_CHUNK = 16  # pictures per forward pass


@dataclass(frozen=True)
class Sheet:
    """A chunk of an exam.

    Attributes:
        pixels: uint8 (B * M, SIDE, SIDE, 3), M pictures for each of B prompts.
        questions: Q questions about each prompt.
        talk: int64 (B, Q), the conversation each belongs to.
    """

    pixels: Tensor
    questions: Questions
    talk: Tensor

    @property
    def pictures(self) -> int:
        """M, the number of pictures in a prompt."""
        return len(self.pixels) // len(self.questions)


def exam(split: str, scenes: int, device: torch.device | str = "cpu") -> Iterator[Sheet]:
    """The questions of a split.

    Args:
        split: as `ask_as` knows them; "turns" asks several questions in one conversation.
        scenes: how many, from the first.
        device: where the chunks shall lie.

    Yields:
        Chunks of at most 16 pictures.
    """
    for start in range(0, scenes, _CHUNK):
        layout = lay_out(seeds(split, range(start, min(start + _CHUNK, scenes)), device), STYLES.get(split, NORMAL))
        questions = ask_as(split, layout)
        talk = torch.arange(questions.form.shape[1], device=device).expand(questions.form.shape)
        if split == "turns":
            questions, talk = converse(questions, layout.seeds, _TURNS)
        yield Sheet(paint(layout).pixels, questions, talk)


@torch.inference_mode()
def mark(architecture: Architecture, model: Any, sheet: Sheet, blind: bool = False, swapped: bool = False) -> Tensor:
    """Which questions of a chunk are answered rightly, the whole answer word for word: bool (B, Q).

    Args:
        architecture: of the model.
        model: the model, in evaluation mode.
        sheet: the questions.
        blind: leave the pictures out of the prompt.
        swapped: show the pictures of the next prompt instead.
    """
    features, _ = architecture.see(model, sheet.pixels)
    features = features.unflatten(0, (-1, sheet.pictures))
    packed = pack(sheet.questions, sheet.talk)
    if swapped:
        features = features.roll(1, 0)
    prefix = architecture.prefix(model, features[:, :0] if blind else features)
    logits, labelled = answer_logits(model, prefix, packed)
    return answered(logits, labelled, packed, sheet.questions.form.shape[1])


def accuracy(
    architecture: Architecture, model: Any, split: str = "heldout", scenes: int = 320, controls: bool = True
) -> dict[str, Any]:
    """Measure a model.

    Args:
        architecture: of the model.
        model: the model, in evaluation mode.
        split: as in `exam`.
        scenes: how many, from the first.
        controls: measure "swapped", "blind" and "prior" too.

    Returns:
        Per kind of question and over "all" of them, "questions", how many there were, and accuracies in percent:
        "full" with "interval" (95 %, bootstrap over prompts, since questions about one are alike), "swapped" (the
        picture of another prompt), "blind" (no picture in the prompt) and "prior" (the most frequent answer to the
        form of the question).
    """
    names = ("full", "blind", "swapped") if controls else ("full",)
    marks: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "form", "answer")}
    for sheet in exam(split, scenes, model.device):
        for name in names:
            right = mark(architecture, model, sheet, blind=name == "blind", swapped=name == "swapped")
            marks[name].append(right.cpu().numpy())
        marks["form"].append(sheet.questions.form.cpu().numpy())
        marks["answer"].append(sheet.questions.answer.cpu().numpy())
    columns = {name: np.concatenate(values) for name, values in marks.items()}
    form = columns.pop("form")
    answers = columns.pop("answer")
    if controls:
        columns["prior"] = _prior(form, answers)
    kind_of = np.array([KINDS.index(kind) for kind in KIND_OF_FORM])
    kinds = np.where(form >= 0, kind_of[form], -1)
    chosen = {kind: kinds == index for index, kind in enumerate(KINDS) if (kinds == index).any()}
    chosen["all"] = kinds >= 0
    result: dict[str, Any] = {"split": split, "scenes": scenes}
    result["questions"] = {kind: int(mask.sum()) for kind, mask in chosen.items()}
    for name, column in columns.items():
        result[name] = {kind: round(100 * float(column[mask].mean()), 1) for kind, mask in chosen.items()}
    prompt = np.arange(len(form))[:, None].repeat(form.shape[1], 1)
    found = {kind: statistics.accuracy(columns["full"][mask], prompt[mask]) for kind, mask in chosen.items()}
    result["interval"] = {kind: [round(100 * x, 1) for x in (one.low, one.high)] for kind, one in found.items()}
    return result


def every_split(architecture: Architecture, model: Any) -> dict[str, dict[str, Any]]:
    """The accuracies on each of EXAMS."""
    return {split: accuracy(architecture, model, split) for split in EXAMS}


def _prior(form: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """bool (B, Q): whether the answer is the most frequent one to its form of question."""
    right = np.zeros(form.shape, bool)
    for index in range(len(FORM_NAMES)):
        rows = answers[form == index]
        if len(rows):
            best = Counter(map(tuple, rows.tolist())).most_common(1)[0][0]
            right[form == index] = (rows == best).all(-1)
    return right


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visiontok.demo.measure", description="Measure models on every split, into their accuracy.json."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="an embedded model")
    for folder in parser.parse_args(arguments).folders:
        model, _ = load(folder)
        found = every_split(ARCHITECTURES[model.config.model_type](), model)
        file = folder / "accuracy.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "splits": found}, indent=1) + "\n")
        print(folder, {split: table["full"]["all"] for split, table in found.items()})


if __name__ == "__main__":
    main()
