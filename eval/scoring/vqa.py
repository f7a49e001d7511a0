"""Soft accuracy of VQA: how many annotators agree with the prediction, each left out in turn.

Antol et al., VQA, arXiv 1505.00468, section 4, as the official scorer averages it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visiontok.errors import ConfigError

from . import normalise
from .base import Mark, Metric, Target, average

Normaliser = Callable[[str], str]
LLAVA_ANSWERS = 10


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3): 0, .3, .6, .9 or 1 for ten annotators.

    An annotator is left out by position. Leaving out by equal value, as two peers do, loses all annotators at once
    where answers carry no ids. No answers at all score 0.
    """
    if not answers:
        return 0.0
    n, k = len(answers), sum(answer == prediction for answer in answers)
    # k annotators see k - 1 that agree, the others k; whole numbers make .3, .6 and .9 exact.
    return (k * min(3, k - 1) + (n - k) * min(3, k)) / (3 * n) if k else 0.0


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official VQAv2 scorer, which normalises only where annotators disagree: "Yes" against ten "yes" scores 0."""
    prediction, answers = normalise.one_line(prediction), [normalise.one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise.official(prediction), [normalise.official(answer) for answer in answers]
    return soft_accuracy(prediction, answers)


def llava_vqav2(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA normalises predictions as EvalAI does before it hands them to the official server."""
    return official_accuracy(normalise.evalai(prediction), answers)


def llava_textvqa(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's own TextVQA evaluator. Raises ConfigError unless there are ten answers, as it does."""
    if len(answers) != LLAVA_ANSWERS:
        raise ConfigError(
            f"answers: {len(answers)} of them, but the dialect 'llava' of textvqa is defined for {LLAVA_ANSWERS}; "
            "use dialect 'lmms-eval' for other numbers"
        )
    return normalised(normalise.evalai)(prediction, answers)


def normalised(normaliser: Normaliser) -> Callable[[str, Sequence[str]], float]:
    """Soft accuracy of prediction and answers after the same normaliser."""
    return lambda prediction, answers: soft_accuracy(normaliser(prediction), [normaliser(a) for a in answers])


def _metric(name: str, dialect: str, accuracy: Callable[[str, Sequence[str]], float], normaliser: Normaliser) -> Metric:
    def score(prediction: str, target: Target) -> Mark:
        return Mark(accuracy(prediction, target.answers), normaliser(prediction))

    return Metric(name, dialect, score, average, "accuracy")


lmms_vqav2 = normalised(normalise.evalai_untokenised)
lmms_textvqa = normalised(normalise.evalai)
vlmevalkit = normalised(normalise.vlmevalkit)

METRICS = (
    _metric("vqav2", "official", official_accuracy, normalise.official),
    _metric("vqav2", "llava", llava_vqav2, normalise.evalai),
    _metric("vqav2", "lmms-eval", lmms_vqav2, normalise.evalai_untokenised),
    _metric("textvqa", "llava", llava_textvqa, normalise.evalai),
    _metric("textvqa", "lmms-eval", lmms_textvqa, normalise.evalai),
    _metric("textvqa", "vlmevalkit", vlmevalkit, normalise.vlmevalkit),
    _metric("vizwiz", "lmms-eval", lmms_textvqa, normalise.evalai),
    _metric("vizwiz", "vlmevalkit", vlmevalkit, normalise.vlmevalkit),
)
