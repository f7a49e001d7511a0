"""All that is said of a method and its baseline on one task, as a whole and by groups of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visiontok.errors import ConfigError

from .clusters import Difference, Estimate, Paired, accuracy, checked, difference, standard_error
from .pairs import McNemar, NonInferiority, mcnemar, minimum_detectable, noninferiority


@dataclass(frozen=True)
class Comparison:
    """A method and its baseline on the same questions.

    Attributes:
        questions: how many.
        clusters: how many clusters they come in. A dozen or fewer tell little, whatever the intervals say.
        score: mean score of the method.
        reference: that of the baseline.
        difference: how much larger that of the method is, and the p-value of a permutation test.
        mcnemar: where all scores are 0 or 1; it knows nothing of clusters.
        noninferiority: whether the method is at most a margin worse.
        detectable: the difference that so many questions find with a power of 0.8, at the discordance seen here.
    """

    questions: int
    clusters: int
    score: Estimate
    reference: Estimate
    difference: Difference
    mcnemar: McNemar | None
    noninferiority: NonInferiority
    detectable: float


def compare(paired: Paired, margin: float = 0.01, draws: int = 9999, seed: int = 0) -> Comparison:
    """Compare a method with its baseline.

    Args:
        paired: scores (Q,) from 0 to 1.
        margin: what does not matter, as a score: 0.01 is one point.
        draws: bootstrap samples and permutations.
        seed: of both.

    Raises:
        ConfigError: no questions, arrays that do not fit together, or scores outside 0 to 1.
    """
    ours, theirs = (np.asarray(each, float) for each in (paired.scores, paired.reference))
    cluster = np.asarray(paired.cluster)
    if ours.ndim != 1 or theirs.ndim != 1:
        raise ConfigError(f"scores {ours.shape} and reference {theirs.shape} must be of one run each: average the runs")
    noninferior = noninferiority(ours, theirs, cluster, margin)  # checks the arrays
    gain = ours - theirs
    binary = bool(np.isin((ours, theirs), (0, 1)).all())
    # Alike questions count less: as many independent ones would have the same standard error.
    alone, together = standard_error(gain, np.arange(len(gain))), standard_error(gain, cluster)
    effective = len(gain) / max((together / alone) ** 2, 1.0) if alone > 0 else len(gain)
    return Comparison(
        questions=len(gain),
        clusters=len(np.unique(cluster)),
        score=accuracy(ours, cluster, draws, "bca", seed),
        reference=accuracy(theirs, cluster, draws, "bca", seed),
        difference=difference(ours, theirs, cluster, draws, "bca", seed),
        mcnemar=mcnemar(ours, theirs) if binary else None,
        noninferiority=noninferior,
        detectable=minimum_detectable(effective, float((gain**2).mean())),
    )


def compare_groups(
    paired: Paired, group: Sequence[str], margin: float = 0.01, draws: int = 9999, seed: int = 0
) -> dict[str, Comparison]:
    """:func:`compare` within each group of questions, such as their types or their :func:`difficulty`.

    Args:
        paired: scores (Q,) from 0 to 1.
        group: Q names.
        margin: what does not matter, as a score: 0.01 is one point.
        draws: bootstrap samples and permutations.
        seed: of both.

    Returns:
        By name, in alphabetical order. Their p-values are as many tests: adjust them by :func:`holm`.

    Raises:
        ConfigError: `group` has another length, or as :func:`compare`.
    """
    names = np.asarray(group, dtype=str)
    if names.shape != np.shape(paired.cluster):
        raise ConfigError(f"group {names.shape} and cluster {np.shape(paired.cluster)} must be of the same questions")
    arrays = [np.asarray(each) for each in paired]
    return {
        str(name): compare(Paired(*(each[names == name] for each in arrays)), margin, draws, seed)
        for name in np.unique(names)
    }


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
