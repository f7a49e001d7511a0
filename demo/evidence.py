"""Write evidence.json, what `visiontok recommend` goes by: `python -m visiontok.demo.evidence`.

Every row is a cell that was measured on an embedded model: what a method at a budget loses against all tokens, on the
questions that stand for a workload. Times and cache are those of bench/results/methods.jsonl. Two of the splits, detail
and pairs, are in workloads.jsonl:

    python -m visiontok.demo.curves weights/llava weights/llava-seed1 weights/qwen3_vl --split SPLIT --questions 500
        --methods visiontok random resize divprune hiprune kmeans vispruner scope --keeps 0.5 0.25 0.11 0.05 --seeds 0
        --mass off --positions original --out weights/workloads.jsonl
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visiontok import recipes
from visiontok.statistics import difference

from .card import WEIGHTS, Curves
from .curves import STOCK, read

FILE = WEIGHTS / "evidence.json"
TIMES = WEIGHTS.parent.parent / "bench" / "results" / "methods.jsonl"
WORKLOADS = {
    "photo": ("curves.jsonl", "heldout", "1,000 questions of all kinds about single scenes"),
    "document": ("workloads.jsonl", "detail", "scenes in which every object has a glyph of the smallest size"),
    "multi-image": ("workloads.jsonl", "pairs", "questions about two pictures"),
    "chat": ("decoder.jsonl", "turns", "second questions, on what the first one's choice has left in the cache"),
}
"""Workload → file, split, and what is asked."""


def rows(weights: Path = WEIGHTS) -> Iterator[dict[str, Any]]:
    """One for each workload, model, method and budget."""
    for workload, (file, split, _) in WORKLOADS.items():
        lines = read(weights / file)
        for exam in (line for line in lines if line.get("split") == split):
            cells = [line for line in lines if "model" in line and line["exam"] == exam["exam"]]
            if workload == "chat":
                cells = [{**cell, "keep": cell["share"]} for cell in cells if cell["cached"]]
            yield from _losses(workload, file, Curves(exam, [c for c in cells if c["positions"] == "original"]))


def _losses(workload: str, file: str, curves: Curves) -> Iterator[dict[str, Any]]:
    for model in curves.models:
        stock = curves.hits(model, STOCK, None)
        if stock is None:
            continue
        for cell in _first(curves.cells, model):
            hits = curves.hits(model, cell["method"], cell["keep"], cell["mass"])
            if hits is None:
                continue
            found = difference(hits, stock, curves.scene)
            yield {
                "workload": workload,
                "model": model,
                "method": cell["method"],
                "mass": cell["mass"],
                "keep": cell["keep"],
                "tokens": cell["tokens"],
                "questions": int(stock.shape[1]),
                "score": round(100 * float(hits.mean()), 1),
                "full": round(100 * float(stock.mean()), 1),
                "change": [round(100 * x, 1) for x in (found.value, found.low, found.high)],
                "source": f"demo/weights/{file}, {curves.split}",
            }


def _first(cells: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    """The cells of a model in which something is dropped, random methods once."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for cell in cells:
        if cell["model"] == model and cell["method"] != STOCK and cell["keep"] not in (None, 1.0):
            found.setdefault((cell["method"], cell["keep"], cell["mass"]), cell)
    return [cell for cell in found.values() if cell["method"].split()[0] in recipes.names()]


def times(file: Path = TIMES) -> dict[str, dict[str, float]]:
    """Per method, in shares of stock's at the average of that benchmark: time to the first token, and cache."""
    found = {}
    for line in map(json.loads, file.read_text().splitlines()):
        if line["method"] == STOCK or "seconds" not in line:
            continue
        ratios = [ours / stock for stock, ours in line["seconds"]["first"]]
        found[line["method"]] = {
            "first_token": round(statistics.median(ratios), 2),
            "cache": round(line["kv"] / line["kv_stock"], 3),
        }
    return found


def main() -> None:
    made = {"rows": list(rows()), "times": times()}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in made["rows"])
    FILE.write_text(f'{{"rows":[\n{lines}\n],\n"times":{json.dumps(made["times"])}}}\n')
    print(FILE)


if __name__ == "__main__":
    main()
