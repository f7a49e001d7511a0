"""Which twin runs: the Triton kernel or plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from visiontok.errors import ConfigError, UnsupportedError

VARIABLE = "VISIONTOK_KERNELS"
CHECK = "VISIONTOK_KERNELS_CHECK"
CHOICES = ("auto", "triton", "reference")
LARGEST = 16384
"""Candidates of a greedy selection that the registers of one Triton program hold; PyTorch selects among more."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, element by element in NumPy: TRITON_INTERPRET=1, read at its import."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def use_triton(x: Tensor, *, worth: bool = True) -> bool:
    """Whether the kernel for ``x`` is Triton's.

    ``VISIONTOK_KERNELS``, read at every call, is ``auto`` (Triton where ``x`` lies on an NVIDIA GPU, Triton is
    installed and it is ``worth`` it; PyTorch elsewhere), ``triton`` or ``reference``.

    Raises:
        ConfigError: if the variable has another value.
        UnsupportedError: if it asks for Triton, which cannot run here.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigError(f"{VARIABLE}={choice!r}: give one of {', '.join(CHOICES)}")
    if choice == "reference":
        return False
    on_gpu = x.is_cuda and torch.version.hip is None
    if choice == "auto":
        return on_gpu and worth and _installed()
    if not _installed():
        raise UnsupportedError(f"{VARIABLE}=triton, but Triton is not installed; install it or set {VARIABLE}=auto")
    if not on_gpu and not (x.device.type == "cpu" and interpreted()):
        raise UnsupportedError(
            f"{VARIABLE}=triton, but the tensors are on {x.device}, where no kernel runs; set {VARIABLE}=auto, or "
            "TRITON_INTERPRET=1 to have kernels interpreted on the CPU"
        )
    return True


def checks() -> bool:
    """Whether laws that results obey are checked at every call, which stops the host: VISIONTOK_KERNELS_CHECK=1."""
    return os.environ.get(CHECK, "0") != "0"
