"""Shapes of pruning over the depth, against brute force over every shape there is."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontok import schedules
from visiontok.allocators import layer_average
from visiontok.conventions import format_schedule, solve_schedule
from visiontok.errors import ConfigError


@st.composite
def places(draw: st.DrawFn, most: int = 3) -> dict:
    """Depth, cuts and limits of a small model."""
    depth = draw(st.integers(most + 1, 9))
    cuts = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=most)))
    start = draw(st.integers(0, cuts[0]))
    stop = draw(st.integers(cuts[-1] + 1, depth))
    return {"depth": depth, "cuts": cuts, "start": start, "stop": stop}


def lengths(cuts: list[int], stop: int) -> list[int]:
    return [b - a for a, b in itertools.pairwise([*cuts, stop])]


def averages(draw: st.DataObject, n: int, where: dict) -> int:
    least = Fraction((where["cuts"][0] - where["start"]) * n + where["stop"] - where["cuts"][0], where["depth"])
    return draw.draw(st.integers(math.ceil(least), max(n, math.ceil(least))))


@given(st.integers(1, 30), places(), st.data())
@settings(max_examples=100, deadline=None)
def test_geometric_is_the_largest_that_fits(n: int, where: dict, data: st.DataObject) -> None:
    average = averages(data, n, where)
    lens = lengths(where["cuts"], where["stop"])

    def at(k: int, i: int) -> list[int]:
        """Counts for λ = (k/n)^(1/i), in whole numbers: c tokens after j cuts fit if (c/n)^i ≤ (k/n)^j."""
        powers = range(1, len(lens) + 1)
        return [max(max(c for c in range(n + 1) if c**i * n**j <= k**j * n**i), 1) for j in powers]

    spent = (where["cuts"][0] - where["start"]) * n
    shapes = [at(k, i) for k in range(n + 1) for i in range(1, len(lens) + 1)]
    costs = {sum(c * m for c, m in zip(shape, lens, strict=True)): shape for shape in shapes}
    best = max(cost for cost in costs if spent + cost <= average * where["depth"])
    assert schedules.geometric(n, average, **where) == costs[best]


@given(st.integers(1, 30), places(most=1), st.data())
@settings(max_examples=100, deadline=None)
def test_linear_is_the_flattest_that_fits(n: int, where: dict, data: st.DataObject) -> None:
    average = averages(data, n, where)
    [first] = where.pop("cuts")
    layers = where["stop"] - first
    slopes = {Fraction(n - k, n * j) for k in range(n + 1) for j in range(1, layers + 1)}
    shapes = [[max(math.floor(n * (1 - i * s)), 0) for i in range(1, layers + 1)] for s in slopes]
    costs = {sum(shape): shape for shape in shapes}
    best = max(cost for cost in costs if (first - where["start"]) * n + cost <= average * where["depth"])
    assert schedules.linear(n, average, first=first, **where) == costs[best]


@given(st.integers(4, 40), places(), st.data())
@settings(max_examples=100, deadline=None)
def test_concave_is_the_most_that_fits_in_front_of_the_tail(n: int, where: dict, data: st.DataObject) -> None:
    average = averages(data, n, where)
    lens = lengths(where["cuts"], where["stop"])
    tail = sorted(data.draw(st.lists(st.integers(1, 3), min_size=len(lens) - 1, max_size=len(lens) - 1)), reverse=True)
    spent = (where["cuts"][0] - where["start"]) * n + sum(c * m for c, m in zip(tail, lens[1:], strict=True))
    fits = [k for k in range(max(tail, default=1), n + 1) if spent + k * lens[0] <= average * where["depth"]]
    if fits:
        assert schedules.concave(n, average, tail=tail, **where) == [max(fits), *tail]
    else:
        with pytest.raises(ConfigError, match=rf"average={average}: .* fewer than the tail"):
            schedules.concave(n, average, tail=tail, **where)


@given(st.integers(2, 40), places(most=1), st.data())
@settings(max_examples=50, deadline=None)
def test_every_shape_with_one_cut_is_the_closed_form(n: int, where: dict, data: st.DataObject) -> None:
    average = averages(data, n, where)
    (cut,), depth, start, stop = where["cuts"], where["depth"], where["start"], where["stop"]
    k = min((depth * average - (cut - start) * n) // (stop - cut), n)
    assert layer_average(n, average, **where) == schedules.geometric(n, average, **where) == [k]
    assert schedules.concave(n, average, tail=[], **where) == [k]


@pytest.mark.parametrize(
    ("shape", "average", "limits", "schedule"),
    [
        ("single@2", 192, {}, "2x576,30x166"),  # EntropyPrune
        ("single@2", 128, {}, "2x576,30x98"),
        ("single@2", 64, {}, "2x576,30x29"),
        ("single@2", 192, {"stop": 24}, "2x576,22x226,8x0"),  # TwigVLM rounds up, to 227
        ("geometric@8,16,24", 270, {}, "8x576,8x288,8x144,8x72"),  # PyramidDrop
        ("concave@10,14,16,18:10,5,1", 48, {"start": 8, "stop": 24}, "8x0,2x576,4x87,2x10,2x5,6x1,8x0"),  # HiDrop
        ("concave@10,14,16,18:10,5,1", 64, {"start": 8, "stop": 24}, "8x0,2x576,4x215,2x10,2x5,6x1,8x0"),
        ("concave@10,13,16,19:10,5,1", 80, {"start": 8, "stop": 24}, "8x0,2x576,3x452,3x10,3x5,5x1,8x0"),  # up: 453
        ("linear@13", 288, {}, "13x576,1x504,1x432,1x360,1x288,1x216,1x144,1x72,12x0"),  # AIM's eighths
    ],
)
def test_published_schedules_follow_from_their_average(shape: str, average: float, limits: dict, schedule: str) -> None:
    if shape == "linear@13":
        average = (13 * 576 + 504 * 4) / 32  # what AIM's line comes to
    assert format_schedule(solve_schedule(shape, 576, average, depth=32, **limits)) == schedule


def test_an_average_is_read_in_decimal() -> None:
    """0.1 of 30 layers is 3 tokens, not the 3.0000000000000004 or 2.9999999999999996 of binary."""
    assert schedules.geometric(5, 0.1, depth=30, cuts=[0], stop=3) == [1]
    assert schedules.linear(5, 2.3, depth=10, first=0) == schedules.linear(5, 2.35, depth=10, first=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cuts": [4, 2]}, "cuts must ascend"),
        ({"cuts": [9]}, "cuts must ascend"),
        ({"cuts": [2], "average": 1}, "is already"),
        ({"cuts": [2, 4], "tail": [1, 1]}, r"tail=\[1, 1\]"),
        ({"cuts": [2, 4, 6], "tail": [1, 2]}, r"tail=\[1, 2\]"),
        ({"cuts": [2, 4], "tail": [0]}, r"tail=\[0\]"),
        ({"cuts": [2, 2], "tail": [3]}, "at one layer"),
        ({"cuts": [2, 4], "tail": [8], "average": 3}, r"raise the average to 8\.00"),
    ],
)
def test_errors_name_argument_value_and_remedy(wrong: dict, said: str) -> None:
    arguments = {"average": 5, "depth": 8} | wrong
    average = arguments.pop("average")
    with pytest.raises(ConfigError, match=said):
        (schedules.concave if "tail" in wrong else schedules.geometric)(8, average, **arguments)


@pytest.mark.parametrize("text", ["single", "single@", "single@2,3", "linear@2,3", "cubic@2", "single@-2", "@2"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"schedule='{text}': write single@2"):
        solve_schedule(text, 576, 192, depth=32)
