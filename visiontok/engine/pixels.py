"""Pixel stages: the vision tower is given less, and its features are placed where the whole picture's would be.

The prompt keeps its placeholders and their positions. Of a picture made smaller, each token covers a cell of the
original grid; the place nearest the middle of the cell keeps it. Of some units of a picture, each token stands at its
own place. The other places hold copies, which are dropped before the language model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from visiontok.adapters.parts import Part

from ..selectors.uniform import stride
from .host import upload

if TYPE_CHECKING:
    from visiontok.adapters.base import Record, Shape


class PixelStage(Protocol):
    """Who decides how small pictures become; see :class:`visiontok.engine.policy.StagePolicy`."""

    @property
    def alters_tower(self) -> bool:
        """Whether units are missing in the tower's run, or its tokens merge."""
        ...

    def serves(self) -> bool:
        """Whether the calls of the present thread are its own."""
        ...

    def smaller(self, record: Record) -> Smaller | None:
        """What the tower is to be given instead; None for what it was given."""
        ...

    def inside(self, record: Record) -> AbstractContextManager[None]:
        """What stands around the tower's run."""
        ...


@dataclass
class Smaller:
    """Less in the place of the pictures of one tower run: smaller pictures, or some units of each.

    Attributes:
        modality: of the run.
        inputs: keyword arguments of ``get_image_features`` (or video), sizes on the host.
        parts: the calls that encode it, and in what their arguments differ from the caller's.
        kept: per item (n,) bool: places that keep a token of their own.
        tokens: per item (n,) long: the token of those the tower makes of it that each place holds, or a copy of it.
        whole: whether pictures have their size, so that every place shows its own pixels.
        output: what the tower made of it; of several parts, their items one behind the other.
    """

    modality: Any
    inputs: dict[str, Any]
    parts: Sequence[Part]
    kept: list[torch.Tensor]
    tokens: list[torch.Tensor]
    whole: bool
    output: Any = None

    @classmethod
    def resized(cls, record: Record, changes: dict[str, Any], shapes: Sequence[tuple[Shape, Shape]]) -> Smaller:
        """Smaller pictures.

        Args:
            record: the run that is to come.
            changes: its keyword arguments that differ from the caller's.
            shapes: per item (t, rows, columns) of tokens in the prompt, and of the smaller picture.
        """
        part = Part(list(range(len(shapes))), changes)
        kept, tokens = [_kept(*pair) for pair in shapes], [_tokens(*pair) for pair in shapes]
        return cls(record.modality, record.inputs | changes, [part], kept, tokens, whole=False)

    @classmethod
    def units(
        cls, record: Record, parts: Sequence[Part], kept: list[torch.Tensor], sources: Sequence[torch.Tensor | None]
    ) -> Smaller:
        """Some units of each picture.

        Args:
            record: the run that is to come.
            parts: the calls that encode them.
            kept: per item (n,) bool on the host.
            sources: per item (n,) long, the kept unit that each is represented by, or None.
        """
        changes = parts[0].changes if len(parts) == 1 else {}
        tokens = [_copies(*pair) for pair in zip(kept, sources, strict=True)]
        return cls(record.modality, record.inputs | changes, parts, kept, tokens, whole=True)

    def encode(self, method: Callable[..., Any], base: Any, given: dict[str, Any]) -> Any:
        """Call the tower, and return its output with a feature for every token of the prompt."""
        device = next(x.device for x in given.values() if torch.is_tensor(x) and x.is_floating_point())
        outputs = []
        for part in self.parts:
            changes = {}
            for name, value in part.changes.items():
                caller = given.get(name)
                at = caller.device if torch.is_tensor(caller) else device
                changes[name] = upload(value, at) if torch.is_tensor(value) else value
            with part.within():
                outputs.append(method(base, **given | changes))
        self.output = output = copy.copy(outputs[0])
        if len(outputs) > 1:  # pictures, whose features stand one behind the other in a list, or stacked
            output.pooler_output = [item for each in outputs for item in each.pooler_output]
        placed = copy.copy(output)
        placed.pooler_output = self.place(output.pooler_output)
        if len(outputs) > 1 and torch.is_tensor(outputs[0].pooler_output):
            placed.pooler_output = torch.stack(placed.pooler_output)
        levels = getattr(output, "deepstack_features", None)
        if levels is not None:
            placed.deepstack_features = [self.place(level) for level in levels]
        return placed

    def place(self, features: Any) -> Any:
        """Features of the tower's tokens, items in the order of the parts → of every place, items in their own order,
        in the same container: one tensor for all items, stacked or one behind the other, or a sequence of (k, D)."""
        order = [item for part in self.parts for item in part.items]
        if torch.is_tensor(features) and features.ndim == 2:
            return torch.cat(list(self.place(features.split([int(self.kept[item].sum()) for item in order]))))
        placed: list[Any] = [None] * len(order)
        for item, x in zip(order, features, strict=True):
            placed[item] = x[upload(self.tokens[item], x.device)]
        return torch.stack(placed) if torch.is_tensor(features) else type(features)(placed)


def _copies(kept: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
    if source is None:
        here = torch.where(kept, torch.arange(len(kept)), -1)
        source = here.cummax(0).values
        source = torch.where(source < 0, here[kept][0], source)
    return (kept.cumsum(0) - 1)[source]


def _kept(shape: Shape, smaller: Shape) -> torch.Tensor:
    axes = []
    for n, k in zip(shape, smaller, strict=True):
        axis = torch.zeros(n, dtype=torch.bool)
        axis[stride(n, k)] = True
        axes.append(axis)
    t, rows, columns = axes
    return (t[:, None, None] & rows[:, None] & columns).flatten()


def _tokens(shape: Shape, smaller: Shape) -> torch.Tensor:
    # The cell of a place is that of its middle.
    t, rows, columns = ((2 * torch.arange(n) + 1) * k // (2 * n) for n, k in zip(shape, smaller, strict=True))
    return ((t[:, None, None] * smaller[1] + rows[:, None]) * smaller[2] + columns).flatten()
