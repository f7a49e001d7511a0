"""``visiontok compare``: methods against one run, question by question; ``visiontok score``: a run marked anew."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from visiontok.errors import ConfigError
from visiontok.statistics import (
    Comparison,
    Difference,
    Estimate,
    Flips,
    Paired,
    Tallied,
    compare,
    difference,
    difficulty,
    flips,
    holm,
    mean_of,
    relative_score,
    tallied_difference,
)

from .grading import mark, summary, tally
from .protocol import of_ids
from .records import PROTOCOL, Records, Row, differences
from .runner import FULL, RESULTS
from .scoring import metric

NEUTRAL = ("seed",)
"""Fields of a protocol in which compared runs may differ."""
ALL = "all"
"""The part of a task that is all of it."""


@dataclass(frozen=True)
class Answered:
    """A finished run, or some of its questions.

    Attributes:
        folder: where it is.
        made: its protocol.json.
        result: its results.json.
        rows: its answers in the order of the questions.
    """

    folder: Path
    made: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """Method and budget."""
        return str(self.made["method"])

    @property
    def keep(self) -> str | None:
        """The budget, None where there is none."""
        keep: str | None = self.made["keep"]
        return keep

    @property
    def method(self) -> str:
        """Without the budget."""
        return self.name if self.keep is None else self.name.removesuffix(f" {self.keep}")

    @property
    def protocol(self) -> Mapping[str, Any]:
        protocol: Mapping[str, Any] = self.made["protocol"]
        return protocol

    @property
    def task(self) -> Mapping[str, Any]:
        task: Mapping[str, Any] = self.protocol["task"]
        return task

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """(Q,), of each question by itself."""
        return np.array([row["score"] for row in self.rows])

    @functools.cached_property
    def cluster(self) -> np.ndarray:
        """(Q,)"""
        return np.array([row["cluster"] for row in self.rows])

    @property
    def tokens(self) -> float | None:
        """Visual tokens of a question, averaged over layers and questions."""
        kept = [float(np.mean(row["kept"])) if row["kept"] else row["visual_tokens"] for row in self.rows]
        return None if None in kept else float(np.mean(kept))

    @property
    def errors(self) -> int:
        """Questions that could not be asked."""
        return sum(row["error"] is not None for row in self.rows)

    def only(self, places: np.ndarray) -> Answered:
        """Those questions at some places, (Q,) bool."""
        return replace(self, rows=[row for row, there in zip(self.rows, places, strict=True) if there])


@dataclass(frozen=True)
class Line:
    """A method against its reference on one task or a part of it.

    Attributes:
        task: its name.
        part: ``all``, or a group of questions.
        method: method and budget.
        against: those of the reference.
        points: what tables multiply scores by.
        tokens: visual tokens of a question, averaged over layers and questions; None if they were not counted.
        errors: questions that could not be asked.
        comparison: what is said of the task's headline.
        p_holm: its p-value, adjusted by Holm for all lines that were made with it.
        family: how many these are.
        flips: answers that changed.
        length: by how many tokens answers became longer.
    """

    task: str
    part: str
    method: str
    against: str
    points: float
    tokens: float | None
    errors: int
    comparison: Comparison
    p_holm: float
    family: int
    flips: Flips
    length: Difference


@dataclass(frozen=True)
class Across:
    """A method against its reference over several tasks, each as important as the others.

    Attributes:
        kind: of the tasks, or ``all``.
        tasks: their names.
        method: method and budget.
        against: those of the reference.
        score: mean of the headlines, each divided by the highest there is.
        difference: how much higher that is than the reference's.
        relative: mean of the shares of the reference's scores; None where one of these is 0 in some sample.
        p_holm: adjusted by Holm for all lines that were made with it.
    """

    kind: str
    tasks: tuple[str, ...]
    method: str
    against: str
    score: float
    difference: Difference
    relative: Estimate | None
    p_holm: float


# -------------------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path) -> Answered:
    """A run by its folder.

    Raises:
        ConfigError: if it is no folder of a run, or the run is not finished.
    """
    place = Path(folder).expanduser()
    if not (place / PROTOCOL).is_file():
        raise ConfigError(
            f"{str(folder)!r}: no run is here; give the folder of one method, such as evaluation/scenes/full"
        )
    if not (place / RESULTS).is_file():
        raise ConfigError(f"{str(folder)!r}: this run is not finished; give its command again")
    made, result = (json.loads((place / name).read_text()) for name in (PROTOCOL, RESULTS))
    rows = Records.found(place).rows()
    asked = made["protocol"]["questions"]
    if of_ids([row["id"] for row in rows]) != asked["ids"]:
        raise ConfigError(f"{str(folder)!r}: has not the {asked['number']} answers it should; give its command again")
    return Answered(place, made, result, rows)


def read_sweep(folder: str | Path) -> dict[str, list[Answered]]:
    """Task → its runs, in alphabetical order, from a folder that ``visiontok eval`` left.

    Raises:
        ConfigError: if no run is there, or one is not finished.
    """
    place = Path(folder).expanduser()
    found: dict[str, list[Answered]] = {}
    for file in sorted(place.glob(f"*/*/{PROTOCOL}")):
        found.setdefault(file.parent.parent.name, []).append(read(file.parent))
    if not found:
        raise ConfigError(
            f"{str(folder)!r}: no run is in it; give the folder that `visiontok eval --out` wrote, with a "
            "folder for each task"
        )
    return found


def cell(runs: Sequence[Answered], name: str) -> Answered:
    """The run of this name.

    Raises:
        ConfigError: if there is none.
    """
    for run in runs:
        if run.name == name:
            return run
    names = ", ".join(repr(run.name) for run in runs)
    raise ConfigError(f"{runs[0].folder.parent}: has no run {name!r}; it has {names}")


def check_alike(reference: Answered, others: Sequence[Answered], *, anyhow: bool = False) -> None:
    """Whether runs may be compared.

    Raises:
        ConfigError: if they came about in different ways, which ``anyhow`` allows where they have the same questions.
    """
    asked = [row["id"] for row in reference.rows]
    for other in others:
        if [row["id"] for row in other.rows] != asked:
            raise ConfigError(f"{other.folder}: has other questions than {reference.folder}; compare runs of one task")
        found = [line for line in differences(reference.protocol, other.protocol) if line.split()[0] not in NEUTRAL]
        if found and not anyhow:
            raise ConfigError(
                f"{other.folder} and {reference.folder} came about differently: {'; '.join(found)}; ask both alike, "
                "or give --anyhow"
            )


# ------------------------------------------------------------------------------------------------------------ comparing


def tallied(reference: Answered, other: Answered) -> Tallied | None:
    """The task's headline as a function of sums over questions; None where it is their mean score."""
    task = reference.task
    ours, theirs = (tally(task["metric"], task["dialect"], run.rows) for run in (other, reference))
    if ours is None or theirs is None:
        return None
    return Tallied(ours.counts, theirs.counts, reference.cluster, ours.score, ours.top)


def lines(pairs: Sequence[tuple[str, Answered, Answered]], margin: float = 0.01) -> list[Line]:
    """Comparisons, and p-values adjusted for their number by Holm.

    Args:
        pairs: part, reference and the run that is compared with it, of the same questions.
        margin: what does not matter, as a share of the highest score.

    Raises:
        ConfigError: a margin that is not above 0.
    """
    found = [
        compare(Paired(other.scores, reference.scores, reference.cluster), margin, tallied=tallied(reference, other))
        for _, reference, other in pairs
    ]
    adjusted = holm([one.difference.p for one in found])
    return [
        Line(
            task=reference.task["name"],
            part=part,
            method=other.name,
            against=reference.name,
            points=metric(reference.task["metric"], reference.task["dialect"]).points,
            tokens=other.tokens,
            errors=other.errors,
            comparison=one,
            p_holm=float(p),
            family=len(pairs),
            flips=flips(
                other.scores,
                reference.scores,
                [row["answer"] for row in other.rows],
                [row["answer"] for row in reference.rows],
                reference.cluster,
            ),
            length=difference(_lengths(other), _lengths(reference), reference.cluster, interval="bca"),
        )
        for (part, reference, other), one, p in zip(pairs, found, adjusted, strict=True)
    ]


def _lengths(run: Answered) -> np.ndarray:
    return np.array([row["answer_tokens"] for row in run.rows], float)


def grouped(reference: Answered, others: Sequence[Answered], key: str) -> list[tuple[str, Answered, Answered]]:
    """Every run within each group of questions, for :func:`lines`.

    Raises:
        ConfigError: if the task has no such groups.
    """
    names = [row["groups"].get(key) for row in reference.rows]
    if None in names:
        known = sorted({name for row in reference.rows for name in row["groups"]})
        raise ConfigError(f"--by {key!r}: questions have no such group; they have {', '.join(known) or 'none'}")
    return _parted(reference, others, np.array([str(name) for name in names]))


def split(reference: Answered, others: Sequence[Answered], judge: Answered) -> list[tuple[str, Answered, Answered]]:
    """Every run within the "easy" questions, those that ``judge`` gets right, and the "difficult" ones.

    Where questions are right or wrong as one (MME's pairs, MMBench's rotations), they are easy as one. The judge itself
    is left out: the split looks at its answers.
    """
    easy = difficulty(judge.scores) == "easy"
    found = tally(judge.task["metric"], judge.task["dialect"], judge.rows)
    if found is not None:
        whole: dict[str, bool] = {}
        for unit, right in zip(found.unit, easy, strict=True):
            whole[unit] = whole.get(unit, True) and bool(right)
        easy = np.array([whole[unit] for unit in found.unit])
    rest = [other for other in others if other.name != judge.name]
    return _parted(reference, rest, np.where(easy, "easy", "difficult"))


def _parted(reference: Answered, others: Sequence[Answered], names: np.ndarray) -> list[tuple[str, Answered, Answered]]:
    return [
        (str(name), reference.only(names == name), other.only(names == name))
        for other in others
        for name in np.unique(names)
    ]


def across(pairs: Mapping[str, Sequence[tuple[Answered, Answered]]]) -> list[Across]:
    """Methods over the tasks of each kind; a method that was not asked all of them is left out.

    Args:
        pairs: task → (reference, run) of each method.
    """
    kinds: dict[str, list[str]] = {ALL: list(pairs)}
    for task, of_task in pairs.items():
        for reference, _ in of_task[:1]:
            kinds.setdefault(reference.result["kind"], []).append(task)
    if len(kinds) == 2:  # all tasks are of one kind, which would be said twice
        del kinds[ALL]
    methods = list(dict.fromkeys(other.name for of_task in pairs.values() for _, other in of_task))
    found: list[Across] = []
    for kind, tasks in kinds.items():
        for method in methods:
            mine = [pair for task in tasks for pair in pairs[task] if pair[1].name == method]
            if len(mine) == len(tasks):
                found.append(_over_tasks(kind, tasks, mine))
    adjusted = holm([one.difference.p for one in found])
    return [replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]


def _over_tasks(kind: str, tasks: Sequence[str], pairs: Sequence[tuple[Answered, Answered]]) -> Across:
    given = [
        tallied(reference, other) or mean_of(Paired(other.scores, reference.scores, reference.cluster))
        for reference, other in pairs
    ]
    change = tallied_difference(given)
    try:
        relative = relative_score(given)
    except ConfigError:  # a reference that is 0 in some sample
        relative = None
    return Across(
        kind=kind,
        tasks=tuple(tasks),
        method=pairs[0][1].name,
        against=pairs[0][0].name,
        score=float(np.mean([one.score(one.counts.sum(0)) / one.top for one in given])),
        difference=change,
        relative=relative,
        p_holm=change.p,
    )


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Compared:
    """What ``visiontok compare`` found.

    Attributes:
        whole: every run against its reference.
        parts: the same within groups of questions.
        kinds: the same over several tasks.
    """

    whole: Sequence[Line]
    parts: Sequence[Line] = ()
    kinds: Sequence[Across] = ()


def compare_job(
    reference: str,
    others: Sequence[str],
    *,
    against: str = FULL,
    by: str | None = None,
    split_by: str | None = None,
    margin: float = 1.0,
    anyhow: bool = False,
) -> Compared:
    """Compare runs of one task, or all runs of a sweep.

    Args:
        reference: folder of the run to compare with, or of a sweep.
        others: folders of runs of the same task; none with a sweep.
        against: in a sweep, the run of each task to compare with.
        by: a group that questions have, or ``kind``, over several tasks.
        split_by: a run, in a sweep its name or its method (the run with the budget of each other is taken): what it
            gets right is easy.
        margin: what does not matter, in percent of the highest score.
        anyhow: also runs that came about in different ways.

    Raises:
        ConfigError: for any argument that is wrong; names it, its value and the remedy.
    """
    if not 0 < margin < 100:
        raise ConfigError(f"--margin {margin:g}: give percent of the highest score, above 0, such as 1")
    if by is not None and split_by is not None:
        raise ConfigError(f"--by {by!r} and --split-by {split_by!r}: give one of them")
    alone = (Path(reference).expanduser() / PROTOCOL).is_file()
    if alone and not others:
        raise ConfigError(f"{reference!r}: is one run; name those to compare with it, or give the folder of a sweep")
    if alone and by == "kind":
        raise ConfigError("--by kind: compares over several tasks; give the folder of a sweep")
    if others or alone:
        first, rest = read(reference), [read(folder) for folder in others]
        found = {first.task["name"]: (first, rest)}
    else:
        found = {}
        for task, runs in read_sweep(reference).items():
            first = cell(runs, against)
            rest = [run for run in runs if run is not first]
            if rest:
                found[task] = (first, rest)
        if not found:
            raise ConfigError(f"{reference!r}: has nothing but {against!r}; evaluate a method, too")
    for first, rest in found.values():
        check_alike(first, rest, anyhow=anyhow)
    share = margin / 100
    whole = lines([(ALL, first, other) for first, rest in found.values() for other in rest], share)
    if by == "kind":
        return Compared(
            whole, kinds=across({task: [(first, other) for other in rest] for task, (first, rest) in found.items()})
        )
    parts: list[tuple[str, Answered, Answered]] = []
    for first, rest in found.values():
        if by is not None:
            parts += grouped(first, rest, by)
        elif split_by is not None and alone:
            judge = read(split_by)
            check_alike(first, [judge], anyhow=anyhow)
            parts += split(first, rest, judge)
        elif split_by is not None:
            parts += split_like([first, *rest], first, rest, split_by)
    if split_by is not None and not parts:
        raise ConfigError(
            f"--split-by {split_by!r}: no run has this name, nor this method at the budget of another run"
        )
    return Compared(whole, lines(parts, share))


def split_like(
    runs: Sequence[Answered], reference: Answered, others: Sequence[Answered], judge: str
) -> list[tuple[str, Answered, Answered]]:
    """:func:`split` by the run of this name, or every run by that of this method at its own budget, if there is one."""
    named = {run.name: run for run in runs}
    if judge in named:
        return split(reference, others, named[judge])
    return [
        part
        for other in others
        if other.keep is not None and f"{judge} {other.keep}" in named
        for part in split(reference, [other], named[f"{judge} {other.keep}"])
    ]


def score(folder: str, name: str | None, dialect: str | None) -> dict[str, Any]:
    """Marks of a run's answers in another metric or dialect; nothing is written, and no model is needed.

    Raises:
        ConfigError: if there is no such metric or dialect, or the task lacks what it needs.
    """
    run = read(folder)
    task = run.task
    name, dialect = name or task["metric"], dialect or task["dialect"]
    rows = []
    for row in run.rows:
        found = mark(name, dialect, row["answer"], row["id"], row["target"], row["groups"])
        rows.append(row | {"score": 0.0 if row["error"] else found.score, "parsed": found.parsed})
    return {"run": str(run.folder), "metric": name, "dialect": dialect, "headline": metric(name, dialect).headline} | {
        "scores": summary(name, dialect, rows)
    }
