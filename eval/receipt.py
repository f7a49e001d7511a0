"""What a reproduction leaves behind: what was measured, how, and what follows from it about a published table.

A receipt has `facts`, which only a run can know, and `findings`, which follow from the facts and the table alone, so
that anyone can derive them anew. Its hash tells accidents and careless changes, not forgers: because of them
:mod:`visiontok.eval.verify` asks the model again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from visiontok.errors import ConfigError

from .published import Published

FORMAT = 1
RECEIPT = "receipt.json"
_FACTS = {"table", "request", "rows", "differences", "data", "cells"}
_LAYERS = 0.5
"""How far, in tokens, the measured layer average may lie from the table's."""

Data = dict[str, Any]


def seal(table: Published, facts: Mapping[str, Any]) -> Data:
    """A receipt, with a hash over all of it."""
    plain = json.loads(json.dumps(facts))
    content = {"format": FORMAT, "facts": plain, "findings": findings(table, plain)}
    return content | {"sha256": _hash(content)}


def read(file: Path) -> Data:
    """A receipt from its file.

    Raises:
        ConfigError: if there is none, or it is of another format.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is no receipt ({error}); give the file that `visiontok reproduce` wrote") from error
    whole = isinstance(found, dict) and found.get("format") == FORMAT and {"facts", "findings"} <= found.keys()
    if not whole or not found["facts"].keys() >= _FACTS:
        raise ConfigError(f"{file}: is no receipt of format {FORMAT}; make it anew with `visiontok reproduce`")
    receipt: Data = found
    return receipt


def intact(receipt: Mapping[str, Any]) -> bool:
    """Whether the hash is that of the content."""
    return receipt.get("sha256") == _hash({name: value for name, value in receipt.items() if name != "sha256"})


def findings(table: Published, facts: Mapping[str, Any]) -> Data:
    """What follows from the facts.

    ``reproduction`` is false where the run was another one than the table's (other model, fewer questions, other
    protocol); ``departures`` says in what, and there is no verdict, nor is any number called within tolerance.
    ``verdict`` is that of what was run; ``complete`` says whether this is all of the table that can be run.
    """
    cells = [_cell(table, cell) for cell in facts["cells"]]
    means = _means(table, cells)
    counted = flops(table, facts["rows"])
    ran = {(cell["row"], cell["column"]) for cell in cells}
    missing = [
        {"row": row.id, "column": column.name, "why": row.cannot or column.cannot or "not run"}
        for row in table.rows
        for column in table.columns
        if (row.id, column.name) not in ran
    ]
    away = departures(table, facts)
    judged = [one["within"] for one in (*cells, *means) if one["within"] is not None]
    judged += [cell["tokens_agree"] for cell in cells if cell["tokens_agree"] is not None]
    reproduction = bool(cells) and not away
    off = baseline(table, cells)
    if not reproduction:
        for one in (*cells, *means):
            one["within"] = None
    return {
        "reproduction": reproduction,
        "departures": away,
        "verdict": ("within tolerance" if all(judged) else "outside of tolerance") if reproduction and judged else None,
        "baseline": off,
        "complete": bool(cells) and all(one["why"] != "not run" for one in missing),
        "cells": cells,
        "means": means,
        "flops": counted,
        "missing": missing,
    }


def departures(table: Published, facts: Mapping[str, Any]) -> list[str]:
    """Why a run is no reproduction of the table, whatever its numbers."""
    if not facts["cells"]:
        return ["nothing was asked"]
    found = list(facts["differences"])
    limit = facts["request"]["limit"]
    model = facts["cells"][0]["protocol"]["model"]
    if any(cell["protocol"]["model"] != model for cell in facts["cells"]):
        found.append("cells were answered by different models")
    if table.weights is not None and model["weights"] != table.weights:
        found.append(f"the weights of {model['name']} are not those of {table.model}")
    elif table.weights is None and model["name"] != table.model:
        found.append(f"the model is {model['name']}, the table's {table.model}")
    if table.revision is not None and model["revision"] != table.revision:
        found.append(f"the model's revision is {model['revision']}, the table's {table.revision}")
    if limit is not None:
        found.append(f"only the first {limit} questions were asked")
    errors = sum(cell["errors"] for cell in facts["cells"])
    if errors:
        found.append(f"{errors} questions could not be asked")
    for column in table.columns:
        asked = {cell["questions"] for cell in facts["cells"] if cell["column"] == column.name}
        if column.questions is not None and asked - {column.questions}:
            found.append(f"{column.name} has {column.questions} questions, and {max(asked)} were asked")
    return found


def baseline(table: Published, cells: list[Data]) -> list[str]:
    """Where the stock model lies outside of its published values."""
    return [
        f"{cell['column']}: off by {abs(cell['deviation']):.2f} points (published {cell['published']:g}, here "
        f"{cell['measured']:.2f}, tolerance {cell['tolerance']:g})"
        for cell in cells
        if cell["row"] == table.stock.id and cell["within"] is False
    ]


def _cell(table: Published, cell: Mapping[str, Any]) -> Data:
    """A measured number beside the published one."""
    row, column = table.row(cell["row"]), table.column(cell["column"])
    measured = column.scale * cell["scores"][column.score or cell["headline"]]
    average = cell["layer_average"]
    agree = None if row.layer_average is None else average is not None and abs(average - row.layer_average) <= _LAYERS
    return {
        "row": row.id,
        "column": column.name,
        **_against(row.values.get(column.name), measured, column.tolerance),
        "errors": cell["errors"],
        "layer_average": average,
        "tokens_agree": agree,
    }


def _against(published: float | None, measured: float, tolerance: float) -> Data:
    away = None if published is None else measured - published
    return {
        "published": published,
        "measured": measured,
        "deviation": away,
        "tolerance": tolerance,
        "within": None if away is None else abs(away) <= tolerance + 1e-9,
    }


def _means(table: Published, cells: list[Data]) -> list[Data]:
    """Means over all columns, where all of them were measured."""
    found = []
    by_row: dict[str, dict[str, float]] = {}
    for cell in cells:
        by_row.setdefault(cell["row"], {})[cell["column"]] = cell["measured"]
    for row in table.rows:
        mine = by_row.get(row.id, {})
        if len(mine) < len(table.columns) or not mine:
            continue
        if row.mean is not None:
            mean = fmean(mine[column.name] * column.mean for column in table.columns)
            found.append({"row": row.id, "kind": "mean", **_against(row.mean, mean, table.mean_tolerance)})
        full = by_row.get(table.stock.id, {})
        if row.relative is not None and len(full) == len(mine) and all(full.values()):
            relative = fmean(100 * mine[column.name] / full[column.name] for column in table.columns)
            found.append({"row": row.id, "kind": "relative", **_against(row.relative, relative, table.mean_tolerance)})
    return found


def flops(table: Published, rows: list[str]) -> list[Data]:
    """Published FLOPs beside those counted here; needs no model."""
    found = []
    for row in table.rows:
        if row.flops is None or row.id not in rows:
            continue
        counted = row.flops.count(table.decoder)
        found.append(
            {
                "row": row.id,
                "published": row.flops.printed,
                "unit": row.flops.unit,
                "convention": row.flops.convention,
                "counted": counted,
                "deviation": counted - float(row.flops.printed),
                "agrees": row.flops.agrees(counted),
                "note": row.flops.note,
            }
        )
    return found


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
