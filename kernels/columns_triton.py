"""Statistics of attention maps that are never held: one pass for the sums of the rows, one for those of the columns.

Both keep a tile of one side and run over the other, so that every sum is made in registers, in one order, and stored
once. The width of a head is read as a power of two and a rest: 80 costs 80.
"""

from __future__ import annotations

import math

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
def _product(a, b, a_rest, b_rest, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """a · bᵀ, of both parts of the width."""
    out = tl.dot(a, tl.trans(b))
    if REST:
        out = tl.dot(a_rest, tl.trans(b_rest), out)
    return out


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    logits, row, key, first, behind, M, N, MASK, place,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which logits count; ``row`` and ``key``, ``first`` and ``behind`` are shaped to go with them.

    MASK points to the corner of the tile, and ``place`` leads from there."""
    ok = (tl.abs(logits) < float("inf")) & (key < N)
    if CAUSAL:
        ok = ok & (key <= row + (N - M))
    if SPAN:
        ok = ok & (key >= first) & (key < behind)
    if MASKED:
        there = (row < M) & (key < N)
        ok = ok & (tl.load(MASK + place, mask=there, other=0) != 0)
    return ok


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    Q, K, SPANS, BIAS, MASK, PART, OUT,
    H, GROUP, M, N, scale,
    s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_span, s_span_batch, s_bias, s_mask_batch, s_mask, s_part,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
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
        logits = _product(q, k, q_rest, k_rest, REST) * scale
        if BIASED:
            logits += tl.load(BIAS + i_b * s_bias + key, mask=key < N, other=0.0)[None, :] * 1.4426950408889634
        ok = _seen(
            logits, row[:, None], key[None, :], first[:, None], behind[:, None], M, N,
            MASK + tl.cast(start, tl.int64) * s_mask + begin, o_r[:, None] * s_mask + o_k[None, :],
            CAUSAL, SPAN, MASKED,
        )  # fmt: skip
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
    ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
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
        logits = _product(k, q, k_rest, q_rest, REST) * scale
        if BIASED:
            logits += bias[:, None]
        ok = _seen(
            logits, row[None, :], key[:, None], first[None, :], behind[None, :], M, N,
            MASK + tl.cast(begin, tl.int64) * s_mask + start, o_r[None, :] * s_mask + o_k[:, None],
            CAUSAL, SPAN, MASKED,
        )  # fmt: skip
        out += tl.sum(tl.where(ok, tl.exp2(logits - level[None, :]), 0.0), 1)
    tl.store(OUT + (i_b * H + i_h) * N + key, out, mask=key < N)


@triton.jit
def _peak_sums(  # type: ignore[no-untyped-def]
    Q, K, SPANS, REACH, BIAS, MASK, LSE, WEIGHT, NUMBER, OUT,
    H, GROUP, M, N, scale,
    s_qb, s_qh, s_qm, s_kb, s_kg, s_kn, s_span, s_span_batch, s_reach, s_bias, s_mask_batch, s_mask,
    s_lse_batch, s_lse_head, s_weight_batch, s_weight, s_number, LENGTH, PARTS,
    CAUSAL: tl.constexpr, SPAN: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, NUMBERED: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_k, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = i_k * KEYS
    o_r, o_k, o_d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WHOLE)
    Q += i_b * s_qb * STEP
    K += i_b * s_kb * STEP
    MASK += i_b * s_mask_batch
    LSE += i_b * s_lse_batch
    key = start + o_k
    if REST:
        o_rest = WHOLE + tl.arange(0, REST)
    if BIASED:
        bias = tl.load(BIAS + i_b * s_bias + key, mask=key < N, other=0.0) * 1.4426950408889634
    if NUMBERED:
        number = tl.load(NUMBER + i_b * s_number + M + key, mask=key < N, other=0)
    low, high = i_p * LENGTH, tl.minimum(M, (i_p + 1) * LENGTH)
    if CAUSAL:
        low = tl.maximum(low, start - (N - M))
    if SPAN:
        low = tl.maximum(low, tl.load(REACH + i_b * s_reach + 2 * i_k))
        high = tl.minimum(high, tl.load(REACH + i_b * s_reach + 2 * i_k + 1))
    out = tl.zeros((KEYS,), tl.float32)
    for begin in range(low, high, ROWS):
        row = begin + o_r
        first, behind = row, row
        if SPAN:
            first = tl.load(SPANS + i_b * s_span_batch + row, mask=row < high, other=N)
            behind = tl.load(SPANS + s_span + i_b * s_span_batch + row, mask=row < high, other=0)
        best = tl.zeros((KEYS, ROWS), tl.float32)
        for i_h in range(H):
            head = tl.cast(i_h, tl.int64)
            A, B = K + (head // GROUP) * s_kg * STEP, Q + head * s_qh * STEP
            k, q = (
                _rows(A, start, o_k, N, s_kn, o_d, D, STEP, UPCAST),
                _rows(B, begin, o_r, M, s_qm, o_d, D, STEP, UPCAST),
            )
            k_rest, q_rest = k, q
            if REST:
                k_rest = _rows(A, start, o_k, N, s_kn, o_rest, D, STEP, UPCAST)
                q_rest = _rows(B, begin, o_r, M, s_qm, o_rest, D, STEP, UPCAST)
            logits = _product(k, q, k_rest, q_rest, REST) * scale
            if BIASED:
                logits += bias[:, None]
            ok = _seen(
                logits, row[None, :], key[:, None], first[None, :], behind[None, :], M, N,
                MASK + tl.cast(begin, tl.int64) * s_mask + start, o_r[None, :] * s_mask + o_k[:, None],
                CAUSAL, SPAN, MASKED,
            )  # fmt: skip
            lse = tl.load(LSE + head * s_lse_head + row, mask=row < high, other=-float("inf"))
            level = tl.where(lse > -float("inf"), lse * 1.4426950408889634, float("inf"))
            best = tl.maximum(best, tl.where(ok, tl.exp2(logits - level[None, :]), 0.0))
        weight = tl.load(WEIGHT + i_b * s_weight_batch + row * s_weight, mask=row < high, other=0.0)
        if NUMBERED:
            mine = tl.load(NUMBER + i_b * s_number + row, mask=row < high, other=0)
            best = tl.where(mine[None, :] == number[:, None], best, 0.0)
        out += tl.sum(best * weight[None, :], 1)
    tl.store(OUT + (i_b * PARTS + i_p) * N + key, out, mask=key < N)


def _config(rows: int, keys: int, d: int, step: int, sight: Sight, **flags: bool) -> Config:
    """``rows`` × ``keys`` logits are held at a time."""
    whole = max(16, 1 << (d.bit_length() - 1))
    shape = {"D": d, "WHOLE": whole, "REST": max(16, triton.next_power_of_2(d - whole)) if d > whole else 0}
    seen = {
        "CAUSAL": sight.causal,
        "SPAN": sight.span is not None,
        "BIASED": sight.bias is not None,
        "MASKED": sight.mask is not None,
    }
    numbers = {"UPCAST": interpreted(), "STEP": step}
    tile = {"ROWS": rows, "KEYS": keys}
    return Config(seen | flags | shape | numbers | tile, warps=4, stages=2, fusion=True)


def _resident(count: int, d: int, sight: Sight) -> int:
    """How long a side of the tile that stays is: longer reads the other side less often, shorter fills the GPU."""
    return 128 if count >= 2048 and d <= 128 and sight.mask is None else 64


def _streamed(d: int, sight: Sight) -> int:
    """The same of the side that passes by; addresses in a mask take registers, too."""
    return 64 if d <= 128 and sight.mask is None else 32


def _peaks(sight: Sight) -> tuple[int, int]:
    """Rows and keys of a tile, beside which that of the largest so far is held."""
    return (32 if sight.mask is None else 16), 64


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
    rows = _resident(m, d, sight)
    config = _config(rows, _streamed(d, sight), d, sides.step, sight, SHARE=part is not None)
    if out.numel():
        _row_sums[(triton.cdiv(m, rows), b * heads)](
            sides.q, sides.k, sides.spans, sides.bias, sides.mask, chosen, out, *sides.sizes, *sides.strides,
            *sides.span_strides, sides.bias_stride, *sides.mask_strides, 0 if part is None else _batch(chosen),
            **config.constants, **config.options(),
        )  # fmt: skip
    return out


def attention_columns(q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, sight: Sight) -> Tensor:
    """Twin of :func:`visiontok.kernels.reference.attention_columns`."""
    (b, heads, _, d), n, sides = q.shape, k.shape[2], _Sides(q, k, sight)
    lse = attention_lse(q, k, sight) if lse is None else _in_line(lse)
    out = torch.empty(b, heads, n, device=q.device)
    keys = _resident(n, d, sight)
    reach = _reach(sight.span, n, keys)
    config = _config(_streamed(d, sight), keys, d, sides.step, sight)
    if out.numel():
        _column_sums[(triton.cdiv(n, keys), b * heads)](
            sides.q, sides.k, sides.spans, q if reach is None else reach, sides.bias, sides.mask, lse, weight, out,
            *sides.sizes, *sides.strides, *sides.span_strides, 0 if reach is None else _batch(reach),
            sides.bias_stride, *sides.mask_strides, *lse.stride()[:2], *weight.stride(),
            **config.constants, **config.options(),
        )  # fmt: skip
    return out


def attention_peaks(
    q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, group: Tensor | None, sight: Sight
) -> Tensor:
    """Twin of :func:`visiontok.kernels.reference.attention_peaks`."""
    (b, _, m, d), n, sides = q.shape, k.shape[2], _Sides(q, k, sight)
    lse = attention_lse(q, k, sight) if lse is None else _in_line(lse)
    number = q if group is None else _in_line(group)
    rows, keys = _peaks(sight)
    # Programs share the rows, too, for there are few blocks of keys; into how many parts depends on the shape alone.
    length = max(4 * rows, triton.cdiv(m, 32 * rows) * rows)
    parts = triton.cdiv(m, length)
    out = torch.empty(b, parts, n, device=q.device)
    reach = _reach(sight.span, n, keys)
    config = _config(rows, keys, d, sides.step, sight, NUMBERED=group is not None)
    if out.numel():
        _peak_sums[(triton.cdiv(n, keys), parts, b)](
            sides.q, sides.k, sides.spans, q if reach is None else reach, sides.bias, sides.mask, lse, weight, number,
            out, *sides.sizes, *sides.strides, *sides.span_strides, 0 if reach is None else _batch(reach),
            sides.bias_stride, *sides.mask_strides, *lse.stride()[:2], *weight.stride(),
            0 if group is None else _batch(number), length, parts, **config.constants, **config.options(),
        )  # fmt: skip
    return out.sum(1)


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


def builds() -> list[Build]:
    """Shipped configurations: towers see all or a window, decoders what came before, with and without a bias."""
    towers = [(64, "all"), (72, "all"), (80, "windows"), (88, "all")]
    decoders = [(64, "causal"), (128, "causal"), (128, "causal, bias"), (128, "mask, bias")]
    return [build for d, sees in (*towers, *decoders) for build in _builds(d, sees)]


def _builds(d: int, sees: str) -> list[Build]:
    some = torch.empty(0)
    sight = Sight(1.0, "causal" in sees, *(some if word in sees else None for word in ("windows", "bias", "mask")))
    long, short = _resident(4096, d, sight), _streamed(d, sight)
    kernels = {
        "row": (_row_sums, _config(long, short, d, 8, sight, SHARE=False)),
        "column": (_column_sums, _config(short, long, d, 8, sight)),
    }
    if "bias" in sees:
        kernels["peak"] = _peak_sums, _config(*_peaks(sight), d, 8, sight, NUMBERED="mask" not in sees)
    if (d, sees) == (128, "causal"):
        kernels["share"] = _row_sums, _config(long, short, d, 8, sight, SHARE=True)
    types = dict.fromkeys(("Q", "K"), "*bf16") | dict.fromkeys(("BIAS", "LSE", "WEIGHT", "OUT"), "*fp32")
    types |= dict.fromkeys(("SPANS", "REACH", "NUMBER"), "*i32") | {"MASK": "*u8", "PART": "*u8", "scale": "fp32"}
    return [
        Build(
            name=f"{name} sums d={d} {sees}",
            kernel=kernel,
            types=dict.fromkeys(kernel.arg_names, "i32") | types,
            config=config,
            instructions={80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"},
            everywhere=sees == "causal, bias" or name == "share",
        )
        for name, (kernel, config) in kernels.items()
    ]
