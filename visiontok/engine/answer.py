"""Put a question to a method, about the images of which something is left, and read its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..context import Attention, Context
from ..errors import ConfigError
from ..method import Selection, Stage

_PER_IMAGE = ("features", "valid", "count", "size", "grid", "place", "row", "image", "encoder_features", "pixels")


def answered(stage: Stage, ctx: Context, counts: Sequence[int]) -> Selection:
    """What the method of a stage answers.

    A cut before may have dropped images whole. They are no part of the question, so that methods need not know of
    images without candidates.

    Args:
        stage: who is asked.
        ctx: the question about all U images.
        counts: tokens that are left of each image, on the host.

    Returns:
        the answer for all U images, of the shapes that ``ctx`` has; of those without tokens nothing is kept.

    Raises:
        ConfigError: if the answer has other shapes than the question.
    """
    left = [u for u, n in enumerate(counts) if n]
    asked = ctx if len(left) == len(counts) else _among(ctx, left)
    answer = stage.method.select(asked)  # type: ignore[union-attr]
    selection = answer if isinstance(answer, Selection) else Selection(keep=answer)
    keep, features, into = selection.keep, selection.features, selection.into
    shape = tuple(asked.valid.shape)
    if not torch.is_tensor(keep) or keep.dtype != torch.bool or keep.shape != shape:
        found = f"{tuple(keep.shape)} {keep.dtype}" if torch.is_tensor(keep) else type(keep).__name__
        raise ConfigError(f"{stage.label}: select() returned {found}; it must return a bool mask {shape}")
    if features is not None and features.shape != asked.features.shape:
        raise ConfigError(
            f"{stage.label}: Selection.features has shape {tuple(features.shape)}, expected "
            f"{tuple(asked.features.shape)}"
        )
    if into is not None and (into.dtype != torch.long or into.shape != shape):
        raise ConfigError(
            f"{stage.label}: Selection.into is {tuple(into.shape)} {into.dtype}; it must be long, {shape}"
        )
    if asked is ctx:
        return selection
    index = torch.tensor(left, device=ctx.valid.device)

    def spread(x: torch.Tensor | None, fill: float) -> torch.Tensor | None:
        return None if x is None else x.new_full((len(counts), *x.shape[1:]), fill).index_copy(0, index.to(x.device), x)

    kept = torch.zeros_like(ctx.valid).index_copy(0, index, keep.to(ctx.valid.device))
    return Selection(keep=kept, features=spread(features, 0.0), into=spread(into, -1))


def _among(ctx: Context, left: list[int]) -> Context:
    """The same question about some of the images."""
    index = torch.tensor(left, device=ctx.valid.device)
    mine: dict[str, Any] = {name: x[index] for name in _PER_IMAGE if (x := getattr(ctx, name)) is not None}
    read, draw, note = ctx.attention._read, ctx.generator, ctx.note

    def among_all(scores: torch.Tensor) -> None:
        if note is not None:
            note(scores.new_full(ctx.valid.shape, torch.nan).index_copy(0, index.to(scores.device), scores))

    return replace(
        ctx,
        **mine,
        attention=Attention(lambda stat, layer: read(stat, layer)[index]),
        generator=lambda u: draw(left[u]),
        note=among_all,
    )
