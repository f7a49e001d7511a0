"""Greedy selection by coverage in one launch.

A pick changes few rows of the table: those that it covers better than the picks before. Only they are read again. Small
problems are one program's; in larger ones programs that run at the same time share the candidates and agree on every
pick.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build, Config
from .picking_triton import (
    SLOTS,
    agree,
    block,
    clean,
    first_best,
    outputs,
    padded,
    readable,
    resident,
    slots,
    tile,
    wide,
)
from .reference import LAST

LARGEST_ALONE = 1024
"""Candidates up to which one multiprocessor is faster than many that agree."""
NONE = 1 << 30


@triton.jit
def _between(  # type: ignore[no-untyped-def]
    TABLE, WEIGHT, INDEX, LOW, HIGH, number, o_n, columns, s_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(BLOCK,) float64: Σ weight_r · (clamp(table_rn, low, high) - low) over the rows r of a list."""
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for begin in range(0, number, ROWS):
        o_s = begin + tl.arange(0, ROWS)
        m_s = o_s < number
        index = tl.load(INDEX + o_s, mask=m_s, other=0)
        low = tl.load(LOW + o_s, mask=m_s, other=0.0)[:, None]
        high = tl.load(HIGH + o_s, mask=m_s, other=0.0)[:, None]
        weight = tl.load(WEIGHT + index, mask=m_s, other=0.0)[:, None]
        o_tile = index.to(tl.int64)[:, None] * s_row + o_n[None, :]
        inside = tl.load(TABLE + o_tile, mask=m_s[:, None] & (o_n < columns)[None, :], other=0.0)
        inside = tl.minimum(tl.maximum(inside, low), high)
        total += weight * (inside.to(tl.float64) - low.to(tl.float64))
    return tl.sum(total, 0)


@triton.jit
def _coverage(  # type: ignore[no-untyped-def]
    TABLE, TRANSPOSED, WEIGHT, SCALE, BONUS, BOUND, COUNT, ORDER, GAIN, BEST, PICK, ARRIVED, INDEX, LOW, HIGH, COVER,
    TILES, R, N, LENGTH, WIDTH, COLUMNS, MOST, s_batch, s_row,
    SHARED: tl.constexpr, LAST: tl.constexpr, NONE: tl.constexpr, SLOTS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_tile = i_p // TILES, tl.program_id(0) % TILES
    o_n = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < WIDTH
    scale = tl.load(SCALE + i_b * WIDTH + o_n, mask=m_n, other=0.0).to(tl.float64)
    bonus = tl.load(BONUS + i_b * WIDTH + o_n, mask=m_n, other=0.0)
    bound = tl.load(BOUND + i_b * WIDTH + o_n, mask=m_n, other=-float("inf"))
    TABLE += i_b * s_batch
    TRANSPOSED += i_b * N * LENGTH
    WEIGHT += i_b * LENGTH
    BEST += i_b * 2 * SLOTS
    PICK += i_b * 2 * SLOTS
    # A list of rows and how well they are covered are every program's own; the list begins with all rows.
    INDEX += i_p * LENGTH
    LOW += i_p * LENGTH
    HIGH += i_p * LENGTH
    COVER += i_p * LENGTH

    total = _between(TABLE, WEIGHT, INDEX, LOW, HIGH, R, o_n, COLUMNS, s_row, ROWS, BLOCK)
    whole = tl.max(tl.where(o_n < N, total, -float("inf")), 0)
    if SHARED:
        whole, _ = agree(whole, i_tile, BEST, PICK, ARRIVED + i_b, i_tile, TILES, 0, NONE, SLOTS)
    noise = 1e-12 * whole
    gain = tl.where(total > noise, total, 0.0) * scale + bonus
    best, pick = first_best(clean(gain, bound, LAST), o_n, NONE)
    if SHARED:
        best, pick = agree(best, pick, BEST, PICK, ARRIVED + i_b, i_tile, TILES, 1, NONE, SLOTS)
    for step in range(tl.load(COUNT + i_b)):
        if i_tile == 0:
            tl.store(ORDER + i_b * MOST + step, pick)
            tl.store(GAIN + i_b * MOST + step, best.to(tl.float32))
        tl.debug_barrier()  # all have read the list
        number = 0
        for begin in range(0, R, CHUNK):
            o_r = begin + tl.arange(0, CHUNK)
            low = tl.load(COVER + o_r, mask=o_r < R, other=0.0)
            high = tl.load(TRANSPOSED + pick.to(tl.int64) * LENGTH + o_r, mask=o_r < R, other=0.0)
            m_r = high > low
            place = number + tl.cumsum(m_r.to(tl.int32), 0) - 1
            tl.store(INDEX + place, o_r, mask=m_r)
            tl.store(LOW + place, low, mask=m_r)
            tl.store(HIGH + place, high, mask=m_r)
            tl.store(COVER + o_r, high, mask=m_r)
            number += tl.sum(m_r.to(tl.int32), 0)
        tl.debug_barrier()  # all have written it
        total -= _between(TABLE, WEIGHT, INDEX, LOW, HIGH, number, o_n, COLUMNS, s_row, ROWS, BLOCK)
        bound = tl.where(o_n == pick, -float("inf"), bound)
        gain = tl.where(total > noise, total, 0.0) * scale + bonus
        best, pick = first_best(clean(gain, bound, LAST), o_n, NONE)
        if SHARED:
            best, pick = agree(best, pick, BEST, PICK, ARRIVED + i_b, i_tile, TILES, step + 2, NONE, SLOTS)


def _config(size: int, shared: bool) -> Config:
    rows = max(1, min(32, 2048 // size))
    constants = {"SHARED": shared, "LAST": LAST, "NONE": NONE, "SLOTS": SLOTS, "CHUNK": 1024, "ROWS": rows}
    return Config({**constants, "BLOCK": size}, warps=max(4, min(32, size // 128)), cooperative=shared)


def coverage(
    table: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bonus: Tensor | None,
    start: float,
    bound: Tensor,
    count: Tensor,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Twin of :class:`visiontok.kernels.reference.Coverage` in the greedy loop; its sums have another order."""
    order, gain = outputs(bound, most)
    b, r, n = table.shape
    if not b or not most:
        return order.long(), gain
    table = table if table.stride(2) == 1 else table.contiguous()
    shared = n > LARGEST_ALONE
    programs = resident(table)
    size = tile(n, programs) if shared else block(n)
    tiles = triton.cdiv(n, size)
    config = _config(size, shared)
    ones = table.new_ones(())
    vectors = [
        padded(table.mT),  # what a pick covers lies together
        padded((ones if weight is None else weight).double().expand(b, r)),
        padded((ones if scale is None else scale).expand(b, n)),
        padded((0 * ones if bonus is None else bonus).expand(b, n)),
        *(padded(bound, -torch.inf), count.int(), order, gain, *slots(b, torch.float64, bound.device)),
    ]
    columns, length = readable(table), wide(r)
    together = programs // tiles if shared else b  # rows of the batch in a launch
    for begin in range(0, b, together):
        part = slice(begin, min(begin + together, b))
        shape = ((part.stop - begin) * tiles, length)
        index = torch.arange(length, dtype=torch.int32, device=table.device).repeat(shape[0], 1)
        low, high, cover = (table.new_full(shape, x) for x in (start, torch.inf, start))
        _coverage[(shape[0],)](
            table[part], *(x[part] for x in vectors), index, low, high, cover,
            tiles, r, n, length, wide(n), columns, most, table.stride(0), table.stride(1),
            **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def builds() -> list[Build]:
    """Shipped configurations."""
    names = ("TABLE", "TRANSPOSED", "SCALE", "BONUS", "BOUND", "GAIN", "LOW", "HIGH", "COVER")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("WEIGHT", "BEST"), "*fp64")
    types |= dict.fromkeys(("COUNT", "ORDER", "PICK", "ARRIVED", "INDEX"), "*i32") | {"s_batch": "i32", "s_row": "i32"}
    types |= dict.fromkeys(("TILES", "R", "N", "LENGTH", "WIDTH", "COLUMNS", "MOST"), "i32")
    return [
        Build(
            name=f"coverage {'shared' if shared else 'alone'} {size}",
            kernel=_coverage,
            types=types,
            config=_config(size, shared),
            aligned=("LENGTH", "WIDTH", "COLUMNS", "s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=size in (128, LARGEST_ALONE),
        )
        for shared, size in ((False, LARGEST_ALONE), (True, 128), (True, 512))
    ]
