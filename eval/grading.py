"""Rows of answers brought to the metrics: what a task's target is, and what its answers come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .scoring import Mark, Tally, Target, metric


def target(question: str, right: Mapping[str, Any], groups: Mapping[str, str]) -> Target:
    """A target as rows and items hold it, as metrics take it."""
    box, size = right.get("box"), right.get("size")
    return Target(
        answers=tuple(right.get("answers", ())),
        choices=tuple(right.get("choices", ())),
        box=None if box is None else tuple(box),
        size=None if size is None else tuple(size),
        id=question,
        groups=groups,
    )


def mark(
    name: str, dialect: str, answer: str, question: str, right: Mapping[str, Any], groups: Mapping[str, str]
) -> Mark:
    """What one answer is worth."""
    return metric(name, dialect).score(answer, target(question, right, groups))


def summary(name: str, dialect: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the answers of a task come to; one that could not be asked counts as wrong, with nothing read in it."""
    return metric(name, dialect).aggregate(*_marked(rows))


def tally(name: str, dialect: str, rows: Sequence[Mapping[str, Any]]) -> Tally | None:
    """The headline of a task as a function of sums; None where it is the mean score."""
    tallier = metric(name, dialect).tally
    return None if tallier is None else tallier(*_marked(rows))


def _marked(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mark], list[Target]]:
    marks = [Mark(row["score"], None if row["error"] else row["parsed"]) for row in rows]
    return marks, [target(row["id"], row["target"], row["groups"]) for row in rows]
