"""What methods share that cut several times inside the language model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..budget import Budget
from ..errors import ConfigError
from ..method import Layer, Method, Stage


def cuts(method: Method, layers: Sequence[Layer], shares: Sequence[float]) -> tuple[Stage, ...]:
    """A cut by ``method`` at each of ``layers``, behind which a share of the *original* tokens is left."""
    return tuple(
        Stage(kind="cut", method=method, layer=layer, keep=Budget.ratio(share))
        for layer, share in zip(layers, shares, strict=True)
    )


def check_cuts(layers: Sequence[Layer], shares: Sequence[float]) -> None:
    """Whether the options of such a method make sense.

    Raises:
        ConfigError: unless there is one share in (0, 1] for each layer, none larger than the one before.
    """
    if not layers:
        raise ConfigError("layers=(): give at least one decoder layer")
    if len(layers) != len(shares):
        raise ConfigError(f"shares={tuple(shares)!r}: give one for each of layers={tuple(layers)!r}")
    if any(a < b for a, b in itertools.pairwise(shares)) or not 0 < shares[-1] <= shares[0] <= 1:
        raise ConfigError(f"shares={tuple(shares)!r}: shares of the original tokens lie in (0, 1] and never grow")
