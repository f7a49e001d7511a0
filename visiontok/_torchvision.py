"""Lets a CUDA build of torchvision be imported beside a CPU-only torch.

PyPI's torchvision wheel is a CUDA build. Next to a CPU-only torch its C++ library does not load, so the operators it
would have registered do not exist, and `import torchvision` dies at "operator torchvision::nms does not exist" as soon
as it registers the fake implementation of one. timm, open_clip and transformers' modelling files import torchvision, so
they die with it. visiontok itself uses none of torchvision's compiled operators: declaring the two that are looked up
by name at import is enough for the pure-Python part to load. Calling them still fails, as it should.

Where torch has CUDA or HIP, or torchvision is absent, already imported or not a CUDA build, nothing is done.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.library import Library

_OPERATORS = ("nms", "qnms")

# The declarations live as long as this object.
_library: Library | None = None


def installed_version() -> str | None:
    """The version in torchvision's `version.py`, read as text because importing it may be what fails."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def is_mismatched() -> bool:
    """Whether a CUDA build of torchvision lies beside a torch without CUDA and HIP."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    return "+cu" in (installed_version() or "")


def is_active() -> bool:
    """Whether the stand-in declarations are in place."""
    return _library is not None


def _declare() -> None:
    global _library
    if _library is not None or "torchvision" in sys.modules or not is_mismatched():
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library = library


_declare()
