"""How differently the heads of a layer see a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TILE = 4096  # tokens whose heads are held in float64 at a time


def head_entropy(heads: Tensor, *, normalise: bool = False) -> Tensor:
    """-Σ λ ln λ / ln H over the eigenvalues λ of Z·Zᵀ / H, Z the heads of a token less their mean.

    The matrix is H × H; Zᵀ·Z, of the width of a head, has the same eigenvalues beside zeros. A rotation that all heads
    share changes nothing, so rotary positions do not matter.

    Args:
        heads: (…, N, H, d), queries, keys or values of each token, of at least two heads.
        normalise: divide the eigenvalues by their sum, which makes it an entropy between 0 and 1; without, long
            vectors have negative values.

    Returns:
        (…, N) float32; NaN where a token is not finite.

    Reference:
        EntropyPrune, arXiv 2602.17196, matrix entropy with the dual Gram matrix.
    """
    number = heads.shape[-2]
    rows = heads.detach().flatten(0, -3)
    return torch.cat([_entropy(tile, number, normalise) for tile in rows.split(_TILE)]).view(heads.shape[:-2])


def _entropy(heads: Tensor, number: int, normalise: bool) -> Tensor:
    finite = heads.isfinite().flatten(1).all(1)
    z = torch.where(finite[:, None, None], heads, 0.0).double()
    z = z - z.mean(1, keepdim=True)
    with torch.autocast(heads.device.type, enabled=False):
        values = torch.linalg.eigvalsh(z @ z.mT / number).clamp_min(0)
    if normalise:
        values = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    values = values.clamp_min(1e-10)
    scores = -(values * values.log()).sum(-1) / math.log(number)
    return torch.where(finite, scores, torch.nan).float()
