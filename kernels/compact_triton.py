"""The same slots of many tensors in one launch, whatever their types: rows are copied as bytes.

What a program needs to know of its tensor stands in a table on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .build import Build, Config

WORD = 16  # bytes that a thread copies at once, where rows begin at multiples of it
FIELDS = 8  # numbers of the table for each tensor


@triton.jit
def _gather_rows(  # type: ignore[no-untyped-def]
    TABLE, SLOTS, K, SLOT_COUNT,
    FIELDS: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    TABLE += tl.program_id(1) * FIELDS
    begin = tl.program_id(0) * BLOCK
    count = tl.load(TABLE + 7).to(tl.int32)
    if begin < count:
        source, target = tl.load(TABLE), tl.load(TABLE + 1)
        s_outer, s_batch, s_row = tl.load(TABLE + 2), tl.load(TABLE + 3), tl.load(TABLE + 4)
        words, wide = tl.load(TABLE + 5).to(tl.int32), tl.load(TABLE + 6)
        o_w = begin + tl.arange(0, BLOCK)
        m_w = o_w < count
        row = o_w // words
        place = row % SLOT_COUNT
        slot = tl.load(SLOTS + place, mask=m_w, other=0)
        at = source + (row // SLOT_COUNT).to(tl.int64) * s_outer + (place // K).to(tl.int64) * s_batch + slot * s_row
        word = (o_w % words).to(tl.int64)
        if wide != 0:
            o_i = tl.arange(0, WORD // 4)[None, :]
            p_from = (at + word * WORD).to(tl.pointer_type(tl.int32))[:, None] + o_i
            p_to = (target + o_w.to(tl.int64) * WORD).to(tl.pointer_type(tl.int32))[:, None] + o_i
            p_from = tl.max_contiguous(tl.multiple_of(p_from, (WORD, WORD)), (1, WORD // 4))
            p_to = tl.max_contiguous(tl.multiple_of(p_to, (WORD, WORD)), (1, WORD // 4))
            tl.store(p_to, tl.load(p_from, mask=m_w[:, None]), mask=m_w[:, None])
        else:
            p_byte = (at + word).to(tl.pointer_type(tl.int8))
            tl.store((target + o_w.to(tl.int64)).to(tl.pointer_type(tl.int8)), tl.load(p_byte, mask=m_w), mask=m_w)


def _config() -> Config:
    return Config({"FIELDS": FIELDS, "WORD": WORD, "BLOCK": 512}, warps=4)


def _flat(x: Tensor, dim: int) -> Tensor:
    """(…, B or 1, N, …) → (outer, B or 1, N, row) whose rows are contiguous; a view, unless they are not."""
    shape = (math.prod(x.shape[: dim - 1]), x.shape[dim - 1], x.shape[dim], math.prod(x.shape[dim + 1 :]))
    x = x.reshape(shape)
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def gather_rows(tensors: Sequence[Tensor], dims: Sequence[int], slots: Tensor) -> list[Tensor]:
    """Twin of :func:`visiontok.kernels.reference.gather_rows`."""
    b, k = slots.shape
    new = [x.new_empty((*x.shape[: d - 1], b, k, *x.shape[d + 1 :])) for x, d in zip(tensors, dims, strict=True)]
    flat = [_flat(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    table = [_describe(x, y) for x, y in zip(flat, new, strict=True) if y.numel()]
    most = max((row[-1] for row in table), default=0)
    if most >= 2**31 - 1024:  # words are counted in 32 bits
        return reference.gather_rows(tensors, dims, slots)
    if table:
        config = _config()
        on_host = torch.tensor(table, pin_memory=slots.is_cuda)
        _gather_rows[(triton.cdiv(most, config.constants["BLOCK"]), len(table))](
            on_host.to(slots.device, non_blocking=True), slots.contiguous(), k, b * k,
            **config.constants, **config.options(),
        )  # fmt: skip
    return new


def _describe(x: Tensor, y: Tensor) -> list[int]:
    """The row of the table for what goes from x (outer, B or 1, N, row) to y."""
    size = x.element_size()
    strides = [x.stride(0) * size, x.stride(1) * size if x.shape[1] > 1 else 0, x.stride(2) * size]
    row = x.shape[3] * size
    wide = all(number % WORD == 0 for number in (x.data_ptr(), y.data_ptr(), row, *strides))
    word = WORD if wide else 1
    return [x.data_ptr(), y.data_ptr(), *strides, row // word, int(wide), y.numel() * size // word]


def builds() -> list[Build]:
    """Shipped configurations."""
    return [
        Build(
            name="compaction",
            kernel=_gather_rows,
            types={"TABLE": "*i64", "SLOTS": "*i64", "K": "i32", "SLOT_COUNT": "i32"},
            config=_config(),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128[^$]*STG\.E\.128"),
            everywhere=True,
        )
    ]
