"""Shapes of pruning over the depth of a model, each solved for an average over all decoder layers.

One cut has a closed form, :func:`~visiontok.functional.layer_average`, and so has a concave pyramid, whose tail is
given. A geometric pyramid and a straight line have one free number each; more of it costs more, so it is found by
bisection, in whole numbers and therefore exactly. A shifted cosine is what it is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from .allocators import room_behind
from .errors import ConfigError

_STEPS = 2**60  # of the free number between 0 and 1; finer than what can change a count


def geometric(
    n: int, average: float, *, depth: int, cuts: Sequence[int], start: int = 0, stop: int | None = None
) -> list[int]:
    """⌊n·λ⌋, ⌊n·λ²⌋, … tokens after one cut, two cuts, …, with the largest λ whose average does not exceed the wanted.

    Args:
        n: visual tokens of the image.
        average: wanted mean, in tokens per layer.
        depth: decoder layers.
        cuts: layers on whose input the set shrinks, ascending.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Returns:
        One count per cut, non-increasing, each in 1 … n.

    Raises:
        ConfigError: if the layers are out of order, or the average is too small for one token after each cut.

    Reference:
        PyramidDrop, arXiv 2410.17247: λ = 0.5 at layers 8, 16 and 24 of 32.
    """
    room, lengths = room_behind(n, average, depth=depth, cuts=cuts, start=start, stop=stop)

    def counts(step: int) -> list[int]:
        return [max(n * step**i // _STEPS**i, 1) for i in range(1, len(lengths) + 1)]

    def spent(step: int) -> int:
        return sum(c * length for c, length in zip(counts(step), lengths, strict=True))

    return counts(bisect_right(range(1, _STEPS + 1), room, key=spent))


def linear(n: int, average: float, *, depth: int, first: int, start: int = 0, stop: int | None = None) -> list[int]:
    """⌊n·(1 - s)⌋, ⌊n·(1 - 2s)⌋, … tokens in the layers from ``first`` on, none where the line has ended.

    The slope s is the smallest whose average does not exceed the wanted.

    Args:
        n: visual tokens of the image.
        average: wanted mean, in tokens per layer.
        depth: decoder layers.
        first: first layer with fewer tokens.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Returns:
        One count for each of the layers ``first … stop-1``, non-increasing, each in 0 … n.

    Raises:
        ConfigError: if the layers are out of order, or the average is too small for one token in each layer.

    Reference:
        AIM, arXiv 2412.03248: s = 1/8 from layer 14 of 28.
    """
    room, [length] = room_behind(n, average, depth=depth, cuts=(first,), start=start, stop=stop)

    def counts(step: int) -> list[int]:
        return [max(n * (_STEPS - i * (_STEPS - step)) // _STEPS, 0) for i in range(1, length + 1)]

    return counts(bisect_right(range(_STEPS + 1), room, key=lambda step: sum(counts(step))) - 1)


def concave(
    n: int,
    average: float,
    *,
    depth: int,
    cuts: Sequence[int],
    tail: Sequence[int],
    start: int = 0,
    stop: int | None = None,
) -> list[int]:
    """A steep first cut and a thin tail that is given: k = ⌊(L·A - c·n - what the tail takes)/(layers of k)⌋.

    Args:
        n: visual tokens of the image.
        average: wanted mean A, in tokens per layer.
        depth: decoder layers L.
        cuts: layers on whose input the set shrinks, ascending; c is the number of layers in front of the first.
        tail: tokens after the second cut, the third, …; non-increasing.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Returns:
        k followed by the tail, k at most n.

    Raises:
        ConfigError: if the layers are out of order, the tail does not suit the cuts, or k would be less than it.

    Reference:
        HiDrop (ICLR 2026): tail 10, 5, 1; its 80-token preset rounds k up.
    """
    room, lengths = room_behind(n, average, depth=depth, cuts=cuts, start=start, stop=stop)
    if len(tail) != len(cuts) - 1 or list(tail) != sorted(tail, reverse=True) or min(tail, default=1) < 1:
        raise ConfigError(f"tail={list(tail)}: give one positive, non-increasing count for each cut after the first")
    if not lengths[0]:
        raise ConfigError(f"cuts={list(cuts)}: the first two are at one layer, so no layer has the first count")
    taken = sum(c * length for c, length in zip(tail, lengths[1:], strict=True))
    first = min((room - taken) // lengths[0], n)
    if first < max(tail, default=1):
        least = Fraction(math.prod((max(tail, default=1), lengths[0])) + taken - room, depth) + Fraction(average)
        raise ConfigError(
            f"average={average}: the first cut would keep {max(first, 0)} tokens, fewer than the tail {list(tail)}; "
            f"raise the average to {float(least):.2f}, or shorten the tail"
        )
    return [first, *tail]


def shifted_cosine(depth: int, *, shift: float = 0.5, most: float = 0.85, least: float = 0.15) -> list[float]:
    """cos(π·l / (L - 1)) / 2 + shift, the share of tokens in each layer l of L; all of them where it is above ``most``.

    Args:
        depth: decoder layers L.
        shift: added to the half cosine.
        most: the largest share that is not everything.
        least: the smallest share.

    Returns:
        One share per layer, 1.0 for all tokens.

    Reference:
        p-MoD (ICCV 2025), progressive ratio decay: shift 0.5, from 0.85 to 0.15.
    """
    shares = [math.cos(math.pi * layer / max(depth - 1, 1)) / 2 + shift for layer in range(depth)]
    return [1.0 if share > most else max(share, least) for share in shares]


def merge_rates(total: int, depth: int, inflect: float = 0.0) -> list[int]:
    """Tokens that each layer of a vision tower merges away, ``total`` in all.

    The rates lie on a straight line from 1 - ``inflect`` to 1 + ``inflect`` times their mean, each sum of the first of
    them rounded.

    Args:
        total: tokens to merge away.
        depth: layers.
        inflect: 0 for as many in each layer, 1 for ever more from none, -1 for ever fewer down to none.

    Returns:
        One count per layer.

    Raises:
        ConfigError: if ``inflect`` lies outside -1 … 1.

    Reference:
        ToMe, arXiv 2210.09461, appendix; its code rounds each rate down, so that other totals come out.
    """
    if not -1 <= inflect <= 1:
        raise ConfigError(f"inflect={inflect}: must lie in [-1, 1]; 0 merges as many tokens in each layer")
    weights = [1 + inflect * (2 * layer / (depth - 1) - 1 if depth > 1 else 0.0) for layer in range(depth)]
    sums = [round(total * sum(weights[: layer + 1]) / sum(weights)) for layer in range(depth)]
    return [sums[0], *(b - a for a, b in pairwise(sums))]
