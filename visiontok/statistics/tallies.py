"""Scores that are no means of questions: F1, MME's acc + acc+, macro means, circular accuracy, and means over tasks.

All of these are functions of sums over questions (true positives; right answers of a category and its questions; …).
So a resample or a permutation is one product of matrices, and the score is computed anew for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from visiontok.errors import ConfigError

from .clusters import (
    EXACT,
    Difference,
    Estimate,
    Interval,
    Paired,
    all_signs,
    checked,
    drawn,
    interval_of,
    quantiles,
    resamples,
    signs,
)
from .pairs import NonInferiority, bounded, minimum_detectable

_NORMAL = NormalDist()


class Tallied(NamedTuple):
    """What each question of a task adds to sums under a method and under its reference, and the score of such sums.

    Attributes:
        counts: (Q, T), of the method.
        reference: (Q, T), of what it is compared with.
        cluster: (Q,), equal for questions that belong together; whatever is counted as one lies in one cluster.
        score: from sums (..., T) to scores (...); a number for any sums that some of the clusters have.
        top: highest score.
    """

    counts: np.ndarray
    reference: np.ndarray
    cluster: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    top: float = 1.0

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, T) of each cluster, of the method and of its reference.

        Raises:
            ConfigError: no questions, counts that are not numbers, or arrays that do not fit together.
        """
        if np.shape(self.counts) != np.shape(self.reference):
            raise ConfigError(
                f"counts {np.shape(self.counts)} and reference {np.shape(self.reference)} must be of the same questions"
            )
        both = []
        for counts in (self.counts, self.reference):
            columns, number = checked(np.asarray(counts).T, self.cluster)
            both.append(np.stack([np.bincount(number, column) for column in columns], 1))
        return both[0], both[1]


def tallied_score(
    tallied: Tallied, draws: int = 9999, interval: Interval = "percentile", seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Scores of the method and of its reference, with bootstrap intervals over clusters.

    Args:
        tallied: a task.
        draws: bootstrap samples.
        interval: "percentile" or "bca".
        seed: of the bootstrap.

    Raises:
        ConfigError: no questions, or arrays that do not fit together.
    """
    ours, theirs = (_estimate(sums, tallied.score, draws, interval, seed) for sums in tallied.sums())
    return ours, theirs


def tallied_difference(
    tasks: Sequence[Tallied], draws: int = 9999, interval: Interval = "percentile", seed: int = 0
) -> Difference:
    """How much higher a method scores than its reference: one task, or the mean over several.

    A sample draws clusters of every task, independently of the other tasks. The p-value is that of a permutation test:
    were the two alike, either could have had each cluster's answers of the other.

    Args:
        tasks: one or more; the scores of several are taken relative to the highest of each.
        draws: bootstrap samples and permutations.
        interval: "percentile"; "bca" for one task.
        seed: of both.

    Raises:
        ConfigError: no task, arrays that do not fit together, or "bca" of several tasks.
    """
    if not tasks or (interval == "bca" and len(tasks) > 1):
        raise ConfigError(f'{len(tasks)} tasks with interval={interval!r}: give one, or several with "percentile"')
    sizes = [len(np.unique(task.cluster)) for task in tasks]
    exact = sum(sizes) <= EXACT
    ways = np.split(all_signs(sum(sizes)), np.cumsum(sizes)[:-1], 1) if exact else []
    value, changed, parts = 0.0, np.zeros(2 ** sum(sizes) if exact else draws), []
    for index, task in enumerate(tasks):
        ours, theirs = task.sums()
        scale = len(tasks) * (task.top if len(tasks) > 1 else 1.0)
        both = np.concatenate([ours, theirs], 1)
        parts.append((both, _gain(task.score, scale)))
        value += float(parts[-1][1](both.sum(0)))
        sides = [ways[index]] if exact else drawn(signs, len(ours), draws, seed + 1 + index)
        middle, half = (ours + theirs).sum(0) / 2, (ours - theirs) / 2
        moved = [block @ half for block in sides]
        changed += np.concatenate([task.score(middle + by) - task.score(middle - by) for by in moved]) / scale
    enough = abs(value) - 1e-9 * max(1.0, abs(value))  # rounding must not break ties with what was seen
    as_large = abs(changed) >= enough
    p = as_large.mean() if exact else (1 + as_large.sum()) / (1 + draws)
    found = _estimate(*parts[0], draws, interval, seed) if len(tasks) == 1 else _over(parts, value, draws, seed)
    return Difference(found.value, found.low, found.high, float(p))


def relative_score(tasks: Sequence[Tallied | Paired], draws: int = 9999, seed: int = 0) -> Estimate:
    """Mean over tasks of score / reference score, with a bootstrap interval over the clusters of each task.

    Args:
        tasks: one or more; their questions are drawn independently of each other's.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ConfigError: no task, arrays that do not fit together, or a reference so rarely above 0 that the ratio does not
            exist in a sample.
    """
    if not tasks:
        raise ConfigError("tasks is empty: a relative score needs at least one")
    value, values = 0.0, np.zeros(draws)
    for index, given in enumerate(tasks):
        task = given if isinstance(given, Tallied) else mean_of(given)
        ours, theirs = task.sums()
        blocks = list(drawn(resamples, len(ours), draws, seed + index))
        over, under = (np.concatenate([task.score(times @ sums) for times in blocks]) for sums in (ours, theirs))
        base = float(task.score(theirs.sum(0)))
        if min(under.min(), base) <= 0:
            raise ConfigError(
                f"the reference of task {index} scores {base:g}, and 0 or less in some samples: nothing is relative to "
                "that; report the difference instead"
            )
        value += float(task.score(ours.sum(0))) / base / len(tasks)
        values += over / under / len(tasks)
    return Estimate(value, *quantiles(values, 0.025, 0.975))


def tallied_noninferiority(tallied: Tallied, margin: float = 0.01) -> NonInferiority:
    """:func:`noninferiority` of a score that is no mean: of its jackknife's pseudo-values, one for each cluster.

    Args:
        tallied: a task.
        margin: what does not matter, as a share of the highest score: 0.01 is one point of a hundred.

    Raises:
        ConfigError: a margin that is not above 0, or arrays that do not fit together.

    Reference:
        Tukey, "Bias and confidence in not-quite large samples", Annals of Mathematical Statistics 29, 1958.
    """
    pseudo = _pseudo_values(tallied)
    size = len(tallied.cluster) / len(pseudo)  # questions of a cluster
    return bounded(size * pseudo, np.full(len(pseudo), size), margin)


def tallied_detectable(tallied: Tallied) -> float:
    """The difference that is found with a power of 0.8, as a score, by the jackknife's standard error.

    At least what so many questions could find if nothing changed.
    """
    pseudo = _pseudo_values(tallied)
    error = float(pseudo.std(ddof=1)) / len(pseudo) ** 0.5 if len(pseudo) > 1 else 0.0
    found = (_NORMAL.inv_cdf(0.975) + _NORMAL.inv_cdf(0.8)) * error
    return tallied.top * max(found, minimum_detectable(len(tallied.cluster), 0.0))


def mean_of(paired: Paired) -> Tallied:
    """Mean scores as what they are, a sum over a number.

    Raises:
        ConfigError: no questions, a score that is not a number, or arrays that do not fit together.
    """
    ours, theirs = (checked(each, paired.cluster)[0].mean(0) for each in (paired.scores, paired.reference))
    counts, base = (np.stack([each, np.ones_like(each)], 1) for each in (ours, theirs))
    return Tallied(counts, base, paired.cluster, lambda sums: sums[..., 0] / sums[..., 1])


Score = Callable[[np.ndarray], np.ndarray]


def _gain(score: Score, scale: float) -> Score:
    """The difference of the scores of sums (..., 2T), those of the method before those of its reference."""

    def gain(both: np.ndarray) -> np.ndarray:
        ours, theirs = np.split(both, 2, -1)
        return (score(ours) - score(theirs)) / scale

    return gain


def _estimate(sums: np.ndarray, score: Score, draws: int, interval: Interval, seed: int) -> Estimate:
    whole = sums.sum(0)
    return interval_of(float(score(whole)), _samples(sums, score, draws, seed), lambda: score(whole - sums), interval)


def _samples(sums: np.ndarray, score: Score, draws: int, seed: int) -> np.ndarray:
    return np.concatenate([score(times @ sums) for times in drawn(resamples, len(sums), draws, seed)])


def _over(parts: Sequence[tuple[np.ndarray, Score]], value: float, draws: int, seed: int) -> Estimate:
    values = sum(_samples(sums, score, draws, seed + index) for index, (sums, score) in enumerate(parts))
    return Estimate(value, *quantiles(np.asarray(values), 0.025, 0.975))


def _pseudo_values(tallied: Tallied) -> np.ndarray:
    """(C,), of the difference, as shares of the highest score."""
    both = np.concatenate(tallied.sums(), 1)
    gain, whole = _gain(tallied.score, tallied.top), both.sum(0)
    if len(both) == 1:
        return np.array([float(gain(whole))])
    return len(both) * gain(whole) - (len(both) - 1) * gain(whole - both)
