"""The most similar row of another set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import ops
from visiontok.kernels.reference import unit

from . import DEVICE, Samples, normal

Args = tuple[Any, ...]


def halves(rows: int, seed: int) -> torch.Tensor:
    """(1, rows, 12) vectors of four ±1, whose cosines are whole quarters: no rounding, and very many ties."""
    random = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, rows, 12)
    for row in x[0]:
        row[torch.randperm(12, generator=random)[:4]] = torch.randint(2, (4,), generator=random).float() * 2 - 1
    return x.to(DEVICE)


def pair(kind: str) -> Callable[[], Args]:
    """Rows by the name of what is special about them."""

    def make() -> Args:
        x, y, valid = normal(2, 70, 12), normal(2, 67, 12, seed=1), None
        every = torch.ones(2, 70, 67, dtype=torch.bool, device=DEVICE)
        if kind == "plain":
            valid = (torch.arange(67, device=DEVICE) < torch.tensor([67, 31], device=DEVICE)[:, None])[:, None]
        elif kind == "pairs":  # and a row that may match nothing
            valid = every & (normal(2, 70, 67, seed=2) > 0)
            valid[0, 3] = False
        elif kind == "one mask for all rows":
            valid = (torch.arange(67, device=DEVICE) % 3 > 0).expand(1, 1, 67)
        elif kind == "nothing may match":
            valid = ~every[:, :1]
        elif kind == "all equal":
            x, y = torch.ones_like(x), torch.ones_like(y)
        elif kind == "long duplicates":  # sums of so many products stray from 1
            x, y = normal(1, 5, 3584), 3 * normal(1, 5, 3584).flip(1)
        elif kind == "duplicates":
            x, y = x[:, torch.arange(70, device=DEVICE) % 9], 3 * x[:, torch.arange(67, device=DEVICE) % 5]
        elif kind == "ties":
            x, y = halves(70, 0), halves(67, 1)
        elif kind == "zero vectors":
            x[:, ::3], y[:, 5::7] = 0, 0
        elif kind == "not finite":
            x[0, 5], x[1, 7, 0], y[0, 9], y[1, 3] = torch.nan, torch.inf, torch.nan, -torch.inf
        elif kind == "one of each":
            x, y = x[:, :1], y[:, :1]
        elif kind == "whole blocks":
            x, y = normal(1, 128, 32), normal(1, 64, 32, seed=1)
        elif kind == "blocks and one":
            x, y = normal(1, 65, 33), normal(1, 129, 33, seed=1)
        elif kind == "one number wide":
            x, y = x[..., :1], y[..., :1]
        elif kind == "no rows":
            x = x[:, :0]
        elif kind == "nothing to match":
            y = y[:, :0]
        x, y = unit(x), unit(y)
        if kind == "views":
            x, y = x.mT.contiguous().mT[:, ::2], y[:, 3:, :11]
            x = x[..., 1:]
        return x, y, valid

    return make


KINDS = (
    "plain", "pairs", "one mask for all rows", "nothing may match", "all equal", "long duplicates", "duplicates",
    "ties", "zero vectors", "not finite", "one of each", "whole blocks", "blocks and one", "one number wide", "no rows",
    "nothing to match", "views",
)  # fmt: skip


def best(args: Args, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The cosine is that of the row, of those that may match none is larger, and of the largest it is the first."""
    (x, y, valid), (cosine, index) = args, result
    if not y.shape[1]:
        assert cosine.eq(-torch.inf).all()
        assert index.eq(0).all()
        return
    exact = x.double() @ y.double().mT
    empty = (x == 0).all(-1)[:, :, None] & (y == 0).all(-1)[:, None]
    exact = torch.where(empty | (exact > 1 - 1e-6), 1.0, exact)
    allowed = torch.ones_like(exact, dtype=torch.bool) if valid is None else valid.expand(exact.shape)
    exact = torch.where(allowed, exact, -torch.inf)
    torch.testing.assert_close(cosine.double(), exact.amax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(exact.gather(2, index[..., None])[..., 0], exact.amax(-1), rtol=0, atol=1e-6)
    assert (cosine[exact.amax(-1) == 1] == 1).all()
    assert torch.equal(index, exact.argmax(-1))


SAMPLES = [Samples(ops.nearest_unit, {kind: pair(kind) for kind in KINDS}, tolerance=(0.0, 1e-6), check=best)]
