"""Numbers and tables in Markdown, as the card and its companions write them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from visiontok.statistics import Estimate, difference


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str) -> str:
    """A paragraph in lines of 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def percent(share: float, sign: str = "") -> str:
    """A share in percent."""
    return format(round(100 * share, 1) + 0.0, f"{sign}.1f")  # + 0.0: no minus before a zero


def estimate(found: Estimate) -> str:
    """A share in percent, with its interval."""
    return f"{percent(found.value)} [{percent(found.low)}, {percent(found.high)}]"


def gain(hits: np.ndarray | None, reference: np.ndarray | None, scene: np.ndarray) -> str:
    """A paired difference in points; nothing where one side was not measured."""
    if hits is None or reference is None:
        return ""
    found = difference(hits, reference, scene)
    p = "p<0.001" if found.p < 0.001 else f"p={found.p:.3f}"
    return f"{percent(found.value, '+')} [{percent(found.low, '+')}, {percent(found.high, '+')}] {p}"
