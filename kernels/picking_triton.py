"""What greedy selections in Triton have in common: gains that are comparable, their argmax, rows of 16-byte loads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import interpreted

SLOTS = 256
"""The most tiles that share a row."""


@triton.jit
def clean(gain, bound, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gains as they count: NaN and -inf come last of what may be picked, and nothing exceeds its bound."""
    gain = tl.where(gain == gain, tl.maximum(gain, LAST), LAST)
    return tl.minimum(gain, bound)


@triton.jit
def first_best(gain, o_n, NONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest gain and the lowest index that has it, below NONE."""
    best = tl.max(gain, 0)
    return best, tl.min(tl.where(gain == best, o_n, NONE), 0)


def outputs(bound: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Order and gains before any pick."""
    order = torch.full((len(bound), most), -1, dtype=torch.int32, device=bound.device)
    return order, torch.full((len(bound), most), -torch.inf, device=bound.device)


def block(n: int) -> int:
    """Candidates of a program that holds all of them."""
    return max(64, triton.next_power_of_2(n))


def wide(n: int) -> int:
    """The next multiple of 16, for loads of 16 bytes."""
    return n + -n % 16


def padded(x: Tensor, value: float = 0.0) -> Tensor:
    """x (…, N) contiguous, with N made a multiple of 16."""
    return torch.nn.functional.pad(x, (0, wide(x.shape[-1]) - x.shape[-1]), value=value).contiguous()


def readable(table: Tensor) -> int:
    """How much to read of the rows of a table (B, M, N): :func:`wide` N where they go on as those of ``cosines`` do."""
    (b, m, n), (batch, row, _) = table.shape, table.stride()
    end = table.storage_offset() + (b - 1) * batch + (m - 1) * row + wide(n)
    there = end * table.itemsize <= table.untyped_storage().nbytes()
    return wide(n) if there and row >= wide(n) and row % 16 == batch % 16 == 0 else n


@triton.jit
def agree(  # type: ignore[no-untyped-def]
    best, pick, BEST, PICK, ARRIVED, i_tile, tiles, number, NONE: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """:func:`first_best` of all tiles of a row, which wait here for each other; what they wrote before is seen after.

    ``number`` counts the calls. Two sets of slots take turns: no tile is ahead by more than one call.
    """
    slot = (number % 2) * SLOTS
    tl.store(BEST + slot + i_tile, best)
    tl.store(PICK + slot + i_tile, pick)
    tl.debug_barrier()  # the release below is that of one thread and speaks for all
    arrived = tl.atomic_add(ARRIVED, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < (number + 1) * tiles:
        arrived = tl.atomic_add(ARRIVED, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    o_t = tl.arange(0, SLOTS)
    others = tl.load(BEST + slot + o_t, mask=o_t < tiles, other=-float("inf"), cache_modifier=".cg")
    index = tl.load(PICK + slot + o_t, mask=o_t < tiles, other=NONE, cache_modifier=".cg")
    best = tl.max(others, 0)
    return best, tl.min(tl.where(others == best, index, NONE), 0)


def resident(x: Tensor) -> int:
    """Programs that certainly run at the same time: one per multiprocessor, one alone in the interpreter."""
    return 1 if interpreted() else min(SLOTS, torch.cuda.get_device_properties(x.device).multi_processor_count)


def tile(n: int, programs: int) -> int:
    """Candidates of a program that shares them with others, at most ``programs`` of them."""
    size = 128
    while triton.cdiv(n, size) > programs:
        size *= 2
    return size


def slots(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`agree` needs of each row: gains and picks of the tiles, and how many have arrived."""
    best = torch.empty(rows, 2, SLOTS, dtype=dtype, device=device)
    pick = torch.empty(rows, 2, SLOTS, dtype=torch.int32, device=device)
    return best, pick, torch.zeros(rows, dtype=torch.int32, device=device)
