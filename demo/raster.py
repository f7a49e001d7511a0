"""Pictures of layouts, drawn many at a time with integer arithmetic: the same pixels on every machine and device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dice import Dice
from .glyphs import BITMAPS, SIZES
from .scenes import BACKGROUNDS, COLORS, SHAPES, SIDE, SIGN, SIGN_GAP, SIGN_HALVES, Layout, extent, table

_STREAM = 2  # of the dice
_UNIT = 1024  # fixed point: one pixel, and 1.0 of sine and cosine
_SINE = [round(_UNIT * math.sin(math.radians(degree))) for degree in range(360)]
_TURNS = tuple(range(-14, 15, 4))  # degrees by which an object can be turned
_LARGEST = 20  # pixels, the radius of the largest shape that can be drawn
_LINES, _LINE = 5, 30  # meaningless lines in a picture, and pixels of the longest


@dataclass(frozen=True)
class Pictures:
    """B pictures and what is where on them.

    Attributes:
        pixels: uint8 (B, SIDE, SIDE, 3), RGB.
        objects: uint8 (B, SIDE, SIDE), 1 + index of the object drawn there, 0 elsewhere.
        labels: uint8 (B, SIDE, SIDE), 1 + index of the object whose outlined glyph is drawn there, 0 elsewhere.
        signs: uint8 (B, SIDE, SIDE), 1 + index of the sign's glyph drawn there, 0 elsewhere.
    """

    pixels: Tensor
    objects: Tensor
    labels: Tensor
    signs: Tensor


# ----------------------------------------------------------------------------------------------------------- atlases


def _star() -> tuple[tuple[int, int], ...]:
    points = []
    for corner in range(10):
        reach = 110 if corner % 2 == 0 else 45
        points.append((reach * _SINE[36 * corner] // _UNIT, -reach * _SINE[(36 * corner + 90) % 360] // _UNIT))
    return tuple(points)


# Corners in percent of the radius, (x right, y down).
_POLYGONS = {
    "square": ((-85, -85), (85, -85), (85, 85), (-85, 85)),
    "triangle": ((0, -100), (95, 80), (-95, 80)),
    "star": _star(),
    "diamond": ((0, -110), (80, 0), (0, 110), (-80, 0)),
    "cross": (
        *((-33, -100), (33, -100), (33, -33), (100, -33), (100, 33), (33, 33)),
        *((33, 100), (-33, 100), (-33, 33), (-100, 33), (-100, -33), (-33, -33)),
    ),
}


def _stencil(shape: str, radius: int, degree: int, half: int) -> np.ndarray:
    """The pixels a shape covers: bool (2 half + 1, 2 half + 1) around its centre."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.int64)
    if shape in ("circle", "ring"):
        distance = 4 * (x * x + y * y)
        disc: np.ndarray = distance <= (2 * radius + 1) ** 2
        hole = 2 * (radius - max(3, radius * 34 // 100)) + 1
        return disc & (distance > hole**2) if shape == "ring" else disc
    sine, cosine = _SINE[degree % 360], _SINE[(degree + 90) % 360]
    u, v = cosine * x + sine * y, cosine * y - sine * x  # in the shape's own frame, 1 / _UNIT pixels
    corners = [(px * radius * _UNIT // 100, py * radius * _UNIT // 100) for px, py in _POLYGONS[shape]]
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 == y2:
            continue
        left = (u - x1) * (y2 - y1) < (v - y1) * (x2 - x1)
        inside ^= ((y1 > v) != (y2 > v)) & (left == (y2 > y1))
    return inside


@functools.cache
def _shapes(device: torch.device) -> Tensor:
    """bool (shapes, radii, turns, E, E): every shape at every size and angle, around its centre."""
    half = int(extent(torch.tensor(_LARGEST, device=device)))
    atlas = np.zeros((len(SHAPES), _LARGEST + 1, len(_TURNS), 2 * half + 1, 2 * half + 1), bool)
    for index, shape in enumerate(SHAPES):
        for radius in range(5, _LARGEST + 1):
            for turn, degree in enumerate(_TURNS):
                atlas[index, radius, turn] = _stencil(shape, radius, degree, half)
    return torch.from_numpy(atlas).to(device)


@functools.cache
def _glyphs(device: torch.device) -> tuple[Tensor, Tensor]:
    """Glyphs with and without an outline of one pixel, both bool (sizes, glyphs, height + 2, width + 2)."""
    tall, wide = (max(lengths) + 2 for lengths in zip(*SIZES, strict=True))
    body = np.zeros((len(SIZES), len(BITMAPS), tall, wide), bool)
    for size, (height, width) in enumerate(SIZES):
        top, left = tall // 2 - height // 2, wide // 2 - width // 2
        for glyph, rows in enumerate(BITMAPS.values()):
            bitmap = np.array([[int(row, 16) >> (4 - bit) & 1 for bit in range(5)] for row in rows.split()], bool)
            scaled = bitmap[np.arange(height)[:, None] * 7 // height, np.arange(width)[None] * 5 // width]
            body[size, glyph, top : top + height, left : left + width] = scaled
    outlined = body.copy()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            outlined |= np.roll(body, (down, right), (2, 3))
    return torch.from_numpy(outlined).to(device), torch.from_numpy(body).to(device)


@functools.cache
def _boards(device: torch.device) -> Tensor:
    """bool (sizes, h, w): the boards of signs with glyphs of every size."""
    wide, tall = (max(half) for half in zip(*SIGN_HALVES, strict=True))
    y, x = np.mgrid[-tall : tall + 1, -wide : wide + 1]
    boards = [(abs(x) <= half[0]) & (abs(y) <= half[1]) for half in SIGN_HALVES]
    return torch.from_numpy(np.stack(boards)).to(device)


# ------------------------------------------------------------------------------------------------------------ drawing


def _background(dice: Dice, pattern: Tensor) -> Tensor:
    """uint8 (B, SIDE, SIDE, 3): a flat colour, a slope across it, and the pattern in a lighter or darker tone."""
    device = pattern.device
    flat = dice.between(85, 165)[:, None] + dice.between(-24, 24, 3)
    slope = dice.between(-20, 20, 2, 3)
    tone = dice.between(16, 32) * (1 - 2 * dice.below(2))
    period, dots = dice.between(9, 18), dice.between(48, 64)
    shift, angle = dice.below(36, 2), dice.below(180)
    sine, cosine = table(_SINE, angle)[torch.stack([angle, angle + 90])]
    places = torch.arange(SIDE, device=device) + shift[..., None]  # (B, 2, SIDE): columns, rows
    step = period[:, None, None]
    mask = torch.zeros(len(pattern), SIDE, SIDE, dtype=torch.bool, device=device)
    for index, name in enumerate(BACKGROUNDS):
        of = pattern == index
        if name == "striped":
            across, down = (places[of] * torch.stack([cosine, sine], 1)[of, :, None]).to(torch.int32).unbind(1)
            width = (step[of] * _UNIT).to(torch.int32)
            mask[of] = (across[:, None] + down[:, :, None]) * 2 // width % 2 == 0
        elif name == "checkered":
            across, down = (places[of] // step[of] % 2 == 0).unbind(1)
            mask[of] = across[:, None] == down[:, :, None]
        elif name == "dotted":
            across, down = ((2 * (places[of] % step[of]) - step[of]) ** 2).to(torch.int32).unbind(1)
            mask[of] = across[:, None] + down[:, :, None] < ((period * dots // 100) ** 2)[of, None, None]
    ramp = 2 * torch.arange(SIDE, device=device) - SIDE
    down, across = (ramp * slope[..., None] // SIDE).to(torch.int16).unbind(1)  # (B, 3, SIDE) each
    toned = mask * tone.to(torch.int16)[:, None, None]
    # Colour by colour, since a last dimension of three is slow.
    planes = toned[:, None] + (flat.to(torch.int16)[..., None] + down)[..., None]  # (B, 3, SIDE, SIDE)
    planes += across[..., None, :]
    return torch.stack(planes.clamp_(0, 255).to(torch.uint8).unbind(1), -1)


def _stamp(image: Tensor, mask: Tensor, x: Tensor, y: Tensor, color: Tensor) -> tuple[Tensor, ...]:
    """Colour the pixels of M masks in each of B pictures.

    Args:
        image: uint8 (B, SIDE, SIDE, 3), changed.
        mask: bool (B, M, h, w), odd h and w, centred on (x, y); where true it lies inside the picture.
        x, y: int64 (B, M).
        color: int64 (B, M, 3).

    Returns:
        What was coloured, int64 (pixels,) each: picture, row and column, and which of the M masks it belongs to.
    """
    picture, which, down, right = mask.nonzero(as_tuple=True)
    row = y[picture, which] + down - mask.shape[2] // 2
    column = x[picture, which] + right - mask.shape[3] // 2
    image[picture, row, column] = color.to(torch.uint8)[picture, which]
    return picture, row, column, which


def _clutter(dice: Dice, image: Tensor) -> None:
    """Up to _LINES thin lines that mean nothing."""
    device = image.device
    drawn = torch.arange(_LINES, device=device) < dice.below(_LINES + 1)[:, None]
    x, y, angle = dice.below(SIDE, _LINES), dice.below(SIDE, _LINES), dice.below(360, _LINES)
    length, color = dice.between(8, _LINE, _LINES), dice.between(40, 215, _LINES, 3).to(torch.uint8)
    sine, cosine = table(_SINE, angle)[torch.stack([angle, (angle + 90) % 360])]
    along = torch.arange(_LINE, device=device)
    columns = x[..., None] + along * cosine[..., None] // _UNIT  # (B, lines, _LINE)
    rows = y[..., None] + along * sine[..., None] // _UNIT
    inside = (columns >= 0) & (columns < SIDE) & (rows >= 0) & (rows < SIDE)
    inside &= drawn[..., None] & (along < length[..., None])
    for line in range(_LINES):  # one after the other: where lines cross, the later one is on top
        picture, place = inside[:, line].nonzero(as_tuple=True)
        image[picture, rows[picture, line, place], columns[picture, line, place]] = color[picture, line]


def paint(layout: Layout) -> Pictures:
    """Draw B scenes.

    Args:
        layout: what they show.

    Returns:
        The pictures, on the device of the layout.
    """
    device, (count, many) = layout.seeds.device, layout.color.shape
    dice = Dice(layout.seeds, _STREAM)
    image = _background(dice, layout.background)
    _clutter(dice, image)
    objects, labels, signs = torch.zeros(3, count, SIDE, SIDE, dtype=torch.uint8, device=device)
    outlined, body = _glyphs(device)
    light, dark = table([245] * 3, image), table([20] * 3, image)

    dark_board = dice.chance(50)[:, None, None]
    masks = _boards(device)[layout.sign_size, None] & (layout.sign[:, :1] >= 0)[..., None, None]
    _stamp(image, masks, layout.sign_x[:, None], layout.sign_y[:, None], torch.where(dark_board, dark, light))
    pitch = table([width + SIGN_GAP for _, width in SIZES], image)[layout.sign_size][:, None]
    x = layout.sign_x[:, None] + pitch * (torch.arange(SIGN, device=device) - SIGN // 2)
    masks = body[layout.sign_size[:, None], layout.sign] & (layout.sign >= 0)[..., None, None]
    ink = torch.where(dark_board, light, dark).expand(-1, SIGN, -1)
    *hit, which = _stamp(image, masks, x, layout.sign_y[:, None].expand(-1, SIGN), ink)
    signs[tuple(hit)] = (which + 1).to(torch.uint8)

    turn = dice.below(len(_TURNS), many)
    paints = table(list(COLORS.values()), image)[layout.color] + dice.between(-16, 16, many, 3)
    masks = _shapes(device)[layout.shape, layout.radius, turn] & layout.there[..., None, None]
    *hit, which = _stamp(image, masks, layout.x, layout.y, paints.clamp(0, 255))
    objects[tuple(hit)] = (which + 1).to(torch.uint8)

    black = dice.chance(50, many)[..., None]
    written = (layout.glyph >= 0)[..., None, None]
    masks = outlined[layout.glyph_size, layout.glyph] & written
    *hit, which = _stamp(image, masks, layout.glyph_x, layout.glyph_y, torch.where(black, light, dark))
    labels[tuple(hit)] = (which + 1).to(torch.uint8)
    masks = body[layout.glyph_size, layout.glyph] & written
    _stamp(image, masks, layout.glyph_x, layout.glyph_y, torch.where(black, dark, light))
    return Pictures(image, objects, labels, signs)
