"""Statistics of attention maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import ops
from visiontok.kernels.reference import Sight

from . import DEVICE, Samples, normal, uniform

Args = tuple[Any, ...]


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed).bfloat16()


def arguments(kind: str) -> tuple[torch.Tensor, torch.Tensor, Sight]:
    """Queries, keys and what is seen of them, by the name of what is special about it."""
    q, k, scale = 2 * half(1, 2, 70, 16), half(1, 1, 70, 16, seed=1), 0.25
    if kind == "plain":
        return 2 * half(2, 2, 70, 64), half(2, 1, 70, 64, seed=1), Sight(0.125)
    if kind == "causal, fewer rows than keys":
        return q[:, :, 40:], k, Sight(scale, causal=True)
    if kind == "causal, more rows than keys":  # the first see nothing
        return q, k[:, :, :40], Sight(scale, causal=True)
    if kind == "seven queries share a key":
        return half(1, 7, 30, 16), half(1, 1, 30, 16, seed=1), Sight(scale, causal=True)
    if kind.startswith("width"):
        d = int(kind.split()[1])
        return half(1, 1, 40, d), half(1, 1, 70, d, seed=1), Sight(d**-0.5)
    if kind == "one key":
        return q[..., :1, :], k[..., :1, :], Sight(scale)
    if kind == "transposed views":  # as projections leave them: heads behind tokens, one tensor of three
        both = half(1, 70, 3, 2, 80)
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2), Sight(scale)
    if kind == "no whole strides":
        return half(1, 2, 70, 17)[..., :16], half(1, 1, 70, 16).mT.contiguous().mT, Sight(scale)
    if kind == "hidden keys":
        bias = normal(1, 70, seed=2).masked_fill(torch.arange(70, device=DEVICE) < 9, -torch.inf)  # some see nothing
        return q, k, Sight(scale, causal=True, bias=bias)
    if kind == "mask":
        q, k, mask = half(2, 2, 70, 16), half(2, 1, 70, 16, seed=1), uniform(2, 70, 70, seed=3) < 0.3
        mask[0, 5], mask[1, :, 9] = False, False
        return q, k, Sight(scale, bias=normal(1, 70, seed=2), mask=mask)
    if kind == "windows":
        return q, k, Sight(scale, span=windows([0, 1, 1, 33, 40, 70], 70))
    if kind == "spans in any order":
        first = (40 * uniform(1, 70, seed=4)).int()
        return q, k, Sight(scale, span=torch.stack([first, first + (30 * uniform(1, 70, seed=5)).int()]))
    if kind == "not finite":
        q[0, 0, 3], k[0, 0, 5], k[0, 0, 7, 0] = torch.nan, torch.nan, torch.inf
    if kind == "no rows":
        return q[:, :, :0], k, Sight(scale)
    if kind == "float32":
        return q.float(), k.float(), Sight(scale)
    return q, k, Sight(scale)


def windows(borders: list[int], length: int) -> torch.Tensor:
    """(2, 1, M) int32: each row sees the keys between its borders; two equal ones are an empty sequence."""
    at = torch.tensor(borders, device=DEVICE, dtype=torch.int32)
    which = torch.searchsorted(at, torch.arange(length, device=DEVICE), right=True)
    return torch.stack([at[which - 1], at[which]])[:, None]


FEW = ("plain", "causal, more rows than keys", "mask", "windows", "not finite", "no rows")
KINDS = (
    *FEW, "causal, fewer rows than keys", "seven queries share a key", "width 8", "width 72", "width 80", "width 88",
    "width 128", "one key", "transposed views", "no whole strides", "hidden keys", "spans in any order", "float32",
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


def share(kind: str) -> Callable[[], Args]:
    def make() -> Args:
        q, k, sight = arguments(kind)
        return q, k, uniform(1, k.shape[2], seed=7) < 0.4, *sight

    return make


def peaks(kind: str, numbered: bool) -> Callable[[], Args]:
    def make() -> Args:
        q, k, sight = arguments(kind)
        (b, _, m, _), n = q.shape, k.shape[2]
        number = (3 * uniform(b, m + n, seed=8)).int() if numbered else None
        return q, k, uniform(b, m, seed=6), None, number, *sight

    return make


SAMPLES = [
    Samples(ops.attention_lse, {kind: lse(kind) for kind in FEW}, (1e-5, 1e-5)),
    Samples(ops.attention_share, {kind: share(kind) for kind in FEW}, (2e-5, 2e-6)),
    Samples(
        ops.attention_columns,
        {kind: columns(kind, known=False) for kind in KINDS}
        | {f"{kind}, weighted": columns(kind, known=True) for kind in ("hidden keys", "windows", "not finite")},
        (2e-5, 2e-6),
    ),
    Samples(
        ops.attention_peaks,
        {kind: peaks(kind, numbered=False) for kind in ("width 80", "hidden keys", "no rows")}
        | {f"{kind}, numbered": peaks(kind, numbered=True) for kind in FEW},
        (2e-5, 2e-6),
    ),
]
