"""Pixel stages: the vision tower is given smaller pictures, and its features are placed where the whole ones would be.

The prompt keeps its placeholders and their positions. Each token of the smaller picture covers a cell of the original
grid; the place nearest the middle of the cell keeps the token, the others hold copies of it that are dropped before the
language model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..selectors.uniform import stride
from .host import upload

if TYPE_CHECKING:
    from visiontok.adapters.base import Record, Shape


class PixelStage(Protocol):
    """Who decides how small pictures become; see :class:`visiontok.engine.policy.StagePolicy`."""

    def serves(self) -> bool:
        """Whether the calls of the present thread are its own."""
        ...

    def smaller(self, record: Record) -> Smaller | None:
        """What the tower is to be given instead; None for what it was given."""
        ...


@dataclass
class Smaller:
    """Smaller pictures in the place of those of one tower run.

    Attributes:
        modality: of the run.
        inputs: keyword arguments of ``get_image_features`` (or video), sizes on the host.
        changes: those of them that differ from the caller's.
        shapes: per item (t, rows, columns) of tokens in the prompt, and of the smaller picture.
        output: what the tower made of them.
    """

    modality: Any
    inputs: dict[str, Any]
    changes: dict[str, Any]
    shapes: Sequence[tuple[Shape, Shape]]
    output: Any = None
    kept: list[torch.Tensor] = field(init=False)
    """Per item (n,) bool: places that keep a token of the smaller picture."""
    tokens: list[torch.Tensor] = field(init=False)
    """Per item (n,) long: the token of the smaller picture in whose cell each place lies."""

    def __post_init__(self) -> None:
        self.kept = [_kept(*shapes) for shapes in self.shapes]
        self.tokens = [_tokens(*shapes) for shapes in self.shapes]

    def encode(self, method: Callable[..., Any], base: Any, given: dict[str, Any]) -> Any:
        """Call the tower, and return its output with a feature for every token of the prompt."""
        changes = {}
        for name, value in self.changes.items():
            caller = given.get(name)
            changes[name] = upload(value, caller.device) if torch.is_tensor(caller) else value
        self.output = output = method(base, **given | changes)
        placed = copy.copy(output)
        placed.pooler_output = self.place(output.pooler_output)
        levels = getattr(output, "deepstack_features", None)
        if levels is not None:
            placed.deepstack_features = [self.place(level) for level in levels]
        return placed

    def place(self, features: Any) -> Any:
        """Features of the smaller pictures → of every place, in the same container: one tensor for all items, stacked
        or one behind the other, or a sequence of (k, D)."""
        if torch.is_tensor(features) and features.ndim == 2:
            sizes = [t * h * w for _, (t, h, w) in self.shapes]
            return torch.cat(list(self.place(features.split(sizes))))
        placed = [x[upload(at, x.device)] for x, at in zip(features, self.tokens, strict=True)]
        return torch.stack(placed) if torch.is_tensor(features) else type(features)(placed)


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
