"""Attention as a score: what tokens receive, and what chosen queries look at."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels.batching import rows, unrow

_TILE = 256  # query rows whose attention is held at a time


def attention_columns(
    q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = False, valid: Tensor | None = None
) -> Tensor:
    """Received attention: mean over heads and query rows of the softmax, per key. The N × N map is never built.

    Args:
        q: (H, M, d) or (B, H, M, d) queries, rotary positions applied.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G.
        scale: factor on the logits; 1/√d by default.
        causal: query i sees the keys up to i + N - M.
        valid: (N,) or (B, N) bool, keys that exist; with M = N, also the rows that count.

    Returns:
        (N,) or (B, N) float32.

    Reference:
        HiPrune, arXiv 2508.00553; VisionZip, arXiv 2412.04467, for towers without CLS.
    """
    ok = None if valid is None else rows(valid, 1, "valid")
    received = kernels.attention_columns(rows(q, 3, "q"), rows(k, 3, "k"), scale=scale, causal=causal, valid=ok)
    return unrow(received, q, 3)


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


def attention_groups(
    q: Tensor, k: Tensor, *, scale: float | None = None, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As :func:`attention_rows`, the sum over the heads that share each key head.

    Returns:
        (G, R, N) or (B, G, R, N) float32.

    Reference:
        H2O, arXiv 2306.14048, and SnapKV, arXiv 2404.14469, which choose for each key-value head.
    """
    return unrow(_weights(q, k, scale, visible, bias).sum(2), q, 3)


def attention_peaks(
    q: Tensor, k: Tensor, *, scale: float | None = None, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As :func:`attention_rows`, the largest over heads instead of the mean.

    Reference:
        FitPrune, arXiv 2409.10197.
    """
    return unrow(_weights(q, k, scale, visible, bias).amax((1, 2)), q, 3)


def _weights(q: Tensor, k: Tensor, scale: float | None, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """(B, G, H / G, R, N) float32."""
    logits = _logits(q, k, scale)
    if bias is not None:
        logits = logits + rows(bias, 1, "bias").float()[:, None, None, None]
    if visible is None:
        return logits.softmax(-1)
    hidden = ~rows(visible, 2, "visible")[:, None, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)


def attention_flow(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    valid: Tensor | None = None,
    temperature: float = 0.1,
    rounds: int = 5,
) -> Tensor:
    """Where attention leads: a walk over the tokens that starts anywhere and follows sharpened attention.

    p ← p · softmax(logits / temperature), ``rounds`` times in every head; the root of the mean over heads of p². The
    N × N map is computed anew in every round, some rows at a time, and never held.

    Args:
        q: (H, N, d) or (B, H, N, d) queries.
        k: (G, N, d) or (B, G, N, d) keys; H is a multiple of G.
        scale: factor on the logits; 1/√d by default.
        visible: (N, N) or (B, N, N) bool, what each row may see; all by default.
        valid: (N,) or (B, N) bool, tokens at which the walk may start.
        temperature: below 1 sharpens.
        rounds: steps of the walk.

    Returns:
        (N,) or (B, N) float32.

    Reference:
        AIM, arXiv 2412.03248; PageRank without damping.
    """
    qs, ks = rows(q, 3, "q"), rows(k, 3, "k")
    ok = (
        torch.ones(len(qs), qs.shape[2], dtype=torch.bool, device=q.device)
        if valid is None
        else rows(valid, 1, "valid")
    )
    seen = None if visible is None else rows(visible, 2, "visible")
    sharp = (q.shape[-1] ** -0.5 if scale is None else scale) / temperature
    walk = (ok / ok.sum(-1, keepdim=True).clamp_min(1))[:, None].expand(-1, qs.shape[1], -1)  # (B, H, N)
    for _ in range(rounds):
        step = torch.zeros_like(walk)
        for tile in torch.arange(qs.shape[2], device=q.device).split(_TILE):
            shown = None if seen is None else seen[:, tile]
            step = (
                step
                + (walk[..., None, tile] @ attention_heads(qs[:, :, tile], ks, scale=sharp, visible=shown))[..., 0, :]
            )
        walk = step
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
    qs, ks = rows(q, 3, "q").float(), rows(k, 3, "k").float()
    groups = ks.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        logits = qs.unflatten(1, (groups, qs.shape[1] // groups)) @ ks.mT[:, :, None]
    return logits * (q.shape[-1] ** -0.5 if scale is None else scale)
