"""One layer of a relevance rollout: what rests on which key, by attention and by its gradient."""

from __future__ import annotations

from torch import Tensor

from ..kernels.batching import rows, unrow
from .attention import attention_heads

TILE = 128
"""Rows of queries whose attention is held at a time."""


def relevance(
    weight: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Σ_i w_i · mean over heads of max(0, A_ij · ∂y/∂A_ij), with A the attention and y what is to be explained.

    The gradient of an attention map follows from that of its outputs, ∂y/∂A_ij = ∂y/∂o_i · v_j, so that the map need
    not have been part of the computation. It is made anew, some rows at a time.

    Args:
        weight: (Q,) or (B, Q), relevance of the rows so far.
        query: (H, Q, d) or (B, H, Q, d).
        key: (G, K, d) or (B, G, K, d), G a divisor of H.
        value: the shape of ``key``.
        gradient: (H, Q, d) or (B, H, Q, d), of y, with respect to the attention's output per head.
        scale: of the logits; 1/√d by default.
        visible: (Q, K) or (B, Q, K) bool, keys that a query sees; all by default.

    Returns:
        (K,) or (B, K) float32.

    Reference:
        Chefer et al., arXiv 2103.15679, equations 5 and 6; arXiv 2506.01097 for language models.
    """
    w, q, k = rows(weight, 1, "weight").float(), rows(query, 3, "query"), rows(key, 3, "key")
    v, g = rows(value, 3, "value").float(), rows(gradient, 3, "gradient").float()
    seen = None if visible is None else rows(visible, 2, "visible").expand(len(q), q.shape[2], k.shape[2])
    total = w.new_zeros(len(q), k.shape[2])
    for start in range(0, q.shape[2], TILE):
        at = slice(start, start + TILE)
        a = attention_heads(q[:, :, at], k, scale=scale, visible=None if seen is None else seen[:, at])
        slope = g[:, :, at].unflatten(1, (v.shape[1], -1)) @ v[:, :, None].mT  # (B, G, H / G, R, K)
        rests = (a * slope.flatten(1, 2)).clamp_min(0).mean(1)
        total = total + (w[:, at, None] * rests).sum(1)
    return unrow(total, weight, 1)
