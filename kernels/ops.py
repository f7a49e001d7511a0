"""The operators that have a Triton twin, registered with PyTorch: one node each for ``torch.compile`` and ``export``.

Whether Triton or PyTorch computes one is decided inside, see :mod:`visiontok.kernels.runtime`; what comes out is the
same but for rounding where a docstring says so. Triton is imported when a kernel is first launched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Sight
from .runtime import LARGEST, use_triton


def _order(bound: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Picks and gains as all greedy operators return them."""
    shape = (bound.shape[0], most)
    return bound.new_empty(shape, dtype=torch.long), bound.new_empty(shape)


@torch.library.custom_op("visiontok::running_max", mutates_args=())
def running_max(
    similarity: Tensor, offset: Tensor, slope: Tensor, start: Tensor, bound: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Greedy picks by :class:`visiontok.kernels.RunningMax`, the same from both twins.

    Args:
        similarity: (B, N, N) float32, rows contiguous.
        offset: (B, N) or (1,) float32.
        slope: likewise, not negative.
        start: (B, N) float32.
        bound: (B, N) float32, see :func:`visiontok.kernels.reference.bounds`.
        count: (B,) long.
        most: picks to have room for.

    Returns:
        order (B, most) long and gain (B, most) float32, see :func:`visiontok.kernels.reference.pick`.
    """
    if use_triton(similarity) and bound.shape[1] <= LARGEST:
        from . import greedy_triton

        return greedy_triton.running_max(similarity, offset, slope, start, bound, count, most)
    return reference.pick(reference.RunningMax(similarity, offset, slope, start), bound, count, most)


@running_max.register_fake
def _(similarity, offset, slope, start, bound, count, most):  # type: ignore[no-untyped-def]
    return _order(bound, most)


def has_kernel(q: Tensor) -> bool:
    """Whether Triton makes statistics of ``q``: exact products of float32 take more registers than there are."""
    return use_triton(q) and q.dtype in (torch.bfloat16, torch.float16)


@torch.library.custom_op("visiontok::attention_lse", mutates_args=())
def attention_lse(
    q: Tensor, k: Tensor, scale: float, causal: bool, span: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_lse`; the twins differ by rounding, as in those below."""
    sight = Sight(scale, causal, span, bias, mask)
    if has_kernel(q):
        from . import columns_triton

        return columns_triton.attention_lse(q, k, sight)
    return reference.attention_lse(q, k, sight)


@attention_lse.register_fake
def _(q, k, scale, causal, span, bias, mask):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("visiontok::attention_share", mutates_args=())
def attention_share(
    q: Tensor,
    k: Tensor,
    part: Tensor,
    scale: float,
    causal: bool,
    span: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_share`."""
    sight = Sight(scale, causal, span, bias, mask)
    if has_kernel(q):
        from . import columns_triton

        return columns_triton.attention_share(q, k, part, sight)
    return reference.attention_share(q, k, part, sight)


@attention_share.register_fake
def _(q, k, part, scale, causal, span, bias, mask):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("visiontok::attention_columns", mutates_args=())
def attention_columns(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    span: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_columns`."""
    sight = Sight(scale, causal, span, bias, mask)
    if has_kernel(q):
        from . import columns_triton

        return columns_triton.attention_columns(q, k, weight, lse, sight)
    return reference.attention_columns(q, k, weight, lse, sight)


@attention_columns.register_fake
def _(q, k, weight, lse, scale, causal, span, bias, mask):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("visiontok::attention_peaks", mutates_args=())
def attention_peaks(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    lse: Tensor | None,
    group: Tensor | None,
    scale: float,
    causal: bool,
    span: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """:func:`visiontok.kernels.reference.attention_peaks`."""
    sight = Sight(scale, causal, span, bias, mask)
    if has_kernel(q):
        from . import columns_triton

        return columns_triton.attention_peaks(q, k, weight, lse, group, sight)
    return reference.attention_peaks(q, k, weight, lse, group, sight)


@attention_peaks.register_fake
def _(q, k, weight, lse, group, scale, causal, span, bias, mask):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("visiontok::running_sum", mutates_args=())
def running_sum(similarity: Tensor, start: Tensor, bound: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Greedy picks by :class:`visiontok.kernels.reference.RunningSum`, the same from both twins.

    Args:
        similarity: (B, N, N) float32, cosines, rows contiguous.
        start: (B, N) float32.
        bound: (B, N) float32, see :func:`visiontok.kernels.reference.bounds`.
        count: (B,) long.
        most: picks to have room for.

    Returns:
        order (B, most) long and gain (B, most) float32, see :func:`visiontok.kernels.reference.pick`.
    """
    if use_triton(similarity) and bound.shape[1] <= LARGEST // 2:  # float64 takes two registers
        from . import greedy_triton

        return greedy_triton.running_sum(similarity, start, bound, count, most)
    row = functools.partial(reference.row_of, similarity)
    return reference.pick(reference.RunningSum(row, start), bound, count, most)


@running_sum.register_fake
def _(similarity, start, bound, count, most):  # type: ignore[no-untyped-def]
    return _order(bound, most)


@torch.library.custom_op("visiontok::determinant", mutates_args=())
def determinant(kernel: Tensor, relevance: Tensor, bound: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Greedy picks by :class:`visiontok.kernels.reference.Determinant`; the twins' sums have different orders.

    Args:
        kernel: (B, N, N) float32, rows contiguous, with the squares of ``relevance`` on its diagonal.
        relevance: (B, N) float32, not negative.
        bound: (B, N) float32, see :func:`visiontok.kernels.reference.bounds`.
        count: (B,) long.
        most: picks to have room for.

    Returns:
        order (B, most) long and gain (B, most) float32, see :func:`visiontok.kernels.reference.pick`.
    """
    if use_triton(kernel) and bound.shape[1] <= LARGEST:
        from . import determinant_triton

        return determinant_triton.determinant(kernel, relevance, bound, count, most)
    return reference.pick(reference.Determinant(kernel, relevance, most), bound, count, most)


@determinant.register_fake
def _(kernel, relevance, bound, count, most):  # type: ignore[no-untyped-def]
    return _order(bound, most)


@torch.library.custom_op("visiontok::coverage", mutates_args=())
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
    """Greedy picks by :class:`visiontok.kernels.reference.Coverage`; the twins' float64 sums have different orders.

    Args:
        table: (B, R, N) float32, finite.
        weight: (B, R) float32, or none.
        scale: (B, N) float32, or none.
        bonus: likewise.
        start: how well every row is covered before the first pick.
        bound: (B, N) float32, see :func:`visiontok.kernels.reference.bounds`.
        count: (B,) long.
        most: picks to have room for.

    Returns:
        order (B, most) long and gain (B, most) float32, see :func:`visiontok.kernels.reference.pick`.
    """
    if use_triton(table) and bound.shape[1] <= LARGEST:
        from . import coverage_triton

        return coverage_triton.coverage(table, weight, scale, bonus, start, bound, count, most)
    return reference.pick(reference.Coverage(table, weight, scale, bonus, start), bound, count, most)


@coverage.register_fake
def _(table, weight, scale, bonus, start, bound, count, most):  # type: ignore[no-untyped-def]
    return _order(bound, most)


@torch.library.custom_op("visiontok::nearest_unit", mutates_args=())
def nearest_unit(x: Tensor, y: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Most similar row of y for each row of x, by cosine, without the M × N matrix; equal but for rounding.

    Duplicates have cosine exactly 1, and so have two zero rows.

    Args:
        x: (B, M, D), rows as :func:`visiontok.kernels.reference.unit` makes them.
        y: (B, N, D), likewise.
        valid: (B, M, N) or (B, 1, N) bool, pairs that may match.

    Returns:
        cosine (B, M) float32 and index (B, M) long, the lowest of equal ones; -inf and 0 where nothing may match.
    """
    if use_triton(x, worth=_long_and_narrow(x, y)):
        from . import matching_triton

        return matching_triton.nearest_unit(x, y, valid)
    return reference.nearest_unit(x, y, valid)


def _long_and_narrow(x: Tensor, y: Tensor) -> bool:
    """Whether the passes over the cosines cost more than the product that makes them, in which cuBLAS is better.

    By the numbers of kernels.md: PyTorch moves some 50 bytes a pair, while a float32 product without tensor cores takes
    as long as 50 bytes from a width of about 350 on.
    """
    b, m, d = x.shape
    return 4 * b * m * y.shape[1] > 256 * 2**20 and d <= 256


@nearest_unit.register_fake
def _(x, y, valid=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2], dtype=torch.long)


@torch.library.custom_op("visiontok::segment_mean", mutates_args=())
def segment_mean(x: Tensor, group: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of the rows of each group, without atomics, so that runs agree bit by bit; equal but for rounding.

    Differentiable in ``x``, not in ``weight``.

    Args:
        x: (B, N, D).
        group: (B, N) long in 0 … count-1; -1 leaves a row out.
        count: number of groups M.
        weight: (B, N).

    Returns:
        means (B, M, D) and the summed weights (B, M), in float32 or better; the mean of an empty group is 0.
    """
    if use_triton(x) and x.dtype != torch.float64:
        from . import segments_triton

        return segments_triton.segment_mean(x, group, count, weight)
    return reference.segment_mean(x, group, count, weight)


@segment_mean.register_fake
def _(x, group, count, weight):  # type: ignore[no-untyped-def]
    means = x.new_empty((x.shape[0], count, x.shape[2]), dtype=torch.promote_types(x.dtype, torch.float32))
    return means, means.new_empty(means.shape[:2])


def _remember_segments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, group, _, weight = inputs
    size = output[1]
    ctx.mark_non_differentiable(size)
    ctx.save_for_backward(group, weight, size)
    ctx.dtype = x.dtype


def _spread_segments(ctx: Any, means: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """∂/∂x_i = weight_i / size_j · ∂/∂mean_j for every row i of group j."""
    group, weight, size = ctx.saved_tensors
    place = group.clamp_min(0)
    share = weight.to(size.dtype) / torch.where(size > 0, size, 1.0).gather(1, place)
    rows = means.gather(1, place[..., None].expand(-1, -1, means.shape[2]))
    return torch.where(group[..., None] >= 0, share[..., None] * rows, 0.0).to(ctx.dtype), None, None, None


segment_mean.register_autograd(_spread_segments, setup_context=_remember_segments)


@torch.library.custom_op("visiontok::gather_rows", mutates_args=())
def gather_rows(tensors: list[Tensor], dims: list[int], slots: Tensor) -> list[Tensor]:
    """The same slots of many tensors, on a GPU in one launch; equal to the last bit. Has no derivative.

    Args:
        tensors: each (…, B or 1, N, …), of any types and widths, on one device.
        dims: where N stands in the shape of each; the batch stands just before it.
        slots: (B, K) long in 0 … N-1, in any order, repeated or not.

    Returns:
        for each tensor a new one (…, B, K, …).
    """
    if use_triton(slots):
        from . import compact_triton

        return compact_triton.gather_rows(tensors, dims, slots)
    return reference.gather_rows(tensors, dims, slots)


@gather_rows.register_fake
def _(tensors, dims, slots):  # type: ignore[no-untyped-def]
    return [
        x.new_empty((*x.shape[: dim - 1], *slots.shape, *x.shape[dim + 1 :]))
        for x, dim in zip(tensors, dims, strict=True)
    ]
