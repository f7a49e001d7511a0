"""Scenes: what the embedded models are trained and measured on.

A scene is a patterned background with a few coloured shapes, some of which carry a glyph (a digit or a letter) beside
them or on them, and sometimes a sign with three glyphs. Scenes are drawn many at a time, on any device, from integers
alone: a seed gives the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .dice import Dice
from .glyphs import GLYPHS, SIZES

SIDE = 144  # pixels, the height and the width of a picture

COLORS = {
    "red": (215, 40, 40),
    "green": (45, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 175),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring")
PLURALS = ("circles", "squares", "triangles", "stars", "diamonds", "crosses", "rings")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
MOST_ALIKE = 3  # objects of the planted colour, and of the planted shape
SIGN = 3  # glyphs on a sign
SIGN_GAP = 3  # pixels between them
# Half the width and half the height of outlined glyphs of each of SIZES, and of signs with such glyphs, in pixels.
GLYPH_HALVES = [(width // 2 + 1, height // 2 + 1) for height, width in SIZES]
SIGN_HALVES = [((SIGN * (width + SIGN_GAP) + 3) // 2, height // 2 + 3) for height, width in SIZES]

# Where the seeds of each split begin; a split has as many as there are up to the next.
SPLITS = {
    name: range(number << 40, number + 1 << 40)
    for number, name in enumerate(
        ("train", "validation", "heldout", "composition", "detail", "pairs", "turns", "video"), start=1
    )
}

_TRIES = 32  # places tried for each object
_STREAM = 1  # of the dice
ON = 4  # the fifth side of an object where a glyph can be: on it


def withheld_pair(color: Tensor, shape: Tensor) -> Tensor:
    """Whether an object of this colour and shape occurs in no split but "composition"; seven of 56 pairs."""
    return color == shape


def withheld_glyph(glyph: Tensor, cell: Tensor) -> Tensor:
    """Whether this glyph occurs in this of the nine cells in no split but "composition"; one cell for each glyph."""
    return glyph * 4 % 9 == cell


@dataclass(frozen=True)
class Style:
    """How scenes are filled.

    Args:
        objects: smallest and largest number of objects (fewer where they do not fit).
        radius: smallest and largest radius in pixels.
        gap: least distance between the boxes of two objects, in pixels.
        glyph_percent: share of objects with a glyph, in percent.
        glyph_odds: how often a glyph has each of glyphs.SIZES, in percent.
        sign_percent: share of scenes with a sign, in percent.
        novel: show what training never shows (`withheld_pair`, `withheld_glyph`), and ask about that.
    """

    objects: tuple[int, int] = (2, 6)
    radius: tuple[int, int] = (7, 17)
    gap: int = 6
    glyph_percent: int = 65
    glyph_odds: tuple[int, int, int] = (20, 40, 40)
    sign_percent: int = 40
    novel: bool = False


NORMAL = Style()
DENSE = Style(objects=(7, 14), radius=(7, 15), gap=2, glyph_percent=75, sign_percent=60)
STYLES = {
    "composition": Style(objects=(2, 6), novel=True),
    "detail": Style(glyph_percent=100, glyph_odds=(100, 0, 0)),
}


@dataclass(frozen=True)
class Layout:
    """What B scenes show; all int64, O objects each, -1 in every field of an object that is not there.

    Attributes:
        seeds: (B,), what the scenes are drawn from.
        color, shape: (B, O), indices into COLOR_NAMES and SHAPES.
        x, y, radius: (B, O), in pixels.
        glyph: (B, O), index into GLYPHS, -1 without one.
        side: (B, O), where the glyph is: right, below, left, above, or 4 on the object.
        glyph_size: (B, O), index into glyphs.SIZES.
        glyph_x, glyph_y: (B, O), its centre in pixels.
        sign: (B, 3), its glyphs, -1 where there is no sign.
        sign_x, sign_y, sign_size: (B,), its centre in pixels and the size of its glyphs.
        background: (B,), index into BACKGROUNDS.
        planted_color, planted_shape: (B,), of which 0 … MOST_ALIKE objects were planned, about equally often.
    """

    seeds: Tensor
    color: Tensor
    shape: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    glyph: Tensor
    side: Tensor
    glyph_size: Tensor
    glyph_x: Tensor
    glyph_y: Tensor
    sign: Tensor
    sign_x: Tensor
    sign_y: Tensor
    sign_size: Tensor
    background: Tensor
    planted_color: Tensor
    planted_shape: Tensor

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice | Tensor) -> Layout:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def there(self) -> Tensor:
        """bool (B, O): slots that hold an object."""
        return self.color >= 0

    @property
    def novel(self) -> Tensor:
        """bool (B, O): objects that training never shows, by their colour and shape or by their glyph and its cell."""
        glyph = (self.glyph >= 0) & withheld_glyph(self.glyph, cell(self.glyph_x, self.glyph_y))
        return self.there & (withheld_pair(self.color, self.shape) | glyph)


# The fields of a layout that are -1 for an object that is not there.
PER_OBJECT = ("color", "shape", "x", "y", "radius", "glyph", "side", "glyph_size", "glyph_x", "glyph_y")


def cell(x: Tensor, y: Tensor) -> Tensor:
    """Index of the cell of a 3 x 3 grid, row by row, that holds a place."""
    return y * 3 // SIDE * 3 + x * 3 // SIDE


def seeds(split: str, indices: range, device: torch.device | str = "cpu") -> Tensor:
    """The seeds of scenes of a split.

    Args:
        split: one of SPLITS.
        indices: which of its scenes.
        device: where the seeds, and all that is drawn from them, shall lie.

    Returns:
        int64 (B,).

    Raises:
        ValueError: unknown split, or an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    whole = SPLITS[split]
    for index in (indices[0], indices[-1]) if len(indices) else ():
        if not 0 <= index < len(whole):
            raise ValueError(f"index must be between 0 and {len(whole) - 1} in split {split!r}, got {index}")
    return whole.start + torch.tensor(list(indices), dtype=torch.int64, device=device)


def extent(radius: Tensor) -> Tensor:
    """Half the side of the box of a shape, in pixels."""
    return radius * 115 // 100 + 1


def _kinds(dice: Dice, style: Style) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour and shape of the objects, (B, O), -1 beyond the last; planted colour and shape, (B,).

    A colour and a shape are planted: how many objects have it is drawn first, so that the answers to "how many red
    objects" come out equally often.
    """
    low, most = style.objects
    slots = torch.arange(most, device=dice.seeds.device)
    number = dice.between(low, most)
    planted_color = dice.below(len(COLOR_NAMES))
    planted_shape = dice.below(len(SHAPES) - 1)
    planted_shape = planted_shape + (planted_shape >= planted_color)  # that pair may be withheld
    planted_shape = torch.where(planted_color == len(SHAPES), dice.below(len(SHAPES)), planted_shape)
    alike = dice.below(number.clamp(max=MOST_ALIKE)[:, None] + 1, 2)  # (B, 2): how many of the colour, of the shape
    there = slots < number[:, None]
    with_color = slots < alike[:, :1]
    order = torch.where(there, dice.words(most), 1 << 32).argsort(dim=1, stable=True).argsort(dim=1)
    with_shape = order < alike[:, 1:]
    novel = torch.zeros_like(there)
    if style.novel:
        # The first object that the plan lets be new to the model is, and some others are. Black is in no withheld pair.
        can = there & ~(with_color & (with_shape | (planted_color == len(SHAPES))[:, None]))
        novel = can & ((can.cumsum(1) == 1) | dice.chance(40, most))

    pairs = torch.arange(len(COLOR_NAMES) * len(SHAPES), device=slots.device)
    colors, shapes = pairs // len(SHAPES), pairs % len(SHAPES)
    allowed = (colors == planted_color[:, None, None]) == with_color[..., None]  # (B, O, pairs)
    allowed &= (shapes == planted_shape[:, None, None]) == with_shape[..., None]
    allowed &= withheld_pair(colors, shapes) == novel[..., None]
    pair = torch.where(there, dice.choose(allowed)[0].squeeze(-1), -1)
    return torch.where(there, colors[pair], -1), torch.where(there, shapes[pair], -1), planted_color, planted_shape


def _sizes(dice: Dice, odds: tuple[int, int, int], *shape: int) -> Tensor:
    point = dice.below(100, *shape)
    return (point >= odds[0]).long() + (point >= odds[0] + odds[1]).long()


def table(values: object, like: Tensor) -> Tensor:
    """Constants as a tensor, on the device of another."""
    return torch.tensor(values, device=like.device)


def box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    """The box around a centre: left, top, right and bottom in the last dimension, in pixels."""
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1)


def union(box: Tensor, other: Tensor) -> Tensor:
    """The smallest box that holds two."""
    return torch.cat([torch.minimum(box, other)[..., :2], torch.maximum(box, other)[..., 2:]], -1)


def boxes_meet(box: Tensor, other: Tensor, gap: int) -> Tensor:
    """Whether boxes (left, top, right, bottom) in the last dimension come closer than `gap` pixels."""
    return ((box[..., :2] < other[..., 2:] + gap) & (other[..., :2] < box[..., 2:] + gap)).all(-1)


# ----------------------------------------------------------------------------------------------------------- layout


def lay_out(seeds: Tensor, style: Style = NORMAL) -> Layout:
    """Decide what scenes show.

    Args:
        seeds: int64 (B,).
        style: how they are filled.

    Returns:
        The layout of B scenes, on the device of the seeds.
    """
    dice = Dice(seeds, _STREAM)
    color, shape, planted_color, planted_shape = _kinds(dice, style)
    most = color.shape[1]
    device = seeds.device
    radius = dice.between(*style.radius, most)
    side = dice.below(4, most)
    roomy = ((shape == SHAPES.index("circle")) | (shape == SHAPES.index("square"))) & (radius >= 14)
    side = torch.where(roomy & dice.chance(60, most), ON, side)
    labelled = dice.chance(style.glyph_percent, most)
    glyph_size = _sizes(dice, style.glyph_odds, most)
    half_width, half_height = table(GLYPH_HALVES, seeds)[glyph_size].unbind(-1)
    reaches = extent(radius)
    right = table((1, 0, -1, 0, 0), seeds)[side]
    down = table((0, 1, 0, -1, 0), seeds)[side]
    offset_x, offset_y = right * (reaches + half_width + 1), down * (reaches + half_height + 1)

    with_sign = dice.chance(style.sign_percent)
    sign_size = _sizes(dice, style.glyph_odds)
    sign_width, sign_height = table(SIGN_HALVES, seeds)[sign_size].unbind(-1)
    sign_x = sign_width + 2 + dice.below(SIDE - 2 * sign_width - 4)
    sign_y = sign_height + 2 + dice.below(SIDE - 2 * sign_height - 4)
    sign_box = box(sign_x, sign_y, sign_width, sign_height)
    nowhere = table([-SIDE] * 4, seeds)
    taken = torch.where(with_sign[:, None], sign_box, nowhere)[:, None]  # (B, boxes so far, 4)

    # The box of an object and its glyph around the object's centre, and places where it lies inside the picture.
    zero = torch.zeros_like(reaches)
    hull, label = box(zero, zero, reaches, reaches), box(offset_x, offset_y, half_width, half_height)  # (B, O, 4)
    hull = torch.where(labelled[..., None], union(hull, label), hull)
    first, last = 1 - hull[..., :2], SIDE - 2 - hull[..., 2:]
    tries = first[:, :, None] + dice.below((last - first + 1)[:, :, None], most, _TRIES, 2)
    boxes = torch.cat([tries, tries], -1) + hull[:, :, None]  # (B, O, tries, 4)

    places = []
    for slot in range(most):
        fits = ~boxes_meet(boxes[:, slot, :, None], taken[:, None], style.gap).any(-1) & (color[:, slot, None] >= 0)
        found, which = fits.any(1)[:, None, None], fits.int().argmax(1)[:, None, None]
        places.append(torch.where(found, tries[:, slot].gather(1, which.expand(-1, 1, 2)), -1))
        taken = torch.cat([taken, torch.where(found, boxes[:, slot].gather(1, which.expand(-1, 1, 4)), nowhere)], 1)

    x, y = torch.cat(places, 1).unbind(-1)
    there = x >= 0
    labelled &= there
    glyph_x, glyph_y = x + offset_x, y + offset_y
    withheld = withheld_glyph(torch.arange(len(GLYPHS), device=device), cell(glyph_x, glyph_y)[..., None])
    if style.novel:
        # Half of the glyphs are new to the model where they are.
        allowed = withheld == dice.chance(50, most)[..., None]
    else:
        allowed = ~withheld
    glyph = dice.choose(allowed)[0].squeeze(-1)
    where_there = {
        "color": color,
        "shape": shape,
        "x": x,
        "y": y,
        "radius": radius,
        "side": torch.where(labelled, side, -1),
        "glyph": torch.where(labelled, glyph, -1),
        "glyph_size": torch.where(labelled, glyph_size, -1),
        "glyph_x": torch.where(labelled, glyph_x, -1),
        "glyph_y": torch.where(labelled, glyph_y, -1),
    }
    return Layout(
        seeds=seeds,
        sign=torch.where(with_sign[:, None], dice.below(len(GLYPHS), SIGN), -1),
        sign_x=sign_x,
        sign_y=sign_y,
        sign_size=sign_size,
        background=dice.below(len(BACKGROUNDS)),
        planted_color=planted_color,
        planted_shape=planted_shape,
        **{name: torch.where(there, value, -1) for name, value in where_there.items()},
    )
