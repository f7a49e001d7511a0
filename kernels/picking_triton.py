"""What greedy selections in Triton have in common: gains that are comparable, their argmax, rows of 16-byte loads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    """How much to read of the rows of a table (B, M, N): :func:`wide` N where they go on, as those of ``cosines`` do."""
    (b, m, n), (batch, row, _) = table.shape, table.stride()
    end = table.storage_offset() + (b - 1) * batch + (m - 1) * row + wide(n)
    there = end * table.itemsize <= table.untyped_storage().nbytes()
    return wide(n) if there and row >= wide(n) and row % 16 == batch % 16 == 0 else n
