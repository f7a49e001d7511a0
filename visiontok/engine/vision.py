"""Where the visual tokens of a call are, which image each belongs to, and what the vision tower said about them."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..errors import UnsupportedError
from .clock import Clock
from .host import stops_host, upload
from .inside import Inside
from .merging import Merged
from .pixels import PixelStage, Smaller

Modality = Literal["image", "video"]


@dataclass
class Encoded:
    """One run of the vision tower: ``get_image_features`` or ``get_video_features``.

    Attributes:
        modality: which of the two.
        inputs: its keyword arguments (pixels, grids, sizes).
        output: what it returned.
        attention: (statistic, tower layer) → one (batch, patches) tensor per attention call, in call order.
        encoder_features: the projector's inputs as the model made them, in call order, if a method needs them.
        clock: when it began, when a pixel stage had chosen, and when it ended; not marked where a memory had a part in
            it.
        smaller: what the tower was given instead, at a pixel stage; ``inputs`` and ``output`` are then as if it had
            not been: the caller's pictures, and a feature for each of their tokens.
        memory: which this is a run for, of one picture, and whose taps alone may write here; None for any other run.
        remembered: whether a memory answered in the place of the tower.
        merged: what a merge stage did inside the tower; ``output`` then has for each token the feature of its group.
    """

    modality: Modality
    inputs: dict[str, Any]
    output: Any = None
    attention: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    encoder_features: list[torch.Tensor] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    smaller: Smaller | None = None
    inside: Inside | None = None
    merged: Merged | None = None
    memory: Any = None
    remembered: bool = False


class Memory(Protocol):
    """What stands between a model and its tower; see :class:`visiontok.engine.memory.VisionMemory`."""

    def encode(self, method: Callable[..., Any], record: Encoded, keep: bool, base: nn.Module, **given: Any) -> Any:
        """What ``method(base, **given)`` is to return; ``record`` gets what taps saw."""
        ...


class _Thread(threading.local):
    def __init__(self) -> None:
        self.current: Encoded | None = None  # the tower run in progress
        self.forward: list[Encoded] = []  # tower runs of the forward in progress


_thread = _Thread()
_RECORD = "_visiontok_record"


class FeatureRecorder:
    """Stands before ``base.get_image_features`` (or video) and remembers what went in and out.

    ``generate()`` encodes pictures before it calls ``forward`` and then drops grids and sizes, so this method is the
    one place where both planes can be watched. Everything is delegated to the class's own method; the record travels
    with the output object.
    """

    def __init__(self, base: nn.Module, modality: Modality) -> None:
        self.base = base
        self.modality: Modality = modality
        self.name = _getter(modality)
        self.users = 0
        self.pictures: tuple[PixelStage, ...] = ()
        self.memory: Memory | None = None
        base.__dict__[self.name] = self

    @classmethod
    def on(cls, base: nn.Module, modality: Modality) -> FeatureRecorder:
        """The recorder of a model, shared by its attachments, each of which calls :meth:`remove` in the end."""
        recorder = base.__dict__.get(_getter(modality)) or cls(base, modality)
        recorder.users += 1
        return recorder

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.base), self.name).__get__(self.base))

    @functools.partial(torch.compiler.disable, recursive=False)  # the tower itself may be compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.base), self.name)
        if _thread.current is not None:  # one modality's method may be built on the other's
            return method(self.base, *args, **kwargs)
        given = self.__signature__.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        inputs = dict(given)
        if self.modality == "video" and "pixel_values" in inputs:  # LLaVA-OneVision up to transformers 5.17
            inputs["pixel_values_videos"] = inputs.pop("pixel_values")
        # sizes are read now, while the device has nothing to do, and not behind the tower
        inputs = {name: x.cpu() if _is_sizes(x) and stops_host(x.device) else x for name, x in inputs.items()}
        record = Encoded(self.modality, inputs)
        stage = next((stage for stage in self.pictures if stage.serves()), None)
        memory = None if stage is not None and stage.alters_tower else self.memory  # which serves the stock tower
        if memory is None:
            record.clock.mark("start")
        else:  # what a stage makes of a picture is its own, and not kept
            method = functools.partial(memory.encode, method, record, stage is None)
        if stage is not None:
            record.smaller = stage.smaller(record)
            if record.smaller is not None and memory is None:
                record.clock.mark("chosen")
        smaller = record.smaller
        with running(record), nullcontext() if stage is None else stage.inside(record):
            output = method(self.base, **given) if smaller is None else smaller.encode(method, self.base, given)
        if memory is None:
            record.clock.mark("end")
        if self.users > (self.memory is not None):  # a memory takes no records
            _thread.forward.append(record)
        record.output = output
        if hasattr(output, "__dict__"):
            record.output = copy.copy(output)  # the record travels with the output, so it must not hold that object
            output.__dict__[_RECORD] = record
        return output

    def remove(self) -> None:
        """Uncover the class's method again, once nobody records."""
        self.users -= 1
        if not self.users:
            del self.base.__dict__[self.name]


class BeforeTower:
    """Lets a pixel stage decide what the recorded towers of a model are given."""

    def __init__(self, base: nn.Module, stage: PixelStage) -> None:
        self._stage = stage
        self._recorders = [r for r in base.__dict__.values() if isinstance(r, FeatureRecorder)]
        for recorder in self._recorders:
            recorder.pictures += (stage,)

    def remove(self) -> None:
        """Let the tower have what it is given again."""
        for recorder in self._recorders:
            recorder.pictures = tuple(stage for stage in recorder.pictures if stage is not self._stage)


def _getter(modality: Modality) -> str:
    return f"get_{modality}_features"


def _is_sizes(x: Any) -> bool:
    return torch.is_tensor(x) and x.ndim <= 3 and not x.is_floating_point() and not x.is_complex()


class TowerRecorder:
    """Remembers the same where a model encodes pictures inside its forward: from the tower's input to the projector's
    output."""

    def __init__(self, tower: nn.Module, projector: nn.Module, serves: Callable[[], bool]) -> None:
        self._serves = serves  # whether this thread's calls are to be recorded here
        self._handles = [
            tower.register_forward_pre_hook(self._start, with_kwargs=True),
            projector.register_forward_hook(self._end),
        ]

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None or not self._serves():
            return
        _thread.current = record = Encoded("image", dict(kwargs))
        record.clock.mark("start")

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._serves():
            return
        record, _thread.current = _thread.current, None
        if record is not None:
            record.output = output
            record.clock.mark("end")
            _thread.forward.append(record)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def record_features(base: nn.Module) -> list[FeatureRecorder]:
    """A recorder before each modality's method of ``base``."""
    modalities: tuple[Modality, ...] = ("image", "video")
    return [FeatureRecorder.on(base, m) for m in modalities if hasattr(type(base), f"get_{m}_features")]


@contextlib.contextmanager
def running(record: Encoded) -> Iterator[None]:
    """Within it, ``record`` is this thread's run of the vision tower in progress."""
    before, _thread.current = _thread.current, record
    try:
        yield
    finally:
        _thread.current = before


def current_record() -> Encoded | None:
    """The vision-tower run in progress on this thread."""
    return _thread.current


def begin_forward() -> None:
    """Forget tower runs that belong to no forward, or to one that failed."""
    _thread.current, _thread.forward = None, []


def take_records(outputs: Mapping[str, Any] | None) -> list[Encoded]:
    """The tower runs that fed the present forward: those since :func:`begin_forward` and those of ``outputs``.

    Args:
        outputs: ``mm_encoder_outputs`` of the forward, if its pictures were encoded beforehand.
    """
    records, _thread.forward = _thread.forward, []
    given = [record_of(output) for output in (outputs or {}).values()]
    return list({id(r): r for r in (*records, *given) if r is not None}.values())


def record_of(output: Any) -> Encoded | None:
    """The record that travels with an output of ``get_image_features``."""
    return getattr(output, "__dict__", {}).get(_RECORD)


@dataclass
class Units:
    """The images (and videos) of a call; each is one unit of budget.

    U units, N the visual tokens of the largest. Everything is known on the host before it goes to the device, so that
    nothing has to be read back.

    Attributes:
        row: (U,) long, batch row of each unit.
        ordinal: list of U ints, which image of its row it is.
        modality: list of U names.
        slots: (U, N) long, prompt position of each visual token; 0 where not valid.
        valid: (U, N) bool.
        grid: (U, N, 3) long, (t, row, col) of each token; -1 where a slot has no patch (newlines) or nothing is known.
        source: for each unit (index of the record, index of the first item in it, number of items), or None.
        rows: list of U ints, ``row`` on the host.
        sizes: list of U ints, visual tokens of each unit.
        tiles: list of U ints, how many different t the grid of each unit has (at least 1).
        has_grid: whether the grid of any token is known.
    """

    row: torch.Tensor
    ordinal: list[int]
    modality: list[Modality]
    slots: torch.Tensor
    valid: torch.Tensor
    grid: torch.Tensor
    source: list[tuple[int, int, int] | None]
    batch: int
    length: int
    rows: list[int] = field(init=False)
    sizes: list[int] = field(init=False)
    tiles: list[int] = field(init=False)
    has_grid: bool = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.sizes = self.row.tolist(), self.valid.sum(1).tolist()
        self.tiles = [max(len(set(t[t >= 0].tolist())), 1) for t in self.grid[..., 0]]
        self.has_grid = bool(((self.grid >= 0).all(-1) & self.valid).any())
        # flat prompt position of every slot; those of no token lie behind the end
        self._place = torch.where(self.valid, self.row[:, None] * self.length + self.slots, self.batch * self.length)

    def __len__(self) -> int:
        return len(self.ordinal)

    def to(self, device: torch.device) -> Units:
        """The same units with their tensors on ``device``."""
        moved = copy.copy(self)
        for name in ("row", "slots", "valid", "grid", "_place"):
            setattr(moved, name, upload(getattr(self, name), device))
        return moved

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, …) → (U, N, …): the rows of ``x`` at the visual tokens, zero where not valid."""
        out = x[self.row.to(x.device)[:, None], self.slots.to(x.device)]
        valid = self.valid.to(x.device)
        return out * valid.view(*valid.shape, *[1] * (out.ndim - 2)).to(out.dtype)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """(U, N) → (B, L): ``values`` at their prompt positions, zero (False) elsewhere."""
        out = values.new_zeros(self.batch * self.length + 1)
        out = out.scatter(0, self._place.to(values.device).flatten(), values.flatten())
        return out[:-1].view(self.batch, self.length)

    def put(self, x: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """(B, L, D) with the rows of the tokens in ``keep`` (U, N) replaced by ``values`` (U, N, D); a new tensor."""
        place = torch.where(keep & self.valid, self._place, self.batch * self.length).to(x.device).flatten()
        flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])])
        flat = flat.scatter(0, place[:, None].expand(-1, x.shape[-1]), values.to(x.dtype).flatten(0, 1))
        return flat[:-1].view_as(x)


def locate(
    masks: dict[Modality, torch.Tensor],
    grids: dict[Modality, list[tuple[int, int, torch.Tensor]] | None],
    *,
    join_adjacent: bool,
    model: str,
) -> Units:
    """Match the images of a call with their placeholders.

    Args:
        masks: per modality (B, L) bool on the host, the placeholder positions.
        grids: per modality the items in the order they were encoded, each (record index, item index, (n, 3) grid);
            None where the call carries no record (then every run of placeholders is one image).
        join_adjacent: items whose placeholders touch are tiles of one image.
        model: name for errors.

    Raises:
        UnsupportedError: if the number of encoded tokens and of placeholders cannot be matched.
    """
    units: list[tuple[int, Modality, list[int], torch.Tensor, tuple[int, int, int] | None]] = []
    for modality, mask in masks.items():
        rows = [torch.nonzero(r).flatten().tolist() for r in mask]
        items = grids[modality]
        if items is None:
            for b, positions in enumerate(rows):
                units += [(b, modality, run, torch.full((len(run), 3), -1), None) for run in _runs(positions)]
            continue
        total, encoded = sum(map(len, rows)), sum(len(g) for _, _, g in items)
        if not encoded:
            continue
        repeat, rest = divmod(total, encoded)
        if rest or not repeat or len(rows) % repeat:
            raise UnsupportedError(
                f"{model}: {encoded} encoded {modality} tokens stand against {total} placeholders in the prompt; "
                "pass each picture once, in the order of its placeholders"
            )
        queue = list(items)
        for first in range(0, len(rows), repeat):  # beams repeat a row together with its images
            mine: list[tuple[int, int, torch.Tensor]] = []
            while queue and sum(len(g) for _, _, g in mine) < len(rows[first]):
                mine.append(queue.pop(0))
            if any(sum(len(g) for _, _, g in mine) != len(rows[b]) for b in range(first, first + repeat)):
                raise UnsupportedError(
                    f"{model}: the placeholders of prompt row {first} do not hold a whole number of {modality}s; "
                    "an image may not be split between rows"
                )
            for b in range(first, first + repeat):
                at = 0
                for record, item, grid in mine:
                    run, at = rows[b][at : at + len(grid)], at + len(grid)
                    last = units[-1] if units else None
                    touches = last is not None and last[0] == b and last[1] == modality and last[2][-1] + 1 == run[0]
                    if join_adjacent and touches and last is not None and last[4] is not None:
                        tile = grid + torch.tensor([int(last[3][:, 0].max()) + 1, 0, 0])
                        source = (last[4][0], last[4][1], last[4][2] + 1)
                        units[-1] = (b, modality, last[2] + run, torch.cat([last[3], tile]), source)
                    else:
                        units.append((b, modality, run, grid, (record, item, 1)))
    units.sort(key=lambda u: (u[0], u[2][0]))
    width = max((len(u[2]) for u in units), default=1)
    slots = torch.zeros(len(units), width, dtype=torch.long)
    valid = torch.zeros(len(units), width, dtype=torch.bool)
    grid = torch.full((len(units), width, 3), -1)
    ordinal: list[int] = []
    for i, (b, _, run, where, _) in enumerate(units):
        slots[i, : len(run)] = torch.tensor(run)
        valid[i, : len(run)] = True
        grid[i, : len(run)] = where
        ordinal.append(ordinal[-1] + 1 if i and units[i - 1][0] == b else 0)
    batch, length = next(iter(masks.values())).shape
    return Units(
        torch.tensor([u[0] for u in units], dtype=torch.long),
        ordinal,
        [u[1] for u in units],
        slots,
        valid,
        grid,
        [u[4] for u in units],
        batch,
        length,
    )


def _runs(positions: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for p in positions:
        if runs and runs[-1][-1] + 1 == p:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs
