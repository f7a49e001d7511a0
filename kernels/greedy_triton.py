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
    WIDTH, COLUMNS, MOST, s_batch, s_row,
    PER_OFFSET: tl.constexpr, PER_SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < WIDTH
    state = tl.load(BOUND + i_b * WIDTH + o_n, mask=m_n, other=-float("inf"))
    gain = _clean(tl.load(START + i_b * WIDTH + o_n, mask=m_n, other=0.0), state, LAST)
    for step in range(tl.load(COUNT + i_b)):
        best, pick = _first_best(gain, o_n, BLOCK)
        tl.store(ORDER + i_b * MOST + step, pick)
        tl.store(GAIN + i_b * MOST + step, best)
        row = tl.load(SIMILARITY + i_b * s_batch + pick.to(tl.int64) * s_row + o_n, mask=o_n < COLUMNS, other=0.0)
        # Offset and slope come from the cache anew: with them, registers would not hold 16384 candidates.
        if PER_SLOPE:
            row *= tl.load(SLOPE + i_b * WIDTH + o_n, mask=m_n, other=0.0)
        else:
            row *= tl.load(SLOPE)
        if PER_OFFSET:
            row = tl.load(OFFSET + i_b * WIDTH + o_n, mask=m_n, other=0.0) - row
        else:
            row = tl.load(OFFSET) - row
        # offset - slope · x falls in x even when rounded, so the least of it is that of the largest similarity.
        state = _clean(row, tl.where(o_n == pick, -float("inf"), state), LAST)
        gain = state


def _block(n: int) -> tuple[int, int]:
    """Candidates of a program, a power of two, and its warps."""
    block = max(64, triton.next_power_of_2(n))
    return block, max(1, min(32, block // 512))


def _wide(n: int) -> int:
    """The next multiple of 16, for loads of 16 bytes."""
    return n + -n % 16


def _padded(x: Tensor, value: float = 0.0) -> Tensor:
    """x (…, N) contiguous, with N a multiple of 16."""
    return torch.nn.functional.pad(x, (0, _wide(x.shape[-1]) - x.shape[-1]), value=value).contiguous()


def _columns(table: Tensor) -> int:
    """What to read of the rows of a table (B, M, N): the padding as well where there is one, as in ``cosines``."""
    (b, m, n), (batch, row, _) = table.shape, table.stride()
    end = table.storage_offset() + (b - 1) * batch + (m - 1) * row + _wide(n)
    fits = row % 16 == batch % 16 == 0 and row >= _wide(n) and end * table.itemsize <= table.untyped_storage().nbytes()
    return _wide(n) if fits else n


def _config(n: int, offset: bool, slope: bool) -> Config:
    block, warps = _block(n)
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
            similarity, _vector(offset), _vector(slope), _padded(start), _padded(bound, -torch.inf), count.int(),
            order, gain, _wide(n), _columns(similarity), most, similarity.stride(0), similarity.stride(1),
            **config.constants, **config.options(),
        )  # fmt: skip
    return order.long(), gain


def _vector(x: Tensor) -> Tensor:
    """One number for all, or padded."""
    return x if x.numel() == 1 else _padded(x)


def builds() -> list[Build]:
    """Shipped configurations."""
    types = dict.fromkeys(("SIMILARITY", "OFFSET", "SLOPE", "START", "BOUND", "GAIN"), "*fp32")
    types |= {"COUNT": "*i32", "ORDER": "*i32", "s_batch": "i64", "s_row": "i64"}
    types |= dict.fromkeys(("WIDTH", "COLUMNS", "MOST"), "i32")
    kinds = {"max-min": (False, False), "mmr": (True, False), "product": (True, True)}
    return [
        Build(
            name=f"greedy {kind} N={n}",
            kernel=_running_max,
            types=types,
            config=_config(n, *per),
            aligned=("WIDTH", "COLUMNS", "s_batch", "s_row"),
            instructions=dict.fromkeys((80, 90, 100), r"LDG\.E\.128"),
            everywhere=n == LARGEST,
        )
        for kind, per in kinds.items()
        for n in (1024, 4096, LARGEST)
    ]
