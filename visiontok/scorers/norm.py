"""Length of the token as its importance."""

from __future__ import annotations

from torch import Tensor


def norm(features: Tensor) -> Tensor:
    """Euclidean length of every token, a near-free stand-in for the projector's sensitivity.

    Args:
        features: (…, N, D).

    Returns:
        (…, N) float32.
    """
    return features.float().norm(dim=-1)
