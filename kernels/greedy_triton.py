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
from .reference import LAST
from .runtime import LARGEST


@triton.jit
def _clean(gain, bound, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gains as they count: NaN and -inf come last of what may be picked, and nothing exceeds its bound."""
    gain = tl.where(gain == gain, tl.maximum(gain, LAST), LAST)
    return tl.minimum(gain, bound)


@triton.jit
def _first_best(gain, o_n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest gain and the lowest index that has it."""
    best = tl.max(gain, 0)
    return best, tl.min(tl.where(gain == best, o_n, BLOCK), 0)


@triton.jit
def _running_max(  # type: ignore[no-untyped-def]
    SIMILARITY, OFFSET, SLOPE, START, BOUND, COUNT, ORDER, GAIN,
    N, MOST, s_batch, s_row,
    PER_OFFSET: tl.constexpr, PER_SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    if PER_OFFSET:
        offset = tl.load(OFFSET + i_b * N + o_n, mask=m_n, other=0.0)
    else:
        offset = tl.load(OFFSET)
    if PER_SLOPE:
        slope = tl.load(SLOPE + i_b * N + o_n, mask=m_n, other=0.0)
    else:
        slope = tl.load(SLOPE)
    bound = tl.load(BOUND + i_b * N + o_n, mask=m_n, other=-float("inf"))
    gain = _clean(tl.load(START + i_b * N + o_n, mask=m_n, other=0.0), bound, LAST)
    state = bound
    for step in range(tl.load(COUNT + i_b)):
        best, pick = _first_best(gain, o_n, BLOCK)
        tl.store(ORDER + i_b * MOST + step, pick)
        tl.store(GAIN + i_b * MOST + step, best)
        row = tl.load(SIMILARITY + i_b * s_batch + pick.to(tl.int64) * s_row + o_n, mask=m_n, other=0.0)
        # offset - slope · x falls in x even when rounded, so the least of it is that of the largest similarity.
        state = _clean(offset - slope * row, tl.where(o_n == pick, -float("inf"), state), LAST)
        gain = state


def _config(n: int, offset: bool, slope: bool) -> Config:
    block = max(64, triton.next_power_of_2(n))
    warps = max(1, min(32, block // 512))
    return Config({"PER_OFFSET": offset, "PER_SLOPE": slope, "LAST": LAST, "BLOCK": block}, warps)


def running_max(
    similarity: Tensor, offset: Tensor, slope: Tensor, start: Tensor, bound: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Twin of :class:`visiontok.kernels.reference.RunningMax` in the greedy loop."""
    b, n, _ = similarity.shape
    order = torch.full((b, most), -1, dtype=torch.int32, device=bound.device)
    gain = torch.full((b, most), -torch.inf, device=bound.device)
    config = _config(n, offset.numel() > 1, slope.numel() > 1)
    if b and most:
        _running_max[(b,)](
            similarity, offset, slope, start, bound, count.int(), order, gain,
            n, most, similarity.stride(0), similarity.stride(1), **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def builds() -> list[Build]:
    """Shipped configurations."""
    types = dict.fromkeys(("SIMILARITY", "OFFSET", "SLOPE", "START", "BOUND", "GAIN"), "*fp32")
    types |= {"COUNT": "*i32", "ORDER": "*i32", "N": "i32", "MOST": "i32", "s_batch": "i64", "s_row": "i64"}
    kinds = {"max-min": (False, False), "mmr": (True, False), "product": (True, True)}
    return [
        Build(
            name=f"greedy {kind} N={n}",
            kernel=_running_max,
            types=types,
            config=_config(n, *per),
            aligned=("s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=n == LARGEST,
        )
        for kind, per in kinds.items()
        for n in (1024, 4096, LARGEST)
    ]
