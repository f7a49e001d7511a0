"""The operators that have a Triton twin, registered with PyTorch: one node each for ``torch.compile`` and ``export``.

Whether Triton or PyTorch computes one is decided inside, see :mod:`visiontok.kernels.runtime`; what comes out is the
same but for rounding where a docstring says so. Triton is imported when a kernel is first launched.
"""

from __future__ import annotations

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
