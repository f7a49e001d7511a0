"""Attention as a score: what tokens receive, and what chosen queries look at."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from ..kernels.batching import rows as rows_of
from ..kernels.batching import unrow


def attention_columns(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    rows: Tensor | slice | None = None,
    weight: Tensor | None = None,
    keys: slice | None = None,
    lse: Tensor | None = None,
    heads: Literal["mean", "each", "max"] = "mean",
    group: tuple[Tensor, Tensor] | None = None,
    normalise: Literal["rows", "count"] | None = "rows",
) -> Tensor:
    """Received attention: mean over heads and query rows of the softmax, per key. The N × N map is never built.

    Args:
        q: (H, M, d) or (B, H, M, d) queries, rotary positions applied; (M, H, d) with ``cu_seqlens``.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G; (N, G, d) with ``cu_seqlens``.
        scale: factor on the logits, an inverse temperature; 1/√d by default.
        causal: query i sees the keys up to i + N - M.
        window: of these the last ``window`` only.
        valid: (N,) or (B, N) bool, keys that exist; with M = N, also the rows that count.
        visible: (M, N) or (B, M, N) bool, what each row may see.
        bias: (N,) or (B, N), added to the logits of each key.
        cu_seqlens: (S + 1,), where S packed sequences begin and end, as flash attention has it, or two of them, of
            queries and keys. A token sees the keys of its own sequence.
        rows: (R,) long or a slice, query rows that count; all by default. What has M rows has so for all of them.
        weight: (M,) or (B, M), or (B, H, M), not negative, how much each row counts.
        keys: those to return; rows see the others, too.
        lse: (H, M) or (B, H, M) float32, natural logarithm of each row's denominator, where the attention itself has
            told it: of the same scale and visibility.
        heads: ``mean`` of them, ``each``, or the ``max`` in every row, before rows are summed.
        group: (M,) or (B, M) and (N,) or (B, N) whole numbers; rows count only for keys of their own number. For
            ``max``.
        normalise: divide by the ``rows``, that is the sum of their weights, by the ``count`` of rows that see the key,
            or not.

    Returns:
        (N,) or (B, N) float32, or (H, N) or (B, H, N) for each head. A row that sees nothing gives nothing, and a
        logit that is not finite counts as not seen.

    Raises:
        ConfigError: if arguments do not go together.

    Reference:
        HiPrune, arXiv 2508.00553; VisionZip, arXiv 2412.04467, for towers without CLS; H2O, arXiv 2306.14048;
        FitPrune, arXiv 2409.10197 (``max``).
    """
    if cu_seqlens is not None:
        if q.dim() != 3 or causal:
            raise ConfigError(
                f"cu_seqlens with q {tuple(q.shape)}, causal={causal}: give packed (tokens, heads, d) without causal"
            )
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        cu_seqlens = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    if window is not None and not causal:
        raise ConfigError(f"window={window}: a window ends at the row itself; give causal=True")
    if group is not None and heads != "max":
        raise ConfigError(f"group with heads={heads!r}: rows are told apart for heads='max' only")
    qs, ks = rows_of(q, 3, "q"), rows_of(k, 3, "k")
    (b, number, m, _), n = qs.shape, ks.shape[2]
    ok = None if valid is None else rows_of(valid, 1, "valid")
    if weight is None:
        weight = ok.bool() if ok is not None and m == n else qs.new_ones(1, m, dtype=torch.float32)
    else:
        weight = rows_of(weight, 1, "weight") if weight.dim() < 3 else weight
    weight = weight.float() if weight.dim() == 3 else weight.float()[:, None]  # (B or 1, H or 1, M)
    at = torch.arange(m, device=q.device)[rows] if isinstance(rows, slice) else rows
    seen = _sight(qs, ks, valid, visible, bias, scale=scale, causal=causal, window=window, borders=cu_seqlens, rows=at)
    known = None if lse is None else rows_of(lse, 2, "lse")
    numbers = None if group is None else [rows_of(x, 1, "group").expand(b, -1) for x in group]
    if at is not None:
        qs, weight = qs[:, :, at], weight[..., at]
        known = None if known is None else known[:, :, at]
        numbers = None if numbers is None else [numbers[0][:, at], numbers[1]]
    if heads == "max":
        if weight.shape[1] > 1:
            raise ConfigError(f"weight {tuple(weight.shape)} with heads='max': give one weight per row")
        mine = None if numbers is None else torch.cat(numbers, 1)
        found = kernels.attention_peaks(qs, ks, weight[:, 0], seen, known, mine)
    else:
        found = kernels.attention_columns(qs, ks, weight, seen, known)
        found = found.mean(1) if heads == "mean" else found
    if normalise is not None:
        if normalise == "rows":
            total = weight.sum(-1, keepdim=True)
            total = total.expand(-1, number, -1) if heads == "each" else total.mean(1)
        else:
            total = kernels.viewers((weight > 0).any(1).expand(b, -1), n, seen).float()
            total = total[:, None] if heads == "each" else total
        found = found / torch.where(total > 0, total, 1.0)
    return unrow(found if keys is None else found[..., keys], q, 3)


def attention_share(
    q: Tensor,
    k: Tensor,
    part: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """How much of the attention of each query row falls on a part of the keys, mean over heads.

    Args:
        q: (H, M, d) or (B, H, M, d) queries.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G.
        part: (N,) or (B, N) bool.
        scale, causal, window, valid, visible, bias: as in :func:`attention_columns`.
        rows: (R,) long, the rows that are asked; all by default.

    Returns:
        (R,) or (B, R) float32; 0 where a row sees nothing.
    """
    qs, ks = rows_of(q, 3, "q"), rows_of(k, 3, "k")
    seen = _sight(qs, ks, valid, visible, bias, scale=scale, causal=causal, window=window, rows=rows)
    asked = qs if rows is None else qs[:, :, rows]
    return unrow(kernels.attention_share(asked, ks, rows_of(part, 1, "part"), seen).mean(1), q, 3)


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float | None = None, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention of chosen query rows, mean over heads, softmax over all keys given.

    Args:
        q: (H, R, d) or (B, H, R, d), the queries of the chosen rows only: CLS, last prompt token, question tokens.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G. Give every key the row sees, text too: the
            denominator needs them.
        scale: factor on the logits; 1/√d by default.
        visible: (R, N) or (B, R, N) bool, what each row may see; a row that sees nothing gets 0.
        bias: (N,) or (B, N), added to the logits of each key.

    Returns:
        (R, N) or (B, R, N) float32.

    Reference:
        FastV, arXiv 2403.06764 (last row); FasterVLM, arXiv 2412.01818 (CLS row).
    """
    return unrow(_weights(q, k, scale, visible, bias).mean((1, 2)), q, 3)


def attention_heads(
    q: Tensor, k: Tensor, *, scale: float | None = None, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As :func:`attention_rows`, every head for itself.

    Returns:
        (H, R, N) or (B, H, R, N) float32.

    Reference:
        SparseVLM+, github.com/Gumpest/SparseVLMs (the heads that look at the image most).
    """
    return unrow(_weights(q, k, scale, visible, bias).flatten(1, 2), q, 3)


def _sight(
    q: Tensor, k: Tensor, valid: Tensor | None, visible: Tensor | None, bias: Tensor | None, **others: Any
) -> kernels.Sight:
    """What query rows see; of one row or of a batch, as the caller has it."""
    return kernels.sight(
        q,
        k,
        valid=None if valid is None else rows_of(valid, 1, "valid").bool(),
        visible=None if visible is None else rows_of(visible, 2, "visible"),
        bias=None if bias is None else rows_of(bias, 1, "bias"),
        **others,
    )


def _weights(q: Tensor, k: Tensor, scale: float | None, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """(B, G, H / G, R, N) float32."""
    logits = _logits(q, k, scale)
    if bias is not None:
        logits = logits + rows_of(bias, 1, "bias").float()[:, None, None, None]
    if visible is None:
        return logits.softmax(-1)
    hidden = ~rows_of(visible, 2, "visible")[:, None, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)


def attention_flow(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    start: Tensor | None = None,
    temperature: float = 0.1,
    rounds: int = 5,
) -> Tensor:
    """Where attention leads: a walk over the tokens that starts anywhere and follows sharpened attention.

    p ← p · softmax(logits / temperature), ``rounds`` times in every head; the root of the mean over heads of p². Every
    round is one pass of :func:`attention_columns`, with p for weights; the N × N map is never held.

    Args:
        q: (H, N, d) or (B, H, N, d) queries.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G.
        scale: factor on the logits; 1/√d by default.
        causal, window, valid, visible: what each token sees, as in :func:`attention_columns`.
        start: (N,) or (B, N) bool, tokens at which the walk may start; all by default.
        temperature: below 1 sharpens.
        rounds: steps of the walk.

    Returns:
        (N,) or (B, N) float32.

    Reference:
        AIM, arXiv 2412.03248; PageRank without damping.
    """
    qs, ks = rows_of(q, 3, "q"), rows_of(k, 3, "k")
    ok = q.new_ones(1, qs.shape[2], dtype=torch.bool) if start is None else rows_of(start, 1, "start").bool()
    sharp = (q.shape[-1] ** -0.5 if scale is None else scale) / temperature
    seen = _sight(qs, ks, valid, visible, None, scale=sharp, causal=causal, window=window)
    lse = kernels.lse_for_many(qs, ks, seen)
    walk = (ok / ok.sum(-1, keepdim=True).clamp_min(1))[:, None].expand(len(qs), qs.shape[1], -1)  # (B, H, N)
    for _ in range(rounds):
        walk = kernels.attention_columns(qs, ks, walk, seen, lse)
    return unrow(walk.square().mean(1).sqrt(), q, 3)


def attention_logits(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """What chosen query rows look at before the softmax, mean over heads.

    Args:
        q: (H, R, d) or (B, H, R, d), the queries of the chosen rows only.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G.
        scale: factor on the logits; 1/√d by default.

    Returns:
        (R, N) or (B, R, N) float32.

    Reference:
        GlobalCom2, arXiv 2501.05179 (CLS row).
    """
    return unrow(_logits(q, k, scale).mean((1, 2)), q, 3)


def _logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """(B, G, H / G, R, N) float32."""
    qs, ks = rows_of(q, 3, "q").float(), rows_of(k, 3, "k").float()
    groups = ks.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        logits = qs.unflatten(1, (groups, qs.shape[1] // groups)) @ ks.mT[:, :, None]
    return logits * (q.shape[-1] ** -0.5 if scale is None else scale)
