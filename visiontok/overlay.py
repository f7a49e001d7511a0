"""Draws which visual tokens were kept: their patches bright and framed, the others darkened.

A picture that the model sees twice, whole and in tiles, is drawn twice. What the processor has padded is drawn as well,
for it has tokens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from visiontok.ledger import TokenLedger
from visiontok.places import Crop, find_places, sheets

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

KEPT_FRAME = (255, 190, 0)
"""Colour of the frame around a kept patch."""
PADDING = (128, 128, 128)
"""Colour of what the processor has padded."""
PICKED = (0, 200, 255)
"""Colour of the frame around a patch that was picked, and of the one that it was merged into."""

_SIDES = 768, 1536  # pixels; a shorter picture is enlarged by a whole factor, or its patches could not be told apart
_LEAST_CELL = 6  # pixels; no grid lines between smaller cells
_GAP = 12  # pixels between two sheets
_FONT_SIZE = 15
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis


@dataclass(frozen=True)
class Drawing:
    """A drawing on which every cell is a visual token.

    Attributes:
        image: RGB.
        tokens: (n, 2) long, (unit, token of the unit).
        cells: (n, 4) long, (left, top, right, bottom) in pixels of the drawing, right and bottom excluded.
    """

    image: Image.Image
    tokens: torch.Tensor
    cells: torch.Tensor

    def token_at(self, x: int, y: int) -> tuple[int, int] | None:
        """The token drawn at a pixel."""
        at = torch.tensor([x, y])
        inside = ((self.cells[:, :2] <= at) & (at < self.cells[:, 2:])).all(1)
        found: list[list[int]] = self.tokens[inside].tolist()
        return (found[0][0], found[0][1]) if found else None


@dataclass(frozen=True)
class Overlay:
    """A drawing of the kept tokens.

    Attributes:
        picture: the picture with its kept patches.
        image: the same above a strip with the caption.
        caption: method, budget, decoder layer, and what is shown.
        layer: decoder layer whose tokens are drawn: the last one that holds visual tokens.
        cells: rectangles on the picture, one per visual token that has a place on it.
        kept: how many of them are drawn bright.
    """

    picture: Image.Image
    image: Image.Image
    caption: str
    layer: int
    cells: int
    kept: int

    def save(self, path: str) -> None:
        """Write a PNG; the caption is also its description."""
        notes = PngInfo()
        notes.add_text("Description", self.caption)
        self.image.save(path, format="PNG", pnginfo=notes)


def overlay(
    pictures: Sequence[Image.Image],
    ledger: TokenLedger,
    adapter: Adapter,
    processed: Callable[[Sequence[Image.Image]], Mapping[str, Any]],
    title: str,
) -> Overlay:
    """Draw what is left of the first picture of a prompt.

    Args:
        pictures: all of the call, which had one prompt, as they were given to the processor.
        ledger: of the compressed call.
        adapter: of the model.
        processed: what the call's processor makes of other pictures of these sizes, in float32 and on the host.
        title: method and budget, for the caption.

    Raises:
        UnsupportedError: if nothing is known of where this model's tokens lie.
    """
    crops = [crop for crop in find_places(adapter, ledger.units, pictures, processed) if crop.picture == 0]
    layer = last_layer(ledger)
    alive = living(ledger, layer)
    drawing = draw_kept(pictures[0], crops, alive, merged=ledger.merged)
    bright = int(alive[tuple(drawing.tokens.T)].sum())
    tokens, kept = int(ledger.visual[0].sum()), int(alive.sum())
    note = f"; {tokens - len(drawing.tokens)} tokens that are none of its patches are not shown"
    caption = f"{title}: {kept} of {tokens} visual tokens kept in decoder layer {layer}"
    caption += note if len(drawing.tokens) < tokens else ""
    caption += (
        "" if ledger.merged is None else "; patches that merged are in the mean colour of those that are one token"
    )
    caption += f"; none from layer {layer + 1} on" if layer < ledger.depth - 1 else ""
    return Overlay(drawing.image, _with_caption(drawing.image, caption), caption, layer, len(drawing.tokens), bright)


def last_layer(ledger: TokenLedger) -> int:
    """The last decoder layer that holds visual tokens."""
    held = [layer for layer in range(ledger.depth) if bool((ledger.alive(layer) & ledger.visual)[0].any())]
    return held[-1] if held else 0


def living(ledger: TokenLedger, layer: int) -> torch.Tensor:
    """(U, N) bool on the host: visual tokens that are alive in a decoder layer."""
    units = ledger.units
    return (units.gather(ledger.alive(layer)[..., None])[..., 0] & units.valid).cpu()


def draw_kept(
    picture: Image.Image,
    crops: Sequence[Crop],
    kept: torch.Tensor,
    picked: Sequence[tuple[int, int]] = (),
    merged: torch.Tensor | None = None,
) -> Drawing:
    """The picture with its kept patches bright and framed, the others dark; no frames where all are kept.

    Args:
        picture: RGB.
        crops: where its tokens lie.
        kept: (U, N) bool.
        picked: tokens to be framed, (unit, token) each.
        merged: (U, N) long, the token of its unit that each merged into inside the tower, -1 for none; patches of one
            token are in their mean colour, if it is kept.
    """
    drawing = _canvas(picture, crops)
    shown = kept[tuple(drawing.tokens.T)]
    dropped = not bool(shown.all())
    grey = drawing.image.convert("L").convert("RGB")
    light, lines, frames = (Image.new("L", drawing.image.size, level) for level in (40, 0, 0))
    fill, faint, strong = (ImageDraw.Draw(plane) for plane in (light, lines, frames))
    for (left, top, right, bottom), bright in zip(drawing.cells.tolist(), shown, strict=True):
        area = (left, top, max(right - 1, left), max(bottom - 1, top))
        fill.rectangle(area, fill=255 if bright else 90)
        if min(right - left, bottom - top) >= _LEAST_CELL:
            faint.line([(left, bottom - 1), (left, top), (right - 1, top)], fill=70)
            if bright and dropped:  # or a kept black patch would look dropped
                strong.rectangle(area, outline=255)
    dark = Image.composite(grey, Image.new("RGB", grey.size), light)
    image = Image.composite(drawing.image, dark, light.point(lambda value: 255 if value == 255 else 0))
    if merged is not None:
        _blend(image, drawing, kept, merged.cpu())
    image.paste("white", mask=lines)
    image.paste(KEPT_FRAME, mask=frames)
    return _framed(Drawing(image, drawing.tokens, drawing.cells), picked)


def _blend(image: Image.Image, drawing: Drawing, kept: torch.Tensor, merged: torch.Tensor) -> None:
    """Paint the cells of every kept token that others merged into in the mean colour that they have on the canvas."""
    pen = ImageDraw.Draw(image)
    units, tokens = drawing.tokens.T
    home = torch.stack([units, merged[units, tokens]], 1)
    for head in drawing.tokens[kept[units, tokens]]:
        areas = drawing.cells[(home == head).all(1)].tolist()
        if len(areas) > 1:
            colours = [drawing.image.resize((1, 1), Image.Resampling.BOX, box=area).getpixel((0, 0)) for area in areas]
            mean = tuple(round(sum(channel) / len(areas)) for channel in zip(*colours, strict=True))
            for left, top, right, bottom in areas:
                pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=mean)


def draw_heat(
    picture: Image.Image, crops: Sequence[Crop], scores: torch.Tensor, picked: Sequence[tuple[int, int]] = ()
) -> Drawing:
    """The picture in grey under the colours of its tokens' ranks, from dark (lowest) to bright.

    Ranks, for the scores of most methods span orders of magnitude.

    Args:
        picture: RGB.
        crops: where its tokens lie.
        scores: (U, N) float; tokens without one (NaN or infinite) stay grey.
        picked: tokens to be framed, (unit, token) each.
    """
    drawing = _canvas(picture, crops)
    grey = drawing.image.convert("L").convert("RGB")
    colours = grey.copy()
    pen = ImageDraw.Draw(colours)
    mine = scores[tuple(drawing.tokens.T)]
    known = mine[mine.isfinite()].unique()
    for (left, top, right, bottom), score in zip(drawing.cells.tolist(), mine, strict=True):
        if bool(score.isfinite()):
            rank = float(torch.searchsorted(known, score)) / max(len(known) - 1, 1)
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=heat(rank))
    return _framed(Drawing(Image.blend(grey, colours, 0.65), drawing.tokens, drawing.cells), picked)


def heat(share: float) -> tuple[int, int, int]:
    """The colour of a number from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(place), len(_HEAT) - 2)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return red, green, blue


def scale_of(size: tuple[int, int]) -> float:
    """By what a picture of this size is enlarged, or reduced, for drawing."""
    least, most = _SIDES
    return max(1, round(least / max(size))) if max(size) <= most else most / max(size)


def _framed(drawing: Drawing, picked: Sequence[tuple[int, int]]) -> Drawing:
    pen = ImageDraw.Draw(drawing.image)
    for token in picked:
        for left, top, right, bottom in drawing.cells[(drawing.tokens == torch.tensor(token)).all(1)].tolist():
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=PICKED, width=3)
    return drawing


def _canvas(picture: Image.Image, crops: Sequence[Crop]) -> Drawing:
    """The picture as it is, one sheet beside the other, with room for what was padded."""
    scale = scale_of(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    drawn = picture.convert("RGB").resize(
        size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    panels: list[Image.Image] = []
    tokens: list[torch.Tensor] = []
    cells: list[torch.Tensor] = []
    across = 0
    for sheet in sheets(crops):
        places = torch.cat([crop.boxes for crop in sheet]) * scale
        ends = torch.tensor(size, dtype=torch.float32)
        low = torch.minimum(places[:, :2].amin(0), torch.zeros(2)).round().long()
        high = torch.maximum(places[:, 2:].amax(0), ends).round().long()
        panel = Image.new("RGB", tuple((high - low).tolist()), PADDING)
        panel.paste(drawn, tuple((-low).tolist()))
        panels.append(panel)
        tokens += [torch.stack([torch.full_like(crop.tokens, crop.unit), crop.tokens], 1) for crop in sheet]
        cells.append(places.round().long() - low.repeat(2) + torch.tensor([across, 0, across, 0]))
        across += panel.width + _GAP
    page = Image.new("RGB", (across - _GAP, max(panel.height for panel in panels)), "white")
    across = 0
    for panel in panels:
        page.paste(panel, (across, 0))
        across += panel.width + _GAP
    return Drawing(page, torch.cat(tokens), torch.cat(cells))


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    letters = max(int(picture.width / (0.55 * _FONT_SIZE)), 12)
    text = "\n".join(textwrap.wrap(caption, letters))
    height = round((text.count("\n") + 1) * 1.35 * _FONT_SIZE) + _FONT_SIZE
    page = Image.new("RGB", (picture.width, picture.height + height), "white")
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    pen.multiline_text((_FONT_SIZE // 2, picture.height + _FONT_SIZE // 3), text, fill="black", font=font)
    return page
