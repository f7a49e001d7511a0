"""Draws which visual tokens were kept: their patches bright, the others darkened.

Where a patch lies on the picture depends on how the processor resized and cropped it. That is known for the families
that see one square crop and for those that see the whole picture; for any other, the first crop is drawn as the model
saw it, and the caption says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from visiontok.errors import UnsupportedError
from visiontok.ledger import TokenLedger

Box = tuple[float, float, float, float]
"""(left, top, width, height) in pixels of a picture; may reach beyond its edges."""

# Resized (and padded or cropped) as the image processor's own flags say.
_ONE_CROP = frozenset({"llava", "vipllava"})
# The tokens of t = 0 cover the whole picture, stretched: native resolution, one stretched square, or the thumbnail.
_WHOLE = frozenset(
    {
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "mistral3", "gemma3", "paligemma", "llava_next",
        "llava_onevision",
    }
)  # fmt: skip

KEPT_FRAME = (255, 190, 0)
"""Colour of the frame around a kept patch."""

_LONG_SIDE = 768  # pixels; smaller pictures are enlarged by a whole factor, or their patches could not be told apart
_LEAST_CELL = 6  # pixels; no grid lines between smaller cells
_FONT_SIZE = 15


@dataclass(frozen=True)
class Overlay:
    """A drawing of the kept tokens.

    Attributes:
        image: the picture with its kept patches, above a strip with the caption.
        caption: method, budget, decoder layer, and what is shown.
        layer: decoder layer whose tokens are drawn: the last one that holds visual tokens.
        cells: rectangles on the picture, one per visual token that has a place on it.
        kept: how many of them are drawn bright.
    """

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
    picture: Image.Image, ledger: TokenLedger, config: Any, image_processor: Any, pixel_values: torch.Tensor, title: str
) -> Overlay:
    """Draw what is left of the first image of the first prompt row.

    Args:
        picture: the picture as it was given to the processor.
        ledger: of the compressed call.
        config: the model's configuration.
        image_processor: the one that made ``pixel_values``.
        pixel_values: what went into the vision tower.
        title: method and budget, for the caption.

    Raises:
        UnsupportedError: if nothing is known of where this model's tokens lie.
    """
    mine = ledger.visual[0].cpu() & (ledger.grid()[0, :, 0].cpu() <= 0)
    place = ledger.grid()[0, mine.to(ledger.visual.device), 1:].cpu()
    layer = _last_layer(ledger)
    alive = ledger.alive(layer)[0].cpu()[mine]
    if not bool((place >= 0).all(1).any()):
        raise UnsupportedError(
            f"overlay: the adapter of {config.model_type} does not say where its tokens lie on the picture; leave "
            "--overlay out, or implement grids() in an adapter (visiontok.adapters.base.Adapter)"
        )
    frame = frame_of(config, image_processor, picture.size)
    note = ""
    if frame is None:
        picture = as_seen(pixel_values, image_processor, config.model_type)
        frame = _patched(config, (0.0, 0.0, float(picture.width), float(picture.height)))
        note = "; shown is the first crop as the model saw it"
    rectangles = boxes(place, frame)
    shown = ~rectangles.isnan().any(1)
    tokens, kept = int(ledger.visual[0].sum()), int((ledger.alive(layer)[0] & ledger.visual[0]).sum())
    if int(shown.sum()) < tokens:
        note += f"; {tokens - int(shown.sum())} tokens that lie on other crops or are no patches are not shown"
    if layer < ledger.depth - 1:
        note += f"; none from layer {layer + 1} on"
    home = None
    if ledger.merged is not None:
        position = torch.nonzero(mine).flatten()
        among = torch.full_like(mine, -1, dtype=torch.long).scatter(0, position[shown], torch.arange(int(shown.sum())))
        source = ledger.sources()[0].cpu()[position[shown]]
        home = torch.where(source >= 0, among[source], -1)
        note += "; patches that merged are in the mean colour of those that are one token"
    caption = f"{title}: {kept} of {tokens} visual tokens kept in decoder layer {layer}{note}"
    image = draw(picture, rectangles[shown], alive[shown], caption, home)
    return Overlay(image, caption, layer, int(shown.sum()), int(alive[shown].sum()))


def _last_layer(ledger: TokenLedger) -> int:
    """The last decoder layer that holds visual tokens."""
    held = [layer for layer in range(ledger.depth) if bool((ledger.alive(layer) & ledger.visual)[0].any())]
    return held[-1] if held else 0


def frame_of(config: Any, image_processor: Any, size: tuple[int, int]) -> Box | None:
    """The part of a picture that the t = 0 grid of its tokens covers; None where it is not known.

    Args:
        config: the model's configuration.
        image_processor: its flags say how pictures are padded, resized and cropped.
        size: (width, height) of the picture.
    """
    if config.model_type in _WHOLE:
        return (0.0, 0.0, float(size[0]), float(size[1]))
    if config.model_type not in _ONE_CROP:
        return None
    width, height = size
    left = top = 0.0
    if getattr(image_processor, "do_pad", False):  # LLaVA pads to a square, the picture in the middle
        side = max(size)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        width = height = side
    new_width, new_height = width, height
    if getattr(image_processor, "do_resize", False):
        new_width, new_height = _resized(image_processor.size, width, height)
    crop_width, crop_height = new_width, new_height
    if getattr(image_processor, "do_center_crop", False):
        crop_width, crop_height = (int(_entry(image_processor.crop_size, side)) for side in ("width", "height"))
    # int() rounds towards zero, as the processors do, whether they cut off or pad.
    crop_left, crop_top = int((new_width - crop_width) / 2), int((new_height - crop_height) / 2)
    across, down = width / new_width, height / new_height
    crop = (left + crop_left * across, top + crop_top * down, crop_width * across, crop_height * down)
    return _patched(config, crop)


def _patched(config: Any, crop: Box) -> Box:
    """The part of a crop that its patches cover: all of it, but for what is left over at the right and below."""
    vision = config.vision_config
    pixels, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(pixels, int) or not isinstance(patch, int):
        return crop
    covered = pixels // patch * patch / pixels
    return (crop[0], crop[1], crop[2] * covered, crop[3] * covered)


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    shortest = _entry(size, "shortest_edge")
    if shortest is None:
        return int(_entry(size, "width")), int(_entry(size, "height"))
    if width < height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def _entry(size: Any, name: str) -> Any:
    """A processor's sizes are mappings or objects, depending on the version of transformers."""
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def as_seen(pixel_values: torch.Tensor, image_processor: Any, model_type: str) -> Image.Image:
    """The first crop, with its normalisation undone.

    Args:
        pixel_values: (…, 3, H, W).
        image_processor: has ``image_mean`` and ``image_std``.
        model_type: for the error.

    Raises:
        UnsupportedError: if the pixels are not crops.
    """
    if pixel_values.ndim < 4 or pixel_values.shape[-3] != 3:
        raise UnsupportedError(
            f"overlay: {model_type} packs its pixels in a way visiontok cannot draw "
            f"(shape {tuple(pixel_values.shape)}); leave --overlay out"
        )
    crop = pixel_values.detach().float().cpu().reshape(-1, *pixel_values.shape[-3:])[0]
    mean, std = (torch.tensor(getattr(image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    pixels = ((crop * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def boxes(place: torch.Tensor, frame: Box) -> torch.Tensor:
    """Rectangles of the tokens of t = 0.

    Args:
        place: (n, 3) long, (t, row, column) of all tokens of one image, -1 where unknown.
        frame: what the grid of t = 0 covers.

    Returns:
        (n, 4) float, (left, top, right, bottom) on the picture; NaN for tokens without a place on it.
    """
    here = (place[:, 0] == 0) & (place >= 0).all(1)
    cells = torch.full((len(place), 4), torch.nan)
    rows, columns = (place[here][:, 1:].amax(0) + 1).tolist()
    left, top, width, height = frame
    row, column = place[here, 1], place[here, 2]
    cells[here, 0], cells[here, 2] = left + width * column / columns, left + width * (column + 1) / columns
    cells[here, 1], cells[here, 3] = top + height * row / rows, top + height * (row + 1) / rows
    return cells


def draw(
    picture: Image.Image, cells: torch.Tensor, kept: torch.Tensor, caption: str, home: torch.Tensor | None = None
) -> Image.Image:
    """The picture with its kept cells bright and framed, the others dark, the rest darker, and a caption below.

    Args:
        picture: RGB.
        cells: (n, 4), (left, top, right, bottom) on the picture.
        kept: (n,) bool.
        caption: text.
        home: (n,) long, the cell whose token a cell merged into, -1 for none; cells of one token are in their mean
            colour, if it is kept.

    Returns:
        an RGB image; the picture's part is ``enlargement(picture.size)`` times as large as the picture.
    """
    factor = enlargement(picture.size)
    bright = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    grey = bright.convert("L").convert("RGB")
    light, lines, frames = (Image.new("L", bright.size, level) for level in (40, 0, 0))
    fill, faint, strong = (ImageDraw.Draw(plane) for plane in (light, lines, frames))
    for (left, top, right, bottom), bright_cell in zip((cells * factor).round().int().tolist(), kept, strict=True):
        area = (left, top, max(right - 1, left), max(bottom - 1, top))
        fill.rectangle(area, fill=255 if bright_cell else 90)
        if min(right - left, bottom - top) >= _LEAST_CELL:
            faint.line([(left, bottom - 1), (left, top), (right - 1, top)], fill=70)
            if bright_cell:  # or a kept black patch would look dropped
                strong.rectangle(area, outline=255)
    dark = Image.composite(grey, Image.new("RGB", bright.size), light)
    picture = Image.composite(bright, dark, light.point(lambda value: 255 if value == 255 else 0))
    if home is not None:
        _blend(picture, bright, (cells * factor).round().int(), kept, home)
    picture.paste("white", mask=lines)
    picture.paste(KEPT_FRAME, mask=frames)
    return _with_caption(picture, caption)


def _blend(
    picture: Image.Image, bright: Image.Image, cells: torch.Tensor, kept: torch.Tensor, home: torch.Tensor
) -> None:
    """Paint the cells of every kept token that others merged into in the mean colour that they have in ``bright``."""
    pen = ImageDraw.Draw(picture)
    for head in torch.nonzero(kept).flatten().tolist():
        areas = [tuple(cells[i].tolist()) for i in torch.nonzero(home == head).flatten().tolist()]
        if len(areas) > 1:
            colours = [bright.resize((1, 1), Image.Resampling.BOX, box=area).getpixel((0, 0)) for area in areas]
            mean = tuple(round(sum(channel) / len(areas)) for channel in zip(*colours, strict=True))
            for left, top, right, bottom in areas:
                pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=mean)


def enlargement(size: tuple[int, int]) -> int:
    """The whole factor by which a picture of this size is enlarged for drawing."""
    return max(1, round(_LONG_SIDE / max(size)))


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
