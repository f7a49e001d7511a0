"""Anchors: the best tokens and their neighbours on the patch grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batching import mask, rows, unrow
from .topk import rank


def anchors(scores: Tensor, n: int | Tensor, grid: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``n`` best tokens, and the tokens that touch one of them along a row or a column.

    Args:
        scores: (N,) or (B, N).
        n: number of anchors, int or (B,) long; 0 is allowed.
        grid: (N, 3) or (B, N, 3) long, (t, row, column) of each token; tokens at -1 have no neighbours.
        valid: (N,) or (B, N) bool; other tokens are neither anchors nor neighbours.

    Returns:
        anchors and neighbours, two disjoint bool masks of the shape of ``scores``.

    Reference:
        HiPrune, arXiv 2508.00553, anchor and buffer tokens.
    """
    s, cells = rows(scores, 1, "scores"), rows(grid, 2, "grid")
    ok = mask(valid, s)
    count = torch.as_tensor(n, device=s.device).expand(s.shape[0])
    anchor = (rank(s, ok) < count[:, None]) & ok

    # A step to a neighbour adds ±1 to the row or to the column: look the four cells up among the cells of the anchors.
    placed = (cells >= 0).all(-1)
    size = (
        torch.cat([cells.flatten(0, 1), cells.new_zeros(1, 3)]).amax(0) + 3
    )  # one cell of margin on both sides: a row's end is nobody's neighbour
    code = ((cells[..., 0] + 1) * size[1] + cells[..., 1] + 1) * size[2] + cells[..., 2] + 1
    touched = torch.zeros(s.shape[0], int(size.prod()), dtype=torch.bool, device=s.device)
    row, place = (anchor & placed).nonzero(as_tuple=True)
    for step in (1, -1, int(size[2]), -int(size[2])):
        touched[row, code[row, place] + step] = True
    neighbour = touched.gather(1, torch.where(placed, code, 0)) & placed & ok & ~anchor
    return unrow(anchor, scores, 1), unrow(neighbour, scores, 1)
