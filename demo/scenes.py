"""Rendered scenes with questions: what the embedded model is trained and measured on.

A scene is a textured background with a few coloured shapes, some of which carry a glyph (a digit or a letter) beside
them or on them. Everything is drawn with integer arithmetic from the Mersenne Twister's documented stream, so a seed
gives the same pixels, questions and answers on every machine.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SIZE = 144  # pixels, height and width

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
KINDS = ("color", "shape", "exist", "count", "position", "read", "background")

# 5x7 bitmaps, one hex pair per row, most significant of five bits on the left. Letters that the 5x7 grid makes hard to
# tell apart (B and 8, O and 0, Z and 2) are left out, and "a", which is also a word of the questions.
_BITMAPS = {
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 04 04 04 04 0E",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
    "c": "0E 11 10 10 10 11 0E",
    "e": "1F 10 10 1E 10 10 1F",
    "h": "11 11 11 1F 11 11 11",
    "j": "07 02 02 02 02 12 0C",
    "k": "11 12 14 18 14 12 11",
    "l": "10 10 10 10 10 10 1F",
    "m": "11 1B 15 15 11 11 11",
    "p": "1E 11 11 1E 10 10 10",
    "t": "1F 04 04 04 04 04 04",
    "u": "11 11 11 11 11 11 0E",
    "x": "11 11 0A 04 0A 11 11",
    "y": "11 11 11 0A 04 04 04",
}
GLYPHS = tuple(_BITMAPS)
DIGITS = 10  # GLYPHS[:DIGITS] are digits, the rest letters
GLYPH_SIZES = ((14, 10), (17, 12))  # pixels, (height, width)

SPLITS = {
    "train": range(2**40),
    "validation": range(2**40, 2**41),
    "heldout": range(2**41, 2**42),
}

MAX_COUNT = 6
# How often a randomly drawn count must be kept so that the answers 0 … MAX_COUNT come out equally often: the inverse of
# how often a scene offers a question with that answer (every scene offers "0", few offer "5"). Measured.
_COUNT_WEIGHTS = (30, 30, 30, 80, 210, 570, 3000)
# How often each kind is tried: most tries at counting fail, and there is only one question about the background.
_KIND_WEIGHTS = {"color": 10, "shape": 10, "exist": 5, "count": 60, "position": 6, "read": 20, "background": 5}


@dataclass(frozen=True)
class Style:
    """How full a scene is.

    Args:
        objects: smallest and largest number of objects (fewer where they do not fit).
        radius: smallest and largest radius in pixels.
        glyph_percent: share of objects with a glyph, in percent.
        gap: least distance between the boxes of two objects, in pixels.
    """

    objects: tuple[int, int] = (2, 6)
    radius: tuple[int, int] = (7, 17)
    glyph_percent: int = 60
    gap: int = 7


NORMAL = Style()
DENSE = Style(objects=(7, 14), radius=(7, 15), glyph_percent=75, gap=2)


@dataclass(frozen=True)
class Thing:
    """One object: indices into the tables above, centre and radius in pixels, the glyph's centre if it has one."""

    color: int
    shape: int
    x: int
    y: int
    radius: int
    glyph: int | None = None
    glyph_at: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{COLOR_NAMES[self.color]} {SHAPES[self.shape]}"

    @property
    def glyph_is_on(self) -> bool:
        return self.glyph_at == (self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows.

    Attributes:
        seed: what it was drawn from.
        pixels: uint8 (SIZE, SIZE, 3), RGB.
        things: the objects.
        background: index into BACKGROUNDS.
        thing_map: uint8 (SIZE, SIZE), 1 + index of the object drawn there, 0 elsewhere.
        glyph_map: the same for glyphs, their outline included.
    """

    seed: int
    pixels: np.ndarray
    things: tuple[Thing, ...]
    background: int
    thing_map: np.ndarray
    glyph_map: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question in plain English, its one-word answer and its kind (one of KINDS)."""

    text: str
    answer: str
    kind: str


class Dice(random.Random):
    """Integers from `random.random()`, the one method whose stream Python promises never to change."""

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self.random() * stop)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def weighted(self, weights: tuple[int, ...]) -> int:
        """An index, drawn in proportion to integer weights."""
        point = self.below(sum(weights))
        for index, reached in enumerate(itertools.accumulate(weights)):
            if point < reached:
                return index
        raise ValueError(f"weights must hold a positive integer, got {weights}")


# ---------------------------------------------------------------------------------------------------------- drawing

_UNIT = 1024  # fixed point: one pixel, and 1.0 of sine and cosine
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.int32)
_SINE = [round(_UNIT * math.sin(math.radians(degree))) for degree in range(360)]


def _sin_cos(degree: int) -> tuple[int, int]:
    return _SINE[degree % 360], _SINE[(degree + 90) % 360]


def _star() -> tuple[tuple[int, int], ...]:
    points = []
    for corner in range(10):
        reach = 110 if corner % 2 == 0 else 45
        sine, cosine = _sin_cos(36 * corner)
        points.append((reach * sine // _UNIT, -reach * cosine // _UNIT))
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


@functools.lru_cache(maxsize=4096)
def _stencil(shape: int, radius: int, degree: int) -> np.ndarray:
    """The pixels a shape covers: bool (2 E + 1, 2 E + 1) around its centre, E = the extent in pixels."""
    extent = radius * 115 // 100 + 1
    y, x = np.mgrid[-extent : extent + 1, -extent : extent + 1].astype(np.int64)
    name = SHAPES[shape]
    if name in ("circle", "ring"):
        distance = 4 * (x * x + y * y)
        disc = distance <= (2 * radius + 1) ** 2
        hole = 2 * (radius - max(3, radius * 34 // 100)) + 1
        return disc & (distance > hole**2) if name == "ring" else disc
    sine, cosine = _sin_cos(degree)
    u, v = cosine * x + sine * y, cosine * y - sine * x  # in the shape's own frame, 1 / _UNIT pixels
    corners = [(px * radius * _UNIT // 100, py * radius * _UNIT // 100) for px, py in _POLYGONS[name]]
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 == y2:
            continue
        left = (u - x1) * (y2 - y1) < (v - y1) * (x2 - x1)
        inside ^= ((y1 > v) != (y2 > v)) & (left == (y2 > y1))
    return inside


@functools.lru_cache(maxsize=64)
def _glyph_stencil(glyph: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A glyph's body and its body with a one-pixel outline, both bool (height + 2, width + 2)."""
    height, width = GLYPH_SIZES[size]
    rows = [int(row, 16) for row in _BITMAPS[GLYPHS[glyph]].split()]
    bitmap = np.array([[row >> (4 - bit) & 1 for bit in range(5)] for row in rows], bool)
    body = np.zeros((height + 2, width + 2), bool)
    body[1:-1, 1:-1] = bitmap[np.arange(height)[:, None] * 7 // height, np.arange(width)[None] * 5 // width]
    outlined = body.copy()
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        outlined |= np.roll(body, (down, right), (0, 1))
    return body, outlined


def _draw_background(dice: Dice, pattern: int) -> np.ndarray:
    """int32 (SIZE, SIZE, 3): a flat colour, a slope across it, and the pattern in a lighter or darker tone."""
    grey = dice.between(70, 190)
    flat = np.array([grey + dice.between(-28, 28) for _ in range(3)], np.int32)
    slope = np.array([[dice.between(-25, 25) for _ in range(3)] for _ in range(2)], np.int32)
    ramp = 2 * np.arange(SIZE, dtype=np.int32) - SIZE
    image = flat + (ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]) // SIZE
    tone = dice.between(22, 45) * (1 if dice.chance(50) else -1)
    period, dx, dy = dice.between(9, 18), dice.below(36), dice.below(36)
    name = BACKGROUNDS[pattern]
    if name == "striped":
        sine, cosine = _sin_cos(dice.below(180))
        mask = ((_COLUMNS + dx) * cosine + (_ROWS + dy) * sine) * 2 // (period * _UNIT) % 2 == 0
    elif name == "checkered":
        mask = ((_COLUMNS + dx) // period + (_ROWS + dy) // period) % 2 == 0
    elif name == "dotted":
        x, y = 2 * ((_COLUMNS + dx) % period) - period, 2 * ((_ROWS + dy) % period) - period
        mask = x * x + y * y < (period * dice.between(48, 64) // 100) ** 2
    else:
        return image
    return image + tone * mask[..., None].astype(np.int32)


def _draw_clutter(dice: Dice, image: np.ndarray) -> None:
    """Up to five thin lines that mean nothing."""
    for _ in range(dice.below(6)):
        x, y, (sine, cosine) = dice.below(SIZE), dice.below(SIZE), _sin_cos(dice.below(360))
        color = [dice.between(40, 215) for _ in range(3)]
        along = np.arange(dice.between(8, 30))
        columns, rows = x + along * cosine // _UNIT, y + along * sine // _UNIT
        seen = (columns >= 0) & (columns < SIZE) & (rows >= 0) & (rows < SIZE)
        image[rows[seen], columns[seen]] = color


def _paint(
    image: np.ndarray, owners: np.ndarray, mask: np.ndarray, x: int, y: int, color: list[int], owner: int
) -> None:
    """Colour the pixels of a mask centred on (x, y), and note whose they are."""
    top, left = y - mask.shape[0] // 2, x - mask.shape[1] // 2
    window = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
    image[window][mask] = color
    owners[window][mask] = owner


def _draw_things(
    dice: Dice, style: Style, image: np.ndarray, thing_map: np.ndarray, glyph_map: np.ndarray
) -> list[Thing]:
    things: list[Thing] = []
    boxes: list[tuple[int, int, int, int]] = []
    wanted = dice.between(*style.objects)
    for _ in range(12 * wanted):
        if len(things) == wanted:
            break
        color, shape, radius = dice.below(len(COLORS)), dice.below(len(SHAPES)), dice.between(*style.radius)
        if things and dice.chance(30):  # twins make counting and existence questions worth asking
            twin = things[dice.below(len(things))]
            color, shape = (twin.color, shape) if dice.chance(50) else (color, twin.shape)
        extent = radius * 115 // 100 + 1
        x, y = dice.between(extent + 1, SIZE - extent - 2), dice.between(extent + 1, SIZE - extent - 2)
        box = (x - extent, y - extent, x + extent, y + extent)
        glyph, size, glyph_at = None, 0, None
        if dice.chance(style.glyph_percent):
            glyph = dice.below(DIGITS) if dice.chance(60) else dice.between(DIGITS, len(GLYPHS) - 1)
            size = dice.below(len(GLYPH_SIZES))
            half_height, half_width = GLYPH_SIZES[size][0] // 2 + 1, GLYPH_SIZES[size][1] // 2 + 1
            side = dice.below(4)
            if SHAPES[shape] in ("circle", "square") and radius >= 14 and dice.chance(60):
                glyph_at = (x, y)
            else:
                right, down = ((1, 0), (0, 1), (-1, 0), (0, -1))[side]
                glyph_at = (x + right * (extent + half_width + 1), y + down * (extent + half_height + 1))
            box = (
                min(box[0], glyph_at[0] - half_width),
                min(box[1], glyph_at[1] - half_height),
                max(box[2], glyph_at[0] + half_width),
                max(box[3], glyph_at[1] + half_height),
            )
        if min(box) < 1 or max(box) > SIZE - 2:
            continue
        gap = style.gap
        if any(
            box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
            for other in boxes
        ):
            continue
        boxes.append(box)
        things.append(Thing(color, shape, x, y, radius, glyph, glyph_at))
        owner = len(things)
        paint = [min(255, max(0, channel + dice.between(-16, 16))) for channel in COLORS[COLOR_NAMES[color]]]
        _paint(image, thing_map, _stencil(shape, radius, dice.between(-14, 14)), x, y, paint, owner)
        if glyph is not None and glyph_at is not None:
            ink, edge = (12, 238) if dice.chance(50) else (248, 24)
            body, outlined = _glyph_stencil(glyph, size)
            _paint(image, glyph_map, outlined, *glyph_at, [edge] * 3, owner)
            _paint(image, glyph_map, body, *glyph_at, [ink] * 3, owner)
    return things


def draw(seed: int, style: Style = NORMAL) -> Scene:
    """Draw the scene of a seed (any integer >= 0); `render` is the way in that keeps the splits apart."""
    dice = Dice(seed)
    background = dice.below(len(BACKGROUNDS))
    image = _draw_background(dice, background)
    _draw_clutter(dice, image)
    thing_map, glyph_map = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    things = _draw_things(dice, style, image, thing_map, glyph_map)
    raw = np.frombuffer(dice.randbytes(image.size), np.uint8).reshape(image.shape).astype(np.int32)
    noise = ((raw & 15) + (raw >> 4) - 15) * dice.between(0, 16) // 8  # standard deviation up to 13 grey levels
    pixels = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(seed, pixels, tuple(things), background, thing_map, glyph_map)


def render(split: str, index: int, style: Style = NORMAL) -> Scene:
    """The scene number `index` of a split.

    Args:
        split: "train", "validation" or "heldout"; their seeds never overlap.
        index: from 0.
        style: how full the scene is.

    Raises:
        ValueError: unknown split, or an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    seeds = SPLITS[split]
    if not 0 <= index < len(seeds):
        raise ValueError(f"index must be between 0 and {len(seeds) - 1} in split {split!r}, got {index}")
    return draw(seeds[index], style)


# -------------------------------------------------------------------------------------------------------- questions


class _Asker:
    """What can be asked about one scene without ambiguity."""

    def __init__(self, scene: Scene, dice: Dice):
        self.dice = dice
        self.background = scene.background
        self.things = scene.things
        self.colors = Counter(thing.color for thing in scene.things)
        self.shapes = Counter(thing.shape for thing in scene.things)
        self.pairs = Counter((thing.color, thing.shape) for thing in scene.things)
        self.unique = [thing for thing in scene.things if self.pairs[thing.color, thing.shape] == 1]
        self.counts: dict[int, list[str]] = defaultdict(list)  # questions by their answer
        self.counts[len(scene.things)].append("how many objects are there?")
        for color, name in enumerate(COLOR_NAMES):
            self.counts[self.colors[color]].append(f"how many {name} objects are there?")
        for shape, name in enumerate(PLURALS):
            self.counts[self.shapes[shape]].append(f"how many {name} are there?")

    def _one_of(self, things: list[Thing]) -> Thing | None:
        return things[self.dice.below(len(things))] if things else None

    def color(self) -> tuple[str, str] | None:
        thing = self._one_of([thing for thing in self.things if self.shapes[thing.shape] == 1])
        return (f"what color is the {SHAPES[thing.shape]}?", COLOR_NAMES[thing.color]) if thing else None

    def shape(self) -> tuple[str, str] | None:
        thing = self._one_of([thing for thing in self.things if self.colors[thing.color] == 1])
        return (f"what shape is the {COLOR_NAMES[thing.color]} object?", SHAPES[thing.shape]) if thing else None

    def exist(self) -> tuple[str, str] | None:
        dice = self.dice
        there = self._one_of(list(self.things))
        if there is None:
            return None
        color, shape, answer = there.color, there.shape, "yes"
        if dice.chance(42):
            answer = "no"
            while self.pairs[color, shape]:
                # Mostly both attributes are in the picture, only not on one object: the answer needs binding.
                kind = dice.below(100)
                color = there.color if kind < 70 else dice.below(len(COLORS))
                shape = self.things[dice.below(len(self.things))].shape if kind < 85 else dice.below(len(SHAPES))
        article = "an" if COLOR_NAMES[color] == "orange" else "a"
        return f"is there {article} {COLOR_NAMES[color]} {SHAPES[shape]}?", answer

    def count(self) -> tuple[str, str] | None:
        target = self.dice.weighted(_COUNT_WEIGHTS)
        candidates = self.counts[target]
        return (candidates[self.dice.below(len(candidates))], str(target)) if candidates else None

    def position(self) -> tuple[str, str] | None:
        dice, thing = self.dice, self._one_of(self.unique)
        if thing is None:
            return None
        sideways = dice.chance(50)
        if dice.chance(35) or len(self.unique) == 1:
            offset = (thing.x if sideways else thing.y) * 2 - SIZE
            if abs(offset) < SIZE // 8:
                return None
            first, second = ("left", "right") if sideways else ("top", "bottom")
            return f"is the {thing.name} in the {first} or {second} half?", first if offset < 0 else second
        other = self._one_of([other for other in self.unique if other is not thing])
        if other is None:
            return None
        offset = thing.x - other.x if sideways else thing.y - other.y
        if abs(offset) < SIZE // 12:
            return None
        if sideways:
            return f"is the {thing.name} left or right of the {other.name}?", "left" if offset < 0 else "right"
        return f"is the {thing.name} above or below the {other.name}?", "above" if offset < 0 else "below"

    def read(self) -> tuple[str, str] | None:
        thing = self._one_of([thing for thing in self.unique if thing.glyph is not None])
        if thing is None or thing.glyph is None:
            return None
        what = "digit" if thing.glyph < DIGITS else "letter"
        where = "on" if thing.glyph_is_on else "next to"
        return f"what {what} is {where} the {thing.name}?", GLYPHS[thing.glyph]

    def backdrop(self) -> tuple[str, str]:
        return "what is the background pattern?", BACKGROUNDS[self.background]


def questions(scene: Scene, count: int, weights: Mapping[str, int] | None = None) -> list[Question]:
    """Up to `count` different questions about a scene, always the same ones.

    Args:
        scene: what is asked about.
        count: how many questions are wanted; a scene with few objects has fewer.
        weights: how often each kind is tried, by kind, where that should differ from the default.

    Returns:
        Questions whose answer is one word and follows from the picture without ambiguity.
    """
    dice = Dice(scene.seed + 2**60)
    asker = _Asker(scene, dice)
    methods: dict[str, Callable[[], tuple[str, str] | None]] = {
        "color": asker.color,
        "shape": asker.shape,
        "exist": asker.exist,
        "count": asker.count,
        "position": asker.position,
        "read": asker.read,
        "background": asker.backdrop,
    }
    odds = tuple({**_KIND_WEIGHTS, **(weights or {})}[kind] for kind in KINDS)
    found: dict[str, Question] = {}
    for _ in range(40 * count):
        if len(found) == count:
            break
        kind = KINDS[dice.weighted(odds)]
        asked = methods[kind]()
        # A scene has many questions whose answer is 0 and at most one whose answer is 6.
        if kind == "count" and sum(question.kind == kind for question in found.values()) == 2:
            continue
        if asked:
            found.setdefault(asked[0], Question(*asked, kind))
    return list(found.values())
