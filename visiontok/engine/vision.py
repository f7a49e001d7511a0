"""Where the visual tokens of a call are, which image each belongs to, and what the vision tower said about them."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UnsupportedError
from .clock import Clock

Modality = Literal["image", "video"]


@dataclass
class Encoded:
    """One run of the vision tower: ``get_image_features`` or ``get_video_features``.

    Attributes:
        modality: which of the two.
        inputs: its keyword arguments (pixels, grids, sizes).
        output: what it returned.
        attention: (statistic, tower layer) → one (batch, patches) tensor per attention call, in call order.
        encoder_features: the projector's input as the model made it, if a method needs it.
        clock: when it began and ended.
    """

    modality: Modality
    inputs: dict[str, Any]
    output: Any = None
    attention: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    encoder_features: torch.Tensor | None = None
    clock: Clock = field(default_factory=Clock)


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
        self.name = f"get_{modality}_features"
        base.__dict__[self.name] = self

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.base), self.name).__get__(self.base))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.base), self.name)
        if _thread.current is not None:  # one modality's method may be built on the other's
            return method(self.base, *args, **kwargs)
        inputs = self.__signature__.bind(*args, **kwargs).arguments
        inputs = {**inputs, **inputs.get("kwargs", {})}
        if self.modality == "video" and "pixel_values" in inputs:  # LLaVA-OneVision up to transformers 5.17
            inputs["pixel_values_videos"] = inputs.pop("pixel_values")
        _thread.current = record = Encoded(self.modality, inputs)
        record.clock.mark("start")
        try:
            record.output = method(self.base, *args, **kwargs)
        finally:
            _thread.current = None
        record.clock.mark("end")
        _thread.forward.append(record)
        output = record.output
        if hasattr(output, "__dict__"):
            record.output = copy.copy(output)  # the record travels with the output, so it must not hold that object
            output.__dict__[_RECORD] = record
        return output

    def remove(self) -> None:
        """Uncover the class's method again."""
        del self.base.__dict__[self.name]


def record_features(base: nn.Module) -> list[FeatureRecorder]:
    """A recorder before each modality's method of ``base``."""
    modalities: tuple[Modality, ...] = ("image", "video")
    return [FeatureRecorder(base, m) for m in modalities if hasattr(type(base), f"get_{m}_features")]


def current_record() -> Encoded | None:
    """The vision-tower run in progress on this thread."""
    return _thread.current


def begin_forward() -> None:
    """Forget tower runs that belong to no forward, or to one that failed."""
    _thread.forward = []


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

    U units, N the visual tokens of the largest.

    Attributes:
        row: (U,) long, batch row of each unit.
        ordinal: list of U ints, which image of its row it is.
        modality: list of U names.
        slots: (U, N) long, prompt position of each visual token; 0 where not valid.
        valid: (U, N) bool.
        grid: (U, N, 3) long, (t, row, col) of each token; -1 where a slot has no patch (newlines) or nothing is known.
        source: for each unit (index of the record, index of the first item in it, number of items), or None.
    """

    row: torch.Tensor
    ordinal: list[int]
    modality: list[Modality]
    slots: torch.Tensor
    valid: torch.Tensor
    grid: torch.Tensor
    source: list[tuple[int, int, int] | None]

    def __len__(self) -> int:
        return len(self.ordinal)

    @property
    def sizes(self) -> list[int]:
        """Visual tokens of each unit."""
        return self._sizes

    def __post_init__(self) -> None:
        self._sizes: list[int] = self.valid.sum(1).tolist()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, …) → (U, N, …): the rows of ``x`` at the visual tokens, zero where not valid."""
        out = x[self.row.to(x.device)[:, None], self.slots.to(x.device)]
        valid = self.valid.to(x.device)
        return out * valid.view(*valid.shape, *[1] * (out.ndim - 2)).to(out.dtype)

    def scatter(self, values: torch.Tensor, length: int, batch: int) -> torch.Tensor:
        """(U, N) bool → (B, length) bool: ``values`` at their prompt positions, False elsewhere."""
        out = torch.zeros(batch, length, dtype=torch.bool, device=values.device)
        valid = self.valid.to(values.device)
        rows = self.row.to(values.device)[:, None].expand_as(valid)[valid]
        out[rows, self.slots.to(values.device)[valid]] = values[valid]
        return out


def locate(
    masks: dict[Modality, torch.Tensor],
    grids: dict[Modality, list[tuple[int, int, torch.Tensor]] | None],
    *,
    join_adjacent: bool,
    model: str,
) -> Units:
    """Match the images of a call with their placeholders.

    Args:
        masks: per modality (B, N) bool, the placeholder positions.
        grids: per modality the items in the order they were encoded, each (record index, item index, (n, 3) grid);
            None where the call carries no record (then every run of placeholders is one image).
        join_adjacent: items whose placeholders touch are tiles of one image.
        model: name for errors.

    Raises:
        UnsupportedError: if the number of encoded tokens and of placeholders cannot be matched.
    """
    units: list[tuple[int, Modality, list[int], torch.Tensor, tuple[int, int, int] | None]] = []
    for modality, mask in masks.items():
        rows = [torch.nonzero(r).flatten().tolist() for r in mask.cpu()]
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
    device = next(iter(masks.values())).device
    return Units(
        torch.tensor([u[0] for u in units], dtype=torch.long, device=device),
        ordinal,
        [u[1] for u in units],
        slots.to(device),
        valid.to(device),
        grid.to(device),
        [u[4] for u in units],
    )


def _runs(positions: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for p in positions:
        if runs and runs[-1][-1] + 1 == p:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs
