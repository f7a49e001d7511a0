"""Relaxed accuracy of ChartQA: numbers within 5 %, other answers literally. (Masry et al., arXiv 2203.10244, § 5.1)"""

from __future__ import annotations

from .base import Mark, Metric, Target, average

TOLERANCE = 0.05


def relaxed(prediction: str, answer: str) -> bool:
    """Whether the prediction is within 5 % of the answer, or else equal to it in lower case.

    "10%" is 0.1. An answer of zero is compared as a string, so "0.0" is not "0"; neither are thousands separators and
    currency signs understood. All dialects share this.
    """
    said, right = _number(prediction), _number(answer)
    if said is None or not right:
        return prediction.lower() == answer.lower()
    return abs(said - right) / abs(right) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def lmms(prediction: str, target: Target) -> Mark:
    return Mark(float(relaxed(prediction, target.answer)), prediction)


def vlmevalkit(prediction: str, target: Target) -> Mark:
    """The best of several answers; the prediction is stripped first."""
    prediction = prediction.strip()
    return Mark(float(any(relaxed(prediction, answer) for answer in target.answers)), prediction)


METRICS = (
    Metric("chartqa", "lmms-eval", lmms, average, "accuracy"),
    Metric("chartqa", "vlmevalkit", vlmevalkit, average, "accuracy"),
)
