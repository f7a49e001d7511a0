"""``visiontok eval``: tasks × methods × budgets on one model, in a folder that the same command goes on with."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from visiontok.api import as_recipe, remember_vision
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.named import Loaded, find_device, load_model, quiet
from visiontok.recipes import find as find_method
from visiontok.recipes import names as method_names

from .runner import BLIND, FULL, Cell, run
from .scoring import metric
from .task import find

if TYPE_CHECKING:
    from visiontok.engine.memory import VisionMemory


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is asked of whom; the keys of a sweep's YAML file.

    Attributes:
        model: ``tiny``, ``tiny-qwen``, or a Hugging Face id or folder.
        tasks: names or YAML files of tasks.
        methods: methods by name, recipes by file, ``full`` (the stock model) and ``blind`` (it sees no picture).
        keeps: budgets; every method that takes one is asked once with each.
        data: task → file or folder with its questions; others come from the hub, or are drawn.
        limit: only the first so many questions of each task.
        batch: questions that are answered together.
        vision_cache: whether the vision tower runs once for each picture, alone, and all methods share its features.
        seed: of the draws of methods.
        device: ``auto``, ``cpu``, ``cuda``, …
        out: folder for answers and results.
    """

    model: str = "tiny"
    tasks: tuple[str, ...] = ("scenes",)
    methods: tuple[str, ...] = (FULL, "random", "resize", "visiontok")
    keeps: tuple[str, ...] = ("0.25",)
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch: int = 16
    vision_cache: bool = True
    seed: int = 0
    device: str = "auto"
    out: str = "evaluation"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Sweep:
        """From plain data; lists may be single values.

        Raises:
            ConfigError: for an unknown key, or a value of another kind.
        """
        known = {entry.name: entry for entry in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"sweep: there is no {name!r}; its keys are {', '.join(known)}")
            default = known[name].default
            if isinstance(default, tuple):
                several = value if isinstance(value, list | tuple) else [value]
                values[name] = tuple(str(one) for one in several)
                if not several:
                    raise ConfigError(f"sweep: {name}=[] is empty; name one at least, or leave the key away")
            elif name == "data":
                if not isinstance(value, Mapping):
                    raise ConfigError(f"sweep: data={value!r}; give a mapping of tasks to files")
                values[name] = {str(task): str(place) for task, place in value.items()}
            elif name in ("limit", "batch", "seed"):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ConfigError(f"sweep: {name}={value!r}; give a whole number")
                values[name] = value
            elif name == "vision_cache":
                if not isinstance(value, bool):
                    raise ConfigError(f"sweep: {name}={value!r}; give true or false")
                values[name] = value
            else:
                values[name] = str(value)
        return cls(**values)

    @classmethod
    def read(cls, file: str) -> dict[str, Any]:
        """The keys of a YAML file."""
        try:
            found = yaml.safe_load(Path(file).expanduser().read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {file!r}: cannot be read as YAML ({error})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"--config {file!r}: holds no keys; its keys are those of a sweep, for example methods")
        return found

    def cells(self) -> list[Cell]:
        """Methods × budgets."""
        found = []
        for method in self.methods:
            keeps: Sequence[str | None] = self.keeps
            if method in (FULL, BLIND) or not _takes_budget(method):
                keeps = (None,)
            found += [Cell.named(method, keep, {}, self.seed) for keep in keeps]
        return found


def _takes_budget(method: str) -> bool:
    """Whether a method, or any in a recipe file, does."""
    if method in method_names():
        return find_method(method).card.budget
    return any(stage.method is not None and stage.method.card.budget for stage in as_recipe(method).stages)


def eval_job(sweep: Sweep, console: Console | None = None) -> list[dict[str, Any]]:
    """Answer what is not answered yet, with a progress bar, and return the results of every cell.

    Everything that can be checked without the model is checked before it is loaded. Started in several processes by
    ``torchrun`` or ``accelerate launch``, each answers its share.

    Raises:
        ConfigError: for any argument that is wrong; names it, its value and the remedy.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    tasks = [find(name) for name in sweep.tasks]
    for task in tasks:
        metric(task.metric, task.dialect)
    for name in sweep.data:
        if name not in sweep.tasks:
            raise ConfigError(f"data: {name!r} is none of the tasks, {', '.join(sweep.tasks)}; correct it")
    cells: dict[str, Cell] = {}
    for cell in sweep.cells():
        if cells.setdefault(_file_name(str(cell)), cell) != cell:
            raise ConfigError(f"methods: two are called {str(cell)!r}; give one of the recipes' files another name")
    device = sweep.device
    if device == "auto" and world > 1 and (local := os.environ.get("LOCAL_RANK")) is not None:
        import torch

        device = f"cuda:{local}" if torch.cuda.is_available() else "auto"
    place = find_device(device)
    found: list[dict[str, Any]] = []
    with quiet(), progress_bar(console) as progress:
        loaded = load_model(sweep.model, place)
        with (
            _memory(loaded, cells.values(), progress.console)
            if sweep.vision_cache
            else contextlib.nullcontext() as memory
        ):
            for task in tasks:
                items = task.items(sweep.data.get(task.name), loaded.model.config.model_type, sweep.limit)
                folder = Path(sweep.out).expanduser() / task.name
                answers = len(items) * len(cells)
                bar = progress.add_task(task.name, total=answers)
                results = run(
                    loaded,
                    task,
                    items,
                    {folder / name: cell for name, cell in cells.items()},
                    batch=sweep.batch,
                    seed=sweep.seed,
                    rank=rank,
                    world=world,
                    progress=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
                )
                progress.update(bar, completed=answers, total=answers)
                for name, cell in cells.items():
                    if (result := results[folder / name]) is not None:
                        found.append({"task": task.name, "cell": str(cell), **result})
            if memory is not None and memory.runs:
                progress.console.print(f"vision tower: {memory.runs} runs for {memory.pictures} pictures")
    return found


def _memory(
    loaded: Loaded, cells: Iterable[Cell], console: Console
) -> contextlib.AbstractContextManager[VisionMemory | None]:
    """What all cells share of the vision tower; nothing, said once, where the model does not allow it."""
    try:
        return remember_vision(loaded.model, [cell.recipe for cell in cells if cell.recipe is not None])
    except UnsupportedError as error:
        console.print(f"without the vision cache: {error}", markup=False)
        return contextlib.nullcontext()


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def progress_bar(console: Console | None = None) -> Progress:
    """On standard error unless a console is given."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console or Console(file=sys.stderr))
