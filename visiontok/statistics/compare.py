"""All that is said of a method and its baseline on one task, or on a part of its questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from visiontok.errors import ConfigError

from .clusters import Difference, Estimate, Paired, accuracy, checked, difference, standard_error
from .pairs import McNemar, NonInferiority, mcnemar, minimum_detectable, noninferiority
from .tallies import (
    Tallied,
    relative_score,
    tallied_detectable,
    tallied_difference,
    tallied_noninferiority,
    tallied_score,
)


@dataclass(frozen=True)
class Comparison:
    """A method and its baseline on the same questions.

    Attributes:
        questions: how many.
        clusters: how many clusters they come in. A dozen or fewer tell little, whatever the intervals say.
        score: that of the method.
        reference: that of the baseline.
        difference: how much larger that of the method is, and the p-value of a permutation test.
        relative: the share of the baseline's score that the method has; None where that is 0 in some sample.
        mcnemar: of the questions, where all their scores are 0 or 1; it knows nothing of clusters.
        noninferiority: whether the method is at most a margin worse.
        detectable: the difference that so many questions find with a power of 0.8, at the discordance seen here.
    """

    questions: int
    clusters: int
    score: Estimate
    reference: Estimate
    difference: Difference
    relative: Estimate | None
    mcnemar: McNemar | None
    noninferiority: NonInferiority
    detectable: float


def compare(
    paired: Paired, margin: float = 0.01, draws: int = 9999, seed: int = 0, tallied: Tallied | None = None
) -> Comparison:
    """Compare a method with its baseline.

    Args:
        paired: scores (Q,) from 0 to 1.
        margin: what does not matter, as a share of the highest score: 0.01 is one point of a hundred.
        draws: bootstrap samples and permutations.
        seed: of both.
        tallied: the score that counts, of the same questions, where it is not their mean score.

    Raises:
        ConfigError: no questions, arrays that do not fit together, or scores outside 0 to 1.
    """
    ours, theirs = (np.asarray(each, float) for each in (paired.scores, paired.reference))
    cluster = np.asarray(paired.cluster)
    if ours.ndim != 1 or theirs.ndim != 1:
        raise ConfigError(f"scores {ours.shape} and reference {theirs.shape} must be of one run each: average the runs")
    noninferior = noninferiority(ours, theirs, cluster, margin)  # checks the arrays
    binary = bool(np.isin((ours, theirs), (0, 1)).all())
    common: dict[str, Any] = {
        "questions": len(ours),
        "clusters": len(np.unique(cluster)),
        "mcnemar": mcnemar(ours, theirs) if binary else None,
        "relative": _relative(tallied or paired, draws, seed),
    }
    if tallied is not None:
        score, reference = tallied_score(tallied, draws, "bca", seed)
        return Comparison(
            **common,
            score=score,
            reference=reference,
            difference=tallied_difference([tallied], draws, "bca", seed),
            noninferiority=tallied_noninferiority(tallied, margin),
            detectable=tallied_detectable(tallied),
        )
    gain = ours - theirs
    # Alike questions count less: as many independent ones would have the same standard error.
    alone, together = standard_error(gain, np.arange(len(gain))), standard_error(gain, cluster)
    effective = len(gain) / max((together / alone) ** 2, 1.0) if alone > 0 else len(gain)
    return Comparison(
        **common,
        score=accuracy(ours, cluster, draws, "bca", seed),
        reference=accuracy(theirs, cluster, draws, "bca", seed),
        difference=difference(ours, theirs, cluster, draws, "bca", seed),
        noninferiority=noninferior,
        detectable=minimum_detectable(effective, float((gain**2).mean())),
    )


def _relative(scores: Tallied | Paired, draws: int, seed: int) -> Estimate | None:
    try:
        return relative_score([scores], draws, seed)
    except ConfigError:  # of arrays that are checked by now, it refuses only a baseline of 0
        return None


def difficulty(resized: np.ndarray) -> np.ndarray:
    """Which questions need the tokens at all: those that `resize` gets right at the same budget are "easy".

    The split looks at the answers of `resize`, so it says nothing about `resize` itself.

    Args:
        resized: (Q,), scores of `resize` from 0 to 1; half a point is right.

    Returns:
        (Q,), "easy" or "difficult".

    Reference:
        Liao et al., "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods",
        2025 (arXiv:2510.07143).
    """
    runs, _ = checked(resized, np.arange(np.shape(resized)[-1]))
    return np.where(runs.mean(0) >= 0.5, "easy", "difficult")
