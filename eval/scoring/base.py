"""What every metric works with: targets of questions go in, marks of predictions come out, and a summary of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from visiontok.errors import ConfigError

DIALECTS = ("official", "llava", "lmms-eval", "vlmevalkit")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is right for one question, and where the question belongs.

    Attributes:
        answers: accepted answers; those of all annotators for soft accuracies, the letter for multiple choice.
        choices: texts of the options, of A first; empty for open questions.
        box: x1, y1, x2, y2 of the object, in pixels of the original image.
        size: width and height of the original image, in pixels.
        seen: width and height of the image the model was given, where they differ from ``size``.
        id: of the question; where a dialect guesses, it seeds the guess.
        groups: what summaries group by, for example ``{"category": "OCR", "image": "0042.jpg"}``.
    """

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    box: Box | None = None
    size: tuple[int, int] | None = None
    seen: tuple[int, int] | None = None
    id: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The only accepted answer."""
        if len(self.answers) != 1:
            raise ConfigError(f"question {self.id!r}: answers={self.answers!r}; this metric takes exactly one answer")
        return self.answers[0]

    def group(self, key: str) -> str:
        if key not in self.groups:
            raise ConfigError(
                f"question {self.id!r}: groups={dict(self.groups)!r} lacks {key!r}, which this metric groups by; "
                "let the task fill it from the data set"
            )
        return self.groups[key]

    @property
    def options(self) -> dict[str, str]:
        """Letter → text."""
        return dict(zip(map(letter, range(len(self.choices))), self.choices, strict=True))


@dataclass(frozen=True)
class Mark:
    """What one prediction earned, in 0 … 1, and what was read out of it (None: nothing that the metric understands)."""

    score: float
    parsed: str | None


Scorer = Callable[[str, Target], Mark]
Summary = dict[str, float]
Aggregator = Callable[[Sequence[Mark], Sequence[Target]], Summary]


@dataclass(frozen=True)
class Tally:
    """A headline as a function of sums over questions.

    Attributes:
        counts: (Q, T), what each question adds; the columns depend on the targets alone, so that those of two methods
            fit together.
        score: from sums (..., T) to the headline (...); parts without questions are left out of means.
        top: highest headline.
        unit: (Q,), equal for questions that are right or wrong as one.
    """

    counts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    top: float
    unit: Sequence[str]


Tallier = Callable[[Sequence[Mark], Sequence[Target]], Tally]


@dataclass(frozen=True)
class Metric:
    """One metric in one dialect.

    Attributes:
        score: marks one prediction.
        aggregate: sums up the marks of a whole task, in whatever order they come; its keys are ``name`` for all
            questions and ``name/group`` for parts.
        headline: the key of the summary that papers quote.
        tally: the headline as a function of sums; None where it is the mean of the marks.
        points: what tables multiply the headline by.
    """

    name: str
    dialect: str
    score: Scorer
    aggregate: Aggregator
    headline: str
    tally: Tallier | None = None
    points: float = 100.0


def letter(index: int) -> str:
    """0 → A, 1 → B, …"""
    return chr(ord("A") + index)


def equal(prediction: str | None, answer: str) -> Mark:
    return Mark(float(prediction == answer), prediction)


def rows(marks: Sequence[Mark], targets: Sequence[Target]) -> list[tuple[Mark, Target]]:
    if len(marks) != len(targets) or not marks:
        raise ConfigError(
            f"{len(marks)} marks for {len(targets)} targets: there must be one for each, and at least one"
        )
    return list(zip(marks, targets, strict=True))


def grouped(pairs: Iterable[tuple[Mark, Target]], key: Callable[[Target], str]) -> dict[str, list[tuple[Mark, Target]]]:
    found: dict[str, list[tuple[Mark, Target]]] = {}
    for mark, target in pairs:
        found.setdefault(key(target), []).append((mark, target))
    return dict(sorted(found.items()))


def mean_score(pairs: Iterable[tuple[Mark, Target]]) -> float:
    return fmean(mark.score for mark, _ in pairs)  # fmean sums exactly, so the order of questions never shows


def unparsed(pairs: Sequence[tuple[Mark, Target]]) -> float:
    """Share of predictions in which the metric found nothing."""
    return fmean(mark.parsed is None for mark, _ in pairs)


def average(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """Mean over all questions, and over those of each ``category`` where the task names one."""
    pairs = rows(marks, targets)
    summary = {"accuracy": mean_score(pairs), "unparsed": unparsed(pairs)}
    named = [pair for pair in pairs if "category" in pair[1].groups]
    for category, part in grouped(named, lambda target: target.group("category")).items():
        summary[f"accuracy/{category}"] = mean_score(part)
    return summary


def macro_average(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """Mean of the means of the categories, beside the mean over all questions."""
    parts = grouped(rows(marks, targets), lambda target: target.group("category"))
    return average(marks, targets) | {"macro_accuracy": fmean(mean_score(part) for part in parts.values())}
