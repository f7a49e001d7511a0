"""OCRBench: does the reply contain the text? (Liu et al., arXiv 2305.07895)

The summary is in 0 … 1; papers quote it out of 1000 questions. Tasks name the source of a question as group
``dataset`` and its kind as group ``category``.
"""

from __future__ import annotations

from .base import Mark, Metric, Target, average

FORMULAS = "HME100k"  # handwritten formulas: spaces mean nothing, case does
_ASCII = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}  # of full-width forms


def contains(prediction: str, target: Target) -> bool:
    """Whether any answer occurs in the prediction. An empty answer always does."""

    def form(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    formula = target.group("dataset") == FORMULAS
    return any(form(answer) in form(prediction) for answer in target.answers)


def lmms(prediction: str, target: Target) -> Mark:
    """Full-width forms of ASCII characters count as those, except in formulas."""
    if target.group("dataset") == FORMULAS:
        return vlmevalkit(prediction, target)
    narrow = Target(answers=tuple(answer.translate(_ASCII) for answer in target.answers), groups=target.groups)
    return Mark(float(contains(prediction.translate(_ASCII), narrow)), prediction)


def vlmevalkit(prediction: str, target: Target) -> Mark:
    return Mark(float(contains(prediction, target)), prediction)


METRICS = (
    Metric("ocrbench", "lmms-eval", lmms, average, "accuracy"),
    Metric("ocrbench", "vlmevalkit", vlmevalkit, average, "accuracy"),
)
