"""HallusionBench: questions about figures and about edited figures. (Guan et al., arXiv 2310.14566)

The official script and lmms-eval let a language model judge the replies; only VLMEvalKit reads yes or no by rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from . import yes_no
from .base import Mark, Metric, Summary, Target, grouped, mean_score, rows, unparsed


def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """aAcc: share of right replies; fAcc: of figures with all questions right; qAcc: of questions right on all figures.

    A figure is (category, subcategory, set, figure), a question (category, subcategory, set, question), as in the
    official script.
    """
    pairs = rows(marks, targets)

    def all_right(last: str) -> float:
        keys = ("category", "subcategory", "set", last)
        parts = grouped(pairs, lambda target: "\0".join(target.group(key) for key in keys))
        return fmean(all(mark.score == 1 for mark, _ in part) for part in parts.values())

    return {
        "aAcc": mean_score(pairs),
        "fAcc": all_right("figure"),
        "qAcc": all_right("question"),
        "unparsed": unparsed(pairs),
    }


METRICS = (Metric("hallusionbench", "vlmevalkit", yes_no.scorer(yes_no.one_of_two), aggregate, "aAcc"),)
