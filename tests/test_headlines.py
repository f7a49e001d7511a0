"""Headlines as functions of sums: they are those of the metrics, and resampling them is resampling the questions."""

from __future__ import annotations

import itertools
from statistics import fmean

import numpy as np
import pytest
from visiontok.eval.scoring import METRICS, Mark, Target, metric

from visiontok.errors import ConfigError
from visiontok.statistics import (
    Paired,
    Tallied,
    accuracy,
    compare,
    difference,
    mean_of,
    relative_score,
    tallied_detectable,
    tallied_difference,
    tallied_noninferiority,
    tallied_score,
)

EVERY = [(name, dialect) for name in sorted(METRICS) for dialect in METRICS[name]]
CATEGORIES = ("existence", "OCR", "code_reasoning")


def questions(name: str, pairs: int, seed: int) -> list[Target]:
    """Two questions about each of some pictures, which all metrics can group."""
    random = np.random.RandomState(seed)
    found = []
    for number in range(pairs):
        category = CATEGORIES[number % 3]
        groups = {"category": category, "image": str(number), "index": str(number)}
        groups |= {"subcategory": "a", "set": str(number // 4), "figure": str(number % 2), "question": str(number)}
        for turn in range(2):
            mine = groups | {"index": str(number + turn * 10**6)}
            right = ("yes", "no")[(turn + random.randint(2)) % 2]
            answers = ("0.1,0.1,0.5,0.5",) if name.startswith("grounding") else (right,)
            found.append(Target(answers=answers, id=f"{number}-{turn}", groups=mine))
    return found


def answered(targets: list[Target], share: float, seed: int) -> list[Mark]:
    """Some right, some wrong, some unread."""
    random = np.random.RandomState(seed)
    marks = []
    for target in targets:
        draw = random.rand()
        other = {"yes": "no", "no": "yes"}.get(target.answers[0], target.answers[0])
        said = target.answers[0] if draw < share else other if draw < share + (1 - share) / 2 else None
        marks.append(Mark(float(draw < share), said))
    return marks


@pytest.mark.parametrize(("name", "dialect"), EVERY)
@pytest.mark.parametrize("seed", range(2))
def test_a_headline_is_the_mean_score_or_has_a_tally_that_agrees(name: str, dialect: str, seed: int) -> None:
    found, targets = metric(name, dialect), questions(name, 15, seed)
    marks = answered(targets, 0.6, seed)
    headline = found.aggregate(marks, targets)[found.headline]
    if found.tally is None:
        assert headline == pytest.approx(fmean(mark.score for mark in marks))
        return
    tally = found.tally(marks, targets)
    assert float(tally.score(tally.counts.sum(0))) == pytest.approx(headline, abs=1e-12)
    perfect = [Mark(1.0, target.answers[0]) for target in targets]
    best = found.tally(perfect, targets)
    assert float(best.score(best.counts.sum(0))) == pytest.approx(tally.top)
    assert best.counts.shape == tally.counts.shape


def f1(pairs: list[tuple[Mark, Target]]) -> float:
    """From its definition, of replies that were read."""
    read = [(mark.parsed, target.answers[0]) for mark, target in pairs if mark.parsed is not None]
    tp, fp, fn = (read.count(case) for case in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def tallied(name: str, dialect: str, targets: list[Target], ours: list[Mark], theirs: list[Mark]) -> Tallied:
    tally = metric(name, dialect).tally
    assert tally is not None
    one, other = tally(ours, targets), tally(theirs, targets)
    cluster = np.array([target.groups["image"] for target in targets])
    return Tallied(one.counts, other.counts, cluster, one.score, one.top)


def test_f1_of_resamples_is_that_of_a_loop_over_questions() -> None:
    targets = questions("pope", 30, 3)
    ours, theirs = answered(targets, 0.55, 4), answered(targets, 0.8, 5)
    given = tallied("pope", "lmms-eval", targets, ours, theirs)
    names, number = np.unique(given.cluster, return_inverse=True)
    random = np.random.RandomState(0)
    values = []
    for times in random.multinomial(len(names), np.full(len(names), 1 / len(names)), 400):
        drawn = [place for place in range(len(targets)) for _ in range(times[number[place]])]
        gains = [f1([(marks[place], targets[place]) for place in drawn]) for marks in (ours, theirs)]
        values.append(gains[0] - gains[1])
    ordered = np.sort(values)
    found = tallied_difference([given], 400, "percentile", 0)
    assert found.value == pytest.approx(
        f1(list(zip(ours, targets, strict=True))) - f1(list(zip(theirs, targets, strict=True)))
    )
    assert (found.low, found.high) == pytest.approx((ordered[10], ordered[389]), abs=1e-12)
    # It is no mean of questions, so the plain difference is another number.
    plain = difference(*([mark.score for mark in marks] for marks in (ours, theirs)), given.cluster, 99)
    assert abs(plain.value - found.value) > 0.01


def test_permutations_swap_whole_clusters() -> None:
    targets = questions("mme", 8, 1)
    ours, theirs = answered(targets, 0.5, 1), answered(targets, 0.9, 2)
    total = metric("mme", "official").aggregate
    seen = abs(total(ours, targets)["total"] - total(theirs, targets)["total"])
    as_large = []
    for sides in itertools.product((False, True), repeat=8):
        swapped = [
            (b, a) if sides[place // 2] else (a, b) for place, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ]
        one, other = (total(list(marks), targets)["total"] for marks in zip(*swapped, strict=True))
        as_large.append(abs(one - other) >= seen - 1e-9)
    assert tallied_difference([tallied("mme", "official", targets, ours, theirs)]).p == np.mean(as_large)


def test_of_a_mean_it_is_what_is_said_of_means() -> None:
    random = np.random.RandomState(2)
    paired = Paired(random.choice((0, 0.3, 1), 80), random.choice((0, 0.6, 1), 80), random.randint(0, 20, 80))
    given = mean_of(paired)
    for interval in ("percentile", "bca"):
        one, other = tallied_difference([given], 999, interval, 5), difference(*paired, 999, interval, 5)
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
        assert one.p == pytest.approx(other.p, abs=0.002)  # ties of fractions round otherwise
        score, reference = tallied_score(given, 999, interval, 5)
        assert score.low == pytest.approx(accuracy(paired.scores, paired.cluster, 999, interval, 5).low)
        assert reference.high == pytest.approx(accuracy(paired.reference, paired.cluster, 999, interval, 5).high)
    plain = compare(paired, draws=99)
    assert tallied_noninferiority(given).low == pytest.approx(plain.noninferiority.low, abs=0.01)
    assert tallied_detectable(given) == pytest.approx(plain.detectable, rel=0.25)


def test_several_tasks_count_alike_whatever_their_scale() -> None:
    targets = questions("mme", 12, 7)
    ours, theirs = answered(targets, 0.5, 8), answered(targets, 0.8, 9)
    mme, pope = (tallied(name, "vlmevalkit", targets, ours, theirs) for name in ("mme", "pope"))
    one, other, both = (tallied_difference(tasks, 500) for tasks in ([mme], [pope], [mme, pope]))
    assert mme.top == 600
    assert both.value == pytest.approx((one.value / 600 + other.value) / 2)
    assert both.low < both.value < both.high
    assert relative_score([mme, pope], 99).value == pytest.approx(
        np.mean([relative_score([task], 99).value for task in (mme, pope)])
    )
    assert 0 < both.p <= max(one.p, other.p)
    with pytest.raises(ConfigError, match="0 tasks"):
        tallied_difference([])
    with pytest.raises(ConfigError, match="'bca'"):
        tallied_difference([mme, pope], interval="bca")


def test_nothing_changed_shows_little_of_few_clusters() -> None:
    targets = questions("pope", 10, 0)
    marks = answered(targets, 0.7, 1)
    same = tallied("pope", "lmms-eval", targets, marks, marks)
    found = compare(Paired(*(np.array([mark.score for mark in marks]),) * 2, same.cluster), 0.05, 99, 0, same)
    assert (found.difference.value, found.difference.p) == (0, 1)
    assert not found.noninferiority.shown
    assert found.detectable > 0.2
    assert found.relative is not None
    assert found.relative.value == 1
