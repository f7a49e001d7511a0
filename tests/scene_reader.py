"""What a person would see in scenes, and what can be said of questions without a picture; for the tests of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import torch
from visiontok.demo import raster, scenes
from visiontok.demo.glyphs import GLYPHS, SIZES
from visiontok.demo.questions import FORM_NAMES, KIND_OF_FORM, VOCABULARY, Questions
from visiontok.demo.scenes import BACKGROUNDS, COLOR_NAMES, SHAPES

# Colours and shapes that are never together in training.
WITHHELD = {
    *("red circle", "green square", "blue triangle", "yellow star", "purple diamond", "orange cross", "white ring"),
}


def withheld_here(glyph: str, x: int, y: int) -> bool:
    """Whether training never shows this glyph at this place."""
    return 4 * GLYPHS.index(glyph) % 9 == 3 * (y // 48) + x // 48


@dataclass(frozen=True)
class Thing:
    """A coloured shape; half the side of its box; the pixels it covers."""

    color: str
    shape: str
    x: int
    y: int
    reach: int
    pixels: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class World:
    """What a person sees: things; glyphs (what, x, y, half the width, half the height), not whose; sign; background."""

    things: list[Thing]
    glyphs: list[tuple[str, int, int, int, int]]
    sign: str
    background: str

    def named(self, name: str) -> list[Thing]:
        return [thing for thing in self.things if thing.name == name]

    def glyphs_of(self, thing: Thing) -> list[tuple[str, bool]]:
        """The glyphs nearer to a thing than to any other, and whether they are on it."""
        found = []
        for glyph, x, y, width, height in self.glyphs:
            gaps = {
                id(other): max(abs(other.x - x) - width - other.reach, abs(other.y - y) - height - other.reach)
                for other in self.things
            }
            nearest = sorted(self.things, key=lambda other: gaps[id(other)])
            assert len(nearest) == 1 or gaps[id(nearest[1])] - gaps[id(nearest[0])] >= 1  # pixels
            if nearest[0] is thing:
                found.append((glyph, gaps[id(thing)] < 0))
        return found


def worlds(layout: scenes.Layout) -> list[World]:
    table = {field.name: getattr(layout, field.name).tolist() for field in fields(layout)}
    objects = raster.paint(layout).objects
    found = []
    for row in range(len(layout)):
        of = {name: values[row] for name, values in table.items()}
        slots = [slot for slot, color in enumerate(of["color"]) if color >= 0]
        things = [
            Thing(
                COLOR_NAMES[of["color"][slot]],
                SHAPES[of["shape"][slot]],
                of["x"][slot],
                of["y"][slot],
                of["radius"][slot] * 115 // 100 + 1,
                int((objects[row] == slot + 1).sum()),
            )
            for slot in slots
        ]
        glyphs = []
        for slot in slots:
            if of["glyph"][slot] >= 0:
                height, width = SIZES[of["glyph_size"][slot]]
                place = of["glyph_x"][slot], of["glyph_y"][slot]
                glyphs.append((GLYPHS[of["glyph"][slot]], *place, width // 2 + 1, height // 2 + 1))
        sign = " ".join(GLYPHS[glyph] for glyph in of["sign"] if glyph >= 0)
        found.append(World(things, glyphs, sign, BACKGROUNDS[of["background"]]))
    return found


def flat(parts: list[Questions]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all questions: form (N,), wording (N, L) and answer (N, 3)."""
    columns = zip(*((part.form, part.token_ids(), part.answer) for part in parts), strict=True)
    form, words, answer = (torch.cat([value.flatten(0, 1) for value in column]) for column in columns)
    return tuple(value[form >= 0].numpy() for value in (form, words, answer))


def shares(parts: list[Questions]) -> dict[str, dict[str, float]]:
    """How often each form has each answer, in percent."""
    counts: dict[str, Counter[str]] = {}
    form, _, answer = flat(parts)
    for index, words in zip(form.tolist(), answer.tolist(), strict=True):
        text = " ".join(VOCABULARY[word] for word in words if word)
        counts.setdefault(FORM_NAMES[index], Counter())[text] += 1
    return {name: {text: 100 * n / c.total() for text, n in c.most_common()} for name, c in counts.items()}


def by_rote(learned: np.ndarray, answers: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """What was answered most often to the same rows before; -1 to rows never seen. All (N,) but the rows (N, L)."""
    rows, index = np.unique(np.concatenate([learned, asked]), axis=0, return_inverse=True)
    counts = np.zeros((len(rows), answers.max() + 1), int)
    np.add.at(counts, (index[: len(learned)], answers), 1)
    return np.where(counts.any(1), counts.argmax(1), -1)[index[len(learned) :]]


def blind(learned: list[Questions], asked: list[Questions]) -> dict[str, tuple[float, float]]:
    """Right answers in percent, by kind: of who knows the usual answer to a form, and to every single wording."""
    (form, words, answer), (form_of, words_of, answer_of) = flat(learned), flat(asked)
    _, every = np.unique(np.concatenate([answer, answer_of]), axis=0, return_inverse=True)
    known, right = every[: len(answer)], every[len(answer) :]
    usual = by_rote(form[:, None], known, form_of[:, None])
    worded = by_rote(words, known, words_of)
    hits = usual == right, np.where(worded >= 0, worded, usual) == right
    kinds = np.array(KIND_OF_FORM)[form_of]
    return {kind: tuple(100 * float(hit[kinds == kind].mean()) for hit in hits) for kind in np.unique(kinds)}
