"""Some units of a picture instead of all: what a stock vision tower must be told to run on them alone.

A *unit* is what becomes one token of the language model: a patch, or the patches that a merger joins. Towers that pack
all pictures into one sequence take positions and borders as keyword arguments, so they are called with the patches of
the kept units and the metadata that these have in the whole picture. Towers of whole pictures embed all patches, and a
hook behind the embeddings lets the kept ones through.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Lengths = tuple[tuple[int, ...], ...]
"""Per tower layer the lengths of its separate attention sequences, CLS included."""


@dataclass(frozen=True)
class Part:
    """One call of ``get_image_features`` (or video) that encodes some units of some items.

    Attributes:
        items: which, in the order of its output.
        changes: keyword arguments that differ from the caller's; sizes on the host.
        lengths: what its attention is divided into; None if this is not known.
        within: a context to call it in, with the hooks that it needs.
    """

    items: list[int]
    changes: dict[str, Any]
    lengths: Lengths | None = None
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Hooks for as long as the context lasts."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def packed(visual: Any, thw: torch.Tensor, kept: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor], Lengths]:
    """What a tower of packed sequences is to be told of some units.

    Args:
        visual: the tower; of transformers' families that share its ``vision_utils``.
        thw: (items, 3) long on the host, frames, rows and columns of patches.
        kept: per item (units,) bool on the host, frame by frame in raster order; at least one each.

    Returns:
        keyword arguments of the tower, for the patches of the kept units in order; and what attention is divided into.
        Frames and windows of which nothing is left vanish.
    """
    from transformers import vision_utils

    merge = visual.spatial_merge_size
    unit = torch.cat(list(kept))
    patch = unit.repeat_interleave(merge**2)
    frames = torch.repeat_interleave(thw[:, 1] * thw[:, 2] // merge**2, thw[:, 0])
    found = {"position_ids": vision_utils.get_vision_position_ids(thw, merge)[patch]}
    found["cu_seqlens"] = _borders(unit, nn.functional.pad(frames.cumsum(0), (1, 0)), merge)
    if hasattr(visual, "num_grid_per_side"):  # its learned positions are interpolated
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        found |= {"interp_indices": indices[patch], "interp_weights": weights[patch]}
    whole = tuple(found["cu_seqlens"].diff().tolist())
    if not hasattr(visual, "fullatt_block_indexes"):
        return found, (whole,) * len(visual.blocks)
    order, borders = vision_utils.get_vision_window_index(
        thw, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
    )
    rank = unit.cumsum(0) - 1
    found["window_index"] = rank[order[unit[order]]]
    found["cu_window_seqlens"] = _borders(unit[order], borders // merge**2, merge)
    windows = tuple(found["cu_window_seqlens"].diff().tolist())
    layers = range(len(visual.blocks))
    return found, tuple(whole if layer in visual.fullatt_block_indexes else windows for layer in layers)


def _borders(unit: torch.Tensor, borders: torch.Tensor, merge: int) -> torch.Tensor:
    """Borders in units → in patches of the kept units, without empty pieces."""
    before = nn.functional.pad(unit.cumsum(0), (1, 0))
    return torch.unique_consecutive(before[borders.long()] * merge**2).to(torch.int32)


def behind_embeddings(embeddings: nn.Module, places: torch.Tensor, prefix: int) -> Any:
    """A hook that lets some patches of each picture through.

    Args:
        embeddings: makes (B, prefix + N, D).
        places: (B, K) long, which of the N patches.
        prefix: leading tokens that are no patches, which all pass.
    """

    thread = threading.get_ident()

    def gather(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != thread:
            return None
        index = places.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        return torch.cat([output[:, :prefix], output[:, prefix:].gather(1, index)], 1)

    return embeddings.register_forward_hook(gather)


def by_count(
    embeddings: nn.Module, pictures: str, pixels: torch.Tensor, kept: Sequence[torch.Tensor], prefix: int, depth: int
) -> list[Part]:
    """Pictures of which equally many patches stay go through the tower together.

    Args:
        embeddings: of the tower; its output has the shape (B, prefix + N, D).
        pictures: the keyword argument that brings them, and ``pixels``, its value (B, 3, H, W).
        kept: per picture (N,) bool on the host.
        prefix: leading tokens that are no patches.
        depth: tower layers.
    """
    groups: dict[int, list[int]] = {}
    for item, mask in enumerate(kept):
        groups.setdefault(int(mask.sum()), []).append(item)
    parts = []
    for count, items in groups.items():
        places = torch.stack([kept[item].nonzero()[:, 0] for item in items])
        parts.append(
            Part(
                items,
                {pictures: pixels if len(groups) == 1 else pixels[items]},
                ((prefix + count,) * len(items),) * depth,
                lambda places=places: hooked(behind_embeddings(embeddings, places, prefix)),  # type: ignore[misc]
            )
        )
    return parts


@dataclass(frozen=True)
class Layers:
    """The layers of a vision tower, for units that leave it on the way.

    Attributes:
        blocks: the layers, in order.
        readers: modules whose first argument is what some layer made: mergers, the projector.
        mlp: of a layer, the attribute names of the norm before its MLP and of the MLP.
        area: patches per unit.
        prefix: leading tokens that are no patches.
        sizes: units of each item.
        order: the raster index of each unit in the order in which the tower of a run has them; None if in order.
    """

    blocks: Sequence[nn.Module]
    readers: Sequence[nn.Module]
    mlp: tuple[str, str]
    area: int
    prefix: int
    sizes: Sequence[int]
    order: Callable[[Any], torch.Tensor | None]
