"""Where on a picture each visual token lies: the processor is asked, by a picture whose colours are its coordinates.

Processors resize, pad, crop and tile, each in its own way. Of a picture that is red from left to right and green from
top to bottom, a token's pixels say where they come from; what stays the same in a black and in a white picture is
padding. The adapter says which pixels are a token's, so nothing here knows any family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from visiontok.engine.attach import bypass
from visiontok.engine.inputs import encode
from visiontok.engine.vision import Encoded, FeatureRecorder, record_of
from visiontok.errors import UnsupportedError

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter
    from visiontok.engine.vision import Units

Box = tuple[float, float, float, float]
"""(left, top, width, height) in pixels of a picture; may reach beyond its edges, where the processor pads."""

_OVERLAP = 0.02  # share of a crop's area that may lie on another one and still be called beside it: errors of rounding


@dataclass(frozen=True)
class Crop:
    """The tokens of one grid: of a picture seen whole, or of a tile of it.

    Attributes:
        picture: which of the pictures it shows.
        unit: which unit of the call (:class:`visiontok.engine.vision.Units`) its tokens belong to.
        tokens: (n,) long, which tokens of the unit.
        boxes: (n, 4) float, their rectangles (left, top, right, bottom) in pixels of the picture.
    """

    picture: int
    unit: int
    tokens: torch.Tensor
    boxes: torch.Tensor

    @property
    def frame(self) -> Box:
        """All of it."""
        left, top = self.boxes[:, :2].amin(0).tolist()
        right, bottom = self.boxes[:, 2:].amax(0).tolist()
        return left, top, right - left, bottom - top


def find_places(
    adapter: Adapter,
    units: Units,
    pictures: Sequence[Image.Image],
    processed: Callable[[Sequence[Image.Image]], Mapping[str, Any]],
) -> list[Crop]:
    """The rectangles of all visual tokens of a call's pictures; runs the vision tower once.

    Args:
        adapter: of the model.
        units: of the call, as its ledger has them.
        pictures: all of the call, in order, as they were given to the processor.
        processed: what the call's processor makes of other pictures of these sizes, in float32 and on the host.

    Returns:
        crop by crop, in the order of the tokens; tokens that are no patches (newlines) are in none.

    Raises:
        UnsupportedError: for families whose adapter does not say where tokens lie, or what pixels they are made of.
    """
    name = adapter.base.config.model_type
    probes = [
        processed([_probe(kind, k, pictures) for k in range(len(pictures))]) for kind in ("black", "white", "map")
    ]
    record = _record(adapter, probes[-1])
    try:
        black, white, seen = (
            [x.float().cpu() for x in adapter.pixels(_with_pixels(record, probe))] for probe in probes
        )
    except UnsupportedError as error:
        raise UnsupportedError(
            f"overlay: where the tokens of {name} lie on a picture is not known ({error}); leave --overlay out, or "
            "implement grids() and group() in an adapter (visiontok.adapters.base.Adapter)"
        ) from error
    crops: list[Crop] = []
    for u, source in enumerate(units.source):
        if source is None or units.modality[u] != "image":
            continue
        mine = slice(source[1], source[1] + source[2])
        share = torch.cat(white[mine]) - torch.cat(black[mine])  # (n, 3, P), 0 on padding, NaN without a patch
        values = (torch.cat(seen[mine]) - torch.cat(black[mine])) / share
        real = (share > 0.5 * share.nan_to_num().amax()).all(1)
        grid = units.grid[u, : units.sizes[u]].cpu()
        for t in sorted({int(t) for t in grid[:, 0].unique() if t >= 0}):
            tokens = torch.nonzero((grid[:, 0] == t) & (grid >= 0).all(1)).flatten()
            found = _crop(u, tokens, grid[tokens, 1:], values[tokens], real[tokens], pictures)
            crops += [] if found is None else [found]
    if not crops:
        raise UnsupportedError(
            f"overlay: the adapter of {name} does not say where its tokens lie on the picture; leave --overlay out, or "
            "implement grids() in an adapter (visiontok.adapters.base.Adapter)"
        )
    return crops


def sheets(crops: Sequence[Crop]) -> list[list[Crop]]:
    """Crops of one picture, put together as far as they lie beside each other: tiles, apart from the thumbnail."""
    found: list[list[Crop]] = []
    for crop in crops:
        free = (sheet for sheet in found if not any(_overlap(crop.frame, other.frame) for other in sheet))
        sheet = next(free, None)
        if sheet is None:
            found.append([crop])
        else:
            sheet.append(crop)
    return found


def _probe(kind: str, k: int, pictures: Sequence[Image.Image]) -> Image.Image:
    """Black, white, or red from left to right, green from top to bottom, and as blue as its number."""
    width, height = size = pictures[k].size
    if kind != "map":
        return Image.new("RGB", size, kind)
    across, down = (((torch.arange(n) + 0.5) / n * 255).round().byte() for n in size)
    number = torch.tensor(round(255 * k / max(len(pictures) - 1, 1)), dtype=torch.uint8)
    planes = (across.expand(height, width), down[:, None].expand(height, width), number.expand(height, width))
    return Image.fromarray(torch.stack(planes, 2).contiguous().numpy())


def _record(adapter: Adapter, inputs: Mapping[str, Any]) -> Encoded:
    """A run of the stock vision tower."""
    if adapter.cross_attention:  # its adapter reads nothing of the output
        return Encoded("image", dict(inputs))
    base = adapter.base
    weight = next(base.parameters())
    there = {k: _moved(x, weight) if torch.is_tensor(x) else x for k, x in inputs.items()}
    recorder = FeatureRecorder.on(base, "image")
    try:
        with bypass(), torch.no_grad():
            record = record_of(encode(base, there)["image"])
    finally:
        recorder.remove()
    if record is None:
        raise UnsupportedError(
            f"overlay: get_image_features() of {base.config.model_type} returns nothing that could carry a record"
        )
    return record


def _moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)


def _with_pixels(record: Encoded, inputs: Mapping[str, Any]) -> Encoded:
    return dataclasses.replace(record, inputs=record.inputs | {"pixel_values": inputs["pixel_values"]})


def _crop(
    unit: int,
    tokens: torch.Tensor,
    cells: torch.Tensor,
    values: torch.Tensor,
    real: torch.Tensor,
    pictures: Sequence[Image.Image],
) -> Crop | None:
    """The crop of tokens at ``cells`` (n, 2), (row, column), of ``values`` (n, 3, P), which are ``real`` (n, P)."""
    whole = real.all(1)
    if not bool(whole.any()):
        return None  # nothing but padding
    numbers = values[whole, 2].mean() * max(len(pictures) - 1, 1)
    picture = round(float(numbers))
    size = pictures[picture].size
    edges = torch.empty(len(tokens), 4)
    for axis in (0, 1):  # across, down
        start, step = _line(cells[whole, 1 - axis], values[whole, axis])
        cell = cells[:, 1 - axis]
        edges[:, axis], edges[:, axis + 2] = (
            size[axis] * (start + step * cell),
            size[axis] * (start + step * (cell + 1)),
        )
    return Crop(picture, unit, tokens, edges)


def _line(cells: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
    """Where cell 0 begins, and how long a cell is, of ``cells`` (n,) whose pixels have the coordinates ``values``
    (n, P): by least squares through their middles."""
    middles = values.double().mean(1)
    if bool((cells == cells[0]).all()):
        side = max(values.shape[1] ** 0.5, 2.0)  # the pixels of a token are a square, so many of them in a line
        step = float((values.amax(1) - values.amin(1)).mean()) * side / (side - 1)
        return float(middles.mean()) - step * (float(cells[0]) + 0.5), step
    x = torch.stack([torch.ones_like(middles), cells.double() + 0.5], 1)
    start, step = torch.linalg.lstsq(x, middles[:, None]).solution.flatten().tolist()
    return start, step


def _overlap(one: Box, other: Box) -> bool:
    sides = [
        min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)
    ]  # what both share across and down
    smaller = min(one[2] * one[3], other[2] * other[3])
    return min(sides) > 0 and sides[0] * sides[1] > _OVERLAP * smaller
