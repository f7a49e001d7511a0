"""Features seen from elsewhere: from their mean, or from what a text subspace cannot explain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import finite
from ..kernels.batching import mask, rows, unrow


def centred(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Features minus the mean of the image; their cosines are correlations over the channels.

    Args:
        features: (N, D) or (B, N, D).
        valid: (N,) or (B, N) bool; other tokens do not count for the mean.

    Returns:
        float32, shape of ``features``; rows that hold NaN or infinity keep it and do not count either.

    Reference:
        Cen-Prune, arXiv 2608.30263.
    """
    x = rows(features, 2, "features").float()
    counts = (mask(valid, x) & finite(x))[..., None]
    mean = torch.where(counts, x, 0.0).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    return unrow(x - mean, features, 2)


def foreground(features: Tensor, rank: int, valid: Tensor | None = None) -> Tensor:
    """What the mean and the ``rank`` leading principal directions of the image do not explain.

    Args:
        features: (N, D) or (B, N, D).
        rank: directions taken out, at least 0; 0 is :func:`centred`.
        valid: (N,) or (B, N) bool; other tokens have no say.

    Returns:
        float32, shape of ``features``; rows that hold NaN or infinity keep it.

    Reference:
        LRCP, arXiv 2605.15621, residual to the low-rank background.
    """
    x = centred(rows(features, 2, "features"), valid).double()
    counts = (mask(valid, x) & finite(x))[..., None]
    known = torch.where(counts, x, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        if known.shape[1] <= known.shape[2]:
            axes = torch.linalg.eigh(known @ known.mT).eigenvectors[..., max(known.shape[1] - rank, 0) :]
            rest = known - axes @ (axes.mT @ known)
        else:
            axes = torch.linalg.eigh(known.mT @ known).eigenvectors[..., max(known.shape[2] - rank, 0) :]
            rest = known - known @ axes @ axes.mT
    return unrow(torch.where(counts, rest, x).float(), features, 2)


def residual(
    features: Tensor, basis: Tensor, *, energy: float = 0.75, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is left of features, in coordinates centred on the basis rows, after their ridge projection on these rows.

    The ridge is the eigenvalue of the rows' Gram matrix at which the larger ones hold the share ``energy`` of the sum.

    Args:
        features: (N, D) or (B, N, D).
        basis: (T, D) or (B, T, D), such as the tokens of a question.
        energy: in (0, 1].
        valid: (T,) or (B, T) bool, rows of the basis that exist; without any, features are returned as they are.

    Returns:
        float32, what is left, of the shape of ``features``, and the share of its length in the centred feature's, (N,)
        or (B, N).

    Reference:
        SIEVE, cross-modal residual, ridge by spectral energy.
    """
    x, t = rows(features, 2, "features").float(), rows(basis, 2, "basis").float()
    ok = mask(valid, t)[..., None]
    t = torch.where(ok, t, 0.0)
    mean = t.sum(1, keepdim=True) / ok.sum(1, keepdim=True).clamp_min(1)
    t, x = torch.where(ok, t - mean, 0.0).double(), (x - mean).double()
    with torch.autocast(x.device.type, enabled=False):
        gram = t @ t.mT  # (B, T, T)
        spectrum = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)
        # the first place at which the running sum reaches the share; rounding must not move it
        short = spectrum.cumsum(-1) < energy * spectrum.sum(-1, keepdim=True) * (1 - 1e-9)
        ridge = spectrum.gather(-1, short.sum(-1, keepdim=True).clamp_max(t.shape[1] - 1))
        tiny = 1e-12 * spectrum[..., :1] + 1e-30  # keeps a Gram matrix of zeros invertible
        eye = torch.eye(t.shape[1], device=t.device, dtype=t.dtype)
        weights = torch.linalg.solve(gram + (ridge + tiny)[..., None] * eye, t @ x.mT)  # (B, T, N)
        rest = x - weights.mT @ t
    share = rest.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)
    return unrow(rest.float(), features, 2), unrow(share.float(), features, 2)
