"""Measure pruning curves: `python -m visiontok.demo.curves FOLDER … --out FILE.jsonl`.

The way a user goes: prompts through the processor, padded batches through `generate` inside `visiontok.compress`, and
the decoded answer compared word for word. Where neither the question nor the language model takes part in the choice,
tower and selection run once per picture, and all questions about it share its tokens: many times faster, and relied on
only after it has given the stock model's answers, question by question. A cell is one model, method and budget over one
exam; FILE gets a line for each, and a cell that is in it is not measured again, so that a run may be stopped and taken
up at any time.

Two kinds of lines, told apart by their first key:

    exam    a digest of the questions, and their split; "kinds", those that occur; "kind", a digit for each question:
            which of them it is; "opens", a bit for each: it is the first about its scene
    model   digests of weights and exam, and what was run; "label", its full name; "tokens", visual tokens kept per
            image, averaged over the decoder's layers; "hits" per kind; "bits", one for each question; "answers", a
            digest of them, none where they were not generated one by one; "seconds" of processor time. Where the
            toolkit refuses to run it, only "refused", why

Bits are in hexadecimal, the first question highest, filled up with zeros.
"""

from __future__ import annotations

import visiontok._torchvision  # transformers imports torchvision

# isort: split
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import visiontok
from visiontok import Card, Mass, Recipe, recipes
from visiontok.errors import ConfigError, VisiontokError
from visiontok.options import read_value, typed_options

from . import picturewise
from .measure import EXAMS, Sheet, exam
from .model import load
from .picturewise import Part
from .questions import KINDS, Question

KEEPS = (1.0, 0.5, 0.25, 0.11, 0.05)
SEEDS = (0, 1, 2)
POSITIONS = ("original", "compact")
STOCK = "stock"
_LOOK = 16  # prompts that show which kinds of questions a split has
_ENOUGH = 1 << 20  # more prompts than an exam needs
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Asked:
    """A question as it is put to a model.

    Attributes:
        pictures: what it is about.
        chat: the turns of the conversation up to the question.
        question: the question.
        scene: index of the scene, or of the pair of scenes, in its split.
        place: of the question among all about its scene.
    """

    pictures: tuple[Image.Image, ...]
    chat: tuple[dict[str, Any], ...]
    question: Question
    scene: int
    place: int


@dataclass(frozen=True)
class Exam:
    """Questions of a split, scene by scene."""

    split: str
    asked: tuple[Asked, ...]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur."""
        found = {one.question.kind for one in self.asked}
        return tuple(kind for kind in KINDS if kind in found)

    @cached_property
    def digest(self) -> str:
        """Of everything that is asked, pixels included."""
        whole = hashlib.sha256()
        for one in self.asked:
            whole.update(repr((one.question, one.scene, one.chat)).encode())
            for picture in one.pictures:
                whole.update(picture.tobytes())
        return whole.hexdigest()[:12]

    def line(self) -> dict[str, Any]:
        """Its line in the file."""
        scenes = [-1, *(one.scene for one in self.asked)]
        return {
            "exam": self.digest,
            "split": self.split,
            "kinds": self.kinds,
            "kind": "".join(f"{self.kinds.index(one.question.kind):x}" for one in self.asked),
            "opens": to_hex([before != here for before, here in itertools.pairwise(scenes)]),
        }


@dataclass(frozen=True)
class Cell:
    """What is run over an exam.

    Attributes:
        method: registered name, with options behind it as in "idpruner scorer=norm balance=0.7"; or "stock" for the
            model as it is.
        keep: share of the visual tokens, or another budget as text, such as "layer_average:36".
        mass: mass attention, with its fields behind it as in "beta=1.2 merge=0.5"; without it, as the recipe says.
        positions: "original", or "compact": consecutive numbers over what is left.
        seed: of a stochastic method.
    """

    method: str = STOCK
    keep: float | str | None = None
    mass: bool | str = False
    positions: str = "original"
    seed: int | None = None

    @property
    def recipe(self) -> Recipe:
        """What a method with its options does.

        Raises:
            ConfigError: no method has that name, or it has no such option.
        """
        name, *pairs = self.method.split()
        options = dict(pair.partition("=")[::2] for pair in pairs)
        return visiontok.recipe(name, **typed_options(recipes.find(name), options))

    @property
    def card(self) -> Card:
        """Of its method."""
        return recipes.find(self.method.split()[0]).card

    @property
    def weighing(self) -> Mass | None:
        """What `mass` asks for.

        Raises:
            ConfigError: mass attention has no such fields, or not these values.
        """
        if not isinstance(self.mass, str):
            return Mass.parse(self.mass)
        pairs = (pair.partition("=") for pair in self.mass.split())
        return Mass.parse({name: read_value(f"mass={self.mass!r}", text, float) for name, _, text in pairs})

    def __str__(self) -> str:
        parts = [self.method]
        parts += [] if self.keep is None else [f"{self.keep:g}" if isinstance(self.keep, float) else self.keep]
        parts += [str(self.weighing)] * bool(self.mass) + ["compact"] * (self.positions == "compact")
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        return " ".join(parts)


def to_hex(bits: Iterable[bool]) -> str:
    """Bits as hexadecimal digits, the first highest, filled up with zeros to whole bytes."""
    return np.packbits(np.fromiter(bits, bool)).tobytes().hex()


def from_hex(digits: str, count: int) -> np.ndarray:
    """bool (count,): what `to_hex` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=count).astype(bool)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of curves, none if it is not there; a last one that was torn off is cut away."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def write_exam(split: str, questions: int, turn: int | None = None) -> Exam:
    """Ask about the scenes of a split in order, one question of each kind, until there are as many of every kind.

    Args:
        split: as `visiontok.demo.measure.exam` knows them.
        questions: how many at least.
        turn: of the conversations, ask only these, from 1.
    """
    kinds = {one.question.kind for one in _questions(split, _LOOK, turn)}
    share = -(-questions // len(kinds))
    number: Counter[str] = Counter()
    chosen: list[Asked] = []
    for _, about in itertools.groupby(_questions(split, _ENOUGH, turn), lambda one: one.scene):
        seen: set[str] = set()
        for one in about:
            kind = one.question.kind
            if kind in kinds - seen and number[kind] < share:
                seen.add(kind)
                number[kind] += 1
                chosen.append(one)
        if len(chosen) == share * len(kinds):
            break
    return Exam(split, tuple(chosen))


def _questions(split: str, prompts: int, turn: int | None = None) -> Iterator[Asked]:
    """Questions about the first prompts of a split, all or of one turn; a later turn follows right answers."""
    scene = 0
    for sheet in exam(split, prompts):
        pictures = [Image.fromarray(pixels) for pixels in sheet.pixels.numpy()]
        shown = zip(*(pictures[start :: sheet.pictures] for start in range(sheet.pictures)), strict=True)
        there = sheet.questions.form >= 0
        for images, row, talk, asked in zip(shown, sheet.questions.rows(), sheet.talk, there, strict=True):
            chats: dict[int, tuple[dict[str, Any], ...]] = {}
            places = asked.nonzero()[:, 0].tolist()
            for question, number, place in zip(row, talk[asked].tolist(), places, strict=True):
                before = chats.get(number, ())
                content = [{"type": "text", "text": question.text}]
                content = content if before else [{"type": "image"}] * len(images) + content
                chat = (*before, {"role": "user", "content": content})
                chats[number] = (*chat, {"role": "assistant", "content": question.answer})
                if turn is None or len(chat) == 2 * turn - 1:
                    yield Asked(images, chat, question, scene, place)
            scene += 1


def sheets(paper: Exam) -> Iterator[tuple[Sheet, Tensor]]:
    """The chunks of a split that an exam is made of, and which of their questions it asks, bool (B, Q)."""
    chosen = {(one.scene, one.place) for one in paper.asked}
    scene = 0
    for sheet in exam(paper.split, _ENOUGH):
        prompts, many = sheet.questions.form.shape
        yield sheet, torch.tensor([[(scene + row, place) in chosen for place in range(many)] for row in range(prompts)])
        scene += prompts
        if scene > paper.asked[-1].scene:
            return


def batches(processor: Any, paper: Exam, size: int) -> tuple[list[Any], list[int]]:
    """An exam in left-padded batches of at most `size` prompts, and the index in the exam of every row.

    Answers of a kind are about as long, so questions of a kind go together.
    """
    order = sorted(range(len(paper.asked)), key=lambda i: paper.kinds.index(paper.asked[i].question.kind))
    made = []
    for start in range(0, len(order), size):
        part = [paper.asked[i] for i in order[start : start + size]]
        text = [processor.apply_chat_template(list(one.chat), add_generation_prompt=True) for one in part]
        images = [picture for one in part for picture in one.pictures]
        made.append(processor(images=images, text=text, padding=True, return_tensors="pt"))
    return made, order


def consecutive(inputs: visiontok.CompressedInputs) -> Tensor:
    """Position ids of shorter inputs that number what is left, as if the dropped tokens had never been."""
    positions: Tensor = inputs["position_ids"]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand_as(positions)


def _run(
    model: Any, cell: Cell, batches: Iterable[Any], answer: Callable[[int, Any], _Answer]
) -> tuple[list[_Answer], str, float]:
    """Attach a cell to a model, and let it answer.

    Args:
        model: the model, in evaluation mode.
        cell: what to attach.
        batches: what the processor made of the prompts.
        answer: given the number of a batch and what the model shall get of it.

    Returns:
        The answers batch by batch; then as `respond`.
    """
    options: dict[str, Any] = {"keep": cell.keep, "seed": cell.seed}
    label, kept, answers = STOCK, [], []
    attached: Any = contextlib.nullcontext()
    if cell.positions == "compact" and cell.mass:
        raise ConfigError("mass=True: mass attention acts inside the language model, compact positions before it")
    if cell.positions != "compact" and cell.method != STOCK:
        attached = visiontok.compress(model, cell.recipe, mass=cell.weighing, **options)
    with attached as compression:
        for number, inputs in enumerate(batches):
            short = None
            if cell.positions == "compact":
                short = visiontok.compress_inputs(model, inputs, cell.recipe, **options)
                inputs = {**short, "position_ids": consecutive(short)}
            answers.append(answer(number, inputs))
            if told := short or compression:
                label = told.report.recipe
                kept += [image.cache_average for image in told.report.images]
    return answers, label, float(np.mean(kept)) if kept else float("nan")


def respond(model: Any, processor: Any, prompts: Iterable[Any], cell: Cell) -> tuple[list[str], str, float]:
    """Let a model answer.

    Args:
        model: the model, in evaluation mode.
        processor: of the model.
        prompts: batches, as the processor makes them.
        cell: what to attach.

    Returns:
        The answers in words; from the toolkit's reports the full name of what ran and the visual tokens kept per image,
        averaged over images and decoder layers ("stock", NaN for the model as it is).

    Raises:
        ConfigError, UnsupportedError: the toolkit refuses the cell on this model.
    """

    def answer(_: int, inputs: Any) -> list[str]:
        output = model.generate(**inputs)
        words: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return words

    words, label, tokens = _run(model, cell, prompts, answer)
    return list(itertools.chain.from_iterable(words)), label, tokens


def respond_picturewise(model: Any, parts: Sequence[Part], cell: Cell) -> tuple[np.ndarray, str, float]:
    """Mark the answers to all questions about a picture at once.

    Args:
        model: the model, in evaluation mode.
        parts: the exam.
        cell: what to attach: nothing, or a method that `shares_pictures`.

    Returns:
        bool, which questions are answered rightly; then as `respond`.

    Raises:
        ConfigError, UnsupportedError: the toolkit refuses the cell on this model.
    """
    bits, label, tokens = _run(
        model,
        cell,
        (part.inputs for part in parts),
        lambda number, inputs: picturewise.marks(model, parts[number], inputs),
    )
    return np.concatenate(bits), label, tokens


def shares_pictures(cell: Cell) -> bool:
    """Whether what a cell keeps of a picture is settled before the language model, without the question.

    Random draws may differ from question to question, but mean nothing by it.
    """
    if cell.method == STOCK or (cell.mass and cell.positions == "compact"):
        return False
    contract = cell.card.contract
    return cell.card.stage != "decoder" and (contract.question_independent or cell.card.stochastic)


@dataclass(frozen=True)
class Sitting:
    """A model in an exam.

    Attributes:
        model: the model, in evaluation mode.
        processor: of the model.
        paper: the exam.
        size: prompts in a batch.
    """

    model: Any
    processor: Any
    paper: Exam
    size: int

    @cached_property
    def batches(self) -> tuple[list[Any], list[int]]:
        return batches(self.processor, self.paper, self.size)

    @cached_property
    def parts(self) -> list[Part]:
        return list(picturewise.parts(self.processor, *zip(*sheets(self.paper), strict=True)))


def ask(sitting: Sitting, cell: Cell) -> tuple[list[str], str, float]:
    """Ask every question with a prompt of its own; answers in the order of the exam, otherwise as `respond`."""
    prompts, order = sitting.batches
    words, label, tokens = respond(sitting.model, sitting.processor, prompts, cell)
    return [word for _, word in sorted(zip(order, words, strict=True))], label, tokens


def measure(
    sitting: Sitting, cell: Cell, asking: Callable[[Sitting, Cell], tuple[list[str], str, float]] = ask
) -> dict[str, Any]:
    """What a cell's line says beyond its name; `asking` puts the questions where pictures do not share them."""
    model, paper = sitting.model, sitting.paper
    started = time.process_time()
    digest = None
    try:
        # Where nothing is dropped, the answers themselves are compared with those of the stock model.
        if asking is ask and shares_pictures(cell) and cell.keep != 1.0:
            bits, label, tokens = respond_picturewise(model, sitting.parts, cell)
        else:
            answers, label, tokens = asking(sitting, cell)
            bits = np.array([said == one.question.answer for said, one in zip(answers, paper.asked, strict=True)])
            digest = hashlib.sha256("\n".join(answers).encode()).hexdigest()[:12]
    except VisiontokError as error:
        return {"refused": " ".join(str(error).split())}
    hits = Counter(one.question.kind for one, right in zip(paper.asked, bits, strict=True) if right)
    return {
        "label": label,
        "tokens": None if cell.method == STOCK else round(tokens, 2),
        "hits": [hits[kind] for kind in paper.kinds],
        "bits": to_hex(bits),
        "answers": digest,
        "seconds": round(time.process_time() - started, 1),
    }


def cells(
    methods: Sequence[str],
    keeps: Sequence[float] = KEEPS,
    seeds: Sequence[int] = SEEDS,
    mass: Sequence[bool | str] = (False, True),
    positions: Sequence[str] = POSITIONS,
) -> list[Cell]:
    """The stock model, then every method in every way; where nothing is dropped there is only one way."""
    ways = [(where, weighed) for where in positions for weighed in mass if not (weighed and where == "compact")]
    found = [Cell(), *(Cell(method, 1.0) for method in methods if 1.0 in keeps)]
    for (where, weighed), keep, method in itertools.product(ways, (keep for keep in keeps if keep != 1.0), methods):
        if (weighed or where == "compact") and any(stage.mass for stage in Cell(method).recipe.stages):
            continue  # it has masses of its own
        draws = Cell(method).card.stochastic
        found += [Cell(method, keep, weighed, where, seed) for seed in (seeds if draws else (None,))]
    return found


def prompt_methods() -> list[str]:
    """Names of all registered methods that choose before the language model, and as many tokens as they are told."""
    return [card.name for card in recipes.methods() if card.stage != "decoder" and card.budget]


def weights_digest(folder: Path) -> str:
    """Of the weights in a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def check_same(path: Path, lines: Sequence[dict[str, Any]], models: dict[str, str], paper: Exam) -> None:
    """Refuse to mix results of different weights or questions under one name."""
    for line in lines:
        if "exam" not in line:
            continue
        if line.get("split") == paper.split and line["exam"] != paper.digest:
            raise ConfigError(f"--out {path}: it holds other questions of split {paper.split!r}; give another file")
        name = line.get("model")
        if name in models and line["weights"] != models[name]:
            raise ConfigError(
                f"--out {path}: it holds results of other weights of {name!r}; remove those lines, or give another file"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m visiontok.demo.curves", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="an embedded model; results bear the folder's name")
    add("--out", type=Path, required=True, metavar="FILE", help="where the lines go; what is there is not done again")
    add("--split", choices=(*EXAMS, "validation"), default="heldout", help="default heldout")
    add("--questions", type=int, default=1000, help="at least so many, as many of each kind; default 1000")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="names, or names and options in quotes; default: all that choose before the language model",
    )
    add("--keeps", nargs="+", type=float, default=KEEPS, help=f"default {' '.join(map(str, KEEPS))}")
    add("--seeds", nargs="+", type=int, default=SEEDS, help=f"of random methods; default {' '.join(map(str, SEEDS))}")
    add(
        "--mass",
        nargs="+",
        default=("off", "on"),
        help="mass attention: off, on, or its fields in quotes ('beta=1.2 merge=0.5'); default off on",
    )
    add("--positions", nargs="+", choices=POSITIONS, default=POSITIONS, help=f"default {' '.join(POSITIONS)}")
    add("--batch", type=int, default=50, help="prompts at a time; default 50")
    add("--threads", type=int, default=1, help="processor threads; default 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = options.methods or prompt_methods()
    if others := [card.name for card in recipes.methods() if card.name not in names]:
        print(f"not measured: {', '.join(others)}; name them with --methods", flush=True)
    weighed = [{"off": False, "on": True}.get(word, word) for word in options.mass]
    todo = cells(names, options.keeps, options.seeds, weighed, options.positions)
    for cell in todo:  # mistakes are said before anything is measured
        _ = cell.weighing if cell == Cell() else (cell.recipe, cell.weighing)
    models = {folder.resolve().name: weights_digest(folder) for folder in options.folders}
    lines, paper = read(options.out), write_exam(options.split, options.questions)
    check_same(options.out, lines, models, paper)
    if not any(line.get("split") and line["exam"] == paper.digest for line in lines):
        append(options.out, paper.line())
    keys = ("model", "weights", "exam", *Cell.__dataclass_fields__)
    done = {tuple(line[key] for key in keys): line for line in lines if "model" in line}
    for folder in options.folders:
        name = folder.resolve().name
        identity = {"model": name, "weights": models[name], "exam": paper.digest}
        key_of = {cell: (*identity.values(), *asdict(cell).values()) for cell in todo}
        missing = [cell for cell in todo if key_of[cell] not in done]
        print(f"{name}: {len(paper.asked)} questions, {len(missing)} of {len(todo)} cells to measure", flush=True)
        if not missing:
            continue
        sitting = Sitting(*load(folder), paper, options.batch)
        begun = time.monotonic()
        for number, cell in enumerate(missing, start=1):
            line = {**identity, **asdict(cell), **measure(sitting, cell)}
            stock = done.get(key_of[Cell()])
            if cell == Cell():
                together, *_ = respond_picturewise(sitting.model, sitting.parts, cell)
                if to_hex(together) != line["bits"]:
                    raise RuntimeError(f"{name}: answers picture by picture are not those to the questions one by one")
            if stock and cell.keep == 1.0 and "refused" not in line and line["answers"] != stock["answers"]:
                raise RuntimeError(
                    f"{name}, {cell}: nothing is dropped, yet the answers are not those of the stock model"
                )
            append(options.out, line)
            done[key_of[cell]] = line
            left = (time.monotonic() - begun) / number * (len(missing) - number) / 60
            found = f"refused: {line['refused']}" if "refused" in line else _summary(line, len(paper.asked))
            print(f"{name} {number}/{len(missing)} {cell}: {found}, about {left:.0f} min left", flush=True)


def _summary(line: dict[str, Any], questions: int) -> str:
    return f"{sum(line['hits']) / questions:.1%} in {line['seconds']} s of processor time"


if __name__ == "__main__":
    main()
