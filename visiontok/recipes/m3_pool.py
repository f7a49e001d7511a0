"""M3: nested average pooling of the patch grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..functional import absorb, cells
from ..method import Card, Contract, Method, Selection

if TYPE_CHECKING:
    from ..context import Context


def m3_pool(
    features: Tensor, grid: Tensor, k: int | Tensor, *, valid: Tensor | None = None, official: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The means of ``k`` cells of the grid.

    Args:
        features: (N, D) or (B, N, D).
        grid: (N, 3) or (B, N, 3) long, (t, row, column), -1 off the grid; such tokens are dropped first.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.
        official: squares of ⌊√(N/k)⌋ tokens a side, so that the count is only about ``k`` and edges may be lost.

    Returns:
        bool keep mask (N,) or (B, N), true at the middle of each cell; features of the shape given: means there; and
        long (N,) or (B, N), the place of the middle of each token's cell, -1 for tokens in none.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    group = cells(grid, k, valid, whole=official)
    ones = torch.ones(group.shape, device=features.device)
    merged, size = absorb(features, group, ones, 1.0)
    return size > 0, merged, group


@dataclass(frozen=True)
class M3Pool(Method):
    """The pooled scales of Matryoshka Multimodal Models, without their training."""

    card: ClassVar[Card] = Card(
        name="m3_pool",
        title="average pooling of the patch grid to any number of cells",
        paper="arXiv 2405.17430",
        venue="ICLR 2025",
        formula="z_c = mean of z over cell c of the grid cut into K cells",
        stage="prompt",
        needs="features, grid",
        official="Scales of 1, 9, 36, 144 and 576 of 24 × 24 tokens, on models that were trained on all of them; "
        "every crop is pooled alike.",
        bugs="For other scales the squares have ⌊√(N/K)⌋ tokens a side, so that more than K remain, and where much "
        "is lost at the edges fewer than K remain.",
        trained="a model trained on all scales; pooling a stock model hurts more than the paper says.",
        departures="Any K: cells of whole bands of rows with as equally many tokens as can be, which are the "
        "published squares where these exist. The budget is split over crops and frames by their size; image_newline "
        "tokens are dropped first. A cell stands at the place of its middle token.",
        defaults="The paper's scales: 1/576, 1/64, 1/16, 1/4 and all.",
        cost="O(ND), cells on the host",
        contract=Contract(sync_free=False),
    )

    def select(self, ctx: Context) -> Selection:
        official = ctx.fidelity == "official"
        keep, features, into = m3_pool(ctx.features, ctx.need_grid(), ctx.count, valid=ctx.valid, official=official)
        return Selection(keep=keep, features=features, into=into)
