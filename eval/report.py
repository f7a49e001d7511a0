"""``visiontok report``: what a sweep found, against what it costs, with ``resize`` always beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from visiontok.errors import ConfigError
from visiontok.statistics import Estimate

from .compare import (
    ALL,
    Across,
    Answered,
    Compared,
    Line,
    across,
    cell,
    check_alike,
    grouped,
    lines,
    read_sweep,
    split_like,
)
from .examples import Example, examples, save
from .measured import Efficiency
from .measured import read as read_bench
from .page import Drawn, Page, Section
from .plots import RESIZE, Plot, Point, draw, require
from .runner import BLIND, FULL
from .sheets import NONE, Sheet, csv_text, estimate, kind_sheet, number, part_sheet, whole_sheet

_MOST_GROUPS = 40
_READING = (
    "Filled markers: nothing that costs as little scores more. Bars and bands: intervals of 95 %, by a bootstrap over "
    "clusters of questions. Lines across: the stock model, and the stock model without its pictures. Dashed: "
    f"{RESIZE}, a smaller picture, which any method must beat."
)
_SHORT = {"time": "time to first token", "tokens": "visual tokens", "flops": "FLOPs"}


@dataclass(frozen=True)
class Study:
    """One task of a sweep.

    Attributes:
        name: of the task.
        reference: the run that others are compared with.
        others: these.
        whole: their comparisons.
        parts: key of groups → comparisons within them.
        hard: comparisons within what ``resize`` at the same budget gets right, and the rest.
    """

    name: str
    reference: Answered
    others: Sequence[Answered]
    whole: Sequence[Line]
    parts: Mapping[str, Sequence[Line]]
    hard: Sequence[Line]

    @property
    def scores(self) -> dict[str, Estimate]:
        """Run → its score as tables show it."""
        points, first = self.whole[0].points, self.whole[0].comparison.reference
        found = {self.reference.name: first} | {line.method: line.comparison.score for line in self.whole}
        return {name: Estimate(points * one.value, points * one.low, points * one.high) for name, one in found.items()}


def report_job(
    folder: str,
    *,
    bench: str | None = None,
    out: str = "report",
    number_of_examples: int = 3,
    against: str = FULL,
    margin: float = 1.0,
    data: Mapping[str, str] | None = None,
    device: str = "auto",
) -> Path:
    """Write ``index.html``, ``report.md``, ``comparisons.csv``, plots and pictures.

    Args:
        folder: what ``visiontok eval --out`` wrote.
        bench: ``efficiency.json`` of ``visiontok bench``; without it there is no plot of times and FLOPs.
        out: folder to write.
        number_of_examples: failures of every method on every task that are shown; 0 needs no model.
        against: what is compared with.
        margin: loss that does not matter, in percent of the highest score.
        data: task → file or folder with its questions, for the examples.
        device: for the examples.

    Returns:
        the page.

    Raises:
        ConfigError: for any argument that is wrong; names it, its value and the remedy.
    """
    require()
    if number_of_examples < 0:
        raise ConfigError(f"--examples {number_of_examples}: give 0 or more")
    if not 0 < margin < 100:
        raise ConfigError(f"--margin {margin:g}: give percent of the highest score, above 0, such as 1")
    sweep = {task: (cell(runs, against), runs) for task, runs in read_sweep(folder).items()}
    first = next(iter(sweep.values()))[0]
    for task, (reference, runs) in sweep.items():
        if reference.protocol["model"] != first.protocol["model"]:
            raise ConfigError(f"{folder!r}: task {task!r} was asked of another model; report the models apart")
        if len(runs) == 1:
            raise ConfigError(f"{folder!r}: task {task!r} has nothing but {against!r}; evaluate a method, too")
        check_alike(reference, runs)
    efficiency = None if bench is None else read_bench(bench, first.protocol["model"])
    place = Path(out).expanduser()
    for part in ("plots", "examples"):
        (place / part).mkdir(parents=True, exist_ok=True)
    others = {task: [run for run in runs if run is not reference] for task, (reference, runs) in sweep.items()}
    shown: list[Example] = []
    if number_of_examples:
        asked = {task: (reference, others[task]) for task, (reference, _) in sweep.items()}
        shown = examples(asked, number_of_examples, data or {}, device)
    studies = _studies({task: (reference, others[task]) for task, (reference, _) in sweep.items()}, margin / 100)
    kinds = across({one.name: [(one.reference, run) for run in one.others] for one in studies})
    page = _page(studies, kinds, efficiency, shown, place)
    parts = [line for one in studies for found in (*one.parts.values(), one.hard) for line in found]
    compared = Compared([line for one in studies for line in one.whole], parts, kinds)
    (place / "comparisons.csv").write_text(csv_text(compared), encoding="utf-8")
    (place / "report.md").write_text(page.markdown(), encoding="utf-8")
    (place / "index.html").write_text(page.html(), encoding="utf-8")
    return place / "index.html"


def _studies(sweep: Mapping[str, tuple[Answered, Sequence[Answered]]], margin: float) -> list[Study]:
    """All comparisons. p-values are adjusted for those of all tasks, and for those of all groups of a key."""
    whole = lines([(ALL, reference, run) for reference, others in sweep.values() for run in others], margin)
    found = []
    for task, (reference, others) in sweep.items():
        parts = {key: lines(grouped(reference, others, key), margin) for key in _keys(reference)}
        halves = split_like([reference, *others], reference, others, RESIZE)
        mine = [line for line in whole if line.task == task]
        found.append(Study(task, reference, others, mine, parts, lines(halves, margin) if halves else ()))
    return found


def _keys(run: Answered) -> list[str]:
    """Keys of groups that are kinds of questions: few, and of more than a question each."""
    keys = sorted({key for row in run.rows for key in row["groups"]})
    values = {key: {row["groups"].get(key) for row in run.rows} for key in keys}
    return [
        key for key in keys if None not in values[key] and 1 < len(values[key]) <= min(_MOST_GROUPS, len(run.rows) // 2)
    ]


# ----------------------------------------------------------------------------------------------------------------- page


def _page(
    studies: Sequence[Study],
    kinds: Sequence[Across],
    efficiency: Efficiency | None,
    shown: Sequence[Example],
    place: Path,
) -> Page:
    first = studies[0].reference
    made = first.protocol
    model, versions = made["model"], made["versions"]
    parts = ", ".join(f"{name} {version}" for name, version in versions.items())
    attention = model["attention"]["model"]
    kind = f"{model['type']}, {model['dtype']}, {attention} attention, {model['device']}; weights {model['weights']}"
    facts = [f"{model['name']} ({kind}). {parts}.", _READING]
    facts += [f"Times and FLOPs: {efficiency}; medians."] if efficiency else []
    sections = [_overall(studies, kinds, efficiency, place)] if len(studies) > 1 else []
    sections += [_task(one, efficiency, [each for each in shown if each.task == one.name], place) for one in studies]
    return Page(f"Visual tokens of {model['name']}", facts, _warnings(studies, efficiency), sections)


def _warnings(studies: Sequence[Study], efficiency: Efficiency | None) -> list[str]:
    found = []
    lacking = [one.name for one in studies if all(run.method != RESIZE for run in one.others)]
    if lacking:
        found.append(
            f"{RESIZE} was not evaluated on {', '.join(lacking)}: a method that does not beat a smaller picture is of "
            f"no use, and this cannot be seen here. Run the sweep again with --method {RESIZE}."
        )
    if efficiency is None:
        found.append(
            "No plot of times and none of FLOPs: no measurements were given. Run `visiontok bench` with these methods "
            "and budgets, and give its efficiency.json as --bench."
        )
    else:
        runs = {run.name for one in studies for run in (one.reference, *one.others)} - {BLIND}
        missing = sorted(name for name in runs if name not in efficiency.rows)
        if missing:
            why = "; ".join(f"{name} ({efficiency.failed.get(name, 'not measured')})" for name in missing)
            found.append(f"Missing in the plots of times and FLOPs: {why}.")
        answered = studies[0].reference.protocol["model"]["device"]
        if efficiency.device and efficiency.device != answered:
            found.append(f"Answers come from {answered}, times from {efficiency.device}.")
    for one in studies:
        for run in (one.reference, *one.others):
            if run.errors:
                found.append(f"{one.name}, {run.name}: {run.errors} questions could not be asked and count as wrong.")
            for text, count in run.result["warnings"].items():
                found.append(f"{one.name}, {run.name}: {text} ({count} of {len(run.rows)} questions)")
    return found


def _overall(studies: Sequence[Study], kinds: Sequence[Across], efficiency: Efficiency | None, place: Path) -> Section:
    relative = {
        one.method: Estimate(*(100 * end for end in (one.relative.value, one.relative.low, one.relative.high)))
        for one in kinds
        if len(one.tasks) == len(studies) and one.relative is not None
    }
    first = studies[0]
    scores = {first.reference.name: Estimate(100.0, 100.0, 100.0)} | relative
    tokens = [{run.name: run.tokens for run in (one.reference, *one.others)} for one in studies]
    means = {
        name: float(np.mean([each[name] for each in tokens]))
        for name in scores
        if all(each.get(name) is not None for each in tokens)
    }
    runs = [run for run in (first.reference, *first.others) if run.name in scores]
    drawn = _plots("all", "All tasks", "score, % of the reference's", runs, scores, means, efficiency, place)
    return Section(
        "all",
        "All tasks",
        [f"Every task counts alike: {', '.join(one.name for one in studies)}."],
        drawn,
        [kind_sheet(kinds)],
    )


def _task(one: Study, efficiency: Efficiency | None, shown: Sequence[Example], place: Path) -> Section:
    result = one.reference.result
    runs = [one.reference, *one.others]
    tokens = {run.name: run.tokens for run in runs if run.tokens is not None}
    label = result["headline"] if result["points"] == 1 else f"{result['headline']}, %"
    drawn = _plots(one.name, result["title"], label, runs, one.scores, tokens, efficiency, place)
    sheets = [_whole(one, efficiency)]
    if one.hard:
        title = f"What {RESIZE} gets right at the same budget (easy), and what it does not (difficult)"
        sheets.append(part_sheet(title, one.hard))
    sheets += [_by_group(one, key, parts) for key, parts in one.parts.items()]
    kept = [(example, save(example, at, place / "examples")) for at, example in enumerate(shown, 1)]
    task = one.reference.task
    text = f"{len(one.reference.rows)} questions; metric {task['metric']} in the dialect {task['dialect']}."
    return Section(one.name, result["title"], [text], drawn, sheets, kept)


def _plots(
    name: str,
    title: str,
    label: str,
    runs: Sequence[Answered],
    scores: Mapping[str, Estimate],
    tokens: Mapping[str, float],
    efficiency: Efficiency | None,
    place: Path,
) -> list[Drawn]:
    """Accuracy against time first, tokens, FLOPs; without measurements against tokens alone."""
    axes: list[tuple[str, str, float, dict[str, float]]] = []
    if efficiency is not None:
        times = {run.name: t for run in runs if (t := efficiency.first_token(run.name)) is not None}
        flops = {run.name: f for run in runs if (f := efficiency.flops(run.name)) is not None}
        axes.append(("time", "total time to first token, ms", 1e3, times))
        axes.append(("tokens", "visual tokens, mean over layers", 1.0, dict(tokens)))
        unit, letter = (1e-12, "T") if max(flops.values(), default=0) >= 1e11 else (1e-9, "G")
        axes.append(("flops", f"{letter}FLOPs to the first token, vision tower included", unit, flops))
    else:
        axes.append(("tokens", "visual tokens, mean over layers", 1.0, dict(tokens)))
    found = []
    for axis, x, unit, costs in axes:
        curves: dict[str, list[Point]] = {}
        for run in runs:
            if run.name in costs and costs[run.name] > 0 and run.method != BLIND:
                curves.setdefault(run.method, []).append(Point(run.name, unit * costs[run.name], scores[run.name]))
        if curves:
            levels = {run.name: scores[run.name] for run in runs if run.method in (FULL, BLIND)}
            plot = Plot(
                f"{name}-{axis}", f"{title}: score against {_SHORT[axis]}", x, label, curves, levels, axis == "tokens"
            )
            svg, png = draw(plot)
            (place / "plots" / f"{plot.name}.svg").write_text(svg, encoding="utf-8")
            (place / "plots" / f"{plot.name}.png").write_bytes(png)
            found.append(Drawn(plot, svg))
    return found


def _whole(one: Study, efficiency: Efficiency | None) -> Sheet:
    more = {}
    if efficiency is not None:
        more["first token, ms"] = lambda line: _time(efficiency, line.method)
    sheet = whole_sheet(f"Against {one.reference.name}", one.whole, more)
    tokens = one.reference.tokens
    known = {
        "method": one.reference.name,
        "tokens": NONE if tokens is None else number(tokens),
        "first token, ms": _time(efficiency, one.reference.name) if efficiency else NONE,
        "score": estimate(one.whole[0].comparison.reference, one.whole[0].points),
        "errors": str(one.reference.errors),
    }
    return replace(sheet, rows=[[known.get(name, NONE) for name in sheet.head], *sheet.rows])


def _time(efficiency: Efficiency, name: str) -> str:
    found = efficiency.first_token(name)
    return NONE if found is None else number(found, 1e3)


def _by_group(one: Study, key: str, parts: Sequence[Line]) -> Sheet:
    """Groups down, methods across."""
    methods = [run.name for run in one.others]
    found = {(line.part, line.method): line for line in parts}
    rows = []
    for group in dict.fromkeys(line.part for line in parts):
        first = found[group, methods[0]]
        cells = [group, str(first.comparison.questions), number(first.comparison.reference.value, first.points)]
        rows.append([*cells, *(_change(found[group, method]) for method in methods)])
    note = (
        f"Scores; in brackets the difference to {one.reference.name}, with a star where p, adjusted for {len(parts)} "
        "comparisons, is below 0.05. Intervals are in comparisons.csv."
    )
    return Sheet(f"By {key}", ["group", "questions", one.reference.name, *methods], rows, [note])


def _change(line: Line) -> str:
    found = line.comparison
    star = "*" if line.p_holm < 0.05 else ""
    return f"{number(found.score.value, line.points)} ({number(found.difference.value, line.points, '+')}{star})"
