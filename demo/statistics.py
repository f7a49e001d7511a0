"""Accuracies and their differences when questions come in clusters, and how alike two rankings are.

Questions about one scene are alike, so whole scenes are drawn, and whole scenes change sides. All functions are pure:
their random numbers are the same in every call, from NumPy's frozen legacy generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXACT = 13  # up to so many scenes, all changes of sides are tried


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference; `p` is how often chance alone makes one at least as large, two-sided."""

    p: float


def accuracy(hits: np.ndarray, cluster: np.ndarray, draws: int = 2000) -> Estimate:
    """Share of right answers, with a bootstrap interval over clusters.

    Args:
        hits: bool (Q,) or (R, Q): Q questions, R runs that are averaged.
        cluster: (Q,), equal for questions that belong together.
        draws: bootstrap samples.

    Raises:
        ValueError: no questions, or `hits` and `cluster` do not fit together.
    """
    runs, cluster = _checked(hits, cluster)
    return _bootstrap(runs.sum(0), len(runs), cluster, draws)


def difference(hits: np.ndarray, reference: np.ndarray, cluster: np.ndarray, draws: int = 9999) -> Difference:
    """How much larger the accuracy of one is than that of another on the same questions.

    The interval is a bootstrap over clusters. The p-value is a sign-flip permutation test over clusters: were the two
    alike, either could have had each cluster's answers of the other. Few clusters are permuted in all ways.

    Args:
        hits: bool (Q,) or (R, Q): Q questions, R runs that are averaged.
        reference: bool (Q,) or (S, Q), what it is compared with.
        cluster: (Q,), equal for questions that belong together.
        draws: bootstrap samples and permutations.

    Raises:
        ValueError: no questions, or the arrays do not fit together.
    """
    ours, cluster = _checked(hits, cluster)
    theirs, _ = _checked(reference, cluster)
    # Integers, so that ties in the permutation test are ties: every question counts R · S times.
    gain = len(theirs) * ours.sum(0) - len(ours) * theirs.sum(0)
    estimate = _bootstrap(gain, len(ours) * len(theirs), cluster, draws)
    sums = np.bincount(cluster, gain)
    exact = len(sums) <= _EXACT
    as_large = abs(_signs(len(sums), None if exact else draws) @ sums) >= abs(sums.sum())
    p = as_large.mean() if exact else (1 + as_large.sum()) / (1 + draws)
    return Difference(estimate.value, estimate.low, estimate.high, float(p))


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings of the same things: 1 if they agree, -1 if one is the other backwards.

    Args:
        one: a score for each thing.
        other: the other scores, in the same order.

    Returns:
        The coefficient; NaN where one of the rankings has nothing but ties.

    Raises:
        ValueError: different lengths.

    Reference:
        Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.
    """
    a, b = np.asarray(one, float), np.asarray(other, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"one and other must be as many scores, got shapes {a.shape} and {b.shape}")
    above = np.triu_indices(len(a), 1)
    first, second = (np.sign(x[:, None] - x)[above] for x in (a, b))
    untied = int(np.count_nonzero(first)) * int(np.count_nonzero(second))
    return float((first * second).sum() / math.sqrt(untied)) if untied else math.nan


def _checked(hits: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs as int64 (R, Q), and clusters numbered from 0."""
    runs = np.atleast_2d(hits).astype(np.int64)
    if not runs.size or runs.shape[1] != len(cluster):
        raise ValueError(
            f"hits {np.shape(hits)} and cluster {np.shape(cluster)} must have the same number of questions"
        )
    return runs, np.unique(cluster, return_inverse=True)[1]


def _bootstrap(gain: np.ndarray, scale: int, cluster: np.ndarray, draws: int) -> Estimate:
    """Mean of `gain` / `scale` over questions, by clusters."""
    sums, sizes = np.bincount(cluster, gain), np.bincount(cluster)
    times = _times(len(sums), draws)
    means = np.sort((times @ sums) / (scale * (times @ sizes)))
    low, high = means[int(0.025 * draws)], means[math.ceil(0.975 * draws) - 1]
    return Estimate(float(gain.sum() / (scale * len(gain))), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _times(clusters: int, draws: int) -> np.ndarray:
    """(draws, clusters): how often each cluster is drawn; whole numbers, as floats because those multiply faster."""
    return np.random.RandomState(0).multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(float)


@functools.lru_cache(maxsize=8)
def _signs(clusters: int, draws: int | None) -> np.ndarray:
    """±1 (draws, clusters): which clusters change sides; without `draws`, all ways to do so."""
    if draws is None:
        bits: np.ndarray = np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1
    else:
        bits = np.random.RandomState(1).randint(0, 2, (draws, clusters))
    return 1.0 - 2 * bits
