"""Means of groups of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import ops

from . import DEVICE, Samples, normal, uniform

Args = tuple[Any, ...]


def groups(kind: str) -> Callable[[], Args]:
    """Rows, their groups and weights by the name of what is special about them."""

    def make() -> Args:
        x, count = normal(2, 30, 20), 12
        # some rows in no group, some groups without rows
        group = torch.randint(-1, 9, (2, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        weight = uniform(2, 30, seed=1) + 0.5
        if kind == "one group":
            group, count = torch.zeros_like(group), 1
        elif kind == "each its own":
            group, count = torch.arange(30, device=DEVICE).flip(0).expand(2, 30), 30
        elif kind == "all left out":
            group = torch.full_like(group, -1)
        elif kind == "no groups":
            group, count = torch.full_like(group, -1), 0
        elif kind == "no rows":
            x, group, weight = x[:, :0], group[:, :0], weight[:, :0]
        elif kind == "no batch":
            x, group, weight = x[:0], group[:0], weight[:0]
        elif kind == "no width":
            x = x[..., :0]
        elif kind == "weights of zero":
            weight = weight * (group != 3) * (torch.arange(30, device=DEVICE) % 2)
        elif kind == "whole weights":
            weight = (weight * 4).long()
        elif kind == "not finite":  # one of those left out, and one of a group
            x[0, (group[0] < 0).nonzero()[0]], x[1, (group[1] == 4).nonzero()[0], 3] = torch.nan, torch.inf
        elif kind == "all equal":
            x, weight = torch.full_like(x, 0.1), torch.ones_like(weight)
        elif kind == "bfloat16":
            x, weight = x.bfloat16(), weight.bfloat16()
        elif kind == "float16":
            x = x.half()
        elif kind == "float64":
            x = x.double()
        elif kind == "wide":
            x = normal(1, 20, 1025)
            group, weight = group[:1, :20], weight[:1, :20]
        elif kind == "views":
            x = normal(20, 60, 2).permute(2, 1, 0)[:, ::2]
            weight = weight.mT.contiguous().mT
            group = group.mT.contiguous().mT
        return x, group, count, weight

    return make


KINDS = (
    "plain", "one group", "each its own", "all left out", "no groups", "no rows", "no batch", "no width",
    "weights of zero", "whole weights", "not finite", "all equal", "bfloat16", "float16", "float64", "wide", "views",
)  # fmt: skip


def means(args: Args, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """By a loop over the groups, in double precision."""
    x, group, count, weight = args
    mean, size = result
    for b in range(len(x)):
        for j in range(count):
            mine = group[b] == j
            w = weight[b][mine].double()
            total = (w[:, None] * x[b][mine].double()).sum(0)
            torch.testing.assert_close(size[b, j].double(), w.sum(), rtol=1e-6, atol=0)
            expected = total / w.sum() if w.sum() > 0 else total
            torch.testing.assert_close(mean[b, j].double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


SAMPLES = [Samples(ops.segment_mean, {kind: groups(kind) for kind in KINDS}, tolerance=(1e-6, 1e-6), check=means)]
