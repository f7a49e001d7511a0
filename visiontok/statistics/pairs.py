"""A method and its baseline, question by question: what changed, whether it is no worse, and what could be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from visiontok.errors import ConfigError

from .clusters import Estimate, accuracy, checked

_NORMAL = NormalDist()


@dataclass(frozen=True)
class McNemar:
    """Questions that only the method (`gained`) and only the baseline (`lost`) gets right, and two-sided p-values.

    `p` is exact and errs on the safe side; `mid_p` counts what was seen by half, which makes it right on average.
    """

    gained: int
    lost: int
    p: float
    mid_p: float


def mcnemar(hits: np.ndarray, reference: np.ndarray) -> McNemar:
    """McNemar's exact test of right and wrong answers to the same questions, which must not come in clusters.

    Args:
        hits: (Q,), 0 or 1.
        reference: (Q,), those of the baseline.

    Returns:
        Both p-values are 1 where nothing changed.

    Raises:
        ConfigError: a score other than 0 and 1, or different lengths.

    Reference:
        Fagerland, Lydersen & Laake, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
        than exact conditional", BMC Medical Research Methodology 13, 2013.
    """
    ours, theirs = np.asarray(hits), np.asarray(reference)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ConfigError(f"hits {ours.shape} and reference {theirs.shape} must be scores of the same questions")
    if not (np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all()):
        raise ConfigError("hits and reference must be 0 or 1: compare fractions of a point by `difference`")
    gained, lost = (int(np.count_nonzero(one > other)) for one, other in ((ours, theirs), (theirs, ours)))
    # Of n changes each is a gain as likely as a loss. Whole numbers, so that no tail is lost: ways to have k gains.
    n, fewer = gained + lost, min(gained, lost)
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    p, as_seen = min(2 * tail / 2**n, 1.0), ways / 2**n
    # What is as extreme as what was seen is one case where gains and losses are equal, and two elsewhere.
    mid_p = p - (as_seen / 2 if gained == lost else as_seen) if n else 1.0
    return McNemar(gained, lost, p, mid_p)


@dataclass(frozen=True)
class Flips:
    """Questions whose score rose (`gained`) and fell (`lost`), and the share of answers that stayed the same."""

    gained: int
    lost: int
    agreement: Estimate


def flips(
    scores: np.ndarray,
    reference: np.ndarray,
    answers: Sequence[str],
    reference_answers: Sequence[str],
    cluster: np.ndarray,
    seed: int = 0,
) -> Flips:
    """What a method changed, also where the mean score stays: wrong answers may become other wrong ones.

    Args:
        scores: (Q,).
        reference: (Q,), those of the baseline.
        answers: Q, as the scorer normalises them.
        reference_answers: Q.
        cluster: (Q,), equal for questions that belong together.
        seed: of the bootstrap.

    Raises:
        ConfigError: no questions, or different lengths.
    """
    ours, _ = checked(scores, cluster)
    theirs, _ = checked(reference, cluster)
    if not len(answers) == len(reference_answers) == len(cluster):
        raise ConfigError(
            f"answers ({len(answers)}), reference_answers ({len(reference_answers)}) and cluster ({len(cluster)}) must "
            "be of the same questions"
        )
    same = np.array([one == other for one, other in zip(answers, reference_answers, strict=True)])
    gain = (ours - theirs)[0]
    return Flips(int((gain > 0).sum()), int((gain < 0).sum()), accuracy(same, cluster, seed=seed))


@dataclass(frozen=True)
class NonInferiority:
    """Whether a method is worse by less than `margin`: `low` bounds its difference from below, in 97.5 % of cases.

    `p` is one-sided: up to 0.025, `low` is above -`margin`.
    """

    margin: float
    low: float
    p: float

    @property
    def shown(self) -> bool:
        return self.low > -self.margin


def noninferiority(
    scores: np.ndarray, reference: np.ndarray, cluster: np.ndarray, margin: float = 0.01
) -> NonInferiority:
    """Is the method at most `margin` worse than the baseline? That no difference is found does not show it.

    A normal approximation to the difference, by clusters, as if two more questions had been asked of which one was
    gained and one was lost. Without these, 20 questions that nothing changed would prove anything.

    Args:
        scores: (Q,) or (R, Q), from 0 to 1: Q questions, R runs that are averaged.
        reference: (Q,) or (S, Q), those of the baseline.
        cluster: (Q,), equal for questions that belong together.
        margin: what does not matter, as a score: 0.01 is one point.

    Raises:
        ConfigError: a margin that is not above 0, scores outside 0 to 1, or arrays that do not fit together.

    Reference:
        Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data", Journal of Educational and Behavioral Statistics 37, 2012; summed over clusters here.
    """
    ours, number = checked(scores, cluster)
    theirs, _ = checked(reference, cluster)
    if min(ours.min(), theirs.min()) < 0 or max(ours.max(), theirs.max()) > 1:
        raise ConfigError("scores must be from 0 to 1: divide them, and the margin, by the highest score")
    return bounded(np.bincount(number, ours.mean(0) - theirs.mean(0)), np.bincount(number), margin)


def bounded(gains: np.ndarray, sizes: np.ndarray, margin: float) -> NonInferiority:
    """As :func:`noninferiority`, of sums of gains (C,) over clusters and of how many questions these have."""
    if margin <= 0:
        raise ConfigError(f"margin is {margin}: it must be above 0, such as 0.01 for one point")
    gains, sizes = np.append(gains, (1.0, -1.0)), np.append(sizes, (1, 1))
    number = sizes.sum()
    mean = gains.sum() / number
    error = math.sqrt(((gains - sizes * mean) ** 2).sum()) / number
    low = mean - _NORMAL.inv_cdf(0.975) * error
    return NonInferiority(margin, float(low), _NORMAL.cdf(float(-(mean + margin) / error)))


def minimum_detectable(n: float, discordance: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The difference of mean scores from which on a two-sided paired test finds it often enough.

    A normal approximation, for McNemar's mid-p; the exact test needs a little more. Where the discordance is too small
    for any test to find a difference, it is taken to grow with the difference, all changes being to one side.

    Args:
        n: questions; where they come in clusters, as many as would tell as much if they did not.
        discordance: mean squared difference of the two scores of a question, from 0 to 1; of right and wrong
            answers, the share that changes.
        power: how often it is found.
        alpha: how often one is found where none is.

    Returns:
        The difference, as a score; infinity where no difference could be found, as in fewer than 4 questions.

    Raises:
        ConfigError: an argument out of range.

    Reference:
        Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43, 1987,
        solved for the difference.
    """
    _check_design(n, discordance)
    if not 0 < alpha < 0.5 <= power < 1:
        raise ConfigError(f"power must be from 0.5 to 1 and alpha from 0 to 0.5, got {power} and {alpha}")
    reach, find = _NORMAL.inv_cdf(1 - alpha / 2), _NORMAL.inv_cdf(power)
    if n < reach**2:
        return math.inf
    # reach · √discordance + find · √(discordance - d²) = d · √n, the test's threshold and its spread, solved for d
    unit = (reach * math.sqrt(n) + find * math.sqrt(n + find**2 - reach**2)) / (n + find**2)
    return unit * math.sqrt(max(discordance, unit**2))


def half_width(n: float, discordance: float) -> float:
    """Half the 95 % interval of a difference: what n questions can tell apart.

    Args:
        n: questions; where they come in clusters, as many as would tell as much if they did not.
        discordance: mean squared difference of the two scores of a question, from 0 to 1; of right and wrong
            answers, the share that changes.

    Raises:
        ConfigError: an argument out of range.
    """
    _check_design(n, discordance)
    return _NORMAL.inv_cdf(0.975) * math.sqrt(discordance / n)


def _check_design(n: float, discordance: float) -> None:
    if n < 1 or not 0 <= discordance <= 1:
        raise ConfigError(f"n must be 1 or more and discordance from 0 to 1, got {n} and {discordance}")
