"""Fast twins of the operators that cost real time."""

from .compaction import gather_rows
from .greedy import greedy, running_max
from .matching import nearest
from .ops import nearest_unit, segment_mean
from .reference import (
    TILE,
    Coverage,
    Determinant,
    Discount,
    Picks,
    Rows,
    RunningMax,
    RunningSum,
    Seeding,
    Widening,
    attention_columns,
    cosine,
    cosines,
    finite,
    gather_nearest,
    nearest_later,
    thin,
    unit,
)

__all__ = [
    "TILE",
    "Coverage",
    "Determinant",
    "Discount",
    "Picks",
    "Rows",
    "RunningMax",
    "RunningSum",
    "Seeding",
    "Widening",
    "attention_columns",
    "cosine",
    "cosines",
    "finite",
    "gather_nearest",
    "gather_rows",
    "greedy",
    "nearest",
    "nearest_later",
    "nearest_unit",
    "running_max",
    "segment_mean",
    "thin",
    "unit",
]
