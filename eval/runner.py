"""Ask a model every question of a task, once for each method and budget, and write down what it said."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visiontok.api import Compression, compress
from visiontok.errors import ConfigError, ImageError
from visiontok.named import Loaded, named_recipe

from .grading import mark, summary
from .protocol import protocol, short
from .records import TIMES, Records, Row, digest, keep_protocol, split, write_json
from .scoring import metric

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import StoppingCriteriaList

    from visiontok.named import Prompt
    from visiontok.recipe import Recipe

    from .items import Item
    from .task import Task

RESULTS = "results.json"
FULL, BLIND = "full", "blind"
"""What stands where a method would: the stock model, and the stock model without its pictures."""

Asked = tuple[list["Image"], "Prompt"]


@dataclass(frozen=True)
class Cell:
    """One way of answering.

    Attributes:
        method: a method's name, a recipe's file, ``full`` or ``blind``.
        keep: budget as text; None for the method's own, or for none.
        recipe: what is attached; None for the stock model.
    """

    method: str
    keep: str | None
    recipe: Recipe | None

    @classmethod
    def named(cls, method: str, keep: str | None, options: Mapping[str, str], seed: int) -> Cell:
        """By the names of a command line.

        Raises:
            ConfigError: if there is no such method, or it cannot have the budget or options.
        """
        if method in (FULL, BLIND):
            return cls(method, None, None)
        return cls(method, keep, named_recipe(method, keep, options, seed))

    def __str__(self) -> str:
        name = Path(self.method).stem if self.method.endswith((".json", ".yaml", ".yml", ".py")) else self.method
        return name if self.keep is None else f"{name} {self.keep}"


@dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        text: the answer; empty where there is an error.
        tokens: how many it took, the end token included.
        prompt: tokens of the stock model's prompt.
        visual: visual tokens of the stock model; None if it makes none that can be counted.
        kept: of them, those in each decoder layer; None for the stock model.
        together: questions that were answered in the same call.
        error: why it was not asked, or None.
        warnings: of the report.
        seconds: of the call, shared among its questions.
    """

    text: str = ""
    tokens: int = 0
    prompt: int = 0
    visual: int | None = None
    kept: tuple[int, ...] | None = None
    together: int = 0
    error: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] | None = None


def run(
    loaded: Loaded,
    task: Task,
    items: Sequence[Item],
    cell: Cell,
    folder: Path,
    *,
    batch: int = 8,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Answer what is not answered yet.

    Args:
        loaded: model and processor.
        task: what is asked.
        items: its questions.
        cell: how they are answered.
        folder: of this cell; answers already there are kept.
        batch: questions that are answered together.
        seed: of the method's draws.
        rank: number of this process among ``world`` that share the questions.
        world: see there.
        progress: told how many of this process's questions are answered, and how many there are.

    Returns:
        what :func:`results` says; None while other processes have not answered their part.

    Raises:
        ConfigError: if the folder holds answers that came about otherwise.
    """
    ids = [item.id for item in items]
    blocks = split(ids, batch)
    made = protocol(
        loaded,
        task={name: getattr(task, name) for name in ("name", "version", "digest", "metric", "dialect")},
        ids=ids,
        block=batch,
        seed=seed,
        max_new_tokens=task.max_new_tokens,
    )
    recipe = None if cell.recipe is None else cell.recipe.hash()
    keep_protocol(folder, {"protocol": made, "method": str(cell), "recipe": recipe})
    by_id = {item.id: item for item in items}
    stamp = {"protocol": short(made), "recipe": recipe}
    with Records(folder, blocks, rank, world) as records:
        todo = records.missing()
        own = sum(len(blocks[number]) for number in range(rank, len(blocks), world))
        left = sum(len(blocks[number]) for number in todo)
        attach = contextlib.nullcontext() if cell.recipe is None else compress(loaded.model, cell.recipe)
        with attach as compression, torch.inference_mode():
            for number in todo:
                part = [by_id[one] for one in blocks[number]]
                answers = answer(loaded, part, compression, task.max_new_tokens, blind=cell.method == BLIND)
                rows = [_row(task, item, found) | stamp for item, found in zip(part, answers, strict=True)]
                records.append(number, rows)
                left -= len(part)
                if progress is not None:
                    progress(own - left, own)
    return finish(folder, blocks, task)


def answer(
    loaded: Loaded,
    items: Sequence[Item],
    compression: Compression | None,
    longest: int,
    blind: bool = False,
    stopping: StoppingCriteriaList | None = None,
) -> list[Answer]:
    """Answer questions together; fewer at a time where memory does not hold them.

    A picture that cannot be read, or that the processor refuses, is an answer with an error, and the others are asked.
    What ``stopping`` says ends answers early.
    """
    found: dict[str, Answer] = {}
    asked: dict[str, Asked] = {}
    for item in items:
        try:
            asked[item.id] = [] if blind else [image.open() for image in item.images], item.prompt
        except ImageError as error:
            found[item.id] = Answer(error=str(error))
    try:
        answers = _generate(loaded, list(asked.values()), compression, longest, stopping)
    except ConfigError:
        refused = {name: why for name, one in asked.items() if (why := _refusal(loaded, one))}
        if not refused:  # it was no question's fault
            raise
        found |= {name: Answer(error=why) for name, why in refused.items()}
        asked = {name: one for name, one in asked.items() if name not in refused}
        answers = _generate(loaded, list(asked.values()), compression, longest, stopping)
    found |= dict(zip(asked, answers, strict=True))
    return [found[item.id] for item in items]


def _refusal(loaded: Loaded, asked: Asked) -> str | None:
    """What the processor has against a question."""
    try:
        loaded.inputs(asked)
    except ConfigError as error:
        return str(error)
    return None


def _generate(
    loaded: Loaded,
    asked: list[Asked],
    compression: Compression | None,
    longest: int,
    stopping: StoppingCriteriaList | None,
) -> list[Answer]:
    if not asked:
        return []
    try:
        return _generate_together(loaded, asked, compression, longest, stopping)
    except torch.OutOfMemoryError:
        if len(asked) == 1:
            raise
    torch.accelerator.empty_cache()  # outside of the handler, which holds the failed call's tensors
    half = len(asked) // 2
    return [a for part in (asked[:half], asked[half:]) for a in _generate(loaded, part, compression, longest, stopping)]


def _generate_together(
    loaded: Loaded,
    asked: list[Asked],
    compression: Compression | None,
    longest: int,
    stopping: StoppingCriteriaList | None,
) -> list[Answer]:
    start = time.perf_counter()
    inputs = loaded.inputs(*asked)
    loaded.synchronize()
    ready = time.perf_counter()
    ids = loaded.model.generate(
        **inputs, max_new_tokens=longest, do_sample=False, num_beams=1, stopping_criteria=stopping
    )
    loaded.synchronize()
    seconds = {"preprocess": ready - start, "generate": time.perf_counter() - ready}
    new, tokenizer = ids[:, inputs["input_ids"].shape[1] :], loaded.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pictures = any(images for images, _ in asked)
    report = compression.report if compression is not None and pictures else None
    place = getattr(loaded.model.config, "image_token_id", None)
    answers = []
    for row, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
        mine = [image for image in report.images if image.row == row] if report else []
        counted = sum(image.tokens for image in mine)
        if not mine and place is not None:
            counted = int((inputs["input_ids"][row] == place).sum())
        answers.append(
            Answer(
                text=text.strip(),
                tokens=int((new[row] != pad).sum()),
                prompt=int(inputs["attention_mask"][row].sum()),
                visual=counted if mine or place is not None else None,
                kept=tuple(map(sum, zip(*(image.kept for image in mine), strict=True))) if mine else None,
                together=len(asked),
                warnings=report.warnings if report else (),
                seconds={name: value / len(asked) for name, value in seconds.items()},
            )
        )
    return answers


def _row(task: Task, item: Item, answer: Answer) -> Row:
    """A line of the answers' file."""
    found = mark(task.metric, task.dialect, answer.text, item.id, item.target, item.groups)
    return {
        "id": item.id,
        "answer": answer.text,
        "parsed": found.parsed,
        "score": 0.0 if answer.error else found.score,
        "target": dict(item.target),
        "cluster": item.cluster,
        "groups": dict(item.groups),
        "answer_tokens": answer.tokens,
        "visual_tokens": answer.visual,
        "kept": None if answer.kept is None else list(answer.kept),
        "together": answer.together,
        "error": answer.error,
        "warnings": list(answer.warnings),
        TIMES: dict(answer.seconds or {}),
    }


def finish(folder: Path, blocks: Sequence[tuple[str, ...]], task: Task) -> dict[str, Any] | None:
    """Sum a run up in ``results.json`` if every question is answered; it comes out the same whoever does it."""
    records = Records(folder, blocks)
    if len(records.done) < len(blocks):
        return None
    found = results(records.rows(), task)
    write_json(folder / RESULTS, found)
    return found


def results(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """What the answers come to: nothing in it depends on when, where and in how many pieces they were made."""
    kept = [statistics.fmean(row["kept"]) for row in rows if row["kept"]]
    visual = [row["visual_tokens"] for row in rows if row["visual_tokens"] is not None]
    return {
        "questions": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "scores": summary(task.metric, task.dialect, rows),
        "headline": metric(task.metric, task.dialect).headline,
        "visual_tokens": statistics.fmean(visual) if visual else None,
        "layer_average": statistics.fmean(kept) if kept else None,
        "answer_tokens": statistics.fmean(row["answer_tokens"] for row in rows),
        "warnings": dict(sorted(Counter(text for row in rows for text in row["warnings"]).items())),
        "digest": digest(rows),
    }
