"""The statistics of curves, against cases worked out by hand and against definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from visiontok.statistics import accuracy, difference, kendall


def test_an_interval_comes_from_drawing_whole_clusters():
    # Scene 0 has one question, answered; scene 1 has three, none answered. Two scenes are drawn from them: both times
    # the first (a quarter of the draws), both times the second, or each once.
    found = accuracy(np.array([1, 0, 0, 0], bool), np.array([7, 9, 9, 9]))
    assert (found.value, found.low, found.high) == (0.25, 0.0, 1.0)
    assert accuracy(np.array([1, 0], bool), np.array([4, 4])).low == 0.5  # a single scene is always drawn


@pytest.mark.parametrize("copies", [1, 4])
def test_alike_questions_count_once(copies):
    """n answers that are equal in fours are worth n / 4: the width of the normal approximation tells."""
    right = np.random.RandomState(3).rand(400 // copies) < 0.5
    found = accuracy(right.repeat(copies), np.arange(len(right)).repeat(copies))
    share = right.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / len(right))
    assert found.value == share
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert (found.high + found.low) / 2 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("gains", "p"),
    [
        ((1, 1, 1), 2 / 8),  # only all signs alike reach 3
        ((1, 1, -1), 1.0),  # every sum is odd, so none is below 1
        ((2, 1), 2 / 4),  # 3, 1, -1, -3
        ((2, 1, 0), 4 / 8),
        ((0, 0), 1.0),
    ],
)
def test_p_counts_the_changes_of_sides_that_do_as_well(gains, p):
    ours, theirs, scene = [], [], []
    for number, gain in enumerate(gains):
        ours += [gain > 0] * abs(gain) + [True]
        theirs += [gain < 0] * abs(gain) + [True]
        scene += [number] * (abs(gain) + 1)
    found = difference(np.array(ours), np.array(theirs), np.array(scene))
    assert found.p == p
    assert found.value == pytest.approx(sum(gains) / len(scene))


@pytest.mark.parametrize("scenes", [13, 14])
def test_few_scenes_are_permuted_in_all_ways_and_many_by_chance(scenes):
    gains = np.resize([1, 0, 1, 1, -1], scenes)
    exact = np.mean([abs(np.dot(s, gains)) >= abs(gains.sum()) for s in itertools.product((1, -1), repeat=scenes)])
    found = difference(gains > 0, gains < 0, np.arange(scenes))
    assert found.p == pytest.approx(exact, abs=0 if scenes == 13 else 0.015)
    assert 0 < exact < 0.5


def test_a_clear_difference_has_the_smallest_p_there_is():
    found = difference(np.ones(40, bool), np.zeros(40, bool), np.arange(40))
    assert (found.value, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 1 / 10_000)


def test_runs_are_averaged_question_by_question():
    ours = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)  # means 1, ½, 0, 0
    theirs = np.array([[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]], bool)  # means ⅓, 0, 0, 1
    scene = np.array([0, 0, 1, 1])
    found = difference(ours, theirs, scene)
    assert found.value == pytest.approx((2 / 3 + 1 / 2 + 0 - 1) / 4)
    # One scene gains 7/6, the other loses 1: sums of ±7/6 ± 1 are 1/6 and 13/6, and all reach 1/6.
    assert found.p == 1.0
    assert found.low == pytest.approx(-1 / 2)
    assert found.high == pytest.approx(7 / 12)
    back = difference(theirs, ours, scene)
    assert (back.value, back.p) == (-found.value, found.p)


def test_pairing_sees_what_two_intervals_do_not():
    random = np.random.RandomState(0)
    base = random.rand(300) < 0.5
    better = base | (random.rand(300) < 0.05)
    scene = np.arange(300) // 3
    one, other = accuracy(base, scene), accuracy(better, scene)
    assert one.high > other.low  # the intervals overlap
    found = difference(better, base, scene)
    assert found.low > 0
    assert found.p == pytest.approx(2 / 2**7, rel=0.2)  # seven questions gained, each in its own scene, none lost
    assert found.value == pytest.approx(better.mean() - base.mean())


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [
        ([1, 2, 3], [4, 5, 9], 1.0),
        ([1, 2, 3], [9, 5, 4], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),  # five pairs agree, one does not
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),  # two pairs agree; one is tied on one side
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -4 / math.sqrt(8 * 9)),  # two agree, six do not; two and one are tied
    ],
)
def test_tau_by_hand(one, other, tau):
    assert kendall(one, other) == pytest.approx(tau)
    assert kendall(other, one) == pytest.approx(tau)


def test_a_ranking_of_ties_has_no_tau():
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("seed", range(5))
def test_tau_b_as_defined(seed):
    one, other = np.random.RandomState(seed).randint(0, 4, (2, 9))
    agree = disagree = first = second = 0
    for i, j in itertools.combinations(range(9), 2):
        product = (int(one[i]) - int(one[j])) * (int(other[i]) - int(other[j]))
        agree, disagree = agree + (product > 0), disagree + (product < 0)
        first, second = first + (one[i] != one[j]), second + (other[i] != other[j])
    assert kendall(one, other) == pytest.approx((agree - disagree) / math.sqrt(first * second))


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="same number of questions"):
        accuracy(np.ones(3, bool), np.zeros(2))
    with pytest.raises(ValueError, match="same number of questions"):
        accuracy(np.ones(0, bool), np.zeros(0))
    with pytest.raises(ValueError, match="same number of questions"):
        difference(np.ones(3, bool), np.ones(4, bool), np.zeros(3))
    with pytest.raises(ValueError, match="as many scores"):
        kendall([1, 2], [1, 2, 3])
