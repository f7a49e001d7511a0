"""Tokens grouped by the principal component they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import finite
from ..kernels.batching import mask, rows, unrow


def components(features: Tensor, count: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """For each token the principal component, of the first ``count``, in which it has the largest coordinate.

    Components are those of sigmoid(features) with tokens as variables, each centred over its channels; by an exact
    eigendecomposition in float64, so that the same features give the same groups.

    Args:
        features: (N, D) or (B, N, D); rows that hold NaN or infinity count as zero.
        count: number of components, int or (B,) long, at least 1; more than min(N, D) give no more.
        valid: (N,) or (B, N) bool; other tokens have no say, and their component means nothing.

    Returns:
        (N,) or (B, N) long in 0 … count-1.

    Reference:
        PruneSID, arXiv 2603.09480, principal semantic components analysis.
    """
    x = rows(features, 2, "features").double()
    ok = mask(valid, x) & finite(x)
    x = torch.sigmoid(torch.where(ok[..., None], x, 0.0))
    x = torch.where(ok[..., None], x - x.mean(-1, keepdim=True), 0.0)
    n, d = x.shape[1:]
    if n <= d:
        loadings = torch.linalg.eigh(x @ x.mT).eigenvectors.flip(-1)  # (B, N, N), largest variance first
    else:
        spectrum, axes = torch.linalg.eigh(x.mT @ x)
        loadings = x @ (axes / spectrum.clamp_min(1e-12 * spectrum[:, -1:] + 1e-300).sqrt()[:, None]).flip(-1)
    most = torch.as_tensor(count, device=x.device).expand(len(x))[:, None, None]
    weight = torch.where(torch.arange(loadings.shape[2], device=x.device) < most, loadings.abs(), -1.0)
    return unrow(weight.argmax(-1), features, 2)
