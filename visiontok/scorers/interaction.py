"""How well groups of tokens answer a question, by late interaction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cosine, finite
from ..kernels.batching import mask, rows, unrow


def late_interaction(
    question: Tensor,
    tokens: Tensor,
    group: Tensor | None = None,
    groups: int = 1,
    *,
    question_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Σ over the question's tokens t of max over the tokens v of a group of cos(t, v).

    Args:
        question: (T, D) or (B, T, D).
        tokens: (N, D) or (B, N, D), such as those of a page.
        group: (N,) or (B, N) long in 0 … G-1; all tokens of a row are one group by default.
        groups: G.
        question_valid: (T,) or (B, T) bool; other tokens ask nothing, nor do those that hold NaN or infinity.
        valid: (N,) or (B, N) bool; other tokens are in no group, nor are those that hold NaN or infinity.

    Returns:
        (G,) or (B, G) float32; -inf for a group without tokens.

    Reference:
        ColBERT, arXiv 2004.12832; URaG, arXiv 2511.10552, retrieval by an early decoder layer.
    """
    q, x = rows(question, 2, "question"), rows(tokens, 2, "tokens")
    asks, there = mask(question_valid, q) & finite(q), mask(valid, x) & finite(x)
    place = torch.zeros_like(there, dtype=torch.long) if group is None else rows(group, 1, "group")
    place = torch.where(there, place, groups)  # one more group takes what does not count
    found = cosine(q, x)  # (B, T, N)
    best = found.new_full((*found.shape[:2], groups + 1), -torch.inf)
    best = best.scatter_reduce(2, place[:, None].expand_as(found), found, "amax")[..., :groups]
    total = torch.where(asks[..., None], best, 0.0).sum(1)
    taken = torch.zeros(len(x), groups + 1, dtype=torch.bool, device=x.device).scatter(1, place, True)[:, :groups]
    return unrow(total.masked_fill(~taken, -torch.inf), tokens, 2)
