"""Fast twins of the operators that cost real time."""

# With the top of the repository on sys.path, transformers imports this folder as it probes for a package `kernels`.
# The operators must not be registered a second time: that would pull them from under their users.
if __name__ == "visiontok.kernels":
    from .columns import (
        attention_columns,
        attention_lse,
        attention_peaks,
        attention_share,
        lse_for_many,
        sight,
        viewers,
    )
    from .compaction import gather_rows
    from .greedy import coverage, determinant, greedy, running_max, running_sum
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
        Sight,
        Widening,
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
    "Sight",
    "Widening",
    "attention_columns",
    "attention_lse",
    "attention_peaks",
    "attention_share",
    "cosine",
    "cosines",
    "coverage",
    "determinant",
    "finite",
    "gather_nearest",
    "gather_rows",
    "greedy",
    "lse_for_many",
    "nearest",
    "nearest_later",
    "nearest_unit",
    "running_max",
    "running_sum",
    "segment_mean",
    "sight",
    "thin",
    "unit",
    "viewers",
]
