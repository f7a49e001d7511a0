"""Every token goes to the kept token it resembles most."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import nearest
from ..kernels.batching import mask, rows, unrow


def nearest_kept(features: Tensor, keep: Tensor, valid: Tensor | None = None, most: int | None = None) -> Tensor:
    """For every token the place of the kept token of largest cosine; a kept token goes to itself.

    With ``merge(features, nearest_kept(features, keep), N)`` the rows of kept tokens hold the means of those they
    stand for, and the sizes are their masses.

    Args:
        features: (N, D) or (B, N, D).
        keep: (N,) or (B, N) bool; in a row that keeps nothing every token gets -1.
        valid: (N,) or (B, N) bool; other tokens get -1.
        most: the largest number of kept tokens of a row, where it is known; read from ``keep`` otherwise.

    Returns:
        long (N,) or (B, N) in 0 … N-1.
    """
    x, kept = rows(features, 2, "features"), rows(keep, 1, "keep")
    ok = mask(valid, x)
    here = torch.arange(x.shape[1], device=x.device).expand(ok.shape)
    # Compare with the kept rows only, gathered to the front.
    if most is None:
        most = max([1, *kept.sum(-1).tolist()])
    order = (~kept).long().sort(dim=-1, stable=True).indices[:, :most]
    front = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    _, index = nearest(x, front, kept.gather(1, order)[:, None])
    place = order.gather(1, index.clamp_max(order.shape[1] - 1))
    ok = ok & kept.any(-1, keepdim=True)
    return unrow(torch.where(ok, torch.where(kept, here, place), -1), features, 2)
