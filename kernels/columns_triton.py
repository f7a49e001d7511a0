"""Statistics of attention maps that are never held: one pass for the sums of the rows, one for those of the columns.

Both keep a tile of one side and run over the other, so that every sum is made in registers, in one order, and stored
once. The width of a head is read as a power of two and a rest: 80 costs 80.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build, Config
from .reference import Sight
from .runtime import interpreted


@triton.jit
def _rows(X, start, o_x, limit, s_row, o_d, D: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows start + o_x of what X points to, 0 behind ``limit``; strides are told in multiples of ``STEP``."""
    base = X + tl.cast(start, tl.int64) * s_row * STEP
    mask = (start + o_x < limit)[:, None] & (o_d < D)[None, :]
    x = tl.load(base + o_x[:, None] * (s_row * STEP) + o_d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _product(a, b, a_rest, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a · bᵀ, of both parts of the width."""
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if REST:
        out = tl.dot(a_rest, tl.trans(b_rest), out, input_precision=PRECISION)
    return out


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    logits, row, key, first, behind, M, N, MASK, s_mask,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which logits count; ``row`` and ``key``, ``first`` and ``behind`` are shaped to go with them."""
    ok = (tl.abs(logits) < float("inf")) & (key < N)
    if CAUSAL:
        ok = ok & (key <= row + (N - M))
    if SPAN:
        ok = ok & (key >= first) & (key < behind)
    if MASKED:
        there = (row < M) & (key < N)
        ok = ok & (tl.load(MASK + row.to(tl.int64) * s_mask + key, mask=there, other=0) != 0)
    return ok


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    Q, K, SPANS, BIAS, MASK, PART, OUT,
    H, GROUP, M, N, scale,
    s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_span, s_span_batch, s_bias, s_mask_batch, s_mask, s_part,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    start = tl.program_id(0) * ROWS
    o_r, o_k, o_d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WHOLE)
    Q += (i_b * s_qb + i_h.to(tl.int64) * s_qh) * STEP
    K += (i_b * s_kb + (i_h // GROUP).to(tl.int64) * s_kg) * STEP
    MASK += i_b * s_mask_batch
    row = start + o_r
    q = _rows(Q, start, o_r, M, s_qm, o_d, D, STEP, UPCAST)
    q_rest = q
    if REST:
        o_rest = WHOLE + tl.arange(0, REST)
        q_rest = _rows(Q, start, o_r, M, s_qm, o_rest, D, STEP, UPCAST)
    low, high = 0, N
    if CAUSAL:
        high = tl.minimum(N, start + ROWS + N - M)
    first, behind = row, row
    if SPAN:
        first = tl.load(SPANS + i_b * s_span_batch + row, mask=row < M, other=N)
        behind = tl.load(SPANS + s_span + i_b * s_span_batch + row, mask=row < M, other=0)
        low, high = tl.maximum(low, tl.min(first, 0)), tl.minimum(high, tl.max(behind, 0))
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    share = tl.zeros((ROWS,), tl.float32)
    for begin in range(low, high, KEYS):
        k = _rows(K, begin, o_k, N, s_kn, o_d, D, STEP, UPCAST)
        k_rest = k
        if REST:
            k_rest = _rows(K, begin, o_k, N, s_kn, o_rest, D, STEP, UPCAST)
        key = begin + o_k
        logits = _product(q, k, q_rest, k_rest, REST, PRECISION) * scale
        if BIASED:
            logits += tl.load(BIAS + i_b * s_bias + key, mask=key < N, other=0.0)[None, :] * 1.4426950408889634
        ok = _seen(
            logits, row[:, None], key[None, :], first[:, None], behind[:, None], M, N, MASK, s_mask, CAUSAL, SPAN, MASKED
        )
        logits = tl.where(ok, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher > -float("inf"), higher, 0.0)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if SHARE:
            part = tl.load(PART + i_b * s_part + key, mask=key < N, other=0)
            share = share * shrink + tl.sum(tl.where((part != 0)[None, :], weights, 0.0), 1)
        top = higher
    some = total > 0
    if SHARE:
        out = share / tl.where(some, total, 1.0)
    else:
        out = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(OUT + (i_b * H + i_h) * M + row, out, mask=row < M)


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]
    Q, K, SPANS, REACH, BIAS, MASK, LSE, WEIGHT, OUT,
    H, GROUP, M, N, scale,
    s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_span, s_span_batch, s_reach, s_bias, s_mask_batch, s_mask,
    s_lse_batch, s_lse_head, s_weight_batch, s_weight_head, s_weight,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_k = tl.program_id(0)
    start = i_k * KEYS
    o_r, o_k, o_d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WHOLE)
    Q += (i_b * s_qb + i_h.to(tl.int64) * s_qh) * STEP
    K += (i_b * s_kb + (i_h // GROUP).to(tl.int64) * s_kg) * STEP
    MASK += i_b * s_mask_batch
    LSE += i_b * s_lse_batch + i_h.to(tl.int64) * s_lse_head
    WEIGHT += i_b * s_weight_batch + i_h.to(tl.int64) * s_weight_head
    key = start + o_k
    k = _rows(K, start, o_k, N, s_kn, o_d, D, STEP, UPCAST)
    k_rest = k
    if REST:
        o_rest = WHOLE + tl.arange(0, REST)
        k_rest = _rows(K, start, o_k, N, s_kn, o_rest, D, STEP, UPCAST)
    if BIASED:
        bias = tl.load(BIAS + i_b * s_bias + key, mask=key < N, other=0.0) * 1.4426950408889634
    low, high = 0, M
    if CAUSAL:
        low = tl.maximum(0, start - (N - M))
    if SPAN:
        low = tl.maximum(low, tl.load(REACH + i_b * s_reach + 2 * i_k))
        high = tl.load(REACH + i_b * s_reach + 2 * i_k + 1)
    out = tl.zeros((KEYS,), tl.float32)
    for begin in range(low, high, ROWS):
        q = _rows(Q, begin, o_r, M, s_qm, o_d, D, STEP, UPCAST)
        q_rest = q
        if REST:
            q_rest = _rows(Q, begin, o_r, M, s_qm, o_rest, D, STEP, UPCAST)
        row = begin + o_r
        lse = tl.load(LSE + row, mask=row < M, other=-float("inf"))
        weight = tl.load(WEIGHT + row * s_weight, mask=row < M, other=0.0)
        # weight · exp(logit - lse) in one exponential; what counts nothing is infinitely far below.
        counts = (weight > 0) & (lse > -float("inf"))
        level = tl.where(counts, lse * 1.4426950408889634 - tl.log2(tl.where(counts, weight, 1.0)), float("inf"))
        first, behind = row, row
        if SPAN:
            first = tl.load(SPANS + i_b * s_span_batch + row, mask=row < M, other=N)
            behind = tl.load(SPANS + s_span + i_b * s_span_batch + row, mask=row < M, other=0)
        logits = _product(k, q, k_rest, q_rest, REST, PRECISION) * scale
        if BIASED:
            logits += bias[:, None]
        ok = _seen(
            logits, row[None, :], key[:, None], first[None, :], behind[None, :], M, N, MASK, s_mask, CAUSAL, SPAN, MASKED
        )
        out += tl.sum(tl.where(ok, tl.exp2(logits - level[None, :]), 0.0), 1)
    tl.store(OUT + (i_b * H + i_h) * N + key, out, mask=key < N)


def _config(rows: int, keys: int, d: int, dtype: torch.dtype, step: int, sight: Sight, **flags: bool) -> Config:
    """``rows`` × ``keys`` logits are held at a time."""
    whole = max(16, 1 << (d.bit_length() - 1))
    shape = {"D": d, "WHOLE": whole, "REST": max(16, triton.next_power_of_2(d - whole)) if d > whole else 0}
    seen = {
        "CAUSAL": sight.causal,
        "SPAN": sight.span is not None,
        "BIASED": sight.bias is not None,
        "MASKED": sight.mask is not None,
    }
    # TF32 alone would keep ten bits of what was float32.
    numbers = {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "UPCAST": interpreted(), "STEP": step}
    tile = {"ROWS": rows, "KEYS": keys}
    return Config(seen | flags | shape | numbers | tile, warps=4, stages=2, fusion=True)


def _resident(count: int, d: int, dtype: torch.dtype) -> int:
    """How long a side of the tile that stays is: longer reads the other side less often, shorter fills the GPU."""
    return 128 if count >= 2048 and d <= 128 and dtype != torch.float32 else 64


def _streamed(d: int, dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 or d > 128 else 64


def _lined_up(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """Queries and keys whose last dimension lies in one piece, and what all their strides are multiples of."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    whole = all(s % 8 == 0 for x in (q, k) for s in x.stride()[:-1]) and not (q.data_ptr() % 16 or k.data_ptr() % 16)
    return q, k, 8 if whole else 1


def _batch(x: Tensor) -> int:
    """Stride of the batch dimension; 0 where one row serves all."""
    return x.stride(0) if len(x) > 1 else 0


class _Sides:
    """Arguments that both passes share.

    Attributes:
        sizes: H, H / G, M, N and the scale of logits in base 2.
        strides: of queries and keys.
        seen: arguments and strides of a :class:`Sight`.
    """

    def __init__(self, q: Tensor, k: Tensor, sight: Sight) -> None:
        self.q, self.k, self.step = _lined_up(q, k)
        self.sight = sight
        self.sizes = (q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], sight.scale / math.log(2))
        self.strides = [s // self.step for x in (self.q, self.k) for s in x.stride()[:3]]
        # What is not there is never read; some pointer must stand for it.
        self.spans = q if sight.span is None else _in_line(sight.span)
        self.bias = q if sight.bias is None else _in_line(sight.bias)
        self.mask = q if sight.mask is None else _in_line(sight.mask).view(torch.uint8)

    @property
    def span_strides(self) -> tuple[int, int]:
        if self.sight.span is None:
            return 0, 0
        return self.spans.stride(0), self.spans.stride(1) if self.spans.shape[1] > 1 else 0

    @property
    def bias_stride(self) -> int:
        return 0 if self.sight.bias is None else _batch(self.bias)

    @property
    def mask_strides(self) -> tuple[int, int]:
        return (0, 0) if self.sight.mask is None else (_batch(self.mask), self.mask.stride(1))


def _in_line(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_lse(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
    """Twin of :func:`visiontok.kernels.reference.attention_lse`."""
    return _sums_of_rows(q, k, None, sight)


def attention_share(q: Tensor, k: Tensor, part: Tensor, sight: Sight) -> Tensor:
    """Twin of :func:`visiontok.kernels.reference.attention_share`."""
    return _sums_of_rows(q, k, part, sight)


def _sums_of_rows(q: Tensor, k: Tensor, part: Tensor | None, sight: Sight) -> Tensor:
    (b, heads, m, d), sides = q.shape, _Sides(q, k, sight)
    out = torch.empty(b, heads, m, device=q.device)
    chosen = q if part is None else _in_line(part).view(torch.uint8)
    rows = _resident(m, d, q.dtype)
    config = _config(rows, _streamed(d, q.dtype), d, q.dtype, sides.step, sight, SHARE=part is not None)
    if out.numel():
        _row_sums[(triton.cdiv(m, rows), b * heads)](
            sides.q, sides.k, sides.spans, sides.bias, sides.mask, chosen, out, *sides.sizes, *sides.strides,
            *sides.span_strides, sides.bias_stride, *sides.mask_strides, 0 if part is None else _batch(chosen),
            **config.constants, **config.options(),
        )  # fmt: skip
    return out


def attention_columns(q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, sight: Sight) -> Tensor:
    """Twin of :func:`visiontok.kernels.reference.attention_columns`."""
    (b, heads, m, d), n, sides = q.shape, k.shape[2], _Sides(q, k, sight)
    lse = attention_lse(q, k, sight) if lse is None else _in_line(lse)
    out = torch.empty(b, heads, n, device=q.device)
    keys = _resident(n, d, q.dtype)
    reach = _reach(sight.span, n, keys)
    config = _config(_streamed(d, q.dtype), keys, d, q.dtype, sides.step, sight)
    if out.numel():
        _column_sums[(triton.cdiv(n, keys), b * heads)](
            sides.q, sides.k, sides.spans, q if reach is None else reach, sides.bias, sides.mask, lse, weight, out,
            *sides.sizes, *sides.strides, *sides.span_strides, 0 if reach is None else _batch(reach),
            sides.bias_stride, *sides.mask_strides, *lse.stride()[:2], *weight.stride(),
            **config.constants, **config.options(),
        )  # fmt: skip
    return out


def _reach(span: Tensor | None, n: int, keys: int) -> Tensor | None:
    """(B or 1, blocks, 2) int32: the first query row that sees a key of each block of keys, and one behind the last.

    Exact where spans begin and end in ascending order, and else wider.
    """
    if span is None:
        return None
    first, behind = span
    begins = torch.arange(0, n, keys, device=span.device, dtype=torch.int32).expand(len(first), -1).contiguous()
    low = torch.searchsorted(behind.cummax(1).values, begins, right=True, out_int32=True)
    firsts = first.flip(1).cummin(1).values.flip(1)  # of the row and those behind it
    return torch.stack([low, torch.searchsorted(firsts, begins + keys, out_int32=True)], -1)


_POINTERS = ("SPANS", "REACH", "BIAS", "MASK", "PART", "LSE", "WEIGHT", "OUT")
