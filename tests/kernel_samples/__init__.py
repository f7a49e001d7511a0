"""What the operators of ``visiontok.kernels.ops`` are tried on. A family of kernels has a module here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Samples:
    """Arguments to try one operator with.

    Attributes:
        op: the operator.
        make: by name, functions that make the arguments.
        tolerance: relative and absolute difference that the twins may have in floating point; None where they are
            equal. Whole numbers and truth values are always equal.
        check: looks at arguments and results for what must hold of them, whoever computed them.
    """

    op: Any
    make: Mapping[str, Callable[[], tuple[Any, ...]]]
    tolerance: tuple[float, float] | None = None
    check: Callable[[tuple[Any, ...], Any], None] | None = None


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers drawn alike on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
