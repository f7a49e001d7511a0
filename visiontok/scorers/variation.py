"""How much a layer changes a token."""

from __future__ import annotations

from torch import Tensor


def variation(states: Tensor, earlier: Tensor) -> Tensor:
    """‖h_i - h'_i‖, the Euclidean length of the difference.

    Args:
        states: (…, N, D), hidden states on the input of one layer.
        earlier: the same shape, on the input of a layer before.

    Returns:
        (…, N) float32.

    Reference:
        V2Drop, CVPR 2026, token variation.
    """
    return (states.float() - earlier.float()).norm(dim=-1)
