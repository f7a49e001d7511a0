"""Tensors cut to the slots that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference


def gather_rows(tensors: Sequence[Tensor], dims: Sequence[int], slots: Tensor) -> list[Tensor]:
    """:func:`visiontok.kernels.ops.gather_rows`; by PyTorch where a gradient is to flow through it."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return reference.gather_rows(tensors, dims, slots)
    return ops.gather_rows(list(tensors), list(dims), slots)
