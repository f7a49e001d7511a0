"""``compress``: attach a recipe to a model, and take it off again."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from visiontok.adapters.base import RECURRENT, find, is_supported, layer_kinds
from visiontok.adapters.encoders import find_encoder
from visiontok.adapters.refused import reason

from . import _torchvision as _torchvision
from .budget import Budget
from .context import Context
from .engine.attach import Attachment, bypass, is_bypassed
from .engine.cross import CrossAttachment, CrossPolicy
from .engine.inputs import CompressedInputs, Generate, InputPlane, shorten
from .engine.memory import VisionMemory, memory_of
from .engine.policy import StagePolicy
from .engine.tower import describe_tower
from .errors import ConfigError, UnsupportedError
from .ledger import TokenLedger
from .method import Card, Contract, Mass, Method, Needs, Selection, Stage
from .recipe import Recipe, of_method, recipe
from .report import Report

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

_MARK = "_visiontok_compressions"  # attribute of a base model: what is attached, oldest first
ENCODER_MARK = "_visiontok_encoder"  # attribute of an encoder alone: what is attached
_BEFORE = ("pixel", "encoder", "merge", "prompt")  # stages before the language model
_lock = threading.RLock()  # over attaching and detaching; calls never take it


class _Thread(threading.local):
    numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self.numbers)  # unlike get_ident(), never used again


_thread = _Thread()


class Compression:
    """A recipe attached to a model; a context manager.

    A call is served by what its own thread has attached; a thread that has attached nothing is served by the oldest
    compression on the model.

    Args:
        model: as in :func:`compress`.
        recipe: what to attach.
        adapter: to use instead of the one that is registered for the family (to try one out).
        force: run the whole machinery even where nothing is dropped (for tests of its exactness).

    Attributes:
        model: the model as it was given.
        recipe: what is attached.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, adapter: type[Adapter] | None = None, force: bool = False
    ) -> None:
        self.model, self.recipe = model, recipe
        self._base, self._thread = base_model(model), _thread.number
        base, alone = self._base, _is_before(recipe)
        known, policy, self._label = _plan(base, recipe, adapter)
        recurrent = bool(layer_kinds(known) & RECURRENT)
        self._attachment: Attachment | CrossAttachment | InputPlane
        with _lock:
            _refuse_second(base, self._thread)
            if known.cross_attention:
                self._attachment = CrossAttachment(known, policy, serves=self._serves, force=force)
            elif recurrent:
                self._attachment = InputPlane(known, serves=self._serves, guard=True)
            else:
                outer = _around(model, base)
                self._attachment = Attachment(known, policy, serves=self._serves, outer=outer, force=force)
            try:
                policy.attach(self._attachment)
                core = _unwrapped(model)
                if alone and not known.cross_attention and hasattr(type(core), "generate"):
                    describe = functools.partial(Report.of, recipe, self._label, base, known)
                    options: Any = {"serves": self._serves, "always": recurrent}
                    traces = self._attachment.traces
                    self._attachment.add(Generate(core, known, policy, traces, describe, **options))
            except Exception:
                self._attachment.remove()
                raise
            base.__dict__[_MARK] = (*base.__dict__.get(_MARK, ()), self)

    def _serves(self) -> bool:
        return not is_bypassed() and _serving(self._base) is self

    def remove(self) -> None:
        """Detach; with the last compression gone the model is stock again, bit for bit. A second call does nothing."""
        with _lock:
            self._attachment.remove()
            others = tuple(c for c in self._base.__dict__.get(_MARK, ()) if c is not self)
            if others:
                self._base.__dict__[_MARK] = others
            else:
                self._base.__dict__.pop(_MARK, None)

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
        trace.promises.settle(wait=True)
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


def remember_vision(model: nn.Module, recipes: Sequence[Recipe] = (), *, capacity: int = 2**30) -> VisionMemory:
    """Let the vision tower of ``model`` run once for each picture, whatever is attached, until the memory is removed.

    For runs of many recipes over the same pictures. Every picture goes through the tower alone, so features may differ
    in their last bits from those of a batch. Nothing may be timed meanwhile; see :func:`refuse_memory`.

    Args:
        model: as in :func:`compress`.
        recipes: all that are to be attached meanwhile: what their methods read of the tower is remembered too.
        capacity: bytes on the model's device; beyond it, the picture that was not asked for longest is forgotten.

    Returns:
        the memory; use it in a with-statement or call ``remove()``.

    Raises:
        ConfigError: for a capacity below 1, a recipe that does not fit the model, or a second memory.
        UnsupportedError: for a model whose pictures cannot go through the tower one by one.
    """
    base = base_model(model)
    plans = [_plan(base, recipe) for recipe in recipes]
    adapter = plans[0][0] if plans else find(base, inside=False)
    with _lock:
        return VisionMemory(adapter, [stage for _, policy, _ in plans for stage in policy.tower_readers], capacity)


def vision_memory(model: nn.Module) -> VisionMemory | None:
    """The memory that stands before the vision tower of ``model``, or None."""
    try:
        return memory_of(base_model(model))
    except UnsupportedError:  # nothing can stand there
        return None


def refuse_memory(model: nn.Module) -> None:
    """What every measurement of time asks first.

    Raises:
        ConfigError: if a vision memory is on the model, which takes the tower's work away.
    """
    if vision_memory(model) is not None:
        raise ConfigError(
            f"model={type(model).__name__}: a vision memory is on it, so that times would lack the vision tower's; "
            "remove it first (in a sweep: vision_cache: false)"
        )


def attached(model: nn.Module) -> Compression | None:
    """The compression that serves calls of ``model`` from this thread, or None.

    A copied or unpickled model has one of its own; this is the way to it.

    Raises:
        UnsupportedError: for a model that visiontok cannot attach to.
    """
    encoder = find_encoder(_unwrapped(model)) if isinstance(model, nn.Module) else None
    return _serving(base_model(model)) if encoder is None else encoder.model.__dict__.get(ENCODER_MARK)


def _serving(base: nn.Module) -> Compression | None:
    known = base.__dict__.get(_MARK, ())
    return next((c for c in known if c._thread == _thread.number), known[0] if known else None)


def base_model(model: nn.Module) -> nn.Module:
    """The module that holds vision tower and language model, inside whatever wraps it (heads, PEFT).

    Raises:
        UnsupportedError: if there is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r}: expected a torch module, as from_pretrained() returns it")
    core = _unwrapped(model)
    config: Any = getattr(core, "config", None)
    if (why := reason(config)) is not None and not is_supported(config.model_type):
        raise UnsupportedError(f"{config.model_type}: visiontok cannot drop tokens here, because {why}")
    base = getattr(core, "model", core)
    if hasattr(base, "config"):
        known = is_supported(getattr(base.config, "model_type", ""))
        if known or hasattr(type(base), "get_image_features"):
            return base
    raise UnsupportedError(
        f"{type(model).__name__}: no model found in it that puts image features in the place of placeholder tokens "
        "(get_image_features); Q-Former models and cross-attention models without an adapter have no such tokens to "
        "drop, others are loaded with AutoModelForImageTextToText"
    )


def _unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _around(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """The modules around ``base`` that may be given labels; PEFT's wrapper skips the hooks of the one inside."""
    wrapped = getattr(model, "_orig_mod", model)
    return [m for m in dict.fromkeys((wrapped, _unwrapped(model))) if m is not base]


def _refuse_second(base: nn.Module, thread: int) -> None:
    """A thread may have one compression on a model."""
    for other in base.__dict__.get(_MARK, ()):
        if other._thread == thread:
            raise ConfigError(
                f"model={type(base).__name__}: it is already compressed with {other.recipe.label}; call .remove() on "
                "that Compression, which is visiontok.attached(model) (or leave its with-block) first"
            )


def _is_before(recipe: Recipe) -> bool:
    """Whether a recipe does everything before the language model."""
    return recipe.positions == "original" and all(
        s.kind in _BEFORE and (s.mass is None or not s.mass.beta) for s in recipe.stages
    )


def _plan(base: nn.Module, recipe: Recipe, kind: type[Adapter] | None = None) -> tuple[Adapter, StagePolicy, str]:
    """Adapter (of ``kind``, if given), policy and label of a recipe on a model."""
    adapter = find(base, inside=not _is_before(recipe)) if kind is None else kind(base)
    depth = len(getattr(base, adapter.text).layers)
    here: Any = base.config
    if recipe.calibrated not in (None, (here.model_type, depth)):
        raise ConfigError(
            f"calibrated={recipe.calibrated}: the layers of {recipe.label} were found on another model than this "
            f"{here.model_type} of {depth} decoder layers; run `visiontok calibrate` on it"
        )
    tower = describe_tower(adapter)
    # what really runs: defaults that depend on the model are filled in, and named in the label
    adapted = tuple(s if s.method is None else replace(s, method=s.method.adapt(tower)) for s in recipe.stages)
    decide = CrossPolicy if adapter.cross_attention else StagePolicy
    shared: Any = {name: getattr(recipe, name) for name in ("average", "seed", "fidelity")}
    policy = decide(adapted, depth, **shared, compact=recipe.positions == "compact")
    return adapter, policy, replace(recipe, stages=adapted).label


@dataclass(frozen=True)
class Callback(Method):
    """A plain function as a method; see :func:`compress`."""

    card: ClassVar[Card] = Card(
        name="callable",
        title="a function of the context",
        paper="-",
        venue="-",
        stage="prompt",
        needs="any",
        contract=Contract(count_from_grid=False),
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
    recipe: str | Path | Recipe | Method | Callable[[Context], torch.Tensor | Selection] = "visiontok",
    *,
    keep: Budget | int | float | str | None = None,
    mass: Mass | bool | None = None,
    reserve: float | None = None,
    seed: int | None = None,
    fidelity: Literal["fixed", "official"] | None = None,
    positions: Literal["original", "compact"] | None = None,
    **options: Any,
) -> Compression:
    """Attach ``recipe`` to ``model`` in place, reversibly.

    Args:
        model: a Hugging Face vision-language model, possibly wrapped by PEFT; for training, the one that is called with
            labels, since what is around it is not seen. For methods that merge in the vision tower, also a vision
            transformer of timm or open_clip, or a CLIP or SigLIP model of transformers.
        recipe: name of a method, a :class:`Recipe`, a :class:`Method`, a path to a JSON or YAML recipe,
            ``"file.py:name"`` of a Python file that defines one of these, or a function from a
            :class:`~visiontok.Context` to a (U, N) bool keep mask or a :class:`~visiontok.Selection`. By default our
            own, ``visiontok``: diverse tokens with mass attention.
        keep: int = tokens per image, float in (0, 1] = ratio. For one selection, what survives it; for schedules, the
            average over all decoder layers.
        mass: True or a :class:`~visiontok.Mass`: kept tokens speak for those they replace, at every selection of the
            recipe; False takes that away; the recipe's own by default.
        reserve: share of the budget for tokens that serve the model as coordinates, at every selection of the recipe;
            see :class:`~visiontok.Stage`. The recipe's own by default.
        seed: of stochastic methods; the recipe's own by default.
        fidelity: ``"fixed"`` or ``"official"``; the recipe's own by default.
        positions: ``"original"``, or ``"compact"`` to count what is left through, as some papers' code does; see
            :class:`~visiontok.Recipe`. The recipe's own by default.
        **options: options of the method; only with a name.

    Returns:
        the attached :class:`Compression`; use it in a with-statement or call ``remove()``. On a model without a
        language model, an :class:`~visiontok.encoder.EncoderCompression`.

    Raises:
        ConfigError: for an unknown recipe, option or budget, a layer outside the model, or a model already compressed.
        UnsupportedError: for a model visiontok cannot attach to; says what is missing.
    """
    made = _settled(recipe, keep, mass, reserve, options, seed=seed, fidelity=fidelity, positions=positions)
    encoder = find_encoder(_unwrapped(model)) if isinstance(model, nn.Module) else None
    if encoder is None:
        return Compression(model, made)
    from .encoder import EncoderCompression

    return EncoderCompression(model, encoder, made)


def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipe: str | Path | Recipe | Method | Callable[[Context], torch.Tensor | Selection],
    *,
    keep: Budget | int | float | str | None = None,
    reserve: float | None = None,
    seed: int | None = None,
    fidelity: Literal["fixed", "official"] | None = None,
    **options: Any,
) -> CompressedInputs:
    """Run the vision tower and a recipe of prompt stages once; returns shorter inputs for the stock model.

    Nothing stays on the model. Without gradients; train inside :func:`compress`.

    Args:
        model: a Hugging Face vision-language model, possibly wrapped by PEFT.
        inputs: what its processor returned, with pixels.
        recipe: as for :func:`compress`; prompt stages only, without a bias of mass attention.
        keep: as for :func:`compress`.
        reserve: as for :func:`compress`.
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
    made = _settled(recipe, keep, None, reserve, options, seed=seed, fidelity=fidelity)
    if not _is_before(made):
        acts = next((f"its {s.kind} stage" for s in made.stages if s.kind not in _BEFORE), "its mass attention")
        if made.positions != "original":
            acts = f"positions={made.positions!r}"
        raise UnsupportedError(
            f"{made.label}: {acts} acts inside the language model, where shorter inputs cannot reach; use "
            "compress(model, recipe)"
        )
    base, core, thread = base_model(model), _unwrapped(model), _thread.number
    if not hasattr(core, "_prepare_position_ids_for_generation"):
        raise UnsupportedError(
            f"{type(core).__name__}: it cannot generate, so it cannot number the prompt; load the model with "
            "AutoModelForImageTextToText"
        )
    with _lock:
        _refuse_second(base, thread)
        adapter, policy, label = _plan(base, made)
        if adapter.cross_attention:
            raise UnsupportedError(
                f"{adapter.base.config.model_type}: its images are no part of the prompt, so no input can be made "
                "shorter; use compress(model, recipe)"
            )
        plane = InputPlane(adapter, serves=lambda: _thread.number == thread)
        try:
            policy.attach(plane)
        except Exception:
            plane.remove()
            raise
    try:
        with bypass():
            describe = functools.partial(Report.of, made, label, base, adapter)
            return shorten(core, adapter, policy, inputs, describe)
    finally:
        with _lock:
            plane.remove()


def _settled(
    recipe: Any,
    keep: Any,
    mass: Mass | bool | None,
    reserve: float | None,
    options: dict[str, Any],
    **shared: Any,
) -> Recipe:
    """The recipe with everything that a call sets; ``shared`` are fields of it, None for its own."""
    made = as_recipe(recipe, **options)
    made = replace(made, **{name: value for name, value in shared.items() if value is not None})
    if keep is not None:
        made = made.with_keep(Budget.parse(keep))
    if reserve is not None:
        made = made.with_reserve(reserve)
    return made if mass is None else made.with_mass(Mass.parse(mass))


def as_recipe(source: Any, **options: Any) -> Recipe:
    """The recipe that ``source`` names or is; see :func:`compress`."""
    if isinstance(source, str | Path) and _is_file(str(source)):
        path, _, name = str(source).partition(".py:")
        source = from_python(path + ".py", name) if name else Recipe.load(source)
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


def from_python(path: str, name: str) -> Any:
    """What a Python file calls ``name``.

    Raises:
        ConfigError: if there is no such file, or no such name in it.
    """
    spec = importlib.util.spec_from_file_location(f"visiontok_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"recipe={path}:{name}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)]
        raise ConfigError(f"recipe={path}:{name}: the file defines no {name!r}; it has {', '.join(known)}")
    return getattr(module, name)
