"""Fast twins of the operators that cost real time."""

from .reference import (
    TILE,
    Coverage,
    Determinant,
    Discount,
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
    "TILE",
    "Coverage",
    "Determinant",
    "Discount",
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
