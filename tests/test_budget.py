"""What a budget means, how it is written, and what it comes to."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visiontok import Budget
from visiontok.errors import ConfigError

EXAMPLES = [Budget.tokens(64), Budget.ratio(0.25), Budget.per_tile(32), Budget.layer_average(64), Budget.flops(0.4)]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (64, Budget.tokens(64)),
        (1, Budget.tokens(1)),
        (0.25, Budget.ratio(0.25)),
        (1.0, Budget.ratio(1.0)),
        ("64", Budget.tokens(64)),
        ("0.25", Budget.ratio(0.25)),
        ("25%", Budget.ratio(0.25)),
        ("33.4 %", Budget.ratio(0.334)),
        ("100%", Budget.ratio(1.0)),
        ("1.0", Budget.ratio(1.0)),
        ("tokens:1", Budget.tokens(1)),
        ("per_tile:32", Budget.per_tile(32)),
        ("layer_average:64", Budget.layer_average(64)),
        ("layer_average:10.5", Budget.layer_average(10.5)),
        ("flops:40%", Budget.flops(0.4)),
        (Budget.tokens(3), Budget.tokens(3)),
    ],
)
def test_parse(written: Budget | int | float | str, meant: Budget) -> None:
    assert Budget.parse(written) == meant


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("1", "'tokens:1'.*'100%'"),
        (True, "not a bool"),
        (None, "not a NoneType"),
        (0, "at least 1"),
        (-5, "at least 1"),
        (1.5, "give an int"),
        (64.0, "give an int"),
        (0.0, r"\(0, 1\]"),
        (-0.5, r"\(0, 1\]"),
        (math.nan, r"\(0, 1\]"),
        (math.inf, r"\(0, 1\]"),
        ("150%", r"\(0, 1\]"),
        ("0%", r"\(0, 1\]"),
        ("nan", r"\(0, 1\]"),
        ("many", "KIND:VALUE"),
        ("", "KIND:VALUE"),
        ("%", "KIND:VALUE"),
        ("-64", "give an int"),
        ("64.5", "give an int"),
        ("1/0%", "KIND:VALUE"),
        ("words:3", "no kind of budget"),
        ("tokens:2.5", "whole number"),
        ("flops:2", r"\(0, 1\]"),
        ("layer_average:-1", "positive number"),
    ],
)
def test_refused_with_a_remedy(written: object, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"keep.*{remedy}"):
        Budget.parse(written)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", EXAMPLES, ids=str)
def test_round_trips(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


def test_json_is_plain_and_checked() -> None:
    assert [b.to_json() for b in EXAMPLES] == [64, 0.25, {"per_tile": 32}, {"layer_average": 64}, {"flops": 0.4}]
    for wrong in ({}, {"tokens": 1, "ratio": 0.5}, {"words": 3}, [64], {"tokens": True}):
        with pytest.raises(ConfigError, match="keep"):
            Budget.from_json(wrong)


def test_counts() -> None:
    sizes = torch.tensor([576, 100, 1, 0])
    assert Budget.tokens(64).counts(sizes).tolist() == [64, 64, 1, 0]
    assert Budget.ratio(0.145).counts(sizes).tolist() == [84, 15, 1, 0]  # 83.52, and 14.5 rounds up
    assert Budget.ratio(0.001).counts(sizes).tolist() == [1, 1, 1, 0]
    assert Budget.ratio(1.0).counts(sizes).tolist() == [576, 100, 1, 0]
    assert Budget.ratio(1 / 3).counts([576, 144]).tolist() == [192, 48]
    assert Budget.per_tile(32).counts([576, 20]).tolist() == [32, 20]
    assert Budget.tokens(3).counts([]).dtype is torch.long


def test_layer_average_counts_depend_on_the_cut() -> None:
    average = Budget.layer_average(64)
    assert average.counts([576], depth=32).tolist() == [64]
    assert average.counts([576], depth=32, cut=2).tolist() == [29]
    assert average.counts([576], depth=32, exit=16).tolist() == [128]
    with pytest.raises(ConfigError, match="needs depth"):
        average.counts([576])
    with pytest.raises(ConfigError, match="no count without a model"):
        Budget.flops(0.5).counts([576])


@given(st.floats(0.001, 1), st.integers(1, 5000))
def test_a_ratio_keeps_between_one_and_all_and_rounds_to_the_nearest(ratio: float, n: int) -> None:
    [count] = Budget.ratio(ratio).counts([n]).tolist()
    assert 1 <= count <= n
    assert abs(count - ratio * n) <= 0.5 + 1e-6 or count == 1
