"""Multiple choice with one question at a time: read the letter, compare it. A target's answer is the right letter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import guess, letters, tally
from .base import (
    Aggregator,
    Mark,
    Metric,
    Scorer,
    Summary,
    Tallier,
    Target,
    average,
    equal,
    macro_average,
    mean_score,
    rows,
)
from .exact import lmms_form

FOUR = ("A", "B", "C", "D")
Reader = Callable[[str, Target], str | None]


def scorer(read: Reader) -> Scorer:
    def score(prediction: str, target: Target) -> Mark:
        return equal(read(prediction, target), target.answer)

    return score


def vlmevalkit(prediction: str, target: Target) -> str | None:
    """What it cannot read goes to a language model there; with "exact matching", and here, it is wrong."""
    found = letters.vlmevalkit(prediction, target.options)
    return None if found == letters.REFUSED else found


def ai2d(prediction: str, target: Target) -> Mark:
    """lmms-eval: exact match of what was read, whole replies included, without case and punctuation."""
    return equal(lmms_form(letters.ai2d(prediction)), lmms_form(target.answer))


def realworldqa(prediction: str, target: Target) -> Mark:
    """lmms-eval: the letter, if the answer is one; else equality but for case and final periods."""
    answer = target.answer.strip()
    if answer.upper() in FOUR:
        return equal(letters.lmms_shared(prediction, FOUR), answer.upper())
    return equal(prediction.lower().strip().rstrip("."), answer.lower())


def longvideobench(prediction: str, target: Target) -> Mark:
    return guess.mark(letters.first_of_five(prediction), target)


def mvbench_average(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """lmms-eval leaves empty replies out of the mean, so a model that falls silent looks better.

    ``accuracy`` counts them as wrong; ``lmms_accuracy`` is the peer's.
    """
    read = [(mark, target) for mark, target in rows(marks, targets) if mark.parsed is not None]
    return average(marks, targets) | {"lmms_accuracy": mean_score(read) if read else 0.0}


def _metric(
    name: str,
    dialect: str,
    read: Reader,
    aggregate: Aggregator = average,
    headline: str = "accuracy",
    tallier: Tallier | None = None,
) -> Metric:
    return Metric(name, dialect, scorer(read), aggregate, headline, tallier)


METRICS = (
    _metric("scienceqa", "llava", lambda text, target: letters.llava_scienceqa(text, len(target.choices))),
    _metric("scienceqa", "lmms-eval", lambda text, _: letters.lmms_scienceqa(text)),
    _metric("scienceqa", "vlmevalkit", vlmevalkit),
    _metric("seed", "lmms-eval", lambda text, _: letters.first_character(text)),
    _metric("seed", "vlmevalkit", vlmevalkit),
    Metric("ai2d", "lmms-eval", ai2d, average, "accuracy"),
    _metric("ai2d", "vlmevalkit", vlmevalkit),
    _metric(
        "mmstar",
        "lmms-eval",
        lambda text, _: letters.lmms_shared(text, FOUR),
        macro_average,
        "macro_accuracy",
        tally.macro,
    ),
    _metric("mmstar", "vlmevalkit", vlmevalkit),
    Metric("realworldqa", "lmms-eval", realworldqa, average, "accuracy"),
    _metric("realworldqa", "vlmevalkit", vlmevalkit),
    Metric("longvideobench", "lmms-eval", longvideobench, guess.aggregate, "accuracy"),
    _metric(
        "mvbench",
        "lmms-eval",
        lambda text, _: letters.mvbench(text),
        mvbench_average,
        "lmms_accuracy",
        tally.mean_of_read,
    ),
)
