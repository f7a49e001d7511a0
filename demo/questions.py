"""Questions about scenes, each with one right answer, made for many scenes at a time.

A question is a form with up to four gaps, filled with words of the vocabulary below; so is its answer. What is asked
is drawn so that the wording alone says nothing about the answer beyond how often the form has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dice import Dice
from .glyphs import DIGITS, GLYPHS
from .scenes import BACKGROUNDS, COLOR_NAMES, ON, PLURALS, SHAPES, SIDE, SIGN, Layout, withheld_pair
from .scenes import cell as cell_of

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
_WORDS = tuple(
    "what color is the shape object objects there a an are how many in image picture pictures which one left right of "  # noqa: SIM905
    "or to above below digit letter number next on where background pattern yes no it top bottom half any larger "
    "smaller than grid cell middle center does sign say has more first second and moves appears disappears changes "
    "up down video at start end".split()
)
VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *_WORDS, *COLOR_NAMES, *SHAPES, *PLURALS, *GLYPHS, *BACKGROUNDS)))
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}

EVENTS = ("moves", "appears", "disappears", "changes")  # what can happen in a video
MOMENTS = ("start", "end")
_TABLES = {
    "color": COLOR_NAMES,
    "shape": SHAPES,
    "plural": PLURALS,
    "background": BACKGROUNDS,
    "event": EVENTS,
    "moment": MOMENTS,
}
# Gaps are filled from the table of their name with the first or the second thing asked about.
FORMS = {
    "color": "what color is the {shape}",
    "shape": "what shape is the {color} object",
    "exist": "is there a {color} {shape}",
    "count": "how many objects are there",
    "count color": "how many {color} objects are there",
    "count shape": "how many {plural} are there",
    "left or right": "is the {color} {shape} left or right of the {color2} {shape2}",
    "above or below": "is the {color} {shape} above or below the {color2} {shape2}",
    "left or right half": "is the {color} {shape} in the left or right half",
    "top or bottom half": "is the {color} {shape} in the top or bottom half",
    "compare": "is the {color} {shape} larger or smaller than the {color2} {shape2}",
    "read digit next to": "what digit is next to the {color} {shape}",
    "read letter next to": "what letter is next to the {color} {shape}",
    "read digit on": "what digit is on the {color} {shape}",
    "read letter on": "what letter is on the {color} {shape}",
    "ground": "in which grid cell is the {color} {shape}",
    "sign": "what does the sign say",
    "background": "what is the background pattern",
    "pair has": "which picture has a {color} {shape}",
    "pair more": "which picture has more objects",
    "pair background": "which picture has a {background} background",
    "video way": "the {color} {shape} moves left or right or up or down",
    "video what": "what object {event}",
    "video color": "the {color} {shape} changes to what color",
    "video half": "the {color} {shape} {event} in the first or second half",
    "video exist": "is there a {color} {shape} at the {moment}",
    "video count": "how many objects are there at the {moment}",
}
FORM_NAMES = tuple(FORMS)
_FORM = {name: index for index, name in enumerate(FORM_NAMES)}
KINDS = (
    *("color", "shape", "exist", "count", "position", "compare", "read", "ground", "sign", "background"),
    *("pair", "video"),
)
KIND_OF_FORM = tuple("position" if "or" in name.split() else name.split()[0] for name in FORM_NAMES)

# How many questions of each kind are drawn for a scene, where it has them.
USUAL = {
    "color": 2,
    "shape": 2,
    "exist": 2,
    "count": 2,
    "position": 2,
    "compare": 1,
    "read": 2,
    "ground": 1,
    "sign": 1,
    "background": 1,
}
_STREAM = 3  # of the dice
_PLACES = {"color": 0, "shape": 0, "exist": 0, "count": 1}  # of kinds in a conversation; all others come later
_LEAST_OFFSET = 12  # pixels, between two things of which one is left of or above the other, and to the middle
_LEAST_RATIO = 160  # percent, between the radii of two things of which one is larger, however slender its shape
_CELL_MARGIN = 5  # pixels, from an object's centre to the border of its cell


@dataclass(frozen=True)
class Question:
    """A question in plain English, its answer, one to three words, and its kind (one of KINDS)."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Questions:
    """Q questions about each of B scenes, or of B pairs of scenes, as indices; int64 tensors.

    Attributes:
        form: (B, Q), index into FORM_NAMES, -1 where there is no question.
        gaps: (B, Q, 4), what fills the gaps: colour and shape of the first thing and of the second. A background
            stands in the first, an event or a moment in the third.
        answer: (B, Q, 3), token ids, 0 beyond the last.
    """

    form: Tensor
    gaps: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.form)

    def token_ids(self) -> Tensor:
        """int64 (B, Q, L): the words of every question, 0 beyond the last."""
        forms, tables = _compiled(self.form.device)
        words = forms[self.form.clamp(min=0)]  # (B, Q, L), -1 - gap where a gap is
        for gap, (column, table) in enumerate(tables):
            filled = table[self.gaps[..., column].clamp(min=0) % len(table)]
            words = torch.where(words == -1 - gap, filled[..., None], words)
        return torch.where(self.form[..., None] >= 0, words, 0)

    def rows(self) -> list[list[Question]]:
        """The questions in words, scene by scene."""
        answers = [[" ".join(VOCABULARY[i] for i in one if i) for one in row] for row in self.answer.tolist()]
        texts = [[" ".join(VOCABULARY[i] for i in one if i) for one in row] for row in self.token_ids().tolist()]
        return [
            [
                Question(text.replace(" a orange", " an orange") + "?", answer, KIND_OF_FORM[form])
                for form, text, answer in zip(forms, texts_of, answers_of, strict=True)
                if form >= 0
            ]
            for forms, texts_of, answers_of in zip(self.form.tolist(), texts, answers, strict=True)
        ]


def word_ids(words: Sequence[str], device: torch.device) -> Tensor:
    """int64 (words,): their token ids."""
    return torch.tensor([TOKEN_ID[word] for word in words], device=device)


@functools.cache
def _compiled(device: torch.device) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Forms as (forms, L) token ids, -1 - gap for a gap; of each gap the column of `gaps` and the words it takes."""
    gaps = {"color": 0, "shape": 1, "color2": 2, "shape2": 3, "plural": 1, "background": 0, "event": 2, "moment": 2}
    names = list(gaps)
    rows = [
        [-1 - names.index(word[1:-1]) if word.startswith("{") else TOKEN_ID[word] for word in form.split()]
        for form in FORMS.values()
    ]
    longest = max(map(len, rows))
    forms = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return forms, [(column, word_ids(_TABLES[name.rstrip("2")], device)) for name, column in gaps.items()]


class _Asker:
    """What can be asked about B scenes without ambiguity; every method draws n questions of its kind for each."""

    def __init__(self, layout: Layout, novel: bool):
        self.layout, self.novel = layout, novel
        self.device = layout.seeds.device
        self.dice = Dice(layout.seeds, _STREAM)
        there = layout.there
        colors = (layout.color[..., None] == torch.arange(len(COLOR_NAMES), device=self.device)).long()  # (B, O, 8)
        shapes = (layout.shape[..., None] == torch.arange(len(SHAPES), device=self.device)).long()  # (B, O, 7)
        self.of_color, self.of_shape, self.number = colors.sum(1), shapes.sum(1), there.sum(1)
        self.of_pair = torch.einsum("boc,bos->bcs", colors, shapes)  # (B, 8, 7)
        self.subject = there & (withheld_pair(layout.color, layout.shape) == novel)
        alone = self.of_pair.flatten(1).gather(1, (layout.color * len(SHAPES) + layout.shape).clamp(min=0)) == 1
        self.unique = there & alone

    def _words(self, words: Sequence[str]) -> Tensor:
        return word_ids(words, self.device)

    def _asked(
        self,
        form: str | Tensor,
        valid: Tensor,
        answer: Tensor,
        first: Tensor | None = None,
        second: Tensor | None = None,
    ) -> Questions:
        """Questions where valid; `first` and `second` are the objects (B, n) that fill the gaps."""
        index = torch.full_like(valid, _FORM[form], dtype=torch.int64) if isinstance(form, str) else form
        gaps = torch.zeros(*valid.shape, 4, dtype=torch.int64, device=self.device)
        for at, thing in ((0, first), (2, second)):
            if thing is not None:
                gaps[..., at] = self.layout.color.gather(1, thing)
                gaps[..., at + 1] = self.layout.shape.gather(1, thing)
        return padded(torch.where(valid, index, -1), gaps, answer)

    def _second(self, first: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
        """Another unique object for each of `first` (B, n), out of those that fit (B, n, O)."""
        other = torch.arange(self.unique.shape[1], device=self.device) != first[..., None]
        second, found = self.dice.choose(self.unique[:, None] & other & fits)
        return second.squeeze(-1), found.squeeze(-1)

    def _in_any_order(self, first: Tensor, second: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange half of the pairs: which thing was drawn first would tell a little about the answer."""
        swap = where & self.dice.chance(50, where.shape[1])
        return torch.where(swap, second, first), torch.where(swap, first, second)

    def color(self, n: int) -> Questions:
        alone = self.of_shape.gather(1, self.layout.shape.clamp(min=0)) == 1
        thing, found = self.dice.choose(self.subject & alone, n)
        return self._asked("color", found, self._words(COLOR_NAMES)[self.layout.color.gather(1, thing)], thing)

    def shape(self, n: int) -> Questions:
        alone = self.of_color.gather(1, self.layout.color.clamp(min=0)) == 1
        thing, found = self.dice.choose(self.subject & alone, n)
        return self._asked("shape", found, self._words(SHAPES)[self.layout.shape.gather(1, thing)], thing)

    def exist(self, n: int) -> Questions:
        pairs = torch.arange(self.of_pair[0].numel(), device=self.device)
        withheld = withheld_pair(pairs // len(SHAPES), pairs % len(SHAPES))
        present = self.of_pair.flatten(1) > 0
        absent = ~present & (withheld == self.novel)
        # Mostly both attributes are in the picture, only not on one object: the answer needs binding.
        both = absent & ((self.of_color > 0)[:, :, None] & (self.of_shape > 0)[:, None]).flatten(1)
        near = both.any(1) & self.dice.chance(75)
        yes, found = self.dice.choose(present & (withheld if self.novel else True), n)
        no, missing = self.dice.choose(torch.where(near[:, None], both, absent), n)
        truth = self.dice.chance(50, n)
        pair = torch.where(truth, yes, no)
        answer = self._words(("no", "yes"))[truth.long()]
        gaps = torch.stack([pair // len(SHAPES), pair % len(SHAPES), pair, pair], -1)
        # Where one of them is missing neither is asked, or the answers would lose their balance.
        form = torch.where(found & missing, _FORM["exist"], -1)
        return padded(form, gaps, answer)

    def count(self, n: int) -> Questions:
        layout = self.layout
        which, found = self.dice.choose(torch.ones(len(layout), 3, dtype=torch.bool, device=self.device), n)
        of_color = self.of_color.gather(1, layout.planted_color[:, None])
        of_shape = self.of_shape.gather(1, layout.planted_shape[:, None])
        number = torch.cat([self.number[:, None], of_color, of_shape], 1).gather(1, which)
        form = torch.tensor([_FORM["count"], _FORM["count color"], _FORM["count shape"]], device=self.device)[which]
        planted = torch.stack([layout.planted_color, layout.planted_shape] * 2, -1)[:, None].expand(-1, n, -1)
        found &= number < DIGITS  # an answer is one word
        return padded(torch.where(found, form, -1), planted, self._words(GLYPHS)[number])

    def position(self, n: int) -> Questions:
        layout, dice = self.layout, self.dice
        first, found = dice.choose(self.unique & self.subject, n)
        sideways = dice.chance(50, n)
        place = torch.where(sideways[..., None], layout.x[:, None], layout.y[:, None])  # (B, n, O)
        mine = place.gather(2, first[..., None])
        second, related = self._second(first, (mine - place).abs() >= _LEAST_OFFSET)
        half = dice.chance(35, n) | ~related
        middle = 2 * mine.squeeze(-1) - (SIDE - 1)
        valid = found & torch.where(half, middle.abs() >= 2 * _LEAST_OFFSET, related)
        first, second = self._in_any_order(first, second, ~half)
        ahead = (place.gather(2, first[..., None]) < place.gather(2, second[..., None])).squeeze(-1)
        ahead = torch.where(half, middle < 0, ahead)
        names = ("left or right", "above or below", "left or right half", "top or bottom half")
        form = torch.tensor([_FORM[name] for name in names], device=self.device)
        words = torch.stack([self._words((name.split()[0], name.split()[2])) for name in names])
        which = 2 * half.long() + (~sideways).long()
        return self._asked(form[which], valid, words[which, (~ahead).long()], first, second)

    def compare(self, n: int) -> Questions:
        first, found = self.dice.choose(self.unique & self.subject, n)
        radius = self.layout.radius[:, None]
        mine = radius.expand(-1, n, -1).gather(2, first[..., None])
        ratio = torch.maximum(mine, radius) * 100 >= _LEAST_RATIO * torch.minimum(mine, radius)
        second, differs = self._second(first, ratio)
        first, second = self._in_any_order(first, second, differs)
        smaller = self.layout.radius.gather(1, first) < self.layout.radius.gather(1, second)
        words = self._words(("larger", "smaller"))
        return self._asked("compare", found & differs, words[smaller.long()], first, second)

    def read(self, n: int) -> Questions:
        layout = self.layout
        subject = layout.novel if self.novel else layout.there
        thing, found = self.dice.choose(self.unique & subject & (layout.glyph >= 0), n)
        glyph = layout.glyph.gather(1, thing)
        which = 2 * (layout.side.gather(1, thing) == ON).long() + (glyph >= DIGITS).long()
        form = _FORM["read digit next to"] + which
        return self._asked(form, found, self._words(GLYPHS)[glyph], thing)

    def ground(self, n: int) -> Questions:
        layout = self.layout
        border = torch.tensor([SIDE // 3, 2 * SIDE // 3], device=self.device)
        away = [((place[..., None] - border).abs() >= _CELL_MARGIN).all(-1) for place in (layout.x, layout.y)]
        thing, found = self.dice.choose(self.unique & self.subject & away[0] & away[1], n)
        cell = cell_of(layout.x, layout.y).gather(1, thing)
        rows, columns = self._words(("top", "middle", "bottom")), self._words(("left", "center", "right"))
        return self._asked("ground", found, torch.stack([rows[cell // 3], columns[cell % 3]], -1), thing)

    def sign(self, n: int) -> Questions:
        shown = (self.layout.sign >= 0) & (not self.novel)
        answer = self._words(GLYPHS)[self.layout.sign.clamp(min=0)]
        return self._asked("sign", shown[:, :1].expand(-1, n), answer[:, None].expand(-1, n, -1))

    def background(self, n: int) -> Questions:
        answer = self._words(BACKGROUNDS)[self.layout.background]
        asked = torch.full((len(self.layout), n), not self.novel, device=self.device)
        return self._asked("background", asked, answer[:, None].expand(-1, n))


def padded(form: Tensor, gaps: Tensor, answer: Tensor) -> Questions:
    """Questions whose answers (B, Q) or (B, Q, words) are padded to SIGN words."""
    answer = answer[..., None] if answer.ndim == 2 else answer
    answer = torch.nn.functional.pad(answer, (0, SIGN - answer.shape[-1]))
    return Questions(form, gaps, torch.where(form[..., None] >= 0, answer, 0))


def joined(parts: Sequence[Questions]) -> Questions:
    """All questions of the parts, without those worded like an earlier one about the same scene."""
    form, gaps, answer = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("form", "gaps", "answer"))
    words = Questions(form, gaps, answer).token_ids()
    alike = (words[:, :, None] == words[:, None]).all(-1)
    repeated = alike.tril(-1).any(-1)
    return Questions(torch.where(repeated, -1, form), gaps, torch.where(repeated[..., None], 0, answer))


def ask(layout: Layout, wanted: Mapping[str, int] = USUAL, novel: bool = False) -> Questions:
    """Draw questions about scenes, always the same ones for a seed.

    Args:
        layout: what B scenes show.
        wanted: how many questions of each kind; a scene that has fewer gets fewer.
        novel: ask only about what training never shows.

    Returns:
        Q questions about each scene, in the order of `wanted`, where Q is the sum of `wanted`.
    """
    asker = _Asker(layout, novel)
    makers: dict[str, Callable[[int], Questions]] = {kind: getattr(asker, kind) for kind in wanted}
    return joined([makers[kind](number) for kind, number in wanted.items()])


def converse(questions: Questions, seeds: Tensor, turns: int, percent: int = 100) -> tuple[Questions, Tensor]:
    """Group the questions about each scene into conversations, in which no question gives another's answer away.

    A question names things by what an earlier one may have asked, so a conversation has one question at most about
    colour, shape or existence, its first, and those about numbers come next.

    Args:
        questions: Q questions about each of B scenes.
        seeds: int64 (B,), what the order is drawn from.
        turns: how many questions a conversation has at most.
        percent: share of the scenes where this is done; elsewhere every question is a conversation of its own.

    Returns:
        The questions that are left, in random order but for that, and int64 (B, Q): the conversation of each.
    """
    dice = Dice(seeds, _STREAM + 2)
    together = dice.chance(percent)[:, None]
    form = questions.form
    order = dice.words(form.shape[1]).argsort(dim=1)
    rank = (form >= 0).gather(1, order).long().cumsum(1) - 1
    talk = torch.where(together, rank.clamp(min=0) // turns, rank)
    kind = torch.tensor([_PLACES.get(kind, len(_PLACES)) for kind in KIND_OF_FORM], device=form.device)
    place = kind[form.gather(1, order).clamp(min=0)]
    sort = (talk * (len(_PLACES) + 1) + place).argsort(dim=1, stable=True)
    order, talk, place = (value.gather(1, sort) for value in (order, talk, place))
    form, gaps, answer = (
        value.gather(1, order[..., None].expand(-1, -1, value.shape[-1]))
        for value in (form[..., None], questions.gaps, questions.answer)
    )
    form = form.squeeze(-1)
    first = (place == 0) & (form >= 0)
    again = first & (first[:, None] & (talk[:, None] == talk[..., None])).tril(-1).any(-1)
    form = torch.where(again & together, -1, form)
    return Questions(form, gaps, torch.where(form[..., None] >= 0, answer, 0)), talk


def ask_pairs(layout: Layout, count: int = 6) -> Questions:
    """Draw questions about pairs of scenes, "first" or "second", the two at random.

    Args:
        layout: 2 B scenes; numbers 2 i and 2 i + 1 are a pair.
        count: questions about each pair, at least three: one about the number of objects and one about the
            backgrounds, where those differ, and the rest about what only one of the pictures shows.

    Returns:
        `count` questions about each of the B pairs.
    """
    asker = _Asker(layout, novel=False)
    dice = Dice(layout.seeds[::2], _STREAM + 1)
    words, pairs = asker._words(("first", "second")), len(layout) // 2
    present = (asker.of_pair.flatten(1) > 0).view(pairs, 2, -1)
    side = dice.below(2, count - 2)  # (B, n)
    here = present.gather(1, side[..., None].expand(-1, -1, present.shape[-1]))
    other = present.gather(1, 1 - side[..., None].expand(-1, -1, present.shape[-1]))
    pair, found = (drawn.squeeze(-1) for drawn in dice.choose(here & ~other))
    gaps = torch.stack([pair // len(SHAPES), pair % len(SHAPES), pair, pair], -1)
    which_has = padded(torch.where(found, _FORM["pair has"], -1), gaps, words[side])
    number, backdrop = asker.number.view(pairs, 2), layout.background.view(pairs, 2)
    more = torch.where(number[:, :1] != number[:, 1:], _FORM["pair more"], -1)
    which_more = padded(more, gaps[:, :1], words[number.argmax(1, keepdim=True)])
    side = dice.below(2, 1)
    form = torch.where(backdrop[:, :1] != backdrop[:, 1:], _FORM["pair background"], -1)
    which_background = padded(form, backdrop.gather(1, side)[..., None].expand(-1, -1, 4), words[side])
    return joined([which_has, which_more, which_background])


def ask_as(split: str, layout: Layout) -> Questions:
    """Draw the questions that a split is measured with.

    Args:
        split: "heldout", "validation" and "turns" ask about ordinary scenes, "composition" about combinations that
            training never shows, "detail" for the smallest glyphs, "pairs" about two pictures.
        layout: scenes of the split.

    Returns:
        Questions about each scene, or each pair of "pairs".
    """
    if split == "pairs":
        return ask_pairs(layout)
    if split == "detail":
        return ask(layout, {"read": 3, "sign": 1})
    return ask(layout, novel=split == "composition")
