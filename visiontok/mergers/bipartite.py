"""Bipartite soft matching: pair tokens at even places with their most similar token at an odd place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import nearest
from ..kernels.batching import mask, rows, unrow
from ..selectors.topk import rank


def bipartite(
    metric: Tensor, r: int | Tensor, *, class_token: bool = False, raster: bool = False, valid: Tensor | None = None
) -> Tensor:
    """Join the ``r`` even tokens whose best odd token is most similar to that odd token.

    Groups are numbered in the order of the published code: even tokens that stay, by falling similarity or, with
    ``class_token`` or ``raster``, by place; then the odd tokens.

    Args:
        metric: (N, D) or (B, N, D), compared by cosine.
        r: tokens to merge away, int or (B,) long; at most half of the unprotected tokens, and r <= 0 changes nothing.
        class_token: token 0 is never merged away.
        raster: number the even tokens that stay by place.
        valid: (N,) or (B, N) bool, of which the true ones come first; other tokens get group -1.

    Returns:
        long (N,) or (B, N): the group of every token, 0 … (valid tokens - r - 1).

    Reference:
        ToMe, arXiv 2210.09461, section 3; AIM, arXiv 2412.03248, applies it in rounds.
    """
    x = rows(metric, 2, "metric")
    ok = mask(valid, x)
    tokens = ok.sum(-1)
    merged = torch.as_tensor(r, device=x.device).expand(x.shape[0]).clamp_min(0)
    merged = torch.minimum(merged, (tokens - int(class_token)).clamp_min(0) // 2)

    even_ok, odd_ok = ok[:, ::2], ok[:, 1::2]
    if not odd_ok.shape[1]:
        return unrow(torch.where(ok, 0, -1), metric, 2)
    similarity, partner = nearest(x[:, ::2], x[:, 1::2], odd_ok[:, None])
    if class_token:
        similarity[:, 0] = -torch.inf
    place = rank(similarity, even_ok)
    stays = even_ok & (place >= merged[:, None])
    number = stays.cumsum(-1) - 1 if raster or class_token else place - merged[:, None]
    odd = stays.sum(-1, keepdim=True) + odd_ok.cumsum(-1) - 1

    group = torch.full(ok.shape, -1, dtype=torch.long, device=x.device)
    group[:, ::2] = torch.where(stays, number, odd.gather(1, partner.clamp_max(odd.shape[1] - 1)))
    group[:, 1::2] = odd
    untouched = torch.arange(ok.shape[1], device=x.device)
    group = torch.where((merged > 0)[:, None], group, untouched)
    return unrow(torch.where(ok, group, -1), metric, 2)
