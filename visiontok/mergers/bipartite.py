"""Bipartite soft matching: pair tokens at even places with their most similar token at an odd place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import nearest, segment_mean
from ..kernels.batching import mask, rows, unrow
from ..selectors.topk import rank


def bipartite(
    metric: Tensor,
    r: int | Tensor | None = None,
    *,
    threshold: float | None = None,
    prefix: int = 0,
    raster: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Join the ``r`` even tokens whose best odd token is most similar to that odd token.

    Groups are numbered in the order of the published code: the prefix by place; even tokens that stay, by falling
    similarity or, with a prefix or ``raster``, by place; then the odd tokens.

    Args:
        metric: (N, D) or (B, N, D), compared by cosine.
        r: tokens to merge away, int or (B,) long; at most half of those behind the prefix, which is what None stands
            for, and r <= 0 changes nothing.
        threshold: merge only pairs of larger cosine.
        prefix: so many tokens in front (CLS, registers) neither merge away nor take any in.
        raster: number the even tokens that stay by place.
        valid: (N,) or (B, N) bool, of which the true ones come first; other tokens get group -1.

    Returns:
        long (N,) or (B, N): the group of every token, 0 … (valid tokens - tokens merged away - 1).

    Reference:
        ToMe, arXiv 2210.09461, section 3, of which the prefix is the CLS and the distillation token; AIM, arXiv
        2412.03248, applies it in rounds; DyMU, arXiv 2504.17040, by threshold.
    """
    x = rows(metric, 2, "metric")
    ok = mask(valid, x)
    most = (ok.sum(-1) - prefix).clamp_min(0) // 2
    merged = most if r is None else torch.minimum(torch.as_tensor(r, device=x.device).clamp_min(0), most)

    even_ok, odd_ok = ok[:, ::2], ok[:, 1::2]
    if not odd_ok.shape[1]:
        return unrow(torch.where(ok, 0, -1), metric, 2)
    similarity, partner = _pairs(x, prefix, ok)
    if threshold is not None:
        merged = torch.minimum(merged, (even_ok & (similarity > threshold)).sum(-1))
    place = rank(similarity, even_ok)
    stays = even_ok & (place >= merged[:, None])
    number = stays.cumsum(-1) - 1 + prefix // 2 if raster or prefix else place - merged[:, None]
    odd = stays.sum(-1, keepdim=True) + odd_ok.cumsum(-1) - 1

    group = torch.full(ok.shape, -1, dtype=torch.long, device=x.device)
    group[:, ::2] = torch.where(stays, number, odd.gather(1, partner.clamp_max(odd.shape[1] - 1)))
    group[:, 1::2] = odd
    untouched = torch.arange(ok.shape[1], device=x.device)
    group[:, :prefix] = untouched[:prefix]
    group = torch.where((merged > 0)[:, None], group, untouched)
    return unrow(torch.where(ok, group, -1), metric, 2)


def pair_cosines(metric: Tensor, *, prefix: int = 0, valid: Tensor | None = None) -> Tensor:
    """The cosines by which :func:`bipartite` chooses.

    Args:
        metric: (B, N, D), at least two tokens.
        prefix: as above.
        valid: (B, N) bool, as above.

    Returns:
        (B, ⌈N/2⌉) float32: of each even token to its nearest odd token; -inf for those of the prefix, or not valid.
    """
    ok = mask(valid, metric)
    return torch.where(ok[:, ::2], _pairs(metric, prefix, ok)[0], -torch.inf)


def _pairs(x: Tensor, prefix: int, ok: Tensor) -> tuple[Tensor, Tensor]:
    """(B, ⌈N/2⌉) cosine of each even token to its nearest odd token, and which that is."""
    takes = ok[:, 1::2].clone()
    takes[:, : prefix // 2] = False
    similarity, partner = nearest(x[:, ::2], x[:, 1::2], takes[:, None])
    similarity[:, : (prefix + 1) // 2] = -torch.inf
    return similarity, partner


def bipartite_rounds(
    metric: Tensor, r: Sequence[int], *, size: Tensor | None = None, prefix: int = 0, valid: Tensor | None = None
) -> Tensor:
    """:func:`bipartite` until ``r`` tokens are merged away: more than half of them in several rounds.

    In each round but the first, tokens are means of what they stand for.

    Args:
        metric: (B, N, D), compared by cosine.
        r: tokens to merge away of each row, on the host; at least one of those behind the prefix is left.
        size: (B, N), how many original tokens each token stands for; 1 by default.
        prefix: as above.
        valid: (B, N) bool, as above.

    Returns:
        long (B, N): the group of every token; -1 for those that are not valid.
    """
    tokens = [metric.shape[1]] * len(r) if valid is None else valid.sum(-1).tolist()
    goal = [n - min(max(k, 0), max(n - prefix - 1, 0)) for n, k in zip(tokens, r, strict=True)]
    group, x, ok = None, metric, valid
    mass = torch.ones(x.shape[:2], device=x.device) if size is None else size
    while group is None or tokens != goal:
        step = [min(n - k, (n - prefix) // 2) for n, k in zip(tokens, goal, strict=True)]
        away: int | Tensor = step[0] if len(set(step)) == 1 else torch.tensor(step, device=x.device)
        found = bipartite(x, away, prefix=prefix, valid=ok)
        tokens = [n - k for n, k in zip(tokens, step, strict=True)]
        group = found if group is None else torch.where(group < 0, -1, found.gather(1, group.clamp_min(0)))
        if tokens != goal:
            x, mass = segment_mean(x, found, max(tokens), mass)
            left = torch.tensor(tokens, device=x.device)[:, None]
            ok = None if len(set(tokens)) == 1 else torch.arange(max(tokens), device=x.device) < left
    return group
