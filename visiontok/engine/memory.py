"""A memory of the vision tower: every picture goes through it alone and once, and whoever comes with it again is given
what came out.

Alone, so that neither what a picture is batched with nor which call came first changes a bit of its features. The taps
of all recipes that are to come listen in that one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..errors import ConfigError, UnsupportedError
from ..method import Stage
from .clock import Clock
from .tower import TowerReadings
from .vision import Encoded, FeatureRecorder, running

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

_FEATURES = ("pooler_output", "deepstack_features")
"""What the language model reads of the tower's output."""
_NOT_OF_IT = ("return_dict", "use_cache")
"""Arguments that change nothing about a feature; transformers 5.16 hands the second to the tower."""


class VisionMemory:
    """Stands before the ``get_image_features`` of a model until :meth:`remove`; a context manager.

    Pixel stages get their smaller pictures made anew each time, alone too. Videos go by. For inference in one thread.

    Args:
        adapter: where the parts of the model are.
        stages: of the recipes that are to come, as adapted to the model; their methods say what is tapped.
        capacity: bytes of features and readings, on the model's device; beyond it, what was not asked for longest goes.

    Attributes:
        adapter: see there.
        layers: none, for nothing of the language model is read.
        serves: no ordinary run of the tower is its own; see :class:`visiontok.engine.readings.Host`.
        runs: how often the tower ran, each time for one picture.
        pictures: how many different pictures were asked for.

    Raises:
        ConfigError: if ``capacity`` is below 1, or the model has a memory already.
        UnsupportedError: if its pictures cannot be told apart, or no projector is known whose input a method wants.
    """

    def __init__(self, adapter: Adapter, stages: Sequence[Stage], capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity={capacity}: a vision memory has at least one byte; leave it away instead")
        if adapter.inseparable:
            raise UnsupportedError(
                f"{adapter.base.config.model_type}: a vision memory cannot serve it, because {adapter.inseparable}"
            )
        if memory_of(adapter.base) is not None:
            raise ConfigError(f"model={type(adapter.base).__name__}: it has a vision memory already; remove that first")
        self.adapter, self.capacity = adapter, capacity
        self.layers: list[nn.Module] = []
        self.serves: Callable[[], bool] = _never
        self.runs = 0
        self._seen: set[bytes] = set()
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()
        self._bytes = 0
        self._clocks: list[Clock] = []
        self._recorder = FeatureRecorder.on(adapter.base, "image")
        self._removables: list[Any] = [self._recorder]
        try:
            TowerReadings(self, stages)
        except Exception:
            self.remove()
            raise
        self._recorder.memory = self

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to this memory."""
        self._removables.append(removable)

    def remove(self) -> None:
        """Let the tower be asked itself again, and forget. A second call does nothing."""
        for removable in self._removables:
            removable.remove()
        self._removables = []
        self._kept.clear()
        if self._recorder.memory is self:
            self._recorder.memory = None

    def __enter__(self) -> VisionMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def pictures(self) -> int:
        return len(self._seen)

    def tower_seconds(self) -> float | None:
        """Seconds that the tower has run since this was asked last; None if it has not."""
        clocks, self._clocks = self._clocks, []
        found = [clock.seconds("start", "end") for clock in clocks]
        return sum(seconds for seconds in found if seconds is not None) if found else None

    def encode(self, method: Callable[..., Any], record: Encoded, keep: bool, base: nn.Module, **given: Any) -> Any:
        """What ``method(base, **given)`` returns, picture by picture; see :class:`visiontok.engine.vision.Memory`.

        Args:
            method: ``get_image_features`` of the class of ``base``.
            record: of the call; gets what the taps saw.
            keep: whether the pictures are the caller's own.
            base: the base model.
            **given: its arguments.

        Raises:
            UnsupportedError: where gradients are wanted, or the output as a tuple.
        """
        if given.get("return_dict") is False:
            raise UnsupportedError("return_dict=False: a vision memory returns features by name; leave it as it is")
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"{type(base).__name__}: a vision memory has no gradients; call the model within torch.no_grad(), or "
                "remove the memory"
            )
        runs = [self._run(method, base, alone, keep) for alone in self.adapter.alone(Encoded(record.modality, given))]
        if not runs:
            return method(base, **given)
        record.remembered = True
        for run in runs:
            record.encoder_features += run.encoder_features
            for place, calls in run.attention.items():
                record.attention.setdefault(place, []).extend(calls)
        outputs = [run.output for run in runs]
        features: dict[str, Any] = {"pooler_output": _joined([output.pooler_output for output in outputs])}
        if (levels := [getattr(output, "deepstack_features", None) for output in outputs])[0] is not None:
            features["deepstack_features"] = [_joined(level) for level in zip(*levels, strict=True)]
        return _named(outputs[0], features)

    def _run(self, method: Callable[..., Any], base: nn.Module, alone: dict[str, Any], keep: bool) -> Encoded:
        """The tower's run for one picture, if need be from memory."""
        key = _key(alone, base.config) if keep else b""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        run = Encoded("image", {}, memory=self)
        run.clock.mark("start")
        with running(run):
            output = method(base, **alone)
        run.clock.mark("end")
        if not isinstance(output, ModelOutput):
            raise UnsupportedError(f"{type(base).__name__}: a vision memory needs features by name; set return_dict")
        found = {name: getattr(output, name, None) for name in _FEATURES}
        run.output = _named(output, {name: value for name, value in found.items() if value is not None})
        self._clocks.append(run.clock)
        self.runs += 1
        if keep:
            self._keep(key, run)
        return run

    def _keep(self, key: bytes, run: Encoded) -> None:
        self._seen.add(key)
        self._kept[key] = run
        self._bytes += _size(run)
        while self._bytes > self.capacity:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def _never() -> bool:
    return False


def memory_of(base: nn.Module) -> VisionMemory | None:
    """The memory that stands before the tower of a base model."""
    memory = getattr(base.__dict__.get("get_image_features"), "memory", None)
    return memory if isinstance(memory, VisionMemory) else None


def _key(inputs: dict[str, Any], config: Any) -> bytes:
    """Of the arguments of one picture: its pixels, sizes and whatever else the tower is told.

    ``generate()`` leaves out options that ``forward()`` gives as the config has them.
    """
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if torch.is_tensor(value):
            found.update(repr((name, value.dtype, tuple(value.shape))).encode())
            found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif value is not None and name not in _NOT_OF_IT and value != getattr(config, name, None):
            found.update(repr((name, value)).encode())
    return found.digest()


def _named(like: ModelOutput, features: dict[str, Any]) -> ModelOutput:
    """Features in an output of the kind of ``like``; what its class has no field for is an attribute, as up to
    transformers 5.17."""
    known = {field.name for field in dataclasses.fields(like)}  # type: ignore[arg-type]
    made = type(like)(**{name: value for name, value in features.items() if name in known})
    for name in features.keys() - known:
        setattr(made, name, features[name])
    return made


def _joined(parts: Sequence[Any]) -> Any:
    """Features of several runs, one picture behind the other, in the model's container: a tensor, or several."""
    first = parts[0]
    if torch.is_tensor(first):
        return torch.cat(list(parts))
    return type(first)(x for part in parts for x in part)


def _size(run: Encoded) -> int:
    """Bytes."""
    features = [getattr(run.output, name, None) for name in _FEATURES]
    read = [x for calls in run.attention.values() for x in calls]
    return sum(x.nbytes for x in _tensors([features, run.encoder_features, read]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)
