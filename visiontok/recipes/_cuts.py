"""Several cuts of one method, at layers and with shares that its options name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..budget import Budget
from ..errors import ConfigError
from ..method import Layer, Method, Stage


def cuts(method: Method, layers: Sequence[Layer], shares: Sequence[float]) -> tuple[Stage, ...]:
    """One cut per layer, after which that share of the original tokens is left.

    Raises:
        ConfigError: without layers, and unless there is one share for each, in (0, 1], none larger than the one before.
    """
    if not layers:
        raise ConfigError(f"layers={tuple(layers)!r}: name at least one to cut at")
    if len(layers) != len(shares):
        raise ConfigError(f"shares={tuple(shares)!r}: give one per layer, of which there are {len(layers)}")
    if not 0 < shares[-1] <= shares[0] <= 1 or any(a < b for a, b in pairwise(shares)):
        raise ConfigError(f"shares={tuple(shares)!r}: shares lie in (0, 1] and do not grow from cut to cut")
    return tuple(
        Stage(kind="cut", method=method, layer=layer, keep=Budget.ratio(share))
        for layer, share in zip(layers, shares, strict=True)
    )


def listed(method: Method, *names: str) -> None:
    """Make tuples of the lists that JSON gave the options ``names``; for ``__post_init__``."""
    for name in names:
        object.__setattr__(method, name, tuple(getattr(method, name)))
