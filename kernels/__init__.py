"""Fast twins of the operators that cost real time."""

from .reference import (
    Coverage,
    Determinant,
    Picks,
    RunningMax,
    RunningSum,
    attention_columns,
    cosine,
    greedy,
    nearest,
    segment_mean,
    unit,
)

__all__ = [
    "Coverage",
    "Determinant",
    "Picks",
    "RunningMax",
    "RunningSum",
    "attention_columns",
    "cosine",
    "greedy",
    "nearest",
    "segment_mean",
    "unit",
]
