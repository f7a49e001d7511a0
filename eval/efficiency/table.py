"""Rows of a benchmark as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ..runner import FULL

TIMES = {
    "preprocess": "preprocess",
    "vision": "vision",
    "selection": "selection",
    "prefill": "prefill",
    "other": "other",
    "first_token": "first token",
    "decode_token": "decode, a token",
}
WIDE = 1000
"""Columns of the console to print on: a wrapped line is no row of Markdown."""


def print_rows(found: Mapping[str, Any], console: Console) -> None:
    """A table for every point, its negatives, and what a reader must know."""
    made = found["protocol"]
    console.print(
        f"{made['model']}, {made['dtype']} on {escape(made['device_name'])}, {made['threads']} thread(s); medians of "
        f"{made['runs']} interleaved rounds, milliseconds; {made['new_tokens']} new tokens"
    )
    for point in dict.fromkeys((row["batch"], row["side"], row["text"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["batch"], row["side"], row["text"]) == point]
        _print_point(point, rows, console)


def _print_point(point: tuple[Any, ...], rows: list[Mapping[str, Any]], console: Console) -> None:
    batch, side, text = point
    pixels = "pictures as they are" if side is None else f"{side} pixels"
    title = f"batch {batch}, {pixels}, {text} text tokens"
    headings = ("method", "configuration", "why", "tokens", *TIMES.values(), "× first token", "cap")
    table = Table(*headings, "peak", "KV", "requests", "FLOPs", box=MARKDOWN)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in headings[:3] else "right"
    whys: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:  # a baseline may stand beside several methods
        whys.setdefault(_key(row), []).append(row["why"] or "")
    for row in {_key(row): row for row in rows}.values():
        name = " ".join(filter(None, (row["method"], row["keep"])))
        cells = [escape(name), row["configuration"], escape(", ".join(filter(None, whys[_key(row)])))]
        if row["error"] is None:
            ratio, total = row["speed_up"], row["flops"]["total"]
            cells.append(f"{row['layer_average']:.1f} of {row['visual_tokens']:.1f}")
            cells += [f"{1e3 * row['seconds'][part]['median']:.3g}" for part in TIMES]
            cells.append("–" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
            cells.append("–" if row["cap"] is None else f"{row['cap']:.2f}")
            cells.append("–" if row["peak_bytes"] is None else decimal(row["peak_bytes"]))
            cells += [decimal(row["kv_bytes"]), "–" if row["requests"] is None else str(row["requests"])]
            cells.append("–" if total is None else f"{total:.3g}")
        else:
            cells.append("error")
        table.add_row(*cells)
    console.print(f"\n{title}:\n")
    with console.capture() as drawn:
        console.print(table)
    lines = (line.rstrip() for line in drawn.get().splitlines())
    console.print("\n".join(filter(None, lines)) + "\n", markup=False)
    named = {id(row): " ".join(filter(None, (row["method"], row["keep"], row["configuration"]))) for row in rows}
    slow = [row for row in rows if row["speed_up"] is not None and row["speed_up"]["median"] < 1]
    said = dict.fromkeys(escape(named[id(row)]) for row in slow if row["method"] != FULL)
    console.print(f"Later to the first token than stock at its best: {', '.join(said) or 'none'}.")
    notes: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, (*row["warnings"], row["error"])):
            notes.setdefault(text, []).append(named[id(row)])
    for text, names in notes.items():
        console.print(escape(f"* {', '.join(dict.fromkeys(names))}: {text}"))


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["keep"] or "", row["configuration"]
