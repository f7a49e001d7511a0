"""What the query rows of an attention see, brought to the form of its column statistics, and these."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontok.errors import UnsupportedError

from . import ops
from .reference import Sight
from .runtime import checks


def sight(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    borders: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
) -> Sight:
    """What the query rows see.

    Args:
        q: (B, H, M, d), all query rows.
        k: (B, G, N, d).
        scale: factor on the products of queries and keys, 1/√d by default.
        causal: row i of M sees the first i + 1 + N - M of N keys.
        window: of those, the last ``window``; needs ``causal``.
        valid: (B or 1, N) bool, keys that exist.
        visible: (B or 1, M, N) bool, which row sees which key.
        bias: (B or 1, N), what is added to the logits of each key.
        borders: (S + 1,) numbers of the rows and of the keys at which S sequences begin and end, which see only their
            own keys; not causal.
        rows: (R,) long, the rows that are looked at, all by default; what is returned is for ``q[:, :, rows]``.
    """
    m, n, device = q.shape[2], k.shape[2], q.device
    span = None
    if borders is not None:
        of_rows, of_keys = (x.to(device, torch.int32).contiguous() for x in borders)
        which = torch.searchsorted(of_rows, torch.arange(m, device=device, dtype=torch.int32), right=True)
        span = torch.stack([of_keys[which - 1], of_keys[which]])[:, None]
    elif causal and (window is not None or rows is not None):
        behind = torch.arange(1 + n - m, 1 + n, device=device, dtype=torch.int32).clamp_min(0)[None]
        first = torch.zeros_like(behind) if window is None else (behind - window).clamp_min(0)
        span, causal = torch.stack([first, behind]), False
    if rows is not None:
        span = None if span is None else span[..., rows]
        visible = None if visible is None else visible[:, rows]
    bias = None if bias is None else bias.float()
    if valid is not None:
        bias = torch.where(valid, 0.0 if bias is None else bias, -torch.inf)
    return Sight(q.shape[-1] ** -0.5 if scale is None else scale, causal, span, bias, visible)


def viewers(rows: Tensor, n: int, seen: Sight) -> Tensor:
    """(B, N) long: how many of the query rows (B, M) bool see each of ``n`` keys."""
    b, m = rows.shape
    if seen.mask is not None:
        both = seen.mask & rows[..., None]
        if seen.causal:
            both = both.tril(n - m)
        if seen.span is not None:
            key = torch.arange(n, device=rows.device)
            both = both & (key >= seen.span[0, ..., None]) & (key < seen.span[1, ..., None])
        count = both.sum(1)
    elif seen.causal or seen.span is not None:
        first = torch.zeros(b, m, dtype=torch.long, device=rows.device)
        behind = (torch.arange(1, m + 1, device=rows.device) + n - m).clamp(0, n).expand(b, -1)
        if seen.span is not None:
            first = torch.maximum(first, seen.span[0].long())
            behind = torch.minimum(behind, seen.span[1].long()) if seen.causal else seen.span[1].long().expand(b, -1)
        ones = (rows & (first < behind)).long()
        steps = torch.zeros(b, n + 1, dtype=torch.long, device=rows.device)
        count = steps.scatter_add(1, first, ones).scatter_add(1, behind, -ones).cumsum(1)[:, :n]
    else:
        count = rows.sum(1, keepdim=True).expand(-1, n)
    return count if seen.bias is None else count * (seen.bias > -torch.inf)


@torch.no_grad()
def attention_columns(q: Tensor, k: Tensor, weight: Tensor, seen: Sight, lse: Tensor | None = None) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_columns`; ``weight`` broadcasts to (B, H, M).

    Raises:
        UnsupportedError: if sums are checked (VISIONTOK_KERNELS_CHECK=1) and are not those of the rows: ``lse`` is
            of other queries, keys, masks or another scale.
    """
    weight = weight.float().expand(q.shape[:3])
    out: Tensor = ops.attention_columns(q, k, weight, lse, *seen)
    if checks():
        own = ops.attention_lse(q, k, *seen)
        rows, columns = (weight.double() * (own > -torch.inf)).sum(-1), out.double().sum(-1)
        if not torch.allclose(rows, columns, rtol=1e-4, atol=1e-4):
            raise UnsupportedError(
                f"attention_columns: keys receive {columns.tolist()} in each head, but rows that weigh {rows.tolist()} "
                "give; lse must be of the same queries, keys, scale and mask"
            )
    return out


@torch.no_grad()
def attention_peaks(
    q: Tensor, k: Tensor, weight: Tensor, seen: Sight, lse: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_peaks`; ``weight`` broadcasts to (B, M)."""
    weight = weight.float().expand(len(q), q.shape[2])
    out: Tensor = ops.attention_peaks(q, k, weight, lse, None if group is None else group.int(), *seen)
    return out


@torch.no_grad()
def attention_lse(q: Tensor, k: Tensor, seen: Sight) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_lse`."""
    out: Tensor = ops.attention_lse(q, k, *seen)
    return out


def lse_for_many(q: Tensor, k: Tensor, seen: Sight) -> Tensor | None:
    """:func:`attention_lse` for several passes over the same map; None where a pass is faster without: PyTorch makes a
    softmax sooner than exponentials of differences."""
    return attention_lse(q, k, seen) if ops.has_kernel(q) else None


@torch.no_grad()
def attention_share(q: Tensor, k: Tensor, part: Tensor, seen: Sight) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_share`."""
    out: Tensor = ops.attention_share(q, k, part, *seen)
    return out
