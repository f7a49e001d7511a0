"""How much of a patch is background: the commonest grey level of its picture."""

from __future__ import annotations

from torch import Tensor

from .entropy import grey_levels


def background(pixels: Tensor, near: float) -> Tensor:
    """Share of the pixels of each patch that are as grey as the background.

    Args:
        pixels: (N, 3, P) in 0 … 1, the patches of one picture.
        near: how far a grey level, in 0 … 1, may be from the background's; those nearer belong to it.

    Returns:
        (N,) float32.

    Reference:
        DocPrune, arXiv 2604.22281, background token pruning.
    """
    grey = grey_levels(pixels)
    mode = grey.flatten().bincount(minlength=256).argmax()
    return ((grey - mode).abs() < near * 255).float().mean(-1)
