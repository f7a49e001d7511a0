"""The threshold of methods that compare pixels."""

from __future__ import annotations

from ..errors import ConfigError


def check_tau(tau: float) -> None:
    """Whether ``tau`` can be a difference of pixel values in 0 … 1.

    Raises:
        ConfigError: if it lies outside, or is no number.
    """
    if not 0 <= tau < 1:
        raise ConfigError(f"tau={tau!r}: a difference of pixel values lies in [0, 1)")
