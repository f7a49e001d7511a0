"""Accuracy over kept tokens, from saved results: those the package ships, and folders of ``visiontok eval``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visiontok.errors import ConfigError

from . import WEIGHTS

FRONT = "Pareto front"
USUAL = ("random", "resize", "divprune", "visionzip", "visiontok")
"""Methods that are shown first."""


@dataclass(frozen=True)
class Point:
    """One measured cell.

    Attributes:
        source: model and questions.
        method: its name in results.
        kept: share of the visual tokens, averaged over decoder layers.
        score: in percent.
    """

    source: str
    method: str
    kept: float
    score: float


def shipped() -> list[Point]:
    """The curves of the embedded models, one per question set: prompt methods, as they were published."""
    from .card import curves
    from .card import shipped as models

    found = []
    for exam in curves(WEIGHTS, models(WEIGHTS)):
        for model in exam.models:
            source = f"embedded {model}, {exam.split}"
            stock = exam.hits(model, "stock", None)
            if stock is not None:
                found.append(Point(source, "full", 1.0, 100 * float(stock.mean())))
            for method in exam.methods:
                for keep in exam.keeps:
                    hits = exam.hits(model, method, keep)
                    hits = exam.hits(model, method, keep, mass=True) if hits is None else hits
                    if hits is not None:
                        found.append(Point(source, exam.label(model, method), keep, 100 * float(hits.mean())))
    return found


def of_eval(folder: str) -> list[Point]:
    """The runs of ``visiontok eval`` below a folder.

    Raises:
        ConfigError: if it holds none.
    """
    root, found = Path(folder).expanduser(), []
    for file in sorted(root.glob("**/results.json")):
        try:
            results, protocol = (json.loads((file.parent / n).read_text()) for n in ("results.json", "protocol.json"))
            score = float(results["scores"][results["headline"]])
            layers, visual = results["layer_average"], results["visual_tokens"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--results {folder!r}: {file} is no result of `visiontok eval` ({error!r})") from error
        if not visual:  # the blind baseline sees none
            continue
        kept = 1.0 if layers is None else layers / visual
        method = str(protocol["method"]).rpartition(" ")[0] or str(protocol["method"])
        found.append(Point(f"{file.parent.parent.name} in {root.name}", method, kept, 100 * score))
    if not found:
        raise ConfigError(f"--results {folder!r}: holds no results.json; give the folder that `visiontok eval` wrote")
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in tokens and score at once, by tokens."""
    best, found = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.kept, -p.score)):
        if point.score > best:
            best = point.score
            found.append(point)
    return found
