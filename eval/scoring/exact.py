"""Exact match of short answers (GQA). The dialects forgive different things; none of them drops articles."""

from __future__ import annotations

import string
from collections.abc import Callable

from .base import Mark, Metric, Target, average, equal

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def lmms_form(text: str) -> str:
    """Lower case without ASCII punctuation; spaces stay ("t-shirt" is "tshirt", not "t shirt")."""
    return text.lower().translate(_NO_PUNCTUATION)


def _metric(dialect: str, of_prediction: Callable[[str], str], of_answer: Callable[[str], str]) -> Metric:
    def score(prediction: str, target: Target) -> Mark:
        return equal(of_prediction(prediction), of_answer(target.answer))

    return Metric("gqa", dialect, score, average, "accuracy")


def _as_is(text: str) -> str:
    return text


METRICS = (
    _metric("official", _as_is, _as_is),
    _metric("llava", lambda text: text.rstrip(".").lower(), _as_is),
    _metric("lmms-eval", lmms_form, lmms_form),
    _metric("vlmevalkit", lambda text: text.strip().lower(), lambda text: text.strip().lower()),
)
