"""Many methods at once: p-values that say so, and how alike two rankings are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from visiontok.errors import ConfigError


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number: to call those up to 0.05 real is wrong about any of them in 5 % of cases.

    Args:
        p: the p-values of all comparisons that were made, also of those that are not shown.

    Returns:
        float64, the adjusted values in the same order.

    Raises:
        ConfigError: a p-value outside 0 to 1.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p, float)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ConfigError(f"p must be a list of numbers between 0 and 1, got {p}")
    order = np.argsort(values, kind="stable")
    steps = np.arange(len(values), 0, -1) * values[order]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings of the same things: 1 if they agree, -1 if one is the other backwards.

    Args:
        one: a score for each thing.
        other: the other scores, in the same order.

    Returns:
        The coefficient; NaN where one of the rankings has nothing but ties.

    Raises:
        ConfigError: different lengths.

    Reference:
        Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.
    """
    a, b = np.asarray(one, float), np.asarray(other, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ConfigError(f"one and other must be as many scores, got shapes {a.shape} and {b.shape}")
    above = np.triu_indices(len(a), 1)
    first, second = (np.sign(x[:, None] - x)[above] for x in (a, b))
    untied = int(np.count_nonzero(first)) * int(np.count_nonzero(second))
    return float((first * second).sum() / math.sqrt(untied)) if untied else math.nan
