"""Measure choosing before and inside the language model: `python -m visiontok.demo.decoder FOLDER … --out FILE.jsonl`.

At equal budgets: a share of the visual tokens, averaged over all decoder layers. A method that sees all of them in its
first layers has to keep fewer behind, and where these layers alone cost more than the budget there is nothing to
measure. Methods without a budget are measured as they are. Where a calibration of the model is there (see
`--calibrate`), its schedule is measured beside the published one. Prompts, answers and lines are those of
`visiontok.demo.curves`, whose cells are not measured again; a line has moreover

    share   of the visual tokens; none where the method has no budget
    cached  the question is asked on the cache of the one before, for which the choice was made
    flops   of the language model's prefill, and "kv", of its cache after it, over those of the stock model

Second questions of conversations are asked both ways: on the cache of the first, and with a prompt of their own.
Methods that thin the cache behind the prefill are measured by these alone: an answer of one word comes of the prefill.
"""

from __future__ import annotations

import visiontok._torchvision  # transformers imports torchvision

# isort: split
import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import visiontok
from visiontok import Budget, recipes
from visiontok.calibration import CALIBRATORS
from visiontok.calibration.samples import Sample, digest
from visiontok.calibration.work import calibrate
from visiontok.errors import VisiontokError

from . import WEIGHTS
from .curves import (
    SEEDS,
    STOCK,
    Cell,
    Exam,
    Sitting,
    append,
    batches,
    check_same,
    measure,
    read,
    weights_digest,
    write_exam,
)
from .model import load

SHARES = (0.5, 0.35, 0.25, 0.11, 0.05)
TURN_SHARES = (0.5, 0.11)
PROMPT = ("visiontok", "cdpruner", "divprune", "idpruner", "hiprune", "visionzip", "random", "resize")
VARIANTS = ("vscan cut=0.5", "vtw layer=1")
"""Methods that act inside the language model if asked to, and other layers where there is no budget."""


@dataclass(frozen=True)
class Entry:
    """A cell, and where it stands in the tables.

    Attributes:
        cell: what is run.
        share: of the visual tokens; None for methods without a budget.
        cached: ask on the cache of the question before.
    """

    cell: Cell
    share: float | None = None
    cached: bool = False

    def key(self, model: str, weights: str, paper: str) -> tuple[Any, ...]:
        """What its line is found by."""
        return (model, weights, paper, *asdict(self.cell).values(), self.cached)


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """`Entry.key` of a line, of this file or of `visiontok.demo.curves`."""
    fields = ("model", "weights", "exam", *Cell.__dataclass_fields__)
    return (*(line[field] for field in fields), line.get("cached", False))


def inside(method: str) -> bool:
    """Whether a method, given with its options, acts inside the language model, or looks ahead at it."""
    cell = Cell(method)
    if cell.card.stage == "decoder":
        return True
    stages = cell.recipe.stages
    before = ("pixel", "merge", "prompt")
    return any(s.kind not in before or (s.method and s.method.needs().decoder_ahead) for s in stages)


def thins(method: str) -> bool:
    """Whether a method acts behind the prefill, on what is stored of it."""
    return Cell(method).card.stage == "cache"


def calibrated(folder: Path) -> list[str]:
    """The methods of a folder's artefacts, with the recommended options behind the names."""
    found = []
    for file in sorted(folder.glob("*.json")):
        artefact = json.loads(file.read_text())
        names = [card.name for card in recipes.methods()]
        if artefact["recommended"] and artefact["calibration"] in names:
            options = [f"{name}={_text(value)}" for name, value in artefact["recommended"].items()]
            found.append(" ".join([artefact["calibration"], *options]))
    return found


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def entries(
    methods: Sequence[str], tokens: int, shares: Sequence[float] = SHARES, mass: Sequence[bool] = (False, True)
) -> list[Entry]:
    """The stock model, then every method at every share, without mass attention first.

    Args:
        methods: names, with options behind them.
        tokens: visual tokens of a picture.
        shares: of them, averaged over all decoder layers.
        mass: with mass attention, without, or both.
    """
    found = [Entry(Cell())]
    for weighed in mass:
        for share in (None, *shares):
            count = None if share is None else int(Budget.ratio(share).counts([tokens])[0])
            for method in methods:
                card = Cell(method).card
                if card.budget == (share is None) or (weighed and _weighs(method)):
                    continue
                # Where all layers keep as many, the average is what is kept, as in the curves, whose cells these are.
                keep = share if share is None or _level(method) else f"layer_average:{count}"
                seeds = SEEDS if card.stochastic else (None,)
                found += [Entry(Cell(method, keep, weighed, seed=seed), share) for seed in seeds]
    return found


def _level(method: str) -> bool:
    """Whether a method does nothing but keep so many tokens before the language model, or in the cache behind it."""
    cell = Cell(method)
    kinds = [s.kind for s in cell.recipe.stages]
    return cell.card.stage != "decoder" and kinds in (["prompt"], ["pixel"], ["merge"], ["cache"])


def _weighs(method: str) -> bool:
    """Whether a method has masses of its own, or selects nothing that could have any."""
    with contextlib.suppress(VisiontokError):
        stages = Cell(method).recipe.stages
        return any(stage.mass for stage in stages) or not any(stage.method for stage in stages)
    return True  # its refusal is told once


class Seen(Sitting):
    """A sitting whose prompts come with what the tower makes of their pictures, once for all cells."""

    @cached_property
    def batches(self) -> tuple[list[Any], list[int]]:
        made, order = batches(self.processor, self.paper, self.size)
        for inputs in made:
            given = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw") if name in inputs}
            with torch.inference_mode():
                encoded = self.model.get_image_features(**given, return_dict=True)
            inputs["mm_encoder_outputs"] = {"image": encoded}
            given.pop("pixel_values")
            inputs |= given  # the grid numbers the tokens
        return made, order


def blind_to_pixels(cell: Cell) -> bool:
    """Whether a cell leaves alone what comes before the language model."""
    if cell.method == STOCK:
        return True
    with contextlib.suppress(VisiontokError):
        stages = cell.recipe.stages
        needs = [asdict(stage.method.needs()) for stage in stages if stage.method]
        reads = any(need[name] for need in needs for name in need if not name.startswith(("decoder", "question")))
        return not reads and all(stage.kind not in ("pixel", "merge", "prompt") for stage in stages)
    return False


def measure_all(sitting: Sitting, seen: Sitting, entry: Entry) -> dict[str, Any]:
    """What an entry's line says beyond its name; `seen` is the sitting for what is blind to pixels."""
    if entry.cached:
        line = measure(sitting, entry.cell, ask_later)
    else:
        line = measure(seen if blind_to_pixels(entry.cell) else sitting, entry.cell)
        if "refused" in line:  # without pixels no method knows where a token lies
            line = measure(sitting, entry.cell)
    if "refused" not in line and entry.cell.method != STOCK:
        line |= costs(sitting, entry.cell)
    return line


def costs(sitting: Sitting, cell: Cell) -> dict[str, float]:
    """FLOPs of the language model and bytes of its cache for the first question, over those of the stock model."""
    inputs = _inputs(sitting.processor, sitting.paper.asked[0].pictures, sitting.paper.asked[0].chat)
    with _attached(sitting.model, cell) as compression, torch.inference_mode():
        sitting.model(**inputs)
        spent = compression.report.account
    return {
        "flops": round(sum(spent.decoder) / sum(spent.decoder_stock), 4),
        "kv": round(spent.kv / spent.kv_stock, 4),
    }


def _attached(model: Any, cell: Cell) -> Any:
    if cell.method == STOCK:
        return contextlib.nullcontext()
    return visiontok.compress(model, cell.recipe, keep=cell.keep, mass=cell.weighing, seed=cell.seed)


def _inputs(processor: Any, pictures: Iterable[Any], *chats: Sequence[Mapping[str, Any]]) -> Any:
    """What the processor makes of conversations of one length about one picture each."""
    text = [processor.apply_chat_template(list(chat), add_generation_prompt=True) for chat in chats]
    return processor(images=list(pictures), text=text, return_tensors="pt")


def conversations(processor: Any, paper: Exam, size: int) -> Iterator[tuple[list[int], Any, Any]]:
    """Second questions of conversations, in batches without padding.

    Args:
        processor: of the model.
        paper: the second questions.
        size: conversations in a batch.

    Yields:
        their indices in the exam, and what the processor makes of the first questions and of the whole conversations.
    """

    def lengths(index: int) -> tuple[int, ...]:
        chat = list(paper.asked[index].chat)
        texts = (processor.apply_chat_template(turns, add_generation_prompt=True) for turns in (chat[:1], chat))
        return tuple(len(processor.tokenizer(text).input_ids) for text in texts)

    for _, alike in itertools.groupby(sorted(range(len(paper.asked)), key=lengths), lengths):
        indices = list(alike)
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            asked = [paper.asked[index] for index in chosen]
            pictures = [picture for one in asked for picture in one.pictures]
            first, whole = (_inputs(processor, pictures, *(one.chat[:end] for one in asked)) for end in (1, None))
            yield chosen, first, whole


def ask_later(sitting: Sitting, cell: Cell) -> tuple[list[str], str, float]:
    """Let a model answer second questions on the cache of the first, for which the choice was made.

    Returns:
        As `visiontok.demo.curves.ask`.

    Raises:
        ConfigError, UnsupportedError: the toolkit refuses the cell on this model.
    """
    model, processor = sitting.model, sitting.processor
    answers, kept, label = [""] * len(sitting.paper.asked), [], STOCK
    with _attached(model, cell) as compression, torch.inference_mode():
        for rows, first, whole in conversations(processor, sitting.paper, sitting.size):
            cache = model(**first, use_cache=True).past_key_values
            if compression is not None:
                label = compression.report.recipe
                kept += [image.cache_average for image in compression.report.images]
            ids = whole["input_ids"]
            output = model.generate(input_ids=ids, attention_mask=whole["attention_mask"], past_key_values=cache)
            words = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for row, word in zip(rows, words, strict=True):
                answers[row] = word
    return answers, label, float(np.mean(kept)) if kept else float("nan")


def calibrations(folder: Path, model: Any, processor: Any, samples: int) -> None:
    """Calibrate a model for every method that has a calibration, on validation scenes; what is there stays.

    Args:
        folder: for the artefacts, METHOD.json and METHOD.svg.
        model: the model, in evaluation mode.
        processor: of the model.
        samples: questions, as many of each kind.
    """
    asked = write_exam("validation", samples).asked
    data = {
        "source": f"{len(asked)} questions about validation scenes of visiontok.demo",
        "samples": len(asked),
        "hash": digest([Sample(one.pictures[0], one.question.text) for one in asked]),
    }
    made = [partial(_inputs, processor, one.pictures, one.chat) for one in asked]
    folder.mkdir(parents=True, exist_ok=True)
    for method, kind in CALIBRATORS.items():
        if not (path := folder / f"{method}.json").exists():
            artefact = calibrate(kind(), model, made, name=folder.name, data=data, partial=path.with_suffix(".partial"))
            artefact.save(path)
            print(f"{folder.name} {method}: {artefact.recommended} {' '.join(artefact.notes)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m visiontok.demo.decoder", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="an embedded model; results bear the folder's name")
    add("--out", type=Path, required=True, metavar="FILE", help="where the lines go; what is there is not done again")
    add("--curves", type=Path, default=WEIGHTS / "curves.jsonl", help="cells that are not measured again")
    add("--calibrated", type=Path, default=WEIGHTS / "calibrated", help="artefacts, in a folder for each model")
    add("--calibrate", type=int, metavar="N", help="first make the artefacts that are missing, with N questions")
    add("--questions", type=int, default=1000, help="at least so many, as many of each kind; default 1000")
    add("--turns", type=int, default=400, help="the same of second questions; default 400")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="names, or names and options in quotes; default: all inside the "
        "language model, as they are and calibrated, and some before it",
    )
    add("--shares", nargs="+", type=float, default=SHARES, help=f"default {' '.join(map(str, SHARES))}")
    add("--turn-shares", nargs="+", type=float, default=TURN_SHARES, help=f"default {' '.join(map(str, TURN_SHARES))}")
    add("--mass", nargs="+", choices=("off", "on"), default=("off", "on"), help="mass attention; default off on")
    add("--batch", type=int, default=50, help="prompts at a time; default 50")
    add("--threads", type=int, default=1, help="processor threads; default 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    papers = [write_exam("heldout", options.questions), write_exam("turns", options.turns, turn=2)]
    weights = {folder.resolve().name: weights_digest(folder) for folder in options.folders}
    lines = read(options.out)
    for paper in papers:
        check_same(options.out, lines, weights, paper)
        if not any(line.get("split") and line["exam"] == paper.digest for line in lines):
            append(options.out, paper.line())
    done = {key_of(line): line for line in (*read(options.curves), *lines) if "model" in line}
    for folder in options.folders:
        name = folder.resolve().name
        model, processor = load(folder)
        if options.calibrate:
            calibrations(options.calibrated / name, model, processor, options.calibrate)
        methods = options.methods or default_methods(options.calibrated / name)
        first = _inputs(processor, papers[0].asked[0].pictures, papers[0].asked[0].chat)
        tokens = int((first["input_ids"] == model.config.image_token_id).sum())
        mass = [word == "on" for word in options.mass]
        turns = entries(methods, tokens, options.turn_shares, (False,))
        listed = [
            (papers[0], entries([name for name in methods if not thins(name)], tokens, options.shares, mass)),
            (papers[1], [replace(entry, cached=cached) for entry in turns for cached in (False, True)]),
        ]
        for paper, wanted in listed:
            one, seen = (kind(model, processor, paper, options.batch) for kind in (Sitting, Seen))
            _sit(one, seen, wanted, done, options.out, name, weights[name])


def default_methods(artefacts: Path) -> list[str]:
    """All that act inside the language model, as they are and as a model's artefacts recommend, and some before it."""
    acting = [card.name for card in recipes.methods() if inside(card.name)]
    return [*PROMPT, *acting, *VARIANTS, *calibrated(artefacts)]


def _sit(
    sitting: Sitting,
    seen: Sitting,
    wanted: Sequence[Entry],
    done: dict[tuple[Any, ...], Any],
    out: Path,
    name: str,
    weights: str,
) -> None:
    """Measure what is not done, line by line."""
    paper = sitting.paper
    missing = [entry for entry in wanted if entry.key(name, weights, paper.digest) not in done]
    print(f"{name}, {paper.split}: {len(missing)} of {len(wanted)} cells to measure", flush=True)
    begun = time.monotonic()
    for number, entry in enumerate(missing, start=1):
        identity = {"model": name, "weights": weights, "exam": paper.digest}
        placed = {"share": entry.share, "cached": entry.cached}
        line = {**identity, **asdict(entry.cell), **placed, **measure_all(sitting, seen, entry)}
        if entry.cell.method == STOCK and entry.cached:
            fresh = done[replace(entry, cached=False).key(name, weights, paper.digest)]
            if line["answers"] != fresh["answers"]:
                raise RuntimeError(f"{name}: answers on the cache of the turn before are not those to whole prompts")
        append(out, line)
        done[entry.key(name, weights, paper.digest)] = line
        left = (time.monotonic() - begun) / number * (len(missing) - number) / 60
        found = f"refused: {line['refused']}" if "refused" in line else f"{sum(line['hits']) / len(paper.asked):.1%}"
        how = " cached" * entry.cached
        print(f"{name} {number}/{len(missing)} {entry.cell}{how}: {found}, about {left:.0f} min left", flush=True)


if __name__ == "__main__":
    main()
