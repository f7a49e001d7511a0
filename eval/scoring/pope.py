"""POPE: is the object in the image? (Li et al., arXiv 2305.10355)"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from . import yes_no
from .base import Aggregator, Mark, Metric, Summary, Tallier, Tally, Target, mean_score, rows, unparsed
from .tally import apart, by_part, mean_of_parts, parts_of, ratio

Pairs = Sequence[tuple[Mark, Target]]


def confusion(pairs: Pairs, *, unread_is_no: bool) -> tuple[int, int, int, int]:
    """True positives, false positives, true negatives, false negatives.

    A reply that is neither yes nor no is a negative, or, with ``unread_is_no`` off, in none of the four.
    """
    counts = {(said, right): 0 for said in (True, False) for right in (True, False)}
    for mark, target in pairs:
        if mark.parsed is not None or unread_is_no:
            counts[mark.parsed == "yes", yes_no.expected(target) == "yes"] += 1
    return counts[True, True], counts[True, False], counts[False, False], counts[False, True]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _numbers(pairs: Pairs, *, unread_is_no: bool) -> Summary:
    tp, fp, _, fn = confusion(pairs, unread_is_no=unread_is_no)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "accuracy": mean_score(pairs),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": fmean(mark.parsed == "yes" for mark, _ in pairs),
        "unparsed": unparsed(pairs),
    }


def _aggregator(*, unread_is_no: bool) -> Aggregator:
    def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
        """All questions, each category, and the mean of the categories; ``yes_ratio`` is that of the predictions."""
        pairs = [
            (mark, category, target)
            for mark, target in rows(marks, targets)
            for category in target.groups.get("category", "all").split(",")  # a question may be in several
        ]
        summary = _numbers([(mark, target) for mark, _, target in pairs], unread_is_no=unread_is_no)
        parts = {
            name: _numbers([(m, t) for m, category, t in pairs if category == name], unread_is_no=unread_is_no)
            for name in sorted({category for _, category, _ in pairs})
        }
        for key in tuple(summary):
            summary |= {f"{key}/{name}": part[key] for name, part in parts.items()}
            summary[f"{key}/mean"] = fmean(part[key] for part in parts.values())
        return summary

    return aggregate


def _tallier(*, unread_is_no: bool, macro: bool) -> Tallier:
    """F1 of all questions or, with ``macro``, the mean over categories."""

    def tally(marks: Sequence[Mark], targets: Sequence[Target]) -> Tally:
        entries = []
        for mark, target in rows(marks, targets):
            tp, fp, _, fn = confusion([(mark, target)], unread_is_no=unread_is_no)
            entries.append([(name, (tp, fp, fn)) for name in target.groups.get("category", "all").split(",")])

        def score(sums: np.ndarray) -> np.ndarray:
            questions, tp, fp, fn = parts_of(sums, 4)
            if macro:
                return mean_of_parts(ratio(2 * tp, 2 * tp + fp + fn), questions)
            tp, fp, fn = tp.sum(-1), fp.sum(-1), fn.sum(-1)
            return ratio(2 * tp, 2 * tp + fp + fn)

        return Tally(by_part(entries, 3), score, 1.0, apart(marks))

    return tally


def _with_expected_ratio(aggregate: Aggregator) -> Aggregator:
    def lmms(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
        """As lmms-eval, whose own yes ratio is that of the right answers, whatever the model says."""
        summary = aggregate(marks, targets)
        return summary | {"lmms_yes_ratio": fmean(yes_no.expected(target) == "yes" for target in targets)}

    return lmms


METRICS = (
    Metric(
        "pope",
        "llava",
        yes_no.scorer(yes_no.first_sentence),
        _aggregator(unread_is_no=True),
        "f1/mean",
        _tallier(unread_is_no=True, macro=True),
    ),
    Metric(
        "pope",
        "lmms-eval",
        yes_no.scorer(yes_no.exact),
        _with_expected_ratio(_aggregator(unread_is_no=False)),
        "f1",
        _tallier(unread_is_no=False, macro=False),
    ),
    Metric(
        "pope",
        "vlmevalkit",
        yes_no.scorer(yes_no.one_of_two),
        _aggregator(unread_is_no=True),
        "f1",
        _tallier(unread_is_no=True, macro=False),
    ),
)
