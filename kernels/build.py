"""What is compiled of a kernel: one configuration, as it is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled.

    Attributes:
        constants: values of its ``tl.constexpr`` parameters.
        warps: ``num_warps``.
        stages: ``num_stages``, the depth of software pipelines.
        fusion: whether a product and a sum may round once; not where picks must be those of the PyTorch twin.
        cooperative: whether all programs must run at once, because they wait for each other.
    """

    constants: Mapping[str, Any]
    warps: int
    stages: int = 1
    fusion: bool = False
    cooperative: bool = False

    def options(self) -> dict[str, Any]:
        """Keywords of a launch, and options of a compilation ahead of time."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fusion}
        return options | ({"launch_cooperative_grid": True} if self.cooperative else {})


@dataclass(frozen=True)
class Build:
    """A shipped configuration, for the gate of :mod:`visiontok.kernels.aot`.

    Attributes:
        name: what it is called in the table.
        kernel: the ``triton.jit`` function.
        types: Triton types of the other parameters, like ``*fp32`` or ``i32``.
        config: as launched.
        aligned: parameters that are multiples of 16, pointers aside, which always are.
        instructions: per architecture (80, 90, 100) what must stand in the machine code, a regular expression.
        small: whether it is launched on GPUs that have 100 KB of shared memory for a block, too.
        everywhere: compiled for sm_100 as well; one configuration of every kernel is.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    config: Config
    aligned: tuple[str, ...] = ()
    instructions: Mapping[int, str] = field(default_factory=dict)
    small: bool = True
    everywhere: bool = False
