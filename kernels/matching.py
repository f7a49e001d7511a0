"""Matching of tokens by cosine."""

from __future__ import annotations

from torch import Tensor

from .ops import nearest_unit
from .reference import unit


def nearest(x: Tensor, y: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`visiontok.kernels.ops.nearest_unit` of rows of any length; those that are not finite are zero rows."""
    return nearest_unit(unit(x), unit(y), valid)
