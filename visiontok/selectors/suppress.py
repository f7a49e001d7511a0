"""Non-maximum suppression: a token falls to a better one it is in conflict with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def suppress(conflict: Tensor, scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """In descending order of score, keep every token that is in conflict with none kept before.

    Args:
        conflict: (N, N) or (B, N, N) bool, symmetric.
        scores: (N,) or (B, N).
        valid: (N,) or (B, N) bool; other tokens neither survive nor suppress.

    Returns:
        (N,) or (B, N) bool, the survivors.

    Reference:
        PruneSID, arXiv 2603.09480, suppression inside semantic groups.
    """
    apart, s = rows(conflict, 2, "conflict"), rows(scores, 1, "scores")
    ok = mask(valid, s)
    order = rank(s, ok).argsort(-1)
    row = torch.arange(len(s), device=s.device)
    standing = ok.clone()
    behind = torch.ones_like(ok)  # tokens whose turn is still to come
    for step in range(s.shape[1]):
        at = order[:, step]
        behind[row, at] = False
        standing = standing & ~(apart[row, at] & behind & standing[row, at][:, None])
    return unrow(standing, scores, 1)
