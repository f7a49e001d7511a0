"""Questions that the stock model gets right and a method gets wrong, with the patches that the method kept."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from visiontok.adapters.base import find as find_adapter

from visiontok.api import Compression, compress, remember_vision
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.named import Loaded, find_device, load_model, quiet
from visiontok.overlay import overlay
from visiontok.recipe import Recipe

from .compare import Answered
from .items import Item
from .protocol import ALONE, protocol
from .records import Row, differences
from .runner import Block, answer
from .task import find

_SAME = ("model", "processor", "task", "questions")
"""Parts of a protocol in which the model that draws must agree with the one that answered."""
_SIDE = 420  # pixels of the longer side of a drawing


@dataclass(frozen=True)
class Example:
    """A question that a method gets wrong.

    Attributes:
        task: its name.
        method: method and budget.
        id: of the question.
        question: as the model was asked.
        right: what is right.
        reference: what the reference answered.
        answer: what the method answered.
        picture: the kept patches, as JPEG; None where there is no picture.
        note: what a reader must know, or nothing.
    """

    task: str
    method: str
    id: str
    question: str
    right: str
    reference: str
    answer: str
    picture: bytes | None
    note: str


def failures(reference: Answered, other: Answered, number: int) -> list[int]:
    """Places of questions that only the reference gets right, evenly spread; half a point is right."""
    lost = np.flatnonzero((reference.scores >= 0.5) & (other.scores < 0.5))
    chosen = np.linspace(0, len(lost) - 1, min(number, len(lost))).round().astype(int)
    return [int(lost[place]) for place in chosen]


def examples(
    pairs: Mapping[str, tuple[Answered, Sequence[Answered]]], number: int, data: Mapping[str, str], device: str
) -> list[Example]:
    """Failures of every method on every task, asked again one by one to see what was kept.

    Args:
        pairs: task → its reference and other runs, all of one model.
        number: at most so many of a method on a task.
        data: task → file or folder with its questions, as for the evaluation.
        device: where the model runs.

    Raises:
        ConfigError: if the model or the questions are not those that were evaluated.
    """
    first = next(iter(pairs.values()))[0]
    found: list[Example] = []
    with quiet():
        loaded = load_model(first.protocol["model"]["name"], find_device(device))
        recipes = {other.name: _recipe(other) for _, others in pairs.values() for other in others if _attached(other)}
        memory: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if first.protocol["model"]["tower"] == ALONE:
            memory = remember_vision(loaded.model, list(recipes.values()))
        with memory:
            for task, (reference, others) in pairs.items():
                items = _items(loaded, reference, data.get(task))
                for other in filter(_attached, others):
                    asked = [(items[place], place) for place in failures(reference, other, number)]
                    found += _of_method(loaded, reference, other, recipes[other.name], asked)
    return found


def _items(loaded: Loaded, reference: Answered, source: str | None) -> Sequence[Item]:
    """The questions that were asked."""
    asked, name = reference.protocol, reference.task["name"]
    task = find(name)
    items = task.items(source, loaded.model.config.model_type, asked["questions"]["number"])
    made = protocol(
        loaded,
        task={field: getattr(task, field) for field in asked["task"]},
        ids=[item.id for item in items],
        block=asked["questions"]["block"],
        seed=asked["seed"],
        max_new_tokens=asked["generation"]["max_new_tokens"],
    )
    changed = [line for part in _SAME for line in differences(asked[part], made[part], part)]
    if changed:
        raise ConfigError(
            f"{reference.folder}: the model or the questions at hand are not those that were evaluated: "
            f"{'; '.join(changed)}; mend this, or give --examples 0"
        )
    return items


def _attached(run: Answered) -> bool:
    """Whether something could be dropped."""
    return run.made["attached"] is not None


def _recipe(run: Answered) -> Recipe:
    recipe = Recipe.from_dict(run.made["attached"])
    if recipe.hash() != run.made["recipe"]:
        raise ConfigError(f"{run.folder}: its recipe is not what its hash says; evaluate it again")
    return recipe


def _of_method(
    loaded: Loaded, reference: Answered, other: Answered, recipe: Recipe, asked: Sequence[tuple[Item, int]]
) -> list[Example]:
    longest = other.protocol["generation"]["max_new_tokens"]
    found = []
    for item, place in asked:
        row = other.rows[place]
        picture, note = None, ""
        if item.images:
            with compress(loaded.model, recipe) as compression, torch.inference_mode():
                (again,) = answer(Block(loaded, [item]), compression, longest)
                if again.error is None:
                    picture, note = _drawn(loaded, item, compression, other.name)
            if again.error is not None:
                note = again.error
            elif again.text != row["answer"]:
                note = f"{note} Asked alone, the answer is {again.text!r}: other questions were padded with it.".strip()
        found.append(
            Example(
                task=other.task["name"],
                method=other.name,
                id=item.id,
                question=str(item.prompt),
                right=_right(row),
                reference=reference.rows[place]["answer"],
                answer=row["answer"],
                picture=picture,
                note=note,
            )
        )
    return found


def _drawn(loaded: Loaded, item: Item, compression: Compression, title: str) -> tuple[bytes, str]:
    pictures = [image.open() for image in item.images]
    note = f"The first of {len(pictures)} pictures." if len(pictures) > 1 else ""
    try:
        made = overlay(
            pictures,
            compression.ledger,
            find_adapter(loaded.base, inside=False),
            lambda like: loaded.processed((like, item.prompt)),
            title,
        )
    except UnsupportedError:
        return _jpeg(pictures[0]), f"{note} Where its tokens lie is not known: the picture itself.".strip()
    return _jpeg(made.picture), f"{made.caption}. {note}".strip()


def _jpeg(picture: Image) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, 2 * _SIDE), Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()


def _right(row: Row) -> str:
    target = row["target"]
    if target.get("box"):
        return ", ".join(f"{edge:g}" for edge in target["box"])
    answers = list(dict.fromkeys(target["answers"]))
    choices = target.get("choices", ())
    named = [f"{one}. {choices[ord(one) - ord('A')]}" if choices and len(one) == 1 else one for one in answers]
    return " / ".join(named)


def save(example: Example, number: int, folder: Path) -> str | None:
    """Write its picture; the file's name, None without one."""
    if example.picture is None:
        return None
    name = f"{example.task}-{example.method}-{number}.jpg".replace(" ", "-").replace("/", "-")
    (folder / name).write_bytes(example.picture)
    return name
