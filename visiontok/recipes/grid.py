"""Grid: tokens at equal distances, whatever they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..functional import uniform
from ..method import Card, Contract, Method

if TYPE_CHECKING:
    from ..context import Context


def grid(cells: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Exactly ``k`` tokens, spread evenly over time, rows and columns.

    Args:
        cells: (N, 3) or (B, N, 3) long, (t, row, column), -1 off the grid.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        bool keep mask (N,) or (B, N).

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return uniform(cells, k, valid)


@dataclass(frozen=True)
class Grid(Method):
    """Uniform spatial sampling."""

    card: ClassVar[Card] = Card(
        name="grid",
        title="tokens at equal distances on the patch grid",
        paper="-",
        venue="baseline",
        formula="row ⌊(2i+1)·H/2R⌋ for i < R ≈ √(K·H/W), in it column ⌊(2j+1)·W/2C⌋ for j < C = K/R",
        stage="prompt",
        needs="grid",
        departures="Rows at equal distances and in them equal steps, which gives exactly K tokens for every K; "
        "tokens that lie on no grid, such as image_newline, come last.",
        defaults="no option",
        cost="O(N log N) on the host",
        contract=Contract(sync_free=False),
    )

    def select(self, ctx: Context) -> Tensor:
        return grid(ctx.need_grid(), ctx.count, valid=ctx.valid)
