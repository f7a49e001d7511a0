"""Questions about the scenes that the embedded models know: drawn, not loaded, and the same everywhere."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL.Image

from visiontok.errors import ConfigError

from .items import Item

if TYPE_CHECKING:
    from visiontok.demo.scenes import Layout

SPLITS = ("heldout", "validation", "composition", "detail", "pairs")
_AT_ONCE = 16  # scenes that are drawn at a time, an even number


@dataclass(frozen=True)
class Scene:
    """A picture that is drawn when it is opened.

    Attributes:
        split: of the embedded models' scenes.
        number: in the split.
    """

    split: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number}"

    def open(self) -> PIL.Image.Image:
        """The picture, 144 x 144."""
        return _drawn(self.split, self.number // _AT_ONCE)[self.number % _AT_ONCE].copy()


@dataclass(frozen=True)
class Scenes:
    """The first scenes of a split of `visiontok.demo`, with all the questions that it is measured with there.

    Only first questions: "turns", conversations, is no split here.

    Attributes:
        split: one of SPLITS; "pairs" shows two pictures.
        number: how many scenes.
    """

    split: str
    number: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"scenes.split={self.split!r}: must be one of {', '.join(SPLITS)}")
        if type(self.number) is not int or self.number < 2 or self.number % 2:
            raise ConfigError(f"scenes.number={self.number!r}: must be an even number from 2")

    def items(self, template: str, limit: int | None) -> tuple[Item, ...]:
        """All questions, or the first, scene by scene."""
        from visiontok.demo.questions import ask_as

        per_prompt = 2 if self.split == "pairs" else 1
        items: list[Item] = []
        for start in range(0, self.number, _AT_ONCE):
            asked = ask_as(self.split, _layout(self.split, start, min(start + _AT_ONCE, self.number)))
            for prompt, (row, forms) in enumerate(zip(asked.rows(), asked.form.tolist(), strict=True)):
                first = start + prompt * per_prompt
                images = tuple(Scene(self.split, first + place) for place in range(per_prompt))
                places = [place for place, form in enumerate(forms) if form >= 0]
                cluster = f"{self.split}-{first // per_prompt}"
                items += [
                    Item(
                        id=f"{cluster}-{place}",
                        images=images,
                        prompt=template.replace("{question}", question.text),
                        target={"answers": [question.answer]},
                        cluster=cluster,
                        groups={"category": question.kind},
                    )
                    for place, question in zip(places, row, strict=True)
                ]
            if limit is not None and len(items) >= limit:
                break
        return tuple(items[:limit])


def _layout(split: str, start: int, end: int) -> Layout:
    from visiontok.demo.scenes import NORMAL, STYLES, lay_out, seeds

    return lay_out(seeds(split, range(start, end)), STYLES.get(split, NORMAL))


@functools.lru_cache(maxsize=8)
def _drawn(split: str, chunk: int) -> list[PIL.Image.Image]:
    from visiontok.demo.raster import paint

    pixels = paint(_layout(split, chunk * _AT_ONCE, (chunk + 1) * _AT_ONCE)).pixels
    return [PIL.Image.fromarray(picture) for picture in pixels.numpy()]
