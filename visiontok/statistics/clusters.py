"""Means, differences, ratios and any other aggregate, with intervals and p-values, when questions come in clusters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from visiontok.errors import ConfigError

Interval = Literal["percentile", "bca"]

EXACT = 13  # up to so many clusters, all changes of sides are tried
_BLOCK = 2**22  # entries of the random numbers that are in memory at a time
_KEPT = 2**24  # up to so many entries, they are kept for the next call, which mostly asks for the same
_NORMAL = NormalDist()


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


class Paired(NamedTuple):
    """Scores of a method and of its reference on the questions of one task, and the clusters of these.

    Scores are (Q,), or (R, Q) of R runs that are averaged; `cluster` is (Q,), equal for questions that belong together.
    """

    scores: np.ndarray
    reference: np.ndarray
    cluster: np.ndarray


def accuracy(
    scores: np.ndarray, cluster: np.ndarray, draws: int = 2000, interval: Interval = "percentile", seed: int = 0
) -> Estimate:
    """Mean score, with a bootstrap interval over clusters.

    Args:
        scores: (Q,) or (R, Q): Q questions, R runs that are averaged; booleans are scores 0 and 1.
        cluster: (Q,), equal for questions that belong together.
        draws: bootstrap samples.
        interval: "percentile", or "bca", which corrects it for bias and skewness.
        seed: of the bootstrap.

    Raises:
        ConfigError: no questions, a score that is not a number, or `scores` and `cluster` do not fit together.

    Reference:
        Efron, "Better bootstrap confidence intervals", JASA 82, 1987 (BCa).
    """
    runs, cluster = checked(scores, cluster)
    return _mean(runs.sum(0), len(runs), cluster, draws, interval, seed)


def difference(
    scores: np.ndarray,
    reference: np.ndarray,
    cluster: np.ndarray,
    draws: int = 9999,
    interval: Interval = "percentile",
    seed: int = 0,
) -> Difference:
    """How much larger the mean score of one is than that of another on the same questions.

    The interval is a bootstrap over clusters. The p-value is a sign-flip permutation test over clusters: were the two
    alike, either could have had each cluster's answers of the other. Few clusters are permuted in all ways.

    Args:
        scores: (Q,) or (R, Q): Q questions, R runs that are averaged; booleans are scores 0 and 1.
        reference: (Q,) or (S, Q), what it is compared with.
        cluster: (Q,), equal for questions that belong together.
        draws: bootstrap samples and permutations.
        interval: "percentile", or "bca", which corrects it for bias and skewness.
        seed: of the bootstrap and the permutations.

    Raises:
        ConfigError: no questions, a score that is not a number, or the arrays do not fit together.
    """
    ours, number = checked(scores, cluster)
    theirs, _ = checked(reference, cluster)
    # Every question counts R · S times: gains of right and wrong answers stay whole numbers.
    gain = len(theirs) * ours.sum(0) - len(ours) * theirs.sum(0)
    estimate = _mean(gain, len(ours) * len(theirs), number, draws, interval, seed)
    sums = np.bincount(number, gain)
    exact = len(sums) <= EXACT
    # Fractions are rounded: changes of sides that tie with what was seen must not fall short of it.
    enough = abs(sums.sum()) - 1e-11 * abs(sums).sum()
    sides = [all_signs(len(sums))] if exact else drawn(signs, len(sums), draws, seed + 1)
    as_large = np.concatenate([abs(block @ sums) >= enough for block in sides])
    p = as_large.mean() if exact else (1 + as_large.sum()) / (1 + draws)
    return Difference(estimate.value, estimate.low, estimate.high, float(p))


def bootstrap(
    aggregate: Callable[[np.ndarray], float],
    cluster: np.ndarray,
    draws: int = 2000,
    interval: Interval = "percentile",
    seed: int = 0,
) -> Estimate:
    """An aggregate that need not be a mean (F1, MME's acc+, a macro mean, a corpus score), recomputed for every sample.

    A sample says how often each question counts, the same for all of a cluster. So pairs and rotations stay whole, and
    two copies of a cluster stay two. For the difference of two methods, aggregate the one minus the other.

    Args:
        aggregate: from int64 (Q,), how often each question counts, to a number; with all ones, the aggregate itself.
            `np.repeat(np.arange(Q), times)` are the questions one by one.
        cluster: (Q,), equal for questions that belong together.
        draws: bootstrap samples.
        interval: "percentile", or "bca", which corrects it for bias and skewness.
        seed: of the bootstrap.

    Raises:
        ConfigError: no questions, or an aggregate that is not a number in some sample.
    """
    _, number = checked(np.ones(len(cluster)), cluster)

    def of(times: np.ndarray) -> float:
        found = float(aggregate(times[number].astype(np.int64)))
        if math.isnan(found):
            raise ConfigError("aggregate is not a number in some sample: give it a value where it is undefined")
        return found

    size = int(number.max()) + 1
    values = np.array([of(row) for times in drawn(resamples, size, draws, seed) for row in times])
    value = of(np.ones(size))
    return interval_of(value, values, lambda: np.array([of(row) for row in 1 - np.eye(size)]), interval)


def standard_error(scores: np.ndarray, cluster: np.ndarray) -> float:
    """Standard error of the mean score when questions of a cluster are alike; of a difference, give it the gains.

    Args:
        scores: (Q,).
        cluster: (Q,), equal for questions that belong together.

    Returns:
        The error; NaN for a single question. Where all clusters are single questions, it is the usual one. Few clusters
        make it too small.

    Raises:
        ConfigError: no questions, a score that is not a number, or `scores` and `cluster` do not fit together.

    Reference:
        Miller, "Adding Error Bars to Evals", 2024 (arXiv:2411.00640), equation 4.
    """
    runs, cluster = checked(scores, cluster)
    rest = runs.mean(0) - runs.mean()
    n = len(rest)
    if n == 1:
        return math.nan
    alone = rest @ rest
    together = (np.bincount(cluster, rest) ** 2).sum() - alone
    return math.sqrt(max(alone / (n * (n - 1)) + together / n**2, 0.0))


def checked(scores: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs as float64 (R, Q), and clusters numbered from 0."""
    runs = np.atleast_2d(scores).astype(float)
    if not runs.size or runs.ndim != 2 or (runs.shape[1],) != np.shape(cluster):
        raise ConfigError(
            f"scores {np.shape(scores)} and cluster {np.shape(cluster)} must have the same number of questions, "
            "one or more"
        )
    if not np.isfinite(runs).all():
        raise ConfigError("scores must be numbers: leave a question that has none out of both sides, or score it 0")
    return runs, np.unique(cluster, return_inverse=True)[1]


def _mean(gain: np.ndarray, scale: int, cluster: np.ndarray, draws: int, interval: Interval, seed: int) -> Estimate:
    """Mean of `gain` / `scale` over questions, by clusters."""
    sums, sizes = np.bincount(cluster, gain), np.bincount(cluster)
    blocks = drawn(resamples, len(sums), draws, seed)
    values = np.concatenate([(times @ sums) / (scale * (times @ sizes)) for times in blocks])
    return interval_of(
        float(gain.sum() / (scale * len(gain))),
        values,
        lambda: (gain.sum() - sums) / (scale * (len(gain) - sizes)),
        interval,
    )


def interval_of(value: float, values: np.ndarray, without: Callable[[], np.ndarray], interval: Interval) -> Estimate:
    """Args: the estimate, (draws,) its samples, and what it is without each cluster in turn."""
    if interval == "percentile":
        return Estimate(value, *quantiles(values, 0.025, 0.975))
    if interval != "bca":
        raise ConfigError(f'interval is {interval!r}: use "percentile" or "bca"')
    # Half of the samples that tie with the estimate, but for rounding, lie below it. A share of 0 or 1 has no normal
    # quantile.
    near = 1e-11 * abs(values).max()
    below = ((values < value - near).mean() + (values <= value + near).mean()) / 2
    bias = _NORMAL.inv_cdf(float(np.clip(below, 0.5 / len(values), 1 - 0.5 / len(values))))
    acceleration = 0.0
    if np.ptp(values) > 0:  # else there is one cluster, or all are equal
        left = without()
        push = left.mean() - left
        spread = (push**2).sum()
        acceleration = (push**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = [bias + _NORMAL.inv_cdf(level) for level in (0.025, 0.975)]
    low, high = (_NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in shifted)
    return Estimate(value, *quantiles(values, low, high))


def quantiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The samples at two levels, each the next one outwards."""
    ordered, last = np.sort(values), len(values) - 1
    at = min(int(low * len(values)), last), max(math.ceil(high * len(values)) - 1, 0)
    return float(ordered[at[0]]), float(ordered[at[1]])


Draw = Callable[[np.random.RandomState, int, int], np.ndarray]


def resamples(random: np.random.RandomState, clusters: int, draws: int) -> np.ndarray:
    """(draws, clusters): how often each cluster is drawn; whole numbers, as floats because those multiply faster."""
    return random.multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(float)


def signs(random: np.random.RandomState, clusters: int, draws: int) -> np.ndarray:
    """±1 (draws, clusters): which clusters change sides."""
    return 1.0 - 2 * random.randint(0, 2, (draws, clusters))


def all_signs(clusters: int) -> np.ndarray:
    """±1 (2^clusters, clusters): all ways to change sides."""
    return 1.0 - 2 * (np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1)


def drawn(draw: Draw, clusters: int, draws: int, seed: int) -> Iterable[np.ndarray]:
    """Random numbers (draws, clusters), some rows at a time: the same rows however they are cut."""
    if clusters * draws <= _KEPT:
        return _kept(draw, clusters, draws, seed)
    return _in_turn(draw, clusters, draws, seed)


def _in_turn(draw: Draw, clusters: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    # The frozen legacy generator: its numbers are the same in every release of NumPy.
    random = np.random.RandomState(seed)
    rows = max(1, _BLOCK // clusters)
    for start in range(0, draws, rows):
        yield draw(random, clusters, min(rows, draws - start))


@functools.lru_cache(maxsize=8)
def _kept(draw: Draw, clusters: int, draws: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_in_turn(draw, clusters, draws, seed))
