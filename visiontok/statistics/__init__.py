"""Statistics of answers to the same questions: pure functions over arrays of scores, deterministic given a seed.

A *cluster* holds the questions that belong together (those about one image, the rotations of one circular question).
They are alike, so whole clusters are drawn and whole clusters change sides. Lengths of answers are scores, too: their
:func:`difference` and :func:`relative_score` say how much longer or shorter a method makes answers.
"""

from .clusters import (
    Difference,
    Estimate,
    Paired,
    accuracy,
    bootstrap,
    difference,
    standard_error,
)
from .compare import Comparison, compare, difficulty
from .pairs import (
    Flips,
    McNemar,
    NonInferiority,
    flips,
    half_width,
    mcnemar,
    minimum_detectable,
    noninferiority,
)
from .rankings import holm, kendall
from .shares import share_at_most
from .tallies import (
    Tallied,
    mean_of,
    relative_score,
    tallied_detectable,
    tallied_difference,
    tallied_noninferiority,
    tallied_score,
)

__all__ = [
    "Comparison",
    "Difference",
    "Estimate",
    "Flips",
    "McNemar",
    "NonInferiority",
    "Paired",
    "Tallied",
    "accuracy",
    "bootstrap",
    "compare",
    "difference",
    "difficulty",
    "flips",
    "half_width",
    "holm",
    "kendall",
    "mean_of",
    "mcnemar",
    "minimum_detectable",
    "noninferiority",
    "relative_score",
    "share_at_most",
    "standard_error",
    "tallied_detectable",
    "tallied_difference",
    "tallied_noninferiority",
    "tallied_score",
]
