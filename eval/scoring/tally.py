"""Headlines as functions of sums over questions, so that comparisons can compute them anew for every resample.

Each agrees with the aggregate of its metric, but for questions that a resample repeats: two copies of MME's picture are
two pictures, not four questions about one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Mark, Tally, Target


def mean_of_read(marks: Sequence[Mark], targets: Sequence[Target]) -> Tally:
    """Mean of the marks of those replies in which something was read."""
    counts = np.array([(mark.score, 1.0) if mark.parsed is not None else (0.0, 0.0) for mark in marks])
    return Tally(counts, lambda sums: ratio(sums[..., 0], sums[..., 1]), 1.0, apart(marks))


def macro(marks: Sequence[Mark], targets: Sequence[Target]) -> Tally:
    """Mean of the means of the categories."""
    entries = [[(target.group("category"), (mark.score,))] for mark, target in zip(marks, targets, strict=True)]

    def score(sums: np.ndarray) -> np.ndarray:
        questions, right = parts_of(sums, 2)
        return mean_of_parts(ratio(right, questions), questions)

    return Tally(by_part(entries, 1), score, 1.0, apart(marks))


def by_part(entries: Sequence[Sequence[tuple[str, Sequence[float]]]], width: int) -> np.ndarray:
    """Counts in columns of parts.

    Args:
        entries: of each question, the parts it is in and what it adds there, ``width`` numbers.
        width: see there.

    Returns:
        (Q, (1 + width) * parts): how often the question is in each part, and what it adds, for :func:`parts_of`.
    """
    parts = {name: at for at, name in enumerate(sorted({name for entry in entries for name, _ in entry}))}
    counts = np.zeros((len(entries), 1 + width, len(parts)))
    for row, entry in zip(counts, entries, strict=True):
        for name, added in entry:
            row[:, parts[name]] += (1, *added)
    return counts.reshape(len(entries), -1)


def parts_of(sums: np.ndarray, rows: int) -> np.ndarray:
    """Sums (..., rows * parts) of :func:`by_part` as (rows, ..., parts)."""
    return np.moveaxis(sums.reshape(*sums.shape[:-1], rows, -1), -2, 0)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def mean_of_parts(values: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Mean over the last dimension of parts that have questions."""
    there = questions > 0
    return ratio((values * there).sum(-1), there.sum(-1))


def apart(marks: Sequence[Mark]) -> Sequence[str]:
    """Units of questions that are right or wrong each by itself."""
    return [str(number) for number in range(len(marks))]
