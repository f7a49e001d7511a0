"""Ask a model every question of a task, once for each method and budget, and write down what it said."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visiontok.api import Compression, compress, vision_memory
from visiontok.errors import ConfigError, ImageError
from visiontok.named import Loaded, named_recipe
from visiontok.report import REMEMBERED

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

    @property
    def described(self) -> dict[str, Any]:
        """What a folder of answers says of it: all that is needed to attach it again."""
        recipe = self.recipe
        return {
            "method": str(self),
            "keep": self.keep,
            "recipe": None if recipe is None else recipe.hash(),
            "attached": None if recipe is None else recipe.to_dict(),
        }

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
        warnings: of the report; that a vision memory is on, the protocol says.
        seconds: of the call, shared among its questions: of the processor and, with a vision memory, of the tower
            where they ran for it, and of everything else.
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


class Block:
    """Questions that are asked together: pictures are opened and processed once, whatever cells then ask.

    A picture that cannot be read, or that the processor refuses, is an error, and the others are asked.

    Args:
        loaded: model and processor.
        items: the questions.
        blind: whether their pictures are left away.

    Attributes:
        asked: pictures and prompt of every question without an error, by id.
        errors: of the others.
    """

    def __init__(self, loaded: Loaded, items: Sequence[Item], blind: bool = False) -> None:
        self.loaded, self.items = loaded, items
        self.asked: dict[str, Asked] = {}
        self.errors: dict[str, str] = {}
        self._inputs: dict[tuple[str, ...], Any] = {}
        for item in items:
            try:
                self.asked[item.id] = [] if blind else [image.open() for image in item.images], item.prompt
            except ImageError as error:
                self.errors[item.id] = str(error)

    def inputs(self, ids: tuple[str, ...]) -> tuple[Any, float | None]:
        """What the processor makes of some of them, and the seconds it took; None where it is known already."""
        if ids in self._inputs:
            return self._inputs[ids], None
        start = time.perf_counter()
        self._inputs[ids] = self.loaded.inputs(*(self.asked[one] for one in ids))
        self.loaded.synchronize()
        return self._inputs[ids], time.perf_counter() - start

    def refuse(self) -> bool:
        """Make errors of what the processor does not take by itself; whether there is any."""
        before = len(self.errors)
        for name, one in list(self.asked.items()):
            try:
                self.loaded.inputs(one)
            except ConfigError as error:
                del self.asked[name]
                self.errors[name] = str(error)
        return len(self.errors) > before


def run(
    loaded: Loaded,
    task: Task,
    items: Sequence[Item],
    cells: Mapping[Path, Cell],
    *,
    batch: int = 8,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Path, dict[str, Any] | None]:
    """Answer what is not answered yet.

    All cells answer a block before the next one is looked at, so that a vision memory, if one is on the model
    (:func:`visiontok.api.remember_vision`), need not hold the pictures of more than a block.

    Args:
        loaded: model and processor.
        task: what is asked.
        items: its questions.
        cells: folder → how they are answered; answers already there are kept.
        batch: questions that are answered together.
        seed: of the methods' draws.
        rank: number of this process among ``world`` that share the questions.
        world: see there.
        progress: told how many answers this process has given, in all cells, and how many it has to.

    Returns:
        folder → what :func:`results` says; None while other processes have not answered their part.

    Raises:
        ConfigError: if a folder holds answers that came about otherwise; before anything is asked.
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
    described = {folder: cell.described for folder, cell in cells.items()}
    for folder, what in described.items():
        keep_protocol(folder, {"protocol": made, **what})
    by_id = {item.id: item for item in items}
    with contextlib.ExitStack() as stack:
        records = {folder: stack.enter_context(Records(folder, blocks, rank, world)) for folder in cells}
        stack.enter_context(torch.inference_mode())
        own = range(rank, len(blocks), world)
        missing = {folder: set(one.missing()) for folder, one in records.items()}
        total = len(cells) * sum(len(blocks[number]) for number in own)
        left = sum(len(blocks[number]) for numbers in missing.values() for number in numbers)
        for number in own:
            part = [by_id[one] for one in blocks[number]]
            opened = functools.cache(functools.partial(Block, loaded, part))  # seen and blind
            for folder, cell in cells.items():
                if number not in missing[folder]:
                    continue
                attach = contextlib.nullcontext() if cell.recipe is None else compress(loaded.model, cell.recipe)
                with attach as compression:
                    answers = answer(opened(cell.method == BLIND), compression, task.max_new_tokens)
                stamp = {"protocol": short(made), "recipe": described[folder]["recipe"]}
                rows = [_row(task, item, found) | stamp for item, found in zip(part, answers, strict=True)]
                records[folder].append(number, rows)
                left -= len(part)
                if progress is not None:
                    progress(total - left, total)
    return {folder: finish(folder, blocks, task) for folder in cells}


def answer(
    block: Block, compression: Compression | None, longest: int, stopping: StoppingCriteriaList | None = None
) -> list[Answer]:
    """Answer questions together; fewer at a time where memory does not hold them.

    Args:
        block: the questions.
        compression: what is attached to the model.
        longest: most tokens of an answer.
        stopping: what ends answers early.
    """
    options = {"max_new_tokens": longest, "stopping_criteria": stopping}
    try:
        answers = _generate(block, tuple(block.asked), compression, options)
    except ConfigError:
        if not block.refuse():  # it was no question's fault
            raise
        answers = _generate(block, tuple(block.asked), compression, options)
    found = {name: Answer(error=why) for name, why in block.errors.items()}
    found |= dict(zip(block.asked, answers, strict=True))
    return [found[item.id] for item in block.items]


def _generate(
    block: Block, ids: tuple[str, ...], compression: Compression | None, options: Mapping[str, Any]
) -> list[Answer]:
    if not ids:
        return []
    try:
        return _generate_together(block, ids, compression, options)
    except torch.OutOfMemoryError:
        if len(ids) == 1:
            raise
    torch.accelerator.empty_cache()  # outside of the handler, which holds the failed call's tensors
    half = len(ids) // 2
    return [a for part in (ids[:half], ids[half:]) for a in _generate(block, part, compression, options)]


def _generate_together(
    block: Block, ids: tuple[str, ...], compression: Compression | None, options: Mapping[str, Any]
) -> list[Answer]:
    loaded = block.loaded
    inputs, preprocess = block.inputs(ids)
    memory = vision_memory(loaded.model)
    start = time.perf_counter()
    out = loaded.model.generate(**inputs, **options, do_sample=False, num_beams=1)
    loaded.synchronize()
    took = time.perf_counter() - start
    tower = None if memory is None else memory.tower_seconds()
    # what was done for another cell is no part of this one's times
    seconds = {"preprocess": preprocess, "tower": tower, "generate": took - (tower or 0.0)}
    new, tokenizer = out[:, inputs["input_ids"].shape[1] :], loaded.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pictures = any(block.asked[one][0] for one in ids)
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
                together=len(ids),
                warnings=tuple(text for text in report.warnings if text != REMEMBERED) if report else (),
                seconds={name: value / len(ids) for name, value in seconds.items() if value is not None},
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
    found = metric(task.metric, task.dialect)
    return {
        "title": task.title,
        "kind": task.kind,
        "questions": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "scores": summary(task.metric, task.dialect, rows),
        "headline": found.headline,
        "points": found.points,
        "visual_tokens": statistics.fmean(visual) if visual else None,
        "layer_average": statistics.fmean(kept) if kept else None,
        "answer_tokens": statistics.fmean(row["answer_tokens"] for row in rows),
        "warnings": dict(sorted(Counter(text for row in rows for text in row["warnings"]).items())),
        "digest": digest(rows),
    }
