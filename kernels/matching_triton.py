"""The most similar row of another set, for each row: a matrix product whose result is never stored.

Products are those of float32: in 16 bits, or TF32, thousands of cosines would be equal. So they run on the ordinary
units, not on tensor cores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .build import Build, Config
from .reference import SAME

BLOCK_K = 16


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    X, Y, EMPTY_X, EMPTY_Y, VALID, BEST, WHERE,
    M, N, D, s_valid_batch, s_valid_row,
    MASK: tl.constexpr, ALIKE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    # Rows behind the last one repeat it, so that no load of the inner loop needs a mask.
    inside_m = tl.minimum(o_m, M - 1)
    o_k = tl.arange(0, BLOCK_K)
    X += i_b * M * D
    Y += i_b * N * D
    p_x = X + inside_m.to(tl.int64)[:, None] * D + o_k[None, :]
    empty_x = tl.load(EMPTY_X + i_b * M + inside_m)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    where = tl.zeros((BLOCK_M,), tl.int32)
    for begin in range(0, N, BLOCK_N):
        o_n = begin + tl.arange(0, BLOCK_N)
        inside_n = tl.minimum(o_n, N - 1)
        p_y = Y + inside_n.to(tl.int64)[None, :] * D + o_k[:, None]
        cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            # Compensated, for else long sums stray from 1 so far that duplicates are not seen.
            part = tl.dot(tl.load(p_x + k), tl.load(p_y + k), input_precision="ieee") - lost
            total = cosine + part
            lost = (total - cosine) - part
            cosine = total
        empty_y = tl.load(EMPTY_Y + i_b * N + inside_n)
        alike = (cosine > ALIKE) | ((empty_x[:, None] != 0) & (empty_y[None, :] != 0))
        allowed = (o_n < N)[None, :]
        if MASK == "column":
            allowed = allowed & (tl.load(VALID + i_b * s_valid_batch + inside_n) != 0)[None, :]
        if MASK == "pair":
            p_valid = VALID + i_b * s_valid_batch + inside_m.to(tl.int64)[:, None] * s_valid_row + inside_n[None, :]
            allowed = allowed & (tl.load(p_valid) != 0)
        cosine = tl.where(allowed, tl.where(alike, 1.0, cosine), -float("inf"))
        top = tl.max(cosine, 1)
        first = tl.min(tl.where(cosine == top[:, None], o_n[None, :], N), 1)
        where = tl.where(top > best, first, where)
        best = tl.maximum(top, best)
    tl.store(BEST + i_b * M + o_m, best, mask=m_m)
    tl.store(WHERE + i_b * M + o_m, where, mask=m_m)


def _config(mask: str) -> Config:
    constants = {"MASK": mask, "ALIKE": 1 - SAME, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": BLOCK_K}
    return Config(constants, warps=8, stages=3, fusion=True)


def nearest_unit(x: Tensor, y: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Twin of :func:`visiontok.kernels.reference.nearest_unit`."""
    (b, m), n = x.shape[:2], y.shape[1]
    best, where = x.new_full((b, m), -torch.inf), torch.zeros(b, m, dtype=torch.int32, device=x.device)
    if b and m and n:
        # zeros behind a row change no product
        x, y = (F.pad(side, (0, -side.shape[2] % BLOCK_K)).contiguous() for side in (x, y))
        empty_x, empty_y = (torch.linalg.vector_norm(side, dim=-1) == 0 for side in (x, y))
        mask = "none" if valid is None else "column" if valid.shape[1] == 1 else "pair"
        allowed = empty_y if valid is None else valid.expand(b, -1, -1).contiguous()
        config = _config(mask)
        _nearest[(triton.cdiv(m, config.constants["BLOCK_M"]), b)](
            x, y, empty_x, empty_y, allowed, best, where,
            m, n, x.shape[2], allowed.stride(0), allowed.stride(1), **config.constants, **config.options(),
        )  # fmt: skip
    return best, where.long()


def builds() -> list[Build]:
    """Shipped configurations."""
    types = dict.fromkeys(("X", "Y", "BEST"), "*fp32") | dict.fromkeys(("EMPTY_X", "EMPTY_Y", "VALID"), "*i1")
    types |= {"WHERE": "*i32", "M": "i32", "N": "i32", "D": "i32", "s_valid_batch": "i32", "s_valid_row": "i32"}
    return [
        Build(
            name=f"nearest, mask: {mask}",
            kernel=_nearest,
            types=types,
            config=_config(mask),
            aligned=("D",),
            instructions=dict.fromkeys((80, 90, 100), "FFMA"),
            everywhere=mask == "column",
        )
        for mask in ("none", "column", "pair")
    ]
