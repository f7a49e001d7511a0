"""The same slots of many tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import ops

from . import DEVICE, Samples, normal

Args = tuple[Any, ...]


def whole(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).view(shape)


def cut(kind: str) -> Callable[[], Args]:
    """Tensors, where their slots are, and slots, by the name of what is special about them."""

    def make() -> Args:
        slots = torch.tensor([[0, 3, 4, 12], [1, 1, 0, 12]], device=DEVICE)  # with padding in the second row
        hidden, heads = normal(2, 13, 24), normal(3, 2, 13, 16).bfloat16()
        tensors = {
            "plain": [
                (hidden, 1), (whole(3, 2, 13), 2), (normal(1, 13, 8), 1), (normal(1, 13, 8, seed=1).bfloat16(), 1),
                (heads, 2), (heads.roll(1), 2), (hidden > 0, 1), (whole(2, 13), 1),
            ],
            "odd widths": [(normal(2, 13, w).to(t), 1) for w in (1, 3, 9) for t in (torch.half, torch.float32)],
            "types": [(hidden.to(t), 1) for t in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.float64)],
            "views": [
                (normal(2, 24, 13).mT, 1), (normal(2, 26, 24)[:, ::2], 1), (normal(2, 13, 48)[..., 1:25], 1),
                (normal(2, 13, 48)[..., ::2], 1), (normal(13, 2, 24).transpose(0, 1), 1), (heads[:, :, :, 8:], 2),
                (normal(2, 13, 3, 8).transpose(1, 2).flatten(0, 1).unflatten(0, (2, 3)).transpose(0, 1), 2),
                (normal(14, 2, 24)[1:].transpose(0, 1), 1), (normal(2, 14, 24)[:, 1:], 1), (whole(13).expand(2, 13), 1),
            ],
            "not finite": [(torch.where(hidden > 0, torch.nan, -torch.inf), 1)],
            "more blocks than one": [(normal(2, 13, 1200), 1), (whole(2, 13), 1)],
            "no width": [(hidden[..., :0], 1), (whole(2, 13), 1)],
            "no tensors": [],
        }.get(kind, [(hidden, 1), (heads, 2), (hidden[..., 0] > 0, 1)])  # fmt: skip
        if kind == "everything stays":
            slots = whole(13).expand(2, 13)
        elif kind == "nothing stays":
            slots = slots[:, :0]
        elif kind == "one token":
            tensors, slots = [(x.narrow(dim, 0, 1), dim) for x, dim in tensors], torch.zeros_like(slots)
        elif kind == "no batch":
            tensors, slots = [(x.narrow(dim - 1, 0, 0), dim) for x, dim in tensors], slots[:0]
        elif kind == "slots of a view":
            slots = slots.mT.contiguous().mT
        return [x for x, _ in tensors], [dim for _, dim in tensors], slots

    return make


KINDS = (
    "plain", "odd widths", "types", "views", "not finite", "more blocks than one", "no width", "no tensors",
    "everything stays", "nothing stays", "one token", "no batch", "slots of a view",
)  # fmt: skip


def same_bits(args: Args, result: list[torch.Tensor]) -> None:
    """Slot by slot, as bytes."""
    tensors, dims, slots = args
    assert len(result) == len(tensors)
    for x, dim, y in zip(tensors, dims, result, strict=True):
        assert y.is_contiguous()
        for b, row in enumerate(slots.tolist()):
            source = x.select(dim - 1, b if x.shape[dim - 1] > 1 else 0)
            for k, slot in enumerate(row):
                expected, got = source.select(dim - 1, slot), y.select(dim - 1, b).select(dim - 1, k)
                assert (
                    expected.contiguous()
                    .flatten()
                    .view(torch.uint8)
                    .equal(got.contiguous().flatten().view(torch.uint8))
                )


SAMPLES = [Samples(ops.gather_rows, {kind: cut(kind) for kind in KINDS}, check=same_bits)]
