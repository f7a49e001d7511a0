"""Greedy selection in one launch: one program per row of the batch makes all of its picks.

Every step is an argmax over gains that lie in registers and one row read from the similarities, so that what counts is
the latency of a step, not bandwidth, and rows of a batch cost nothing extra while there are multiprocessors left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build, Config
from .picking_triton import block, clean, first_best, outputs, padded, readable, wide
from .reference import LAST
from .runtime import LARGEST


@triton.jit
def _running_max(  # type: ignore[no-untyped-def]
    SIMILARITY, OFFSET, SLOPE, START, BOUND, COUNT, ORDER, GAIN,
    WIDTH, COLUMNS, MOST, s_batch, s_row,
    PER_OFFSET: tl.constexpr, PER_SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    state = tl.load(BOUND + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=-float("inf"))
    gain = clean(tl.load(START + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=0.0), state, LAST)
    best, pick = first_best(gain, o_n, BLOCK)
    for step in range(tl.load(COUNT + i_b)):
        tl.store(ORDER + i_b * MOST + step, pick)
        tl.store(GAIN + i_b * MOST + step, best)
        # Registers hold the state alone of 16384 candidates: offset and slope are read anew, and since no pick is
        # negative, which the compiler does not know, it computes addresses anew as well.
        o_n = tl.arange(0, BLOCK) + tl.minimum(pick, 0) * 16
        gain = tl.load(SIMILARITY + i_b * s_batch + pick.to(tl.int64) * s_row + o_n, mask=o_n < COLUMNS, other=0.0)
        if PER_SLOPE:
            gain *= tl.load(SLOPE + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=0.0)
        else:
            gain *= tl.load(SLOPE)
        if PER_OFFSET:
            gain = tl.load(OFFSET + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=0.0) - gain
        else:
            gain = tl.load(OFFSET) - gain
        # offset - slope · x falls in x even when rounded, so the least of it is that of the largest similarity.
        state = clean(gain, tl.where(o_n == pick, -float("inf"), state), LAST)
        best, pick = first_best(state, o_n, BLOCK)


@triton.jit
def _running_sum(  # type: ignore[no-untyped-def]
    SIMILARITY, START, BOUND, COUNT, ORDER, GAIN,
    WIDTH, COLUMNS, MOST, s_batch, s_row,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    bound = tl.load(BOUND + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=-float("inf"))
    gain = clean(tl.load(START + i_b * WIDTH + o_n, mask=o_n < WIDTH, other=0.0), bound, LAST)
    best, pick = first_best(gain.to(tl.float64), o_n, BLOCK)
    # What has a bound stays there, for a cosine changes neither -inf nor, in float64, LAST.
    state = tl.where(bound == float("inf"), 0.0, bound).to(tl.float64)
    for step in range(tl.load(COUNT + i_b)):
        tl.store(ORDER + i_b * MOST + step, pick)
        tl.store(GAIN + i_b * MOST + step, best.to(tl.float32))
        o_n = tl.arange(0, BLOCK) + tl.minimum(pick, 0) * 16  # as above
        row = tl.load(SIMILARITY + i_b * s_batch + pick.to(tl.int64) * s_row + o_n, mask=o_n < COLUMNS, other=0.0)
        # Behind the row there may be anything, and NaN must not reach the argmax.
        state = tl.where((o_n == pick) | (state == -float("inf")), -float("inf"), state - row)
        best, pick = first_best(state, o_n, BLOCK)


def _config(n: int, **constants: bool) -> Config:
    size = block(n)
    return Config({**constants, "LAST": LAST, "BLOCK": size}, warps=max(1, min(32, size // 512)))


def running_max(
    similarity: Tensor, offset: Tensor, slope: Tensor, start: Tensor, bound: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Twin of :class:`visiontok.kernels.reference.RunningMax` in the greedy loop."""
    order, gain = outputs(bound, most)
    b, n = bound.shape
    config = _config(n, PER_OFFSET=offset.numel() > 1, PER_SLOPE=slope.numel() > 1)
    if b and most:
        offset, slope = (x if x.numel() == 1 else padded(x) for x in (offset, slope))
        _running_max[(b,)](
            similarity, offset, slope, padded(start), padded(bound, -torch.inf), count.int(), order, gain,
            wide(n), readable(similarity), most, similarity.stride(0), similarity.stride(1),
            **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def running_sum(similarity: Tensor, start: Tensor, bound: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Twin of :class:`visiontok.kernels.reference.RunningSum` in the greedy loop."""
    order, gain = outputs(bound, most)
    b, n = bound.shape
    config = _config(n)
    if b and most:
        _running_sum[(b,)](
            similarity, padded(start), padded(bound, -torch.inf), count.int(), order, gain,
            wide(n), readable(similarity), most, similarity.stride(0), similarity.stride(1),
            **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def builds() -> list[Build]:
    """Shipped configurations."""
    types = dict.fromkeys(("SIMILARITY", "OFFSET", "SLOPE", "START", "BOUND", "GAIN"), "*fp32")
    types |= {"COUNT": "*i32", "ORDER": "*i32", "s_batch": "i32", "s_row": "i32"}
    types |= dict.fromkeys(("WIDTH", "COLUMNS", "MOST"), "i32")
    kinds = {
        "max-min": (_running_max, LARGEST, {"PER_OFFSET": False, "PER_SLOPE": False}),
        "mmr": (_running_max, LARGEST, {"PER_OFFSET": True, "PER_SLOPE": False}),
        "product": (_running_max, LARGEST, {"PER_OFFSET": True, "PER_SLOPE": True}),
        "max-sum": (_running_sum, LARGEST // 2, {}),
    }
    return [
        Build(
            name=f"greedy {kind} N={n}",
            kernel=kernel,
            types=types,
            config=_config(n, **constants),
            aligned=("WIDTH", "COLUMNS", "s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=n == largest,
        )
        for kind, (kernel, largest, constants) in kinds.items()
        for n in (1024, 4096, largest)
    ]
