"""Entropy of the grey levels of a patch: strokes and texture have much, flat areas none."""

from __future__ import annotations

import torch
from torch import Tensor

GREY = (0.299, 0.587, 0.114)


def grey_levels(pixels: Tensor) -> Tensor:
    """(…, 3, P) in 0 … 1 → (…, P) long in 0 … 255, the weighted sum of the channels; NaN is black."""
    levels = torch.nan_to_num(pixels.float(), nan=0.0).clamp(0, 1).mul(255)
    weights = torch.tensor(GREY, device=levels.device)[:, None]
    return (levels * weights).sum(-2).round().long()


def pixel_entropy(pixels: Tensor) -> Tensor:
    """Entropy, in nats, of the histogram of 256 grey levels of each patch.

    The weighted sum of the channels is rounded to whole levels.

    Args:
        pixels: (…, N, 3, P) in 0 … 1.

    Returns:
        (…, N) float32, from 0 (all pixels alike) to log(min(P, 256)).

    Reference:
        ERASE, arXiv 2605.09982, stage 1.
    """
    grey = grey_levels(pixels).flatten(0, -2)  # (M, P)
    counts = torch.zeros(len(grey), 256, device=grey.device)
    counts.scatter_add_(1, grey, torch.ones_like(grey, dtype=counts.dtype))
    share = counts / grey.shape[1]
    return torch.special.entr(share).sum(-1).view(pixels.shape[:-2])
