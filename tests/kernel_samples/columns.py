"""Statistics of attention maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import ops
from visiontok.kernels.reference import Sight

from . import DEVICE, Samples, normal, uniform

Args = tuple[Any, ...]


def arguments(kind: str) -> tuple[torch.Tensor, torch.Tensor, Sight]:
    """Queries, keys and what is seen of them, by the name of what is special about it."""
    q, k = 2 * normal(2, 4, 70, 64), normal(2, 2, 70, 64, seed=1)
    scale = 0.125
    if kind == "causal, fewer rows than keys":
        return q[:, :, 40:], k, Sight(scale, causal=True)
    if kind == "seven queries share a key, width 80":
        return normal(1, 14, 66, 80), normal(1, 2, 66, 80, seed=1), Sight(scale, causal=True)
    if kind in ("width 72", "width 88", "width 128", "width 8"):
        d = int(kind.split()[1])
        return normal(1, 1, 40, d), normal(1, 1, 70, d, seed=1), Sight(scale)
    if kind == "one key":
        return q[..., :1, :], k[..., :1, :], Sight(scale)
    if kind == "transposed views":  # as projections leave them: heads behind tokens, one tensor of three
        both = normal(2, 70, 3, 4, 80)
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2), Sight(scale)
    if kind == "width not in one piece":
        return q[:1, :2].mT.contiguous().mT, k[:1, :1].mT.contiguous().mT, Sight(scale)
    if kind == "half precision":
        return q[:1, :2].bfloat16(), k[:1].bfloat16(), Sight(scale)
    if kind == "hidden keys":  # rows that see nothing: all keys of the second sample are hidden
        bias = normal(2, 70, seed=2).masked_fill(torch.arange(70, device=DEVICE) < 9, -torch.inf)
        bias[1] = -torch.inf
        return q, k, Sight(scale, causal=True, bias=bias)
    if kind == "mask":
        mask = uniform(2, 70, 70, seed=3) < 0.3
        mask[0, 5], mask[1, :, 9] = False, False
        return q, k, Sight(scale, mask=mask, bias=normal(1, 70, seed=2))
    if kind == "windows":
        return q[:1], k[:1], Sight(scale, span=windows([0, 1, 1, 33, 40, 70], 70))
    if kind == "spans in any order":
        first = (40 * uniform(2, 70, seed=4)).int()
        return q, k, Sight(scale, span=torch.stack([first, first + (30 * uniform(2, 70, seed=5)).int()]))
    if kind == "not finite":
        q[0, 0, 3], k[0, 0, 5], k[1, 1, 7, 0] = torch.nan, torch.nan, torch.inf
    if kind == "no rows":
        return q[:, :, :0], k, Sight(scale)
    return q, k, Sight(scale)


def windows(borders: list[int], length: int) -> torch.Tensor:
    """(2, 1, M) int32: each row sees the keys between its borders; two equal ones are an empty sequence."""
    at = torch.tensor(borders, device=DEVICE, dtype=torch.int32)
    which = torch.searchsorted(at, torch.arange(length, device=DEVICE), right=True)
    return torch.stack([at[which - 1], at[which]])[:, None]


KINDS = (
    "plain", "causal, fewer rows than keys", "seven queries share a key, width 80", "width 72", "width 88", "width 128",
    "width 8", "one key", "transposed views", "width not in one piece", "half precision", "hidden keys", "mask",
    "windows", "spans in any order", "not finite", "no rows",
)  # fmt: skip


def lse(kind: str) -> Callable[[], Args]:
    def make() -> Args:
        q, k, sight = arguments(kind)
        return q, k, *sight

    return make


def columns(kind: str, known: bool) -> Callable[[], Args]:
    def make() -> Args:
        q, k, sight = arguments(kind)
        weight = torch.ones(1, device=DEVICE).expand(q.shape[:3])
        if not known:
            return q, k, weight, None, *sight
        weight = uniform(*q.shape[:3], seed=6)
        return q, k, weight * (weight > 0.3), ops.attention_lse(q, k, *sight), *sight

    return make


SAMPLES = [
    Samples(ops.attention_lse, {kind: lse(kind) for kind in KINDS}, (1e-5, 1e-5)),
    Samples(
        ops.attention_columns,
        {kind: columns(kind, known=False) for kind in KINDS}
        | {f"{kind}, weighted": columns(kind, known=True) for kind in ("plain", "hidden keys", "windows", "not finite")},
        (2e-5, 2e-6),
    ),
]
