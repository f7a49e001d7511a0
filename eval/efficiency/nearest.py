"""The budget whose time is nearest to a given one, found with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable


def nearest(ratio: Callable[[int], float], low: int, high: int, tries: int = 4) -> int:
    """The number of tokens at which ``ratio`` came nearest to 1, among those that were tried.

    Both ends are measured, then points between them where a straight line through the bracket's ends crosses 1. A time
    that grows with the number of tokens is taken for granted, not a straight line.

    Args:
        ratio: measures a number of tokens: its time as a multiple of what it is to be.
        low: fewest tokens.
        high: most.
        tries: measurements between them at most.
    """
    seen = {k: ratio(k) for k in dict.fromkeys((low, high))}
    for _ in range(tries):
        if high - low < 2 or not seen[low] < 1 < seen[high]:
            break
        place = low + (1 - seen[low]) / (seen[high] - seen[low]) * (high - low)
        middle = min(max(round(place), low + 1), high - 1)
        seen[middle] = ratio(middle)
        low, high = (middle, high) if seen[middle] < 1 else (low, middle)
    return min(seen, key=lambda k: abs(math.log(seen[k])))
