"""``visiontok bench``: methods × budgets at every point of a sweep, in a file that the same command goes on with."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from visiontok.errors import ConfigError
from visiontok.named import Loaded, find_device, load_model, named_recipe, quiet
from visiontok.recipes import find as find_method
from visiontok.recipes import names as method_names

from ..protocol import of_model
from ..records import differences, write_json
from ..runner import BLIND, FULL
from .measure import COMPILED, DYNAMIC, STATIC, Batch, Variant
from .requests import Point, pictures, requests
from .rounds import Rounds

SCHEMA = 1
_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured of whom.

    Attributes:
        model: ``tiny``, ``tiny-qwen``, or a Hugging Face id or folder.
        methods: methods by name, recipes by file; the stock model, ``random`` and ``resize`` stand beside them anyway.
        keeps: budgets; every method that takes one is measured with each.
        batches: requests that are answered together.
        sides: pixels of pictures; none leaves them as they are.
        texts: text tokens of prompts; none leaves questions as they are.
        image: a picture; None takes scenes of the embedded models.
        new_tokens: length of every answer, forced.
        runs: rounds that count.
        warm_up: rounds before them.
        memory: as text, in which concurrent requests are to fit; None is all that the device has.
        static: measure methods with a static cache, too.
        compile: and with compiled decoding.
        seed: of the draws of methods, and number of the first scene.
        device: ``auto``, ``cpu``, ``cuda``, …
        out: file for the rows.
    """

    model: str = "tiny"
    methods: tuple[str, ...] = ("visiontok",)
    keeps: tuple[str, ...] = ("0.25",)
    batches: tuple[int, ...] = (1,)
    sides: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    image: str | None = None
    new_tokens: int = 16
    runs: int = 20
    warm_up: int = 3
    memory: str | None = None
    static: bool = False
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    out: str = "efficiency.json"

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("runs", 1), ("warm_up", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: give at least {least}")
        for name in ("batches", "sides", "texts"):
            for value in getattr(self, name):
                if value < 1:
                    raise ConfigError(f"{name}={value}: give whole numbers from 1")

    def points(self) -> list[Point]:
        """All combinations of batch, side and text."""
        return [Point(*each) for each in product(self.batches, self.sides or (None,), self.texts or (None,))]

    def variants(self) -> list[Variant]:
        """Methods × budgets × configurations.

        Raises:
            ConfigError: if there is no such method, or it cannot have the budget.
        """
        configurations = [DYNAMIC] + [STATIC] * self.static + [COMPILED] * self.compile
        found = []
        for method in self.methods:
            if method == BLIND:
                raise ConfigError(f"--method {BLIND}: sees no picture, so there is nothing to measure; leave it out")
            if method == FULL:
                continue  # the stock model is measured anyway
            takes = method not in method_names() or find_method(method).card.budget
            for keep in self.keeps if takes else (None,):
                recipe = named_recipe(method, keep, {}, self.seed)
                found += [Variant(method, keep, recipe, configuration) for configuration in configurations]
        return found


def bench_job(bench: Bench, console: Console | None = None) -> dict[str, Any]:
    """Measure the points that are not in the file yet, with a progress bar, and return what the file holds then.

    A point is measured as a whole, all of its rows in turn, and written when it is done. Everything that can be checked
    without the model is checked before it is loaded.

    Raises:
        ConfigError: for any argument that is wrong, or a file that was measured otherwise; names it and the remedy.
    """
    variants, points, out = bench.variants(), bench.points(), Path(bench.out).expanduser()
    memory = None if bench.memory is None else parse_bytes(bench.memory)
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"--out {bench.out!r}: give the name of a file in a folder that there is")
    given = pictures(bench.image, max(bench.batches), bench.seed)
    place = find_device(bench.device)
    with quiet(), _progress(console) as progress:
        loaded = load_model(bench.model, place)
        if memory is None and place.type != "cpu":
            memory = _device_memory(place)
        found = _resumed(out, _plain(protocol(bench, loaded, memory)))
        for point in points:
            bar = progress.add_task(str(point), total=None)
            if _has(found["rows"], point, variants):
                progress.update(bar, total=1, completed=1)
                continue
            asked = requests(loaded, point, given)
            batch = Batch(loaded, asked, bench.new_tokens)
            rounds = Rounds(
                loaded,
                batch,
                variants,
                seed=bench.seed,
                tell=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
            )
            rounds.measure(bench.runs, bench.warm_up)
            where = {"batch": point.batch, "side": point.side, "text": rounds.text_tokens, "asked_text": point.text}
            kept = [row for row in found["rows"] if not _at(row, point)]
            found["rows"] = kept + [_ordered(row, where) for row in rounds.rows(memory)]
            write_json(out, found)
    return found


def protocol(bench: Bench, loaded: Loaded, memory: int | None) -> dict[str, Any]:
    """What decides about all rows of a file."""
    made = of_model(loaded)
    model = made["model"]
    return {
        "model": model.pop("name"),
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "threads": torch.get_num_threads(),
        "dtype": model.pop("dtype"),
        "attention": model.pop("attention"),
        "weights": {"bytes": Batch(loaded, [], 2).weights, "digest": model["weights"], "revision": model["revision"]},
        "type": model["type"],
        "processor": made["processor"],
        "versions": made["versions"] | {"python": platform.python_version()},
        "pictures": "scenes of the embedded models" if bench.image is None else bench.image,
        "seed": bench.seed,
        "new_tokens": bench.new_tokens,
        "runs": bench.runs,
        "warm_up": bench.warm_up,
        "memory": memory,
    }


def parse_bytes(text: str) -> int:
    """Bytes from "24GiB", "80 GB" or "1000000".

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"--memory {text!r}: write it as 24GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def device_name(device: torch.device) -> str:
    """Of the accelerator, or the processor and its number of cores."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{found[0] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _device_memory(device: torch.device) -> int | None:
    module = torch.get_device_module(device)
    return int(module.get_device_properties(device).total_memory) if hasattr(module, "get_device_properties") else None


def _resumed(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, if it was measured in this way."""
    if not out.exists():
        return {"schema": SCHEMA, "protocol": made, "rows": []}
    try:
        found: dict[str, Any] = json.loads(out.read_text())
        before, _ = found["protocol"], found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out {out}: holds no efficiency rows ({error!r}); give another file") from error
    changed = differences(before, made)
    if found.get("schema") != SCHEMA or changed:
        why = "; ".join(changed) or f"schema was {found.get('schema')} and is {SCHEMA}"
        raise ConfigError(f"--out {out}: was measured otherwise: {why}; give another file")
    return found


def _at(row: Mapping[str, Any], point: Point) -> bool:
    return (row["batch"], row["side"], row["asked_text"]) == (point.batch, point.side, point.text)


def _has(rows: list[dict[str, Any]], point: Point, variants: list[Variant]) -> bool:
    """Whether a point has a row of everything that is asked for; a row with an error counts."""
    there = {
        (row["method"], row["keep"], row["recipe"], row["configuration"])
        for row in rows
        if _at(row, point) and row["why"] is None
    }
    wanted = {
        (variant.name, variant.keep, variant.recipe.hash(), variant.configuration)
        for variant in variants
        if variant.recipe is not None
    }
    return wanted <= there and any(_at(row, point) for row in rows)


def _ordered(row: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """A row with its point in front of its numbers."""
    head = ("method", "keep", "recipe", "configuration", "why")
    return {name: row[name] for name in head} | where | {k: v for k, v in row.items() if k not in head}


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))


def _progress(console: Console | None) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console or Console(file=sys.stderr))
