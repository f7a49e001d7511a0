"""ANLS of DocVQA, InfoVQA and ST-VQA: average normalised Levenshtein similarity. (Biten et al., arXiv 1905.13648)"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .base import Mark, Metric, Target, average

THRESHOLD = 0.5  # similarities below it count nothing; one half itself counts


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance. Answers are short, so these lines do, and the ``eval`` extra needs no library for them."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row_above, row = row, [i]
        for j, (y, (diagonal, above)) in enumerate(zip(b, pairwise(row_above), strict=True), 1):
            row.append(min(row[j - 1] + 1, above + 1, diagonal + (x != y)))
    return row[-1]


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def lmms_similarity(prediction: str, answer: str) -> float:
    """Distance after collapsing spaces, over the length from before: inner and outer spaces raise the score.

    The length is also that of the upper-case string, of which ß has two characters.
    """
    return _similarity(_collapsed(prediction), _collapsed(answer), max(len(prediction.upper()), len(answer.upper())))


def vlmevalkit_similarity(prediction: str, answer: str) -> float:
    """Distance and length of the strings with collapsed spaces."""
    prediction, answer = _collapsed(prediction), _collapsed(answer)
    return _similarity(prediction, answer, max(len(prediction), len(answer)))


def llava_similarity(prediction: str, answer: str) -> float:
    """Distance and length of the stripped strings, inner spaces as they are (LLaVA's ST-VQA evaluator)."""
    prediction, answer = prediction.lower().strip(), answer.lower().strip()
    return _similarity(prediction, answer, max(len(prediction), len(answer)))


def _similarity(prediction: str, answer: str, length: int) -> float:
    return 1 - edit_distance(prediction, answer) / length if length else 1.0


def _metric(dialect: str, similarity: Callable[[str, str], float]) -> Metric:
    def score(prediction: str, target: Target) -> Mark:
        best = max((similarity(prediction, answer) for answer in target.answers), default=0.0)
        return Mark(best if best >= THRESHOLD else 0.0, prediction)

    return Metric("anls", dialect, score, average, "accuracy")


METRICS = (
    _metric("llava", llava_similarity),
    _metric("lmms-eval", lmms_similarity),
    _metric("vlmevalkit", vlmevalkit_similarity),
)
