"""Visual-token pruning and merging for stock Hugging Face vision-language models.

The public names are loaded on first use: `import visiontok` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontok import demo, errors, functional
    from visiontok.api import CompressedInputs, Compression, attached, compress, compress_inputs
    from visiontok.budget import Budget
    from visiontok.context import Context
    from visiontok.method import Card, Contract, Mass, Method, Needs, Selection, Stage
    from visiontok.recipe import Recipe, recipe
    from visiontok.recipes import methods
    from visiontok.rollout import explain

    __version__: str

__all__ = [
    "Budget",
    "Card",
    "CompressedInputs",
    "Compression",
    "Context",
    "Contract",
    "Mass",
    "Method",
    "Needs",
    "Recipe",
    "Selection",
    "Stage",
    "__version__",
    "attached",
    "compress",
    "compress_inputs",
    "demo",
    "errors",
    "explain",
    "functional",
    "methods",
    "recipe",
]

_SOURCES = {
    "Budget": "visiontok.budget",
    "Card": "visiontok.method",
    "CompressedInputs": "visiontok.api",
    "Compression": "visiontok.api",
    "Context": "visiontok.context",
    "Contract": "visiontok.method",
    "Mass": "visiontok.method",
    "Method": "visiontok.method",
    "Needs": "visiontok.method",
    "Recipe": "visiontok.recipe",
    "Selection": "visiontok.method",
    "Stage": "visiontok.method",
    "attached": "visiontok.api",
    "compress": "visiontok.api",
    "compress_inputs": "visiontok.api",
    "explain": "visiontok.rollout",
    "methods": "visiontok.recipes",
    "recipe": "visiontok.recipe",
}
_MODULES = ("demo", "errors", "functional")


class _Package(ModuleType):
    """Keeps `visiontok.recipe` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "recipe" and isinstance(value, ModuleType):
            value = value.recipe
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    value: Any
    if name in _SOURCES:
        value = getattr(importlib.import_module(_SOURCES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"visiontok.{name}")
    elif name == "__version__":
        value = importlib.metadata.version("visiontok")
    else:
        raise AttributeError(f"module 'visiontok' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
