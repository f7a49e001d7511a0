"""Who may import whom. The tables are the rule."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every module belongs to one layer: its longest prefix here.
LAYERS = {
    "visiontok": "package",
    "visiontok.errors": "errors",
    "visiontok._torchvision": "torchvision",
    "visiontok._window": "window",
    "visiontok.kernels": "kernels",
    "visiontok.functional": "operators",
    "visiontok.scorers": "operators",
    "visiontok.selectors": "operators",
    "visiontok.mergers": "operators",
    "visiontok.allocators": "operators",
    "visiontok.schedules": "operators",
    "visiontok.budget": "values",
    "visiontok.tokens": "values",
    "visiontok.method": "method",
    "visiontok.context": "method",
    "visiontok.recipes": "recipes",
    "visiontok.recipe": "recipe",
    "visiontok.adapters": "adapters",
    "visiontok.adapters.base": "adapters.base",
    "visiontok.adapters.parts": "adapters.base",
    "visiontok.adapters.encoder": "adapters.base",
    "visiontok.engine": "engine",
    "visiontok.ledger": "engine",
    "visiontok.cost": "cost",
    "visiontok.conventions": "conventions",
    "visiontok.report": "report",
    "visiontok.images": "images",
    "visiontok.clip": "clip",
    "visiontok.catalogue": "catalogue",
    "visiontok.options": "options",
    "visiontok.weights": "weights",
    "visiontok.overlay": "overlay",
    "visiontok.places": "overlay",
    "visiontok.api": "api",
    "visiontok.encoder": "api",
    "visiontok.rollout": "api",
    "visiontok.named": "named",
    "visiontok.stopwatch": "named",
    "visiontok.run": "run",
    "visiontok.cli": "cli",
    "visiontok.doctor": "doctor",
    "visiontok.conformance": "conformance",
    "visiontok.calibration": "calibration",
    "visiontok.calibration.job": "run",
    "visiontok.statistics": "statistics",
    "visiontok.eval": "eval",
    "visiontok.eval.scoring": "scoring",
    "visiontok.demo": "demo",
    "visiontok.demo.app": "app",
    "visiontok.demo.fate": "app",
    "visiontok.demo.page": "app",
    "visiontok.demo.picture": "app",
    "visiontok.demo.session": "app",
    "visiontok.demo.examples": "examples",
}

OPERATORS = {"errors", "kernels", "operators"}
METHOD = OPERATORS | {"values", "method"}
ENGINE = METHOD | {"recipe", "engine", "adapters.base", "cost", "torchvision", "window"}
API = ENGINE | {"recipes", "adapters", "report", "images", "api"}
# `package` is `import visiontok`: the public names, which the outer layers use.
MAY_IMPORT = {
    "package": API | {"demo"},
    "errors": set(),
    "torchvision": set(),
    "window": set(),
    "kernels": {"errors", "kernels"},
    "operators": OPERATORS,
    "values": OPERATORS | {"values"},
    "method": METHOD,
    "recipes": METHOD | {"recipe", "recipes", "clip", "weights"},
    "recipe": METHOD | {"recipe", "recipes"},
    "adapters.base": {"errors", "values", "adapters.base", "torchvision"},
    "adapters": {"errors", "values", "adapters.base", "adapters", "torchvision"},
    "engine": ENGINE,
    "cost": {"errors"},
    "conventions": {"errors", "cost", "operators"},
    "report": ENGINE | {"report"},
    "images": {"errors"},
    "clip": {"errors", "torchvision"},
    "catalogue": {"errors", "method", "recipes"},
    "options": {"errors", "method"},
    "weights": {"errors"},
    "overlay": {"errors", "engine", "adapters.base", "overlay"},
    "api": API,
    "named": API | {"options", "named", "demo"},
    "run": API | {"package", "overlay", "options", "named", "run", "demo", "calibration"},
    "conformance": API | {"package", "conformance"},
    "calibration": API | {"conventions", "weights", "calibration"},
    "cli": API
    | {
        "package",
        "cli",
        "run",
        "eval",
        "demo",
        "app",
        "doctor",
        "conformance",
        "catalogue",
        "options",
        "conventions",
        "calibration",
    },
    "doctor": {"errors", "torchvision", "window", "doctor"},
    "scoring": {"errors", "scoring"},
    "statistics": {"errors", "statistics"},
    "eval": API | {"package", "conventions", "named", "overlay", "scoring", "statistics", "weights", "eval", "demo"},
    "demo": API | {"package", "named", "options", "calibration", "statistics", "demo"},
    "app": API | {"package", "named", "overlay", "run", "demo", "app"},
    "examples": API | {"package", "named", "conformance", "eval"},
}
# Third-party packages; the layers not named here may use any dependency.
MAY_USE = {
    "package": set(),
    "errors": set(),
    "torchvision": {"torch"},
    "window": set(),
    "kernels": {"torch", "triton"},
    "operators": {"torch"},
    "values": {"torch"},
    "method": {"torch"},
    "recipes": {"torch"},
    "recipe": {"torch", "yaml"},
    "engine": {"torch", "transformers"},
    "images": {"PIL"},
    "clip": {"torch", "open_clip", "transformers"},
    "weights": {"torch", "safetensors"},
    "overlay": {"torch", "PIL"},
    "statistics": {"numpy"},
    "scoring": {"numpy", "pycocoevalcap"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "visiontok" else ("visiontok", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in ("visiontok", "adapters", "kernels", "eval", "demo")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def layer(module: str) -> str | None:
    """The layer of a module; None for one that no entry but the package's own covers."""
    name = module
    while name not in LAYERS:
        name = name.rpartition(".")[0]
    return None if name == "visiontok" != module else LAYERS[name]


def imports(module: str, source: str, is_package: bool) -> set[str]:
    """Absolute names of all that a module imports, at the top, in functions and for type checking alike."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
            base = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return found


@pytest.mark.parametrize("module", FILES)
def test_directions(module: str) -> None:
    here = layer(module)
    assert here, f"{module} is in no layer: add it to LAYERS"
    path = FILES[module]
    for name in sorted(imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")):
        top = name.partition(".")[0]
        if top == "visiontok":
            there = layer(name)
            assert there, f"{name} is in no layer: add it to LAYERS"
            assert there in MAY_IMPORT[here], f"{module} ({here}) must not import {name} ({there})"
        elif here in MAY_USE and top not in sys.stdlib_module_names:
            assert top in MAY_USE[here], f"{module} ({here}) must not use {top}"


def test_nothing_but_the_commands_imports_eval_or_demo() -> None:
    for target in ("eval", "demo"):
        users = {here for here, may in MAY_IMPORT.items() if target in may}
        assert users <= {"package", "named", "run", "cli", "eval", "demo", "app", "examples"}


@pytest.mark.parametrize(
    ("source", "is_package", "expected"),
    [
        ("import torch.nn as nn", False, {"torch.nn"}),
        ("from visiontok.errors import ConfigError", False, {"visiontok.errors"}),
        ("from visiontok import errors", False, {"visiontok.errors"}),
        ("from . import errors", True, {"visiontok.errors"}),
        ("from .. import errors", False, {"visiontok"}),
        ("from .base import Adapter", False, {"visiontok.base"}),
        ("def f():\n    import demo", False, {"demo"}),
    ],
)
def test_the_reader_of_imports(source: str, is_package: bool, expected: set[str]) -> None:
    module = "visiontok" if is_package else "visiontok.cli"
    if source.startswith("from .."):
        module, expected = "visiontok.engine.attach", {"visiontok.errors"}
    assert imports(module, source, is_package) == expected
