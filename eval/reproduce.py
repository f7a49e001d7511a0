"""``visiontok reproduce``: a published table measured again, the stock model first, with a receipt at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from visiontok.errors import ConfigError, ImageError
from visiontok.named import Loaded, find_device, load_model, quiet

from . import receipt as receipts
from .enforce import adapted, departures
from .items import Item
from .job import progress_bar
from .published import Column, Published, Row, find, names
from .records import PROTOCOL, write_json
from .runner import FULL, Cell, run
from .task import Task

CAUSES = (
    "likely causes: conversation or system sentence (--adapt sets the table's), crop instead of pad, pixel limits, OCR "
    "tokens in or out of the prompt, another split or dialect, precision"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be reproduced.

    Attributes:
        table: name or YAML file.
        model: another than the table's, or its folder.
        rows: only these, by id; the stock model is always measured. All for none.
        tasks: only these benchmarks. All for none.
        data: task → file or folder with its questions; others come from the hub, or are drawn.
        limit: only the first so many questions of each column.
        batch: questions answered together; None for the table's.
        device: ``auto``, ``cpu``, ``cuda``, …
        out: folder for answers and receipt; None for ``reproduction/TABLE``.
        adapt: give the processor the table's chat template and pixels.
        anyhow: go on although the protocol differs or the baseline is off.
        flops: only what needs no model.
    """

    table: str
    model: str | None = None
    rows: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch: int | None = None
    device: str = "auto"
    out: str | None = None
    adapt: bool = False
    anyhow: bool = False
    flops: bool = False


@dataclass(frozen=True)
class Setting:
    """A model before the questions of a table: all that is needed to ask any of them.

    Attributes:
        table: what is reproduced.
        loaded: the model, its processor adapted if that was asked for.
        tasks: by column, what is asked.
        items: by column, the questions.
        differences: between the table's protocol and this one.
    """

    table: Published
    loaded: Loaded
    tasks: Mapping[str, tuple[Column, Task]]
    items: Mapping[str, Sequence[Item]]
    differences: Sequence[str]

    @classmethod
    def of(cls, request: Request, table: Published, *, refuse: bool) -> Setting:
        """Load what a request needs.

        Raises:
            ConfigError: for anything in the request that is wrong, and with ``refuse`` where the model departs from the
                table's protocol; names the fields.
        """
        tasks = _tasks(table, request)
        asked = [task.name for _, task in tasks.values()]
        for name in request.data:
            if name not in asked:
                raise ConfigError(f"data: {name!r} is none of the tasks that are run, {', '.join(asked)}; correct it")
        protocol = table.protocol
        if protocol is None:
            raise ConfigError(f"table={table.name!r}: has no columns, so there is nothing to ask a model; give --flops")
        loaded = load_model(request.model or str(table.model), find_device(request.device))
        if request.adapt:
            loaded = adapted(protocol, loaded)
        found = departures(protocol, loaded, tasks)
        if found and refuse:
            raise ConfigError(
                f"{loaded.name} is not set up as {table.name} was measured (the table's value first): "
                f"{'; '.join(found)}; --adapt sets template and pixels, --anyhow goes on, as no reproduction"
            )
        family = loaded.model.config.model_type
        items = {
            name: task.items(request.data.get(task.name), family, request.limit) for name, (_, task) in tasks.items()
        }
        return cls(table, loaded, tasks, items, found)

    def cell(self, row: Row) -> Cell:
        """How a row's answers come about."""
        return Cell(FULL, None, None) if row.method is None else Cell(row.id, None, row.recipe())


def reproduce(request: Request, console: Console) -> dict[str, Any]:
    """Measure a table, as far as it is not measured yet, and write a receipt.

    The stock model comes first; where it is off its published values the rest is not run, unless ``anyhow`` is set.
    Rows can be run side by side by several commands with one ``out``, and be summed up by one more.

    Returns:
        the receipt.

    Raises:
        ConfigError: for anything in the request that is wrong, and where the model is not set up as the table says;
            names the fields. Nothing is asked then.
    """
    table = find(request.table)
    rows, out = _rows(table, request), Path(request.out or f"reproduction/{table.name}").expanduser()
    facts: dict[str, Any] = {
        "table": {"name": table.name, "digest": table.digest, "citation": dataclasses.asdict(table.citation)},
        "rows": [row.id for row in rows],
        "request": dataclasses.asdict(request),
        "differences": [],
        "data": {},
        "cells": [],
    }
    print_flops(receipts.flops(table, facts["rows"]), table, console)
    if table.columns and not request.flops:
        with quiet():
            _measure(request, table, rows, out, facts, console)
    out.mkdir(parents=True, exist_ok=True)
    sealed = receipts.seal(table, facts)
    write_json(out / receipts.RECEIPT, sealed)
    print_findings(sealed["findings"], table, console)
    console.print(f"receipt: {out / receipts.RECEIPT}", soft_wrap=True)
    return sealed


def _measure(
    request: Request, table: Published, rows: Sequence[Row], out: Path, facts: dict[str, Any], console: Console
) -> None:
    """Ask the questions; adds to the facts."""
    setting = Setting.of(request, table, refuse=not request.anyhow)
    facts["differences"] = list(setting.differences)
    facts["data"] = {name: data_digest(items) for name, items in setting.items.items()}
    batch = table.protocol.batch if request.batch is None and table.protocol is not None else request.batch
    with progress_bar() as progress:
        for row in [table.stock, *(row for row in rows if row is not table.stock and row.method is not None)]:
            for name, (_, task) in setting.tasks.items():
                items, folder = setting.items[name], out / name / row.id
                bar = progress.add_task(f"{name} {row.id}", total=len(items))
                result = run(
                    setting.loaded,
                    task,
                    items,
                    {folder: setting.cell(row)},
                    batch=batch or 1,
                    progress=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
                )[folder]
                progress.update(bar, completed=len(items), total=len(items))
                if result is None:
                    raise ConfigError(f"{folder}: another process has not answered its part; wait for it")
                made = json.loads((folder / PROTOCOL).read_text())
                facts["cells"].append({"row": row.id, "column": name, "folder": f"{name}/{row.id}", **made, **result})
            if row is table.stock and not request.anyhow and receipts.findings(table, facts)["baseline"]:
                return


def data_digest(items: Sequence[Item]) -> str:
    """16 hex digits of questions: words, right answers, groups and pixels."""
    found, pictures = hashlib.sha256(), {}
    for item in items:
        for image in item.images:
            if image.name not in pictures:
                try:
                    opened = image.open()
                    pictures[image.name] = hashlib.sha256(repr(opened.size).encode() + opened.tobytes()).hexdigest()
                except ImageError:
                    pictures[image.name] = "unreadable"
        seen = [pictures[image.name] for image in item.images]
        content = [item.id, item.prompt, dict(item.target), item.cluster, dict(item.groups), seen]
        found.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return found.hexdigest()[:16]


def _rows(table: Published, request: Request) -> list[Row]:
    chosen = [table.row(name) for name in request.rows] or list(table.rows)
    for row in chosen:
        if request.rows and row.cannot and row.flops is None:
            raise ConfigError(f"rows: {row.id!r} cannot be run: {row.cannot}; leave it out")
    return chosen


def _tasks(table: Published, request: Request) -> dict[str, tuple[Column, Task]]:
    """By column, what is asked."""
    known = {column.name: (column, table.task(column)) for column in table.columns if column.task is not None}
    asked = [task.name for _, task in known.values()]
    for name in request.tasks:
        if name not in asked:
            raise ConfigError(f"tasks: {name!r} is none of those of {table.name}, {', '.join(asked)}; correct it")
    return {name: one for name, one in known.items() if not request.tasks or one[1].name in request.tasks}


# -------------------------------------------------------------------------------------------------------------- printed


def tables() -> list[dict[str, Any]]:
    """The built-in tables, one by one, as plain data."""
    found = []
    for name in names():
        table = find(name)
        found.append(
            {
                "name": name,
                "title": table.title,
                "citation": dataclasses.asdict(table.citation),
                "model": table.model,
                "columns": [column.name for column in table.columns if column.task is not None],
                "cannot": {column.name: column.cannot for column in table.columns if column.cannot},
                "rows": [row.id for row in table.rows if row.method is not None or not row.cannot],
                "flops": sum(row.flops is not None for row in table.rows),
            }
        )
    return found


def markdown() -> str:
    """The built-in tables as a table of the documentation."""
    lines = ["| table | of | model | benchmarks | methods | FLOPs |", "|---|---|---|---|---|---|"]
    for one in tables():
        methods = dict.fromkeys(str(row.method) for row in find(one["name"]).rows if row.method is not None)
        cells = (
            f"`{one['name']}`", one["title"], one["model"] or "-", ", ".join(one["columns"]) or "-",
            ", ".join(methods) or "-", str(one["flops"] or "-"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def print_tables(console: Console) -> None:
    """What can be reproduced."""
    table = Table("table", "what", "model", "benchmarks", "rows")
    for one in tables():
        rows = str(len(one["rows"])) if one["model"] else f"{one['flops']} of FLOPs"
        table.add_row(one["name"], one["title"], one["model"] or "-", ", ".join(one["columns"]) or "-", rows)
    console.print(table)
    console.print("We have run none of these tables of large models; run one, and keep its receipt.")


def print_flops(rows: Sequence[Mapping[str, Any]], table: Published, console: Console) -> None:
    """Published FLOPs, and what comes out here."""
    if not rows:
        return
    titles = {row.id: row.title for row in table.rows}
    units = {"T": "T", "left": "% left", "saved": "% saved"}
    shown = Table(
        "FLOPs", "convention", "published", "counted", "deviation", "", title=f"{table.name}, without a model"
    )
    for row in rows:
        said = "agrees" if row["agrees"] else f"differs{': ' if row['note'] else ''}{row['note']}"
        count = f"{row['counted']:.3f}" if row["unit"] == "T" else f"{row['counted']:.1f}"
        published = f"{row['published']} {units[row['unit']]}"
        shown.add_row(titles[row["row"]], row["convention"], published, count, f"{row['deviation']:+.3f}", said)
    console.print(shown)
    console.print(f"{sum(row['agrees'] for row in rows)} of {len(rows)} agree in every printed digit")


def print_findings(found: Mapping[str, Any], table: Published, console: Console) -> None:
    """Measured beside published, and what it amounts to."""
    if not found["cells"]:
        return
    shown = Table("row", "", "published", "measured", "deviation", "tolerance", "within", title=table.name)
    for one in (*found["cells"], *found["means"]):
        published = "-" if one["published"] is None else f"{one['published']:g}"
        deviation = "-" if one["deviation"] is None else f"{one['deviation']:+.2f}"
        within = {True: "yes", False: "no", None: "-"}[one["within"]]
        name = one.get("column") or one["kind"]
        if one.get("tokens_agree") is False:
            within += f", {one['layer_average']:.1f} tokens per layer"
        shown.add_row(one["row"], name, published, f"{one['measured']:.2f}", deviation, f"{one['tolerance']:g}", within)
    console.print(shown)
    for line in found["baseline"]:
        console.print(f"baseline of {line}", soft_wrap=True)
    if found["baseline"]:
        alone = all(cell["row"] == table.stock.id for cell in found["cells"])
        console.print(f"{'the comparison stops here (--anyhow goes on); ' if alone else ''}{CAUSES}", soft_wrap=True)
    if found["reproduction"]:
        whole = "all that can be run" if found["complete"] else "a part of the table"
        console.print(f"verdict: {found['verdict']} ({whole})")
    else:
        console.print(f"not a reproduction of {table.name}: {'; '.join(found['departures'])}", soft_wrap=True)
