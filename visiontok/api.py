"""``compress``: attach a recipe to a model, and take it off again."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from visiontok.adapters.base import RECURRENT, find, layer_kinds

from . import _torchvision as _torchvision
from .budget import Budget
from .context import Context
from .engine.attach import Attachment
from .engine.inputs import CompressedInputs, Generate, InputPlane, shorten
from .engine.policy import StagePolicy, describe_tower
from .errors import ConfigError, UnsupportedError
from .ledger import TokenLedger
from .method import Card, Method, Needs, Selection, Stage
from .recipe import Recipe, of_method, recipe
from .report import Report

_MARK = "_visiontok_compression"


class Compression:
    """A recipe attached to a model; a context manager.

    Attributes:
        model: the model as it was given.
        recipe: what is attached.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, force: bool = False) -> None:
        self.model, self.recipe = model, recipe
        base = _free(model)
        adapter, policy, self._label = _plan(base, recipe)
        self._base = base
        recurrent = bool(layer_kinds(adapter) & RECURRENT)
        self._attachment: Attachment | InputPlane = (
            InputPlane(adapter, guard=True) if recurrent else Attachment(adapter, policy, force=force)
        )
        try:
            policy.attach(self._attachment)
            if _is_prompt_only(recipe) and hasattr(type(core := _core(model)), "generate"):
                describe = functools.partial(Report.of, recipe, self._label, base, adapter)
                generate = Generate(core, adapter, policy, self._attachment.traces, describe, always=recurrent)
                self._attachment.add(generate)
        except Exception:
            self._attachment.remove()
            raise
        base.__dict__[_MARK] = self

    def remove(self) -> None:
        """Detach; the model is stock again, bit for bit. Does nothing the second time."""
        self._attachment.remove()
        if self._base.__dict__.get(_MARK) is self:
            del self._base.__dict__[_MARK]

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Compression({self._label!r} on {type(self._base).__name__})"

    @property
    def ledger(self) -> TokenLedger:
        """Which token was alive where in the latest call with an image.

        Raises:
            ConfigError: before any such call.
        """
        trace = self._attachment.traces.latest
        if trace is None or trace.ledger is None:
            raise ConfigError("ledger: no image has gone through this model since compress(); run the model first")
        return trace.ledger

    @property
    def report(self) -> Report:
        """Requested and realised budget, per-layer counts, KV bytes, FLOPs and times of the latest call with an image.

        Raises:
            ConfigError: before any such call.
        """
        ledger = self.ledger
        trace = self._attachment.traces.latest
        return Report.of(self.recipe, self._label, self._base, self._attachment.adapter, ledger, trace)  # type: ignore[arg-type]


def attached(model: nn.Module) -> Compression | None:
    """The compression that is attached to ``model``, or None.

    A copied or unpickled model has one of its own; this is the way to it.

    Raises:
        UnsupportedError: for a model that visiontok cannot attach to.
    """
    return base_model(model).__dict__.get(_MARK)


def base_model(model: nn.Module) -> nn.Module:
    """The module that holds vision tower and language model, inside whatever wraps it (heads, PEFT).

    Raises:
        UnsupportedError: if there is none.
    """
    core = _core(model)
    base = getattr(core, "model", core)
    if hasattr(type(base), "get_image_features") and hasattr(base, "config"):
        return base
    raise UnsupportedError(
        f"{type(model).__name__}: no model found in it that puts image features in the place of placeholder tokens "
        "(get_image_features); cross-attention and Q-Former models have no such tokens to drop, others are loaded with "
        "AutoModelForImageTextToText"
    )


def _core(model: nn.Module) -> Any:
    """The model that generates, out of PEFT's wrapping."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r}: expected a torch module, as from_pretrained() returns it")
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _free(model: nn.Module) -> nn.Module:
    """The base model, if nothing is attached to it."""
    if (other := attached(model)) is not None:
        raise ConfigError(
            f"model={type(base_model(model)).__name__}: it is already compressed with {other.recipe.label}; "
            "call .remove() on that Compression, which is visiontok.attached(model) (or leave its with-block) first"
        )
    return base_model(model)


def _is_prompt_only(recipe: Recipe) -> bool:
    return all(stage.kind == "prompt" for stage in recipe.stages)


def _plan(base: nn.Module, recipe: Recipe) -> tuple[Any, StagePolicy, str]:
    """Adapter, policy and label of a recipe on a model."""
    adapter = find(base, inside=not _is_prompt_only(recipe))
    depth = len(getattr(base, adapter.text).layers)
    tower = describe_tower(adapter)
    # what really runs: defaults that depend on the model are filled in, and named in the label
    adapted = tuple(s if s.method is None else replace(s, method=s.method.adapt(tower)) for s in recipe.stages)
    policy = StagePolicy(adapted, depth, average=recipe.average, seed=recipe.seed, fidelity=recipe.fidelity)
    return adapter, policy, replace(recipe, stages=adapted).label


@dataclass(frozen=True)
class Callback(Method):
    """A plain function as a method; see :func:`compress`."""

    card: ClassVar[Card] = Card(
        name="callable", title="a function of the context", paper="-", venue="-", stage="prompt", needs="any"
    )
    function: Callable[[Context], torch.Tensor | Selection] = field(repr=False)
    needed: Needs = field(default_factory=Needs)

    @property
    def label(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", "callable")

    def needs(self) -> Needs:
        """What the function declared in its attribute ``needs``."""
        return self.needed

    def select(self, ctx: Context) -> torch.Tensor | Selection:
        """Call the function."""
        return self.function(ctx)


def compress(
    model: nn.Module,
    recipe: str | Path | Recipe | Method | Callable[[Context], torch.Tensor | Selection],
    *,
    keep: Budget | int | float | str | None = None,
    seed: int | None = None,
    fidelity: Literal["fixed", "official"] | None = None,
    **options: Any,
) -> Compression:
    """Attach ``recipe`` to ``model`` in place, reversibly.

    Args:
        model: a Hugging Face vision-language model, possibly wrapped by PEFT.
        recipe: name of a method, a :class:`Recipe`, a :class:`Method`, a path to a JSON or YAML recipe,
            ``"file.py:name"`` of a Python file that defines one of these, or a function from a
            :class:`~visiontok.Context` to a (U, N) bool keep mask or a :class:`~visiontok.Selection`.
        keep: int = tokens per image, float in (0, 1] = ratio. For one selection, what survives it; for schedules, the
            average over all decoder layers.
        seed: of stochastic methods; the recipe's own by default.
        fidelity: ``"fixed"`` or ``"official"``; the recipe's own by default.
        **options: options of the method; only with a name.

    Returns:
        the attached :class:`Compression`; use it in a with-statement or call ``remove()``.

    Raises:
        ConfigError: for an unknown recipe, option or budget, a layer outside the model, or a model already compressed.
        UnsupportedError: for a model visiontok cannot attach to; says what is missing.
    """
    return Compression(model, _settled(recipe, keep, seed, fidelity, options))


_taps = threading.Lock()  # a model carries one set of taps at a time


def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipe: str | Path | Recipe | Method | Callable[[Context], torch.Tensor | Selection],
    *,
    keep: Budget | int | float | str | None = None,
    seed: int | None = None,
    fidelity: Literal["fixed", "official"] | None = None,
    **options: Any,
) -> CompressedInputs:
    """Run the vision tower and a recipe of prompt stages once; returns shorter inputs for the stock model.

    Nothing stays on the model. Without gradients; train inside :func:`compress`.

    Args:
        model: a Hugging Face vision-language model, possibly wrapped by PEFT.
        inputs: what its processor returned, with pixels.
        recipe: as for :func:`compress`; prompt stages only.
        keep: as for :func:`compress`.
        seed: of stochastic methods; the recipe's own by default.
        fidelity: ``"fixed"`` or ``"official"``; the recipe's own by default.
        **options: options of the method; only with a name.

    Returns:
        a mapping for ``model.generate(**short)``; ``short.restore(output)`` brings sequences into the usual format,
        ``short.extend(...)`` makes the next turn, ``short.report`` and ``short.ledger`` say what was kept.

    Raises:
        ConfigError: for an unknown recipe, option or budget, incomplete inputs, or a model already compressed.
        UnsupportedError: for a stage inside the language model, or a model that cannot be given shorter inputs.
    """
    made = _settled(recipe, keep, seed, fidelity, options)
    for stage in made.stages:
        if stage.kind != "prompt":
            raise UnsupportedError(
                f"{made.label}: its {stage.kind} stage acts inside the language model, where shorter inputs cannot "
                "reach; use compress(model, recipe)"
            )
    core = _core(model)
    with _taps:
        base = _free(model)
        if not hasattr(core, "_prepare_position_ids_for_generation"):
            raise UnsupportedError(
                f"{type(core).__name__}: it cannot generate, so it cannot number the prompt; load the model with "
                "AutoModelForImageTextToText"
            )
        adapter, policy, label = _plan(base, made)
        plane = InputPlane(adapter)
        try:
            policy.attach(plane)
            return shorten(core, adapter, policy, inputs, functools.partial(Report.of, made, label, base, adapter))
        finally:
            plane.remove()


def _settled(
    recipe: Any, keep: Any, seed: int | None, fidelity: Literal["fixed", "official"] | None, options: dict[str, Any]
) -> Recipe:
    """The recipe with everything that a call sets."""
    made = as_recipe(recipe, **options)
    changes: dict[str, Any] = {}
    if seed is not None:
        changes["seed"] = seed
    if fidelity is not None:
        changes["fidelity"] = fidelity
    made = replace(made, **changes)
    return made if keep is None else made.with_keep(Budget.parse(keep))


def as_recipe(source: Any, **options: Any) -> Recipe:
    """The recipe that ``source`` names or is; see :func:`compress`."""
    if isinstance(source, str | Path) and _is_file(str(source)):
        path, _, name = str(source).partition(".py:")
        source = _from_python(path + ".py", name) if name else Recipe.load(source)
    elif isinstance(source, str):
        return recipe(source, **options)
    if options:
        raise ConfigError(
            f"{next(iter(options))}={next(iter(options.values()))!r}: options go with the name of a method; set them "
            "in the recipe itself"
        )
    if isinstance(source, Recipe):
        return source
    if isinstance(source, type) and issubclass(source, Method):
        source = source()
    if isinstance(source, Method):
        return of_method(source)
    if callable(source):
        method = Callback(source, getattr(source, "needs", None) or Needs())
        return Recipe(stages=(Stage(kind="prompt", method=method),))
    raise ConfigError(f"recipe={source!r}: give a method name, a Recipe, a recipe file, file.py:name or a function")


def _is_file(source: str) -> bool:
    return source.endswith((".json", ".yaml", ".yml")) or ".py:" in source


def _from_python(path: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("visiontok_user_recipe", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"recipe={path}:{name}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)]
        raise ConfigError(f"recipe={path}:{name}: the file defines no {name!r}; it has {', '.join(known)}")
    return getattr(module, name)
