"""Greedy selection by determinant in one launch.

Each step adds a row to a Cholesky factor, for which it reads all rows before: k²·N numbers in all. One program per row
of the batch does for small problems; in large ones programs that run at the same time share the candidates and agree on
every pick.
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
from .reference import LAST, Determinant

ALONE = 50e6
"""Bytes of the factor, read over all steps, that one multiprocessor gets through faster than many agree."""
LARGEST_ALONE = 4096
NONE = 1 << 30


@triton.jit
def _determinant(  # type: ignore[no-untyped-def]
    KERNEL, VARIANCE, FLOOR, BEHIND, BOUND, COUNT, ORDER, GAIN, FACTOR, BEST, PICK, ARRIVED,
    TILES, WIDTH, COLUMNS, MOST, s_batch, s_row,
    SHARED: tl.constexpr, LAST: tl.constexpr, NONE: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b, i_tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    o_n = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < WIDTH
    o_b = i_b * WIDTH + o_n
    variance = tl.load(VARIANCE + o_b, mask=m_n, other=0.0)
    floor = tl.load(FLOOR + o_b, mask=m_n, other=0.0)
    behind = tl.load(BEHIND + o_b, mask=m_n, other=0.0)
    bound = tl.load(BOUND + o_b, mask=m_n, other=-float("inf"))
    FACTOR += i_b * MOST * WIDTH
    BEST += i_b * 2 * SLOTS
    PICK += i_b * 2 * SLOTS
    best, pick = first_best(clean(tl.where(variance > floor, variance, behind), bound, LAST), o_n, NONE)
    if SHARED:
        best, pick = agree(best, pick, BEST, PICK, ARRIVED + i_b, i_tile, TILES, 0, NONE, SLOTS)
    for step in range(tl.load(COUNT + i_b)):
        if i_tile == 0:
            tl.store(ORDER + i_b * MOST + step, pick)
            tl.store(GAIN + i_b * MOST + step, best)
        known = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, step, ROWS):
            o_s = begin + tl.arange(0, ROWS)
            m_s = o_s < step
            # A column of another tile must not come from this multiprocessor's own cache.
            seen = tl.load(FACTOR + o_s * WIDTH + pick, mask=m_s, other=0.0, cache_modifier=".cg")
            o_tile = o_s[:, None] * WIDTH + o_n[None, :]
            known += seen[:, None] * tl.load(FACTOR + o_tile, mask=m_s[:, None] & m_n[None, :], other=0.0)
        row = tl.load(KERNEL + i_b * s_batch + pick.to(tl.int64) * s_row + o_n, mask=o_n < COLUMNS, other=0.0)
        # What adds nothing leaves the factor as it is.
        root = tl.sqrt_rn(tl.where(best > 0, best, float("inf")))
        row = tl.div_rn(row - tl.sum(known, 0), root)
        tl.store(FACTOR + step * WIDTH + o_n, row, mask=m_n)
        variance -= row * row
        bound = tl.where(o_n == pick, -float("inf"), bound)
        best, pick = first_best(clean(tl.where(variance > floor, variance, behind), bound, LAST), o_n, NONE)
        if SHARED:
            best, pick = agree(best, pick, BEST, PICK, ARRIVED + i_b, i_tile, TILES, step + 1, NONE, SLOTS)
        else:
            tl.debug_barrier()  # the row is read by other threads than wrote it


def _config(size: int, shared: bool) -> Config:
    rows, warps = (max(1, 4096 // size), 4) if shared else (max(1, min(32, 8192 // size)), max(4, size // 128))
    constants = {"SHARED": shared, "LAST": LAST, "NONE": NONE, "SLOTS": SLOTS, "ROWS": rows, "BLOCK": size}
    return Config(constants, warps, fusion=True, cooperative=shared)


def determinant(kernel: Tensor, relevance: Tensor, bound: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Twin of :class:`visiontok.kernels.reference.Determinant` in the greedy loop; sums have another order."""
    order, gain = outputs(bound, most)
    b, n = bound.shape
    if not b or not most:
        return order.long(), gain
    shared = n > LARGEST_ALONE or (b < 64 and most * most * n * 2 > ALONE)
    programs = resident(kernel)
    size = tile(n, programs) if shared else block(n)
    tiles = triton.cdiv(n, size)
    config = _config(size, shared)
    start = Determinant(kernel, relevance, 0)
    vectors = [padded(x) for x in (start.variance, start.floor, start.behind)]
    vectors += [padded(bound, -torch.inf), count.int(), order, gain]
    vectors += [relevance.new_empty(b, most, wide(n)), *slots(b, torch.float32, bound.device)]
    columns = readable(kernel)
    together = programs // tiles if shared else b  # rows of the batch in a launch
    for begin in range(0, b, together):
        part = slice(begin, min(begin + together, b))
        _determinant[((part.stop - begin) * tiles,)](
            kernel[part], *(x[part] for x in vectors),
            tiles, wide(n), columns, most, kernel.stride(0), kernel.stride(1), **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def builds() -> list[Build]:
    """Shipped configurations."""
    names = ("KERNEL", "VARIANCE", "FLOOR", "BEHIND", "BOUND", "GAIN", "FACTOR", "BEST")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("COUNT", "ORDER", "PICK", "ARRIVED"), "*i32")
    types |= dict.fromkeys(("TILES", "WIDTH", "COLUMNS", "MOST"), "i32") | {"s_batch": "i32", "s_row": "i32"}
    return [
        Build(
            name=f"determinant {'shared' if shared else 'alone'} {size}",
            kernel=_determinant,
            types=types,
            config=_config(size, shared),
            aligned=("WIDTH", "COLUMNS", "s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=size in (128, 1024),
        )
        for shared, size in ((False, 1024), (False, LARGEST_ALONE), (True, 128), (True, 512))
    ]
