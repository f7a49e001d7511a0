"""Published tables as data: what was measured, how, and which numbers came out.

A table is a YAML file; those in `eval/published` are built in. Its keys are the fields of `Published`, and those of its
columns and rows the fields of `Column` and `Row`. See there for what they mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from visiontok.conventions import CONVENTIONS, bill, decoder_config, parse_schedule
from visiontok.errors import ConfigError
from visiontok.named import named_recipe
from visiontok.recipe import Fidelity, Positions, Recipe

from .scoring import metric
from .task import Task
from .task import find as find_task

FOLDER = Path(__file__).parent / "published"
PROMPT = "{prompt}"
"""Where a question stands in a conversation."""

Unit = Literal["T", "left", "saved"]


@dataclass(frozen=True, kw_only=True)
class Citation:
    """Where the numbers were published.

    Attributes:
        paper: short name and venue.
        where: table, section or file.
        arxiv: its number; empty if it is not known here.
    """

    paper: str
    where: str
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of the decoder as published; they follow from a schedule and a formula, without a model.

    Attributes:
        printed: the number, with the digits that were printed.
        unit: ``T``, 10¹²; ``left``, percent of the stock schedule; ``saved``, 100 minus that.
        convention: one of visiontok.conventions.
        schedule: visual tokens per layer.
        stock: schedule of the stock model, for percentages.
        text: tokens of text that are counted.
        decoder: of whom, a name of visiontok.conventions; None for the table's.
        source: mark of the notes the number is from, if it is not the row's.
        note: why it does not come out, where that is known.
    """

    printed: str
    unit: Unit = "T"
    convention: str
    schedule: str
    stock: str | None = None
    text: int = 0
    decoder: str | None = None
    source: str = ""
    note: str = ""

    def count(self, decoder: str | None) -> float:
        """The same number, counted here."""
        config = decoder_config(self.decoder or decoder or "")

        def tera(schedule: str) -> float:
            found = bill(config, parse_schedule(schedule), text=self.text, conventions=(self.convention,))
            return found.published[self.convention] / 1e12

        if self.unit == "T":
            return tera(self.schedule)
        left = 100 * tera(self.schedule) / tera(self.stock or "")
        return left if self.unit == "left" else 100 - left

    def agrees(self, count: float) -> bool:
        """Whether a count is the published number in the digits that were printed, halves up."""
        return Decimal(count).quantize(Decimal(self.printed), ROUND_HALF_UP) == Decimal(self.printed)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One benchmark of a table.

    Attributes:
        name: heading.
        task: a task by name, or YAML file beside the table; None where it cannot be measured here.
        score: key of the metric's summary; None for its headline.
        scale: the table's number is the summary's times this.
        dialect: of the metric, if not the task's.
        prompt: template of questions, if not the task's.
        wrap: how hint and OCR tokens enter it, if not as in the task.
        asks: the task's :meth:`~visiontok.eval.task.Task.sample_prompt` must be this.
        questions: how many there are; None where that is not known.
        tolerance: how far a measured number may lie from the published one, in the table's units.
        mean: what the number counts in the table's mean is it times this.
        cannot: why the column cannot be measured here.
    """

    name: str
    task: str | None = None
    score: str | None = None
    scale: float = 100.0
    dialect: str | None = None
    prompt: str | None = None
    wrap: Mapping[str, str] = field(default_factory=dict)
    asks: str = ""
    questions: int | None = None
    tolerance: float = 1.0
    mean: float = 1.0
    cannot: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget.

    Attributes:
        id: short name, for `--rows`, files and receipts.
        title: as the table calls it.
        method: of visiontok; None for the stock model, and where ``cannot`` says why there is none.
        keep: budget; None for the method's own.
        options: of the method.
        fidelity: as in a recipe.
        positions: as in a recipe: what the official code does.
        layer_average: visual tokens per layer that this comes to, where all pictures have equally many.
        values: column → published number.
        mean: published mean over all columns.
        relative: published mean, over all columns, of percent of the stock model.
        flops: as published.
        source: mark of the notes the numbers are from: P paper or README, S source code, I issue thread, M memory,
            R measured by visiontok.
        cannot: why the row cannot be run.
        note: what the official code does differently, and what is not known.
    """

    id: str
    title: str
    method: str | None = None
    keep: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    fidelity: Fidelity = "official"
    positions: Positions = "original"
    layer_average: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None
    relative: float | None = None
    flops: Flops | None = None
    source: str = "P"
    cannot: str = ""
    note: str = ""

    def recipe(self) -> Recipe:
        """What is attached."""
        made = named_recipe(str(self.method), self.keep, self.options, seed=0)
        return dataclasses.replace(made, fidelity=self.fidelity, positions=self.positions)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the published answers came about, as far as it is known.

    Attributes:
        conversation: what the processor must render for one picture and the question ``{prompt}``.
        chat_template: a template that renders it, which can be set.
        image_processor: settings of the image processor, ``image_processor_type`` among them.
        min_pixels: of a picture, for towers that take any size.
        max_pixels: see there.
        sizes: "WxH" of a picture → "WxH" in which it must enter the tower, or "N of WxH" for tiles.
        dtype: of the model.
        batch: questions answered together.
        note: what the official code does differently, and what is not known.
    """

    conversation: str
    chat_template: str | None = None
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    min_pixels: int | None = None
    max_pixels: int | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    batch: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A table.

    Attributes:
        name: of the file.
        title: what is compared on which model.
        citation: where.
        columns: benchmarks; none for a table of FLOPs only.
        rows: the stock model, if there are columns, and methods.
        model: id on the hub, or an embedded model; None for a table of FLOPs only.
        revision: of it; None where none was published.
        weights: :func:`visiontok.weights.fingerprint` of the model; None where it is not known.
        decoder: its shape, a name of visiontok.conventions.
        protocol: how it was measured.
        tolerance: why the columns' tolerances are what they are.
        mean_tolerance: of means and relative means, in points.
        note: what a reader must know.
        folder: the file's.
    """

    name: str
    title: str
    citation: Citation
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()
    model: str | None = None
    revision: str | None = None
    weights: str | None = None
    decoder: str | None = None
    protocol: Protocol | None = None
    tolerance: str = ""
    mean_tolerance: float = 1.0
    note: str = ""
    folder: Path = Path()

    @property
    def digest(self) -> str:
        """16 hex digits of all that decides about a result: everything but prose."""
        content = dataclasses.asdict(self)
        for name in ("title", "citation", "tolerance", "note", "folder"):
            del content[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def stock(self) -> Row:
        """The row of the stock model."""
        return next(row for row in self.rows if row.method is None and not row.cannot)

    def row(self, id: str) -> Row:
        """A row by its id.

        Raises:
            ConfigError: if there is none.
        """
        if (found := next((row for row in self.rows if row.id == id), None)) is None:
            raise ConfigError(
                f"rows: there is no {id!r} in {self.name}; it has {', '.join(row.id for row in self.rows)}"
            )
        return found

    def column(self, name: str) -> Column:
        """A column by its name.

        Raises:
            ConfigError: if there is none.
        """
        if (found := next((column for column in self.columns if column.name == name), None)) is None:
            raise ConfigError(f"columns: there is no {name!r} in {self.name}")
        return found

    def task(self, column: Column) -> Task:
        """What the column asks, in its words and judged in its dialect."""
        name = str(column.task)
        task = find_task(str(self.folder / name) if name.endswith((".yaml", ".yml")) else name)
        changes: dict[str, Any] = {}
        if column.dialect is not None:
            changes["dialect"] = column.dialect
        if column.prompt is not None:
            changes["prompts"] = {"default": column.prompt}
        if column.wrap:
            changes["wrap"] = dict(task.wrap) | dict(column.wrap)
        return dataclasses.replace(task, **changes)


# ------------------------------------------------------------------------------------------------------------ from YAML


def names() -> list[str]:
    """Names of the built-in tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Published:
    """A table by its name, or from a YAML file of your own (a path that ends in .yaml).

    Raises:
        ConfigError: there is no such table, or its file is wrong; names the key and the remedy.
    """
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if path.parent == FOLDER and path.stem not in names():
        close = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known tables: {', '.join(names())}"
        raise ConfigError(f"table={name!r}: unknown; {hint}")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"table={name!r}: cannot be read ({error}); known tables: {', '.join(names())}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({error})") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: must be a mapping of keys")
    reserved = {"name": path.stem, "folder": path.parent}
    if given := next((key for key in reserved if key in keys), None):
        raise ConfigError(f"{path}: {given!r} follows from the file; leave it out")
    table: Published = _value(str(path), keys | reserved, Published)
    _check(str(path), table)
    return table


def _value(where: str, given: Any, hint: Any) -> Any:
    """Plain data as a value of a type: a dataclass, a tuple of them, a mapping, a literal or a plain one."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(where, given, hint)
    kind, members = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        rest = [member for member in members if member is not types.NoneType]
        return None if given is None and len(rest) < len(members) else _value(where, given, rest[0])
    if kind is Literal:
        if given not in members:
            raise ConfigError(f"{where}={given!r}: must be one of {', '.join(map(str, members))}")
        return given
    if kind is tuple:
        if not isinstance(given, list):
            raise ConfigError(f"{where}={given!r}: must be a list")
        return tuple(_value(f"{where}[{number}]", one, members[0]) for number, one in enumerate(given))
    if kind is not None:
        if not isinstance(given, dict):
            raise ConfigError(f"{where}={given!r}: must be a mapping")
        return {str(name): _value(f"{where}.{name}", one, members[1]) for name, one in given.items()}
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if hint is not Any and (not isinstance(given, hint) or (isinstance(given, bool) and hint is not bool)):
        remedy = "; quote it" if hint is str else ""
        raise ConfigError(f"{where}={given!r}: must be of type {hint.__name__}{remedy}")
    return given


def _record(where: str, given: Any, kind: type[Any]) -> Any:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}={given!r}: must be a mapping")
    known = {one.name: one for one in dataclasses.fields(kind)}
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; it has {', '.join(known)}")
    for key, one in known.items():
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and key not in given:
            raise ConfigError(f"{where}: the key {key!r} is missing")
    hints = get_type_hints(kind)
    return kind(**{key: _value(f"{where}: {key}", value, hints[key]) for key, value in given.items()})


def _check(where: str, table: Published) -> None:
    """What no single value tells."""
    for what, found in (("row", [row.id for row in table.rows]), ("column", [one.name for one in table.columns])):
        if twice := next((one for one in found if found.count(one) > 1), None):
            raise ConfigError(f"{where}: there are two {what}s {twice!r}; name each differently")
    for row in table.rows:
        here = f"{where}: row {row.id!r}"
        for name in row.values:
            if name not in [column.name for column in table.columns]:
                raise ConfigError(f"{here}: there is no column {name!r}")
        if row.method is not None and row.cannot:
            raise ConfigError(f"{here}: has both `method` and `cannot`; leave one out")
        if row.method is not None:
            row.recipe()
        _check_flops(here, row.flops, table.decoder)
    for column in table.columns:
        here = f"{where}: column {column.name!r}"
        if (column.task is None) != bool(column.cannot):
            raise ConfigError(f"{here}: give either its task, or `cannot`, why it cannot be measured")
        if column.tolerance <= 0:
            raise ConfigError(f"{here}: tolerance={column.tolerance}: must be above 0")
        if column.task is not None:
            task = table.task(column)
            metric(task.metric, task.dialect)
    asked = [column.task for column in table.columns if column.task is not None]
    if twice := next((one for one in asked if asked.count(one) > 1), None):
        raise ConfigError(f"{where}: two columns have the task {twice!r}; data are given by task")
    if not table.columns:
        return
    for name in ("model", "protocol"):
        if getattr(table, name) is None:
            raise ConfigError(f"{where}: the key {name!r} is missing, which a table with columns needs")
    if sum(row.method is None and not row.cannot for row in table.rows) != 1:
        raise ConfigError(f"{where}: there must be one row without `method`, that of the stock model")
    if table.protocol is not None and PROMPT not in table.protocol.conversation:
        raise ConfigError(f"{where}: protocol.conversation lacks {PROMPT}, the place of the question")


def _check_flops(where: str, flops: Flops | None, decoder: str | None) -> None:
    if flops is None:
        return
    if flops.convention not in CONVENTIONS:
        raise ConfigError(f"{where}: flops.convention={flops.convention!r}: use one of {', '.join(CONVENTIONS)}")
    if flops.unit != "T" and flops.stock is None:
        raise ConfigError(f"{where}: flops.unit={flops.unit!r} needs flops.stock, the schedule of the stock model")
    try:
        Decimal(flops.printed)
    except ArithmeticError as error:
        raise ConfigError(f"{where}: flops.printed={flops.printed!r}: must be a number in quotes") from error
    flops.count(decoder)
