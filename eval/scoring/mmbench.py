"""MMBench: a question counts if it is right with its options in every rotation. (Liu et al., arXiv 2307.06281)

The official evaluation, to which LLaVA submits, is a server. lmms-eval and VLMEvalKit read letters by rule and ask a
language model about the rest; here are lmms-eval's "static" and VLMEvalKit's "exact matching", which ask none.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from visiontok.errors import ConfigError

from . import letters
from .base import Mark, Metric, Summary, Tally, Target, grouped, mean_score, rows, unparsed
from .choice import scorer, vlmevalkit
from .tally import ratio

ROTATION = 10**6  # question 17 comes again as 1000017, 2000017, …


def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """``circular``: share of questions with all rotations right; ``vanilla``: with the first right, so never less.

    Raises:
        ConfigError: if the group ``index`` of a question is no number, or its first rotation is missing.
    """
    pairs = rows(marks, targets)
    questions = grouped(pairs, lambda target: str(_index(target) % ROTATION))
    firsts = []
    for question, part in questions.items():
        first = [pair for pair in part if _index(pair[1]) < ROTATION]
        if len(first) != 1:
            raise ConfigError(
                f"MMBench question {question} has {len(first)} entries below {ROTATION}, but must have one"
            )
        firsts += first
    circular = [float(all(mark.score == 1 for mark, _ in part)) for part in questions.values()]
    summary = {"circular": fmean(circular), "vanilla": mean_score(firsts), "unparsed": unparsed(pairs)}
    named = [(hit, pair) for hit, pair in zip(circular, firsts, strict=True) if "category" in pair[1].groups]
    for category in sorted({target.group("category") for _, (_, target) in named}):
        of_category = [(hit, pair) for hit, pair in named if pair[1].group("category") == category]
        summary[f"circular/{category}"] = fmean(hit for hit, _ in of_category)
        summary[f"vanilla/{category}"] = mean_score(pair for _, pair in of_category)
    return summary


def tally(marks: Sequence[Mark], targets: Sequence[Target]) -> Tally:
    """Circular accuracy; a question is counted with its first rotation."""
    question = [str(_index(target) % ROTATION) for target in targets]
    right: dict[str, bool] = {}
    for name, mark in zip(question, marks, strict=True):
        right[name] = right.get(name, True) and mark.score == 1
    firsts = [_index(target) < ROTATION for target in targets]
    counts = np.array([(first and right[name], first) for name, first in zip(question, firsts, strict=True)], float)
    return Tally(counts, lambda sums: ratio(sums[..., 0], sums[..., 1]), 1.0, question)


def _index(target: Target) -> int:
    index = target.group("index")
    if not index.isdecimal():
        raise ConfigError(
            f"question {target.id!r}: groups['index']={index!r} is no number; MMBench tells rotations by it"
        )
    return int(index)


METRICS = (
    Metric(
        "mmbench",
        "lmms-eval",
        scorer(lambda text, target: letters.mmbench_static(text, target.options)),
        aggregate,
        "circular",
        tally,
    ),
    Metric("mmbench", "vlmevalkit", scorer(vlmevalkit), aggregate, "circular", tally),
)
