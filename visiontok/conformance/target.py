"""What a target of ``visiontok check`` names, and the tiny models to try it on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

from visiontok.adapters.base import Adapter, adapter_class, is_supported

from .. import recipes
from ..api import as_recipe, base_model, from_python
from ..budget import Budget
from ..errors import ConfigError
from ..recipe import Recipe
from . import zoo
from .adapter_checks import AdapterCase
from .checks import Case


def resolve(target: Any, options: dict[str, Any]) -> Recipe | type[Adapter]:
    """The recipe or the adapter that a target names or is.

    Raises:
        ConfigError: if it is neither.
    """
    source, known = target, isinstance(target, str) and target not in recipes.names()
    if isinstance(target, str) and ".py:" in target:
        path, _, name = target.partition(".py:")
        source = from_python(path + ".py", name)
    elif known and is_supported(target):
        source = adapter_class(target)
    if isinstance(source, type) and issubclass(source, Adapter):
        if options:
            name, value = next(iter(options.items()))
            raise ConfigError(f"{name}={value!r}: an adapter takes no options")
        return source
    return as_recipe(source, **options)


def method_cases(recipe: Recipe, architectures: Sequence[str], keep: Budget) -> dict[str, Case]:
    """The recipe on each architecture.

    Raises:
        ConfigError: for an unknown architecture.
    """
    for name in architectures:
        if name not in zoo.ARCHITECTURES:
            close = difflib.get_close_matches(name, zoo.ARCHITECTURES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(zoo.ARCHITECTURES)}"
            raise ConfigError(f"arch={name!r}: there is no such tiny model; {hint}")
    return {name: Case(recipe, name, keep) for name in architectures}


def adapter_cases(adapter: type[Adapter], target: Any) -> dict[str, AdapterCase]:
    """The adapter on the tiny models of its families, or on that of the function ``tiny`` in its file.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(target, str) and ".py:" in target:
        path = target.partition(".py:")[0] + ".py"
        try:
            tiny = from_python(path, "tiny")
        except ConfigError:
            tiny = None
        if tiny is not None:
            model, inputs = tiny()
            inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
            name = getattr(base_model(model).config, "model_type", type(model).__name__)
            return {name: AdapterCase(adapter, zoo.prepare(model), inputs)}
    names = [name for name in adapter.model_types if name in zoo.ARCHITECTURES]
    if not names:
        raise ConfigError(
            f"{adapter.__name__}: there is no tiny model for model_types={adapter.model_types}; write a function "
            "tiny() in the same file that returns (model, inputs): a small random model of the genuine class, and two "
            "left-padded prompts with two images each"
        )
    return {name: AdapterCase(adapter, zoo.build(name), zoo.batch(name, zoo.build(name))) for name in names}
