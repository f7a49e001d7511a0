"""Statistics of a method and its baseline: published vectors, scipy, definitions written out, and simulation."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from visiontok.errors import ConfigError
from visiontok.statistics import (
    Paired,
    accuracy,
    bootstrap,
    clusters,
    compare,
    difference,
    difficulty,
    flips,
    half_width,
    holm,
    mcnemar,
    minimum_detectable,
    noninferiority,
    relative_score,
    standard_error,
)

VQA = (0, 0.3, 0.6, 0.9, 1)


def changes(gained: int, lost: int, same: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hits of a method and of its baseline."""
    method = np.repeat([1, 0, 1], [gained, lost, same])
    return method, np.repeat([0, 1, 1], [gained, lost, same])


def some(seed: int, questions: int = 60, size: int = 20, values: tuple[float, ...] = VQA) -> Paired:
    """Scores in clusters of different sizes; the method is mostly the baseline, and seldom much better than it."""
    random = np.random.RandomState(seed)
    cluster = np.sort(random.randint(0, size, questions))
    reference = random.choice(values, questions)
    change = random.rand(size)[cluster] < 0.3
    return Paired(np.where(change, random.choice(values, questions), reference), reference, cluster)


# ------------------------------------------------------------------------------------------------------------ McNemar


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(10, 2, 0.038574), (25, 10, 0.016674), (5, 5, 1), (0, 0, 1), (2, 10, 0.038574)]
)
def test_mcnemar_of_published_tables(gained, lost, p):
    found = mcnemar(*changes(gained, lost, 7))
    assert (found.gained, found.lost) == (gained, lost)
    assert found.p == pytest.approx(p, abs=5e-7)
    assert found.mid_p < p or gained == lost == 0


@pytest.mark.parametrize("table", [(0, 1), (3, 3), (7, 1), (0, 60), (41, 60), (3000, 3200)])
def test_mcnemar_is_a_binomial_test_of_the_changes(table):
    found = mcnemar(*changes(*table))
    assert found.p == pytest.approx(stats.binomtest(table[0], sum(table)).pvalue, rel=1e-9)
    # mid-p: what is more extreme on either side, and half of what is as extreme
    k = np.arange(sum(table) + 1)
    extreme = abs(2 * k - sum(table)) - abs(table[0] - table[1])
    chance = stats.binom.pmf(k, sum(table), 0.5)
    assert found.mid_p == pytest.approx(chance[extreme > 0].sum() + chance[extreme == 0].sum() / 2, rel=1e-9)


def test_mcnemar_of_fractions_is_refused():
    with pytest.raises(ConfigError, match="0 or 1"):
        mcnemar(np.array([0, 0.3]), np.array([0, 1]))
    with pytest.raises(ConfigError, match="same questions"):
        mcnemar(np.array([0, 1]), np.array([1]))


# -------------------------------------------------------------------------------------------- intervals and p-values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("interval", ["percentile", "bca"])
def test_intervals_are_those_of_scipy(seed, interval):
    """From the same samples; scipy interpolates between the two nearest, and ours is the outer one."""
    scores, reference, cluster = some(seed, values=(0, 0.25, 0.5, 1))  # no rounding
    sums, sizes = (
        np.array([x[cluster == c].sum() for c in np.unique(cluster)]) for x in (scores - reference, 1 + 0 * cluster)
    )
    times = np.random.RandomState(4).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 9999)
    samples = np.sort((times @ sums) / (times @ sizes))
    expected = stats.bootstrap(
        (np.arange(len(sums)),),
        lambda chosen, axis: sums[chosen].sum(axis) / sizes[chosen].sum(axis),
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=samples),
        method=interval,
    ).confidence_interval
    found = difference(scores, reference, cluster, interval=interval, seed=4)
    assert found.value == pytest.approx(sums.sum() / sizes.sum())
    for ours, theirs in ((found.low, expected.low), (found.high, expected.high)):
        first, last = (np.searchsorted(samples, theirs, side) for side in ("left", "right"))
        assert samples[first - 1] <= ours <= samples[last]


def test_bca_follows_the_skew():
    gains = np.array([1] * 3 + [0] * 57)  # three questions gained: the share is rather larger than smaller
    plain, corrected = (difference(gains, 0 * gains, np.arange(60), interval=i) for i in ("percentile", "bca"))
    assert corrected.low > plain.low
    assert corrected.high > plain.high


def test_the_interval_covers_the_truth():
    """95 % of the intervals hold the mean; of those that take alike questions for independent ones, fewer."""
    random = np.random.RandomState(0)
    cluster = np.arange(120) // 3
    inside = np.zeros(2)
    for _ in range(300):
        gain = random.choice([-1, 0, 0, 0, 1], 40).repeat(3)
        for which, keys in enumerate((cluster, np.arange(120))):
            found = difference(gain > 0, gain < 0, keys, 499)
            inside[which] += found.low <= 0 <= found.high
    assert 0.91 <= inside[0] / 300 <= 0.98
    assert inside[1] / 300 < 0.85


@pytest.mark.parametrize("seed", range(4))
def test_permutation_of_fractions_is_that_of_scipy(seed):
    scores, reference, cluster = some(seed, questions=30, size=9)
    ours, theirs = (np.bincount(cluster, x) for x in (scores, reference))
    expected = stats.permutation_test(
        (ours, theirs),
        lambda x, y, axis: (x - y).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
    )
    assert difference(scores, reference, cluster).p == pytest.approx(expected.pvalue)


def test_rounding_breaks_no_tie():
    gains = np.array([0.1, 0.2, -0.3, 0.6])  # 0.1 + 0.2 - 0.3 is not 0
    by_hand = np.mean([abs(np.dot(s, [1, 2, -3, 6])) >= 6 for s in itertools.product((1, -1), repeat=4)])
    assert difference(gains, 0 * gains, np.arange(4)).p == by_hand
    # Few changes, so that many samples tie with the estimate.
    whole = np.array([1, 2, -3, 1, *[0] * 30])
    one, tenth = (difference(unit * whole, 0 * whole, np.arange(34), interval="bca") for unit in (1, 0.1))
    assert (tenth.value, tenth.low, tenth.high) == pytest.approx((0.1 * one.value, 0.1 * one.low, 0.1 * one.high))


hits = st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 2))


@given(hits)
@settings(max_examples=40, deadline=None)
def test_of_independent_answers_permutation_is_mcnemar(pair):
    ours, theirs = map(np.array, pair)
    found = difference(ours, theirs, np.arange(len(ours)), 9)
    assert found.p == pytest.approx(mcnemar(ours, theirs).p)


sets = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2,
        st.lists(st.integers(0, 20), min_size=n, max_size=n),
        st.permutations(range(n)),
    )
)


@given(sets)
@settings(max_examples=40, deadline=None)
def test_what_does_not_matter(found):
    ours, theirs, cluster, order = map(np.array, found)
    plain = difference(ours, theirs, cluster, 199)
    # the other way round
    back = difference(theirs, ours, cluster, 199)
    assert (back.value, back.low, back.high, back.p) == (-plain.value, -plain.high, -plain.low, plain.p)
    # the order of the questions
    assert difference(ours[order], theirs[order], cluster[order], 199) == plain
    # every question asked twice in its cluster, and what both get right in the same way
    assert difference(ours.repeat(2), theirs.repeat(2), cluster.repeat(2), 199) == plain
    again = difference(ours + 3, theirs + 3, cluster, 199)
    assert again == plain
    # the unit
    double = difference(2 * ours, 2 * theirs, cluster, 199)
    assert (double.value, double.low, double.high, double.p) == (
        2 * plain.value,
        2 * plain.low,
        2 * plain.high,
        plain.p,
    )
    # the sides in a non-inferiority test: lower and upper bounds mirror
    assert noninferiority(ours / 4, theirs / 4, cluster).low <= plain.value / 4 + 2 / (len(ours) + 2)


def test_alike_questions_make_the_interval_wider():
    random = np.random.RandomState(1)
    gain = random.choice([-1, 0, 0, 0, 1], 100).repeat(4)
    wide, narrow = (difference(gain > 0, gain < 0, c) for c in (np.arange(400) // 4, np.arange(400)))
    assert wide.high - wide.low == pytest.approx(2 * (narrow.high - narrow.low), rel=0.1)
    assert standard_error(gain, np.arange(400) // 4) == pytest.approx(
        2 * standard_error(gain, np.arange(400)), rel=0.01
    )


@pytest.mark.parametrize("draws", [50, 999])
def test_many_clusters_are_drawn_in_parts_that_change_nothing(monkeypatch, draws):
    scores, reference, cluster = some(2)
    whole = difference(scores, reference, cluster, draws)
    monkeypatch.setattr(clusters, "_KEPT", 0)
    monkeypatch.setattr(clusters, "_BLOCK", 100)
    assert difference(scores, reference, cluster, draws) == whole


def test_a_seed_is_another_sample():
    paired = some(3)
    assert difference(*paired) == difference(*paired)
    one, other = (difference(*paired, seed=seed) for seed in (0, 1))
    assert one.low != other.low
    assert one.p != other.p
    assert one.p == pytest.approx(other.p, abs=0.03)


# ------------------------------------------------------------------------------------------------------ standard error


@pytest.mark.parametrize(
    ("scores", "cluster", "expected"),
    [
        ([1, 0, 1, 1, 0, 0], list("aabbcc"), 0.252763),
        ([1, 0, 1, 1, 0, 0], list("abcdef"), 0.223607),
        ([0, -1, 0, 0, 0, -1, 0, 0], list("abcdefgh"), 0.163663),
    ],
)
def test_standard_errors_of_published_vectors(scores, cluster, expected):
    assert standard_error(np.array(scores), np.array(cluster)) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_as_defined(seed):
    scores, _, cluster = some(seed)
    n, rest = len(scores), scores - scores.mean()
    together = sum(
        rest[i] * rest[j] for i, j in itertools.product(range(n), repeat=2) if i != j and cluster[i] == cluster[j]
    )
    assert standard_error(scores, cluster) == pytest.approx(math.sqrt(stats.sem(scores) ** 2 + together / n**2))
    assert math.isnan(standard_error(scores[:1], cluster[:1]))


# ---------------------------------------------------------------------------------------------------- other aggregates


@pytest.mark.parametrize("interval", ["percentile", "bca"])
def test_of_a_mean_the_bootstrap_is_that_of_a_mean(interval):
    scores, _, cluster = some(5)
    found = bootstrap(lambda times: times @ scores / times.sum(), cluster, 500, interval)
    expected = accuracy(scores, cluster, 500, interval)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_f1_is_computed_for_every_sample():
    random = np.random.RandomState(6)
    cluster = np.arange(90) // 3
    truth = random.rand(90) < 0.4
    said = np.where(random.rand(30)[cluster] < 0.2, ~truth, truth)

    def f1(times: np.ndarray) -> float:
        right, extra, missed = (times @ mask for mask in (truth & said, said & ~truth, truth & ~said))
        return 2 * right / (2 * right + extra + missed)

    found = bootstrap(f1, cluster, 1000)
    samples = []
    for _ in range(1000):
        index = np.concatenate([np.flatnonzero(cluster == c) for c in random.randint(0, 30, 30)])
        t, s = truth[index], said[index]
        precision, recall = t[s].mean(), s[t].mean()
        samples.append(2 * precision * recall / (precision + recall))
    assert found.value == pytest.approx(2 * (truth & said).sum() / (truth.sum() + said.sum()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(samples, (0.025, 0.975))), abs=0.02)


def test_pairs_stay_whole_and_copies_stay_two():
    """MME's acc+ counts pictures of which both questions are right: three of four here, and then any number of four."""
    hit = np.array([1, 1, 1, 0, 1, 1, 1, 1])
    picture = np.arange(8) // 2
    samples = []

    def plus(times: np.ndarray) -> float:
        assert (times[::2] == times[1::2]).all()
        assert times.sum() == 8 or times.sum() == 6  # or a picture is left out, for the interval
        samples.append(times)
        return float((times * hit)[::2] @ hit[1::2] / times[::2].sum())

    found = bootstrap(plus, picture, 400, "bca")
    assert found.value == 0.75
    assert max(times.max() for times in samples) >= 3


def test_a_macro_mean_weighs_categories_alike():
    category = np.repeat([0, 1], [90, 10])
    hit = np.r_[np.ones(90), np.zeros(10)]

    def macro(times: np.ndarray) -> float:
        return float(np.mean([np.average(hit[category == c], weights=times[category == c]) for c in (0, 1)]))

    found = bootstrap(macro, np.arange(100), 200)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)  # the mean of all is 0.9, and changes


def test_an_aggregate_must_be_a_number():
    with pytest.raises(ConfigError, match="not a number"):
        bootstrap(lambda times: math.nan if times[0] == 0 else 1.0, np.arange(4), 50)


# ------------------------------------------------------------------------------------------------------ relative score


def test_relative_scores_by_hand():
    half = Paired(np.array([1, 0, 1, 0]), np.array([1, 1, 1, 1]), np.arange(4))
    same = Paired(np.array([0.3, 0.6]), np.array([0.3, 0.6]), np.arange(2))
    assert relative_score([half]).value == 0.5
    found = relative_score([half, same])  # a mean of ratios, not a ratio of means
    assert found.value == 0.75
    assert (found.low, found.high) == (0.5, 1.0)
    assert relative_score([same]) == relative_score([same, same])
    assert relative_score([same]).low == 1.0
    runs = Paired(np.array([[1, 0, 1, 0], [1, 1, 1, 1]]), np.ones(4), np.arange(4))
    assert relative_score([runs]).value == 0.75


def test_tasks_are_drawn_independently():
    paired = some(7, questions=200, size=100, values=(0.5, 1))
    one, four = relative_score([paired]), relative_score([paired] * 4)
    assert four.value == pytest.approx(one.value)
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.1)


def test_a_ratio_has_the_error_of_its_linear_part():
    scores, reference, cluster = some(8, questions=600, size=300, values=(0.3, 1))
    found = relative_score([Paired(scores, reference, cluster)])
    ratio = scores.mean() / reference.mean()
    error = standard_error(scores - ratio * reference, cluster) / reference.mean()
    assert (found.low, found.high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)


def test_nothing_is_relative_to_nothing():
    with pytest.raises(ConfigError, match="task 0"):
        relative_score([Paired(np.ones(3), np.array([0, 0, 1]), np.arange(3))])
    with pytest.raises(ConfigError, match="empty"):
        relative_score([])


# ----------------------------------------------------------------------------------------------- many methods, margins


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_holm_rejects_what_every_set_of_hypotheses_rejects(p):
    """Closed testing: a hypothesis falls when Bonferroni rejects every set that holds it."""
    every = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    closed = [max(min(len(s) * min(p[i] for i in s), 1) for s in every if mine in s) for mine in range(len(p))]
    assert holm(p) == pytest.approx(closed)


@pytest.mark.parametrize("p", [[0.1, 1.5], [-0.1], [math.nan]])
def test_holm_wants_probabilities(p):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        holm(p)


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 5, 200), (0, 0, 20), (12, 30, 100)])
def test_the_lower_bound_of_bonett_and_price(gained, lost, n):
    a, b = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    low = a - b - stats.norm.ppf(0.975) * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    found = noninferiority(*changes(gained, lost, n - gained - lost), np.arange(n), 0.05)
    assert found.low == pytest.approx(low)
    assert found.shown == (found.p < 0.025) == (low > -0.05)


def test_that_nothing_changed_shows_little_when_little_was_asked():
    for n, shown in ((20, False), (500, True)):
        assert noninferiority(np.ones(n), np.ones(n), np.arange(n), 0.01).shown == shown
    # One picture asked about 500 times is one picture.
    assert not noninferiority(np.r_[np.ones(500), 1], np.r_[np.ones(500), 0], np.r_[np.zeros(500), 1], 0.001).shown


@pytest.mark.parametrize("copies", [1, 3])
def test_a_method_as_bad_as_the_margin_is_seldom_called_no_worse(copies):
    random, shown = np.random.RandomState(0), 0
    for _ in range(1000):
        gain = random.choice([-1, 0, 1], 200, p=[0.1, 0.85, 0.05]).repeat(copies)
        shown += noninferiority(gain > 0, gain < 0, np.arange(200).repeat(copies), 0.05).shown
    assert 0.01 < shown / 1000 < 0.035


def test_what_a_margin_must_be():
    with pytest.raises(ConfigError, match="margin is 0"):
        noninferiority(np.ones(2), np.ones(2), np.arange(2), 0)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        noninferiority(np.array([98.0, 20]), np.ones(2), np.arange(2))


# ----------------------------------------------------------------------------------------------------- what can be seen


@pytest.mark.parametrize(("n", "half"), [(500, 0.0277), (5000, 0.0088), (12578, 0.0055)])
def test_half_widths_at_a_discordance_of_a_tenth(n, half):
    assert half_width(n, 0.1) == pytest.approx(half, abs=6e-5)


@pytest.mark.parametrize(("n", "discordance", "expected"), [(2181, 0.25, 0.03), (3925, 0.05, 0.01)])
def test_published_sample_sizes_find_their_differences(n, discordance, expected):
    assert minimum_detectable(n, discordance) == pytest.approx(expected, rel=2e-3)


def share_found(n: int, changed: float, d: float) -> float:
    """Of 20,000 simulated pairs of methods, the share that McNemar's mid-p tells apart."""
    shares = [(changed + d) / 2, (changed - d) / 2, 1 - changed]
    gained, lost, _ = np.random.RandomState(0).multinomial(n, shares, 20_000).T
    fewer, both = np.minimum(gained, lost), gained + lost
    mid_p = 2 * stats.binom.cdf(fewer, both, 0.5) - stats.binom.pmf(fewer, both, 0.5)
    return float((mid_p <= 0.05).mean())


@pytest.mark.parametrize(
    ("n", "discordance", "power"),
    [(500, 0.1, 0.8), (2000, 0.05, 0.8), (300, 0.3, 0.9), (60, 0.5, 0.5)],
)
def test_simulated_tests_find_the_detectable_difference_as_often_as_said(n, discordance, power):
    found = share_found(n, discordance, minimum_detectable(n, discordance, power))
    assert found == pytest.approx(power, abs=0.04)


@pytest.mark.parametrize(("n", "discordance", "power"), [(12, 1.0, 0.8), (40, 0.3, 0.9), (500, 0.1, 0.5)])
def test_the_detectable_difference_solves_its_equation(n, discordance, power):
    """The test's threshold, 1.96 errors of no difference, is where its power says in the distribution of this one."""
    d = minimum_detectable(n, discordance, power)
    threshold, spread = 1.959964 * math.sqrt(discordance / n), math.sqrt((discordance - d**2) / n)
    assert stats.norm.sf(threshold, d, spread) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("n", [30, 200, 5000])
def test_where_too_little_changes_a_detectable_difference_is_all_that_changes(n):
    d = minimum_detectable(n, 0)
    assert d == minimum_detectable(n, d)  # about 8 questions of any n, and 5 to one side are enough
    assert 0.8 < share_found(n, d, d) < 0.92


def test_too_few_questions_detect_nothing():
    assert minimum_detectable(3, 0.5) == minimum_detectable(3.8, 1.0) == math.inf
    assert 0.9 < minimum_detectable(4, 0.5) < 1
    with pytest.raises(ConfigError, match="discordance"):
        minimum_detectable(100, 1.5)
    with pytest.raises(ConfigError, match="n must be 1"):
        half_width(0, 0.1)
    with pytest.raises(ConfigError, match="power"):
        minimum_detectable(100, 0.1, power=0.4)


# --------------------------------------------------------------------------------------------------------- comparisons


def test_flips_are_seen_where_the_score_stays():
    found = flips(
        np.array([1, 0, 0, 1]),
        np.array([0, 1, 0, 1]),
        ["yes", "no", "cat", "2"],
        ["no", "yes", "dog", "2"],
        np.arange(4),
    )
    assert (found.gained, found.lost, found.agreement.value) == (1, 1, 0.25)
    with pytest.raises(ConfigError, match="same questions"):
        flips(np.ones(2), np.ones(2), ["a", "b"], ["a"], np.arange(2))


def test_a_comparison_says_what_its_parts_say():
    paired = some(9, values=(0, 1))
    found = compare(paired, margin=0.2, draws=999, seed=3)
    assert (found.questions, found.clusters) == (60, len(set(paired.cluster)))
    assert found.score == accuracy(paired.scores, paired.cluster, 999, "bca", 3)
    assert found.reference == accuracy(paired.reference, paired.cluster, 999, "bca", 3)
    assert found.difference == difference(*paired, 999, "bca", 3)
    assert found.mcnemar == mcnemar(paired.scores, paired.reference)
    assert found.noninferiority == noninferiority(*paired, 0.2)
    assert compare(some(9)).mcnemar is None


def test_what_can_be_detected_knows_of_clusters():
    random = np.random.RandomState(0)
    scores, reference = (random.rand(400) < 0.7).astype(int), (random.rand(400) < 0.7).astype(int)
    share = np.mean(scores != reference)
    alone = compare(Paired(scores, reference, np.arange(400)), draws=99)
    assert alone.detectable == minimum_detectable(400, share)
    fourfold = Paired(scores.repeat(4), reference.repeat(4), np.arange(400).repeat(4))
    assert compare(fourfold, draws=99).detectable == pytest.approx(alone.detectable, rel=0.01)
    # Gains and losses that cancel within clusters are no reason to claim more.
    apart = Paired(np.tile([1, 0], 20), np.tile([0, 1], 20), np.arange(40) // 2)
    assert compare(apart, draws=99).detectable == minimum_detectable(40, 1.0)


def test_questions_that_a_resized_picture_answers_are_easy():
    paired = some(10, values=(0, 1))
    split = difficulty(paired.reference)
    assert set(split[paired.reference == 1]) == {"easy"}
    assert set(split[paired.reference == 0]) == {"difficult"}
    assert list(difficulty(np.array([0.3, 0.6]))) == ["difficult", "easy"]


def test_answers_have_lengths():
    now, before = np.array([12, 8, 40]), np.array([10, 10, 20])
    assert difference(now, before, np.arange(3)).value == pytest.approx(20 / 3)
    assert relative_score([Paired(now, before, np.arange(3))]).value == 1.5


def test_a_single_question_tells_nothing():
    found = compare(Paired(np.array([1]), np.array([0]), np.array(["picture"])), draws=9)
    assert (found.difference.value, found.difference.p, found.detectable) == (1.0, 1.0, math.inf)
    assert not found.noninferiority.shown


@pytest.mark.parametrize("scores", [np.array([1, np.nan]), np.array([1, np.inf])])
def test_a_missing_score_is_refused(scores):
    with pytest.raises(ConfigError, match="must be numbers"):
        difference(scores, np.ones(2), np.arange(2))
    with pytest.raises(ConfigError, match="must be numbers"):
        compare(Paired(np.ones(2), scores, np.arange(2)))


def test_an_interval_has_a_name():
    with pytest.raises(ConfigError, match="'bc'"):
        accuracy(np.ones(2), np.arange(2), interval="bc")  # type: ignore[arg-type]
