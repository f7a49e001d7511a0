"""Which method for which use: `visiontok recommend`, a rule table over what was measured on the embedded models.

The rule: a method at a budget is *safe* if, on every embedded model of the architecture, the loss of right answers that
the data do not exclude (the lower end of the 95 % interval) is at most a margin. Among safe rows the goal decides; of
those that lose as much, to a point, it is the package's default. Where none is safe, the answer is to prune nothing.
Every recommendation comes with the rows that it rests on.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from visiontok.adapters.base import family

from visiontok import recipes
from visiontok.errors import ConfigError
from visiontok.named import model_type

if TYPE_CHECKING:
    from rich.console import Console

EVIDENCE = Path(__file__).parent / "weights" / "evidence.json"
GOALS = ("ttft", "memory", "loss")
MARGIN = 2.0
_ALIKE = 1.0  # points
_USUAL = "visiontok"
_BASELINES = ("random", "grid")
_TEST_BENCH = (
    "the evidence is of small embedded models on drawn scenes, which predicts nothing about a large model: measure "
    "yours with `visiontok eval` against full, random and resize"
)
_LIKE = {"llava": "llava", "llava_next": "llava", "qwen_vl": "qwen3_vl"}
"""Family of adapters → what the names of the embedded models of its architecture begin with."""


@dataclass(frozen=True)
class Row:
    """A method at a budget on the questions of a workload, in all embedded models of an architecture.

    Attributes:
        method: its name, with options.
        mass: mass attention.
        keep: share of the visual tokens.
        worst: points of accuracy against all tokens at the lower end of the interval, in the worst model.
        change: points, mean over models.
        measured: the rows of evidence.json.
        first_token: measured share of stock's time to the first token, of the CPU benchmark; None if unknown.
        cache: measured share of stock's cache there.
    """

    method: str
    mass: bool
    keep: float
    worst: float
    change: float
    measured: tuple[Mapping[str, Any], ...]
    first_token: float | None
    cache: float | None


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        workload: of the evidence.
        goal: what decided among safe rows.
        margin: points that may be lost.
        chosen: None where nothing is safe.
        others: the runners-up, or, where nothing is safe, what loses least.
        excluded: method → why it was not looked at.
        caveats: what a reader must know.
    """

    workload: str
    goal: str
    margin: float
    chosen: Row | None
    others: tuple[Row, ...]
    excluded: Mapping[str, str]
    caveats: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@functools.cache
def _evidence() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EVIDENCE.read_text())
    return found


def workloads() -> list[str]:
    """Those with evidence."""
    return list(dict.fromkeys(row["workload"] for row in _evidence()["rows"]))


def recommend_for(model: str, workload: str, goal: str = "ttft", margin: float = MARGIN) -> Advice:
    """:func:`recommend`, for a model by the name that a command line gives it.

    Raises:
        ConfigError: as there, or if there is no such model.
    """
    return recommend(model_type(model), workload, goal, margin)


def recommend(kind: str, workload: str, goal: str = "ttft", margin: float = MARGIN) -> Advice:
    """Choose a method and a budget.

    Args:
        kind: ``model_type`` of the model's config.
        workload: one of :func:`workloads`.
        goal: ``ttft`` (fewest tokens, and selection that does not eat the gain), ``memory`` (smallest cache) or
            ``loss`` (fewest points lost at half of the tokens or less).
        margin: points of accuracy that may be lost.

    Raises:
        ConfigError: unknown workload or goal, or a margin below 0.
    """
    if workload not in workloads():
        raise ConfigError(f"--workload {workload!r}: there is evidence for {', '.join(workloads())}")
    if goal not in GOALS:
        raise ConfigError(f"--goal {goal!r}: one of {', '.join(GOALS)}")
    if margin < 0:
        raise ConfigError(f"--margin {margin}: points that may be lost, at least 0")
    like = _LIKE.get(family(kind) or "")
    rows, excluded = _rows(workload, like)
    if goal == "ttft":  # what saves no time is no answer
        slow = {row.method for row in rows if row.first_token is not None and row.first_token >= 0.95}
        excluded |= dict.fromkeys(slow, "saves no time to the first token (bench/results/methods.md)")
        rows = [row for row in rows if row.method not in slow]
    safe = [row for row in rows if row.worst >= -margin]
    safe = [row for row in safe if row.method not in _BASELINES]
    if goal == "loss":
        safe = sorted((row for row in safe if row.keep <= 0.5), key=lambda row: (-row.change, row.keep))
    else:
        safe = sorted(safe, key=lambda row: (row.keep, -row.change))
        alike = [row for row in safe if row.keep == safe[0].keep and row.change >= safe[0].change - _ALIKE]
        usual = [row for row in alike if row.method == _USUAL]
        safe = usual + [row for row in safe if row not in usual]
    least = sorted(rows, key=lambda row: -row.worst)
    return Advice(
        workload=workload,
        goal=goal,
        margin=margin,
        chosen=safe[0] if safe else None,
        others=tuple(safe[1:4] if safe else least[:3]),
        excluded=excluded,
        caveats=tuple(_caveats(kind, like)),
    )


def _rows(workload: str, like: str | None) -> tuple[list[Row], dict[str, str]]:
    found = [row for row in _evidence()["rows"] if row["workload"] == workload]
    found = [row for row in found if like is None or row["model"].startswith(like)]
    models = {row["model"] for row in found}
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in found:
        grouped[row["method"], bool(row["mass"]), row["keep"]].append(row)
    excluded: dict[str, str] = {}
    rows = []
    for (method, mass, keep), measured in grouped.items():
        card = recipes.find(method.split()[0]).card
        if card.trained != "none":
            excluded[method] = "its published form needs trained weights"
        elif workload == "chat" and not card.contract.question_independent:
            excluded[method] = "chooses for the first question"
        elif {row["model"] for row in measured} != models or keep is None:
            excluded.setdefault(method, "not measured on every model of the architecture")
        else:
            rows.append(_row(method, mass, keep, measured))
    for row in rows:
        excluded.pop(row.method, None)
    return rows, excluded


def _row(method: str, mass: bool, keep: float, measured: Sequence[Mapping[str, Any]]) -> Row:
    known = _evidence()["times"].get(method.split()[0], {})
    return Row(
        method=method,
        mass=mass,
        keep=keep,
        worst=min(row["change"][1] for row in measured),
        change=sum(row["change"][0] for row in measured) / len(measured),
        measured=tuple(measured),
        first_token=known.get("first_token"),
        cache=known.get("cache"),
    )


def _caveats(kind: str, like: str | None) -> list[str]:
    said = [_TEST_BENCH]
    if like is None:
        said.append(f"no embedded model is like {kind}: rows must be safe on all of them")
    elif like == "qwen3_vl":
        said.append("one embedded model of this architecture: another training seed may rank methods otherwise")
    return said


def render(advice: Advice, console: Console) -> None:
    """For a terminal."""
    if advice.chosen is None:
        console.print(
            f"Nothing here is safe for {advice.workload}: no measured method at any budget excludes a loss of more "
            f"than {advice.margin:g} points. Use none, or smaller pictures (resize) if you must. What loses least:"
        )
        shown = advice.others
    else:
        best = advice.chosen
        name, *options = best.method.split()
        extra = "".join([", mass=True" * best.mass, *(f", {option}" for option in options)])
        console.print(f"{best.method} at {best.keep:.0%}, for {advice.workload}, goal {advice.goal}\n")
        console.print(f'    visiontok.compress(model, "{name}", keep={best.keep:g}{extra})', markup=False)
        console.print(f"    visiontok run --method {name} --keep {best.keep:g}{' --mass' * best.mass}\n", markup=False)
        shown = (best, *advice.others)
    table = Table("method", "keep", "model", "questions", "all tokens", "kept", "change [95 %]", "source", box=None)
    for row in shown:
        for one in row.measured:
            value, low, high = one["change"]
            table.add_row(
                escape(f"{row.method}{' mass' * row.mass}"),
                f"{row.keep:.0%}",
                one["model"],
                str(one["questions"]),
                f"{one['full']:.1f}",
                f"{one['score']:.1f}",
                escape(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"),
                one["source"],
            )
    console.print(table)
    timed = advice.chosen
    if timed is not None and timed.first_token is not None:
        console.print(
            f"time to the first token {timed.first_token:.2f}, cache {timed.cache:.2f} of stock's at a third of the "
            "tokens (random LLaVA on a CPU, bench/results/methods.md)"
        )
    for text in advice.caveats:
        console.print(f"note: {text}")
