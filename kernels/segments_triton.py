"""Weighted means of groups of rows: who belongs to whom is sorted by PyTorch, each group is summed by one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build, Config


@triton.jit
def _segment_mean(  # type: ignore[no-untyped-def]
    X, ORDER, BEGIN, WEIGHT, MEAN, SIZE,
    N, M, D, s_batch, s_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_b = tl.program_id(2).to(tl.int64)
    o_r = tl.arange(0, ROWS)
    m_d = o_d < D
    X += i_b * s_batch
    group = i_b * M + i_m
    begin = tl.load(BEGIN + group + i_b)
    end = tl.load(BEGIN + group + i_b + 1)
    # Some rows at a time, so that they arrive together; each of these sums takes every ROWS-th one of the group.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    for at in range(begin, end, ROWS):
        m_r = at + o_r < end
        row = tl.load(ORDER + i_b * N + at + o_r, mask=m_r, other=0)
        weight = tl.load(WEIGHT + i_b * N + row, mask=m_r, other=0.0)
        x = tl.load(X + row[:, None] * s_row + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
        total += weight[:, None] * x.to(tl.float32)
        size += weight
    whole = tl.sum(size, 0)
    mean = tl.sum(total, 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(MEAN + group * D + o_d, mean, mask=m_d)
    tl.store(SIZE + group, whole, mask=tl.program_id(1) == 0)


def _config(d: int) -> Config:
    return Config({"ROWS": 4, "BLOCK": 128 if d <= 128 else 1024}, warps=1 if d <= 128 else 4, fusion=True)


def segment_mean(x: Tensor, group: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`visiontok.kernels.reference.segment_mean`."""
    b, n, d = x.shape
    mean = torch.empty(b, count, d, device=x.device)
    size = torch.empty(b, count, device=x.device)
    if b and count:
        x = x if x.stride(2) == 1 else x.contiguous()
        ranked = torch.where(group < 0, count, group).contiguous().sort(dim=1, stable=True)
        edges = torch.arange(count + 1, device=x.device).repeat(b, 1)
        config = _config(d)
        _segment_mean[(count, max(1, triton.cdiv(d, config.constants["BLOCK"])), b)](
            x, ranked.indices, torch.searchsorted(ranked.values, edges, out_int32=True), weight.float().contiguous(),
            mean, size,
            n, count, d, x.stride(0), x.stride(1), **config.constants, **config.options(),
        )  # fmt: skip
    return mean, size


def builds() -> list[Build]:
    """Shipped configurations."""
    types = {"ORDER": "*i64", "BEGIN": "*i32"} | dict.fromkeys(("WEIGHT", "MEAN", "SIZE"), "*fp32")
    types |= dict.fromkeys(("N", "M", "D", "s_batch", "s_row"), "i32")
    return [
        Build(
            name=f"segment mean {kind} D={d}",
            kernel=_segment_mean,
            types=types | {"X": f"*{kind}"},
            config=_config(d),
            aligned=("D", "s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=(kind, d) == ("bf16", 4096),
        )
        for kind in ("fp32", "bf16", "fp16")
        for d in (128, 4096)
    ]
