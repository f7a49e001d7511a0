"""The operators that have a Triton twin, registered with PyTorch: one node each for ``torch.compile`` and ``export``.

Whether Triton or PyTorch computes one is decided inside, see :mod:`visiontok.kernels.runtime`; what comes out is the
same but for rounding where a docstring says so. Triton is imported when a kernel is first launched.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference
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
