"""Fast twins of the operators that cost real time."""

from .reference import (
    Coverage,
    Determinant,
    Picks,
    RunningMax,
    RunningSum,
    Seeding,
    attention_columns,
    cosine,
    gather_nearest,
    greedy,
    nearest,
    nearest_later,
    nearest_unit,
    segment_mean,
    thin,
    unit,
)

__all__ = [
    "Coverage",
    "Determinant",
    "Picks",
    "RunningMax",
    "RunningSum",
    "Seeding",
    "attention_columns",
    "cosine",
    "gather_nearest",
    "greedy",
    "nearest",
    "nearest_later",
    "nearest_unit",
    "segment_mean",
    "thin",
    "unit",
]
