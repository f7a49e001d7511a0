"""What is asked while it is timed: batches of pictures and questions of given sizes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from visiontok.adapters.base import find as find_adapter

from visiontok.errors import ConfigError
from visiontok.images import load_image
from visiontok.named import Loaded

if TYPE_CHECKING:
    from torch import Tensor

    from ..runner import Asked

SMALLEST = 0.5
"""Size of the last request of a batch, picture and text, as a share of the first's; those between lie evenly."""
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes:
        batch: requests in it.
        side: pixels of the longer side of the first request's picture; None leaves pictures as they are.
        text: text tokens of the first request's prompt, template included; None leaves questions as they are.
    """

    batch: int
    side: int | None
    text: int | None

    def __str__(self) -> str:
        parts = [f"batch {self.batch}"]
        parts += [] if self.side is None else [f"{self.side} pixels"]
        parts += [] if self.text is None else [f"{self.text} text tokens"]
        return ", ".join(parts)


def pictures(image: str | None, number: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Pictures with questions: scenes of the embedded models, or one file as often as needed."""
    if image is not None:
        return [(load_image(image), QUESTION)] * number
    from visiontok.demo import scene

    drawn = [scene(seed + place) for place in range(number)]
    return [(picture, questions[0].text) for picture, questions in drawn]


def requests(loaded: Loaded, point: Point, given: Sequence[tuple[Image.Image, str]]) -> list[Asked]:
    """A batch; with more than one request it is ragged, so that rows are padded on the left.

    Raises:
        ConfigError: if a prompt of so few tokens cannot be had.
    """
    asked: list[Asked] = []
    for row, (picture, question) in enumerate(given[: point.batch]):
        share = 1 - (1 - SMALLEST) * row / max(point.batch - 1, 1)
        side = (point.side or max(picture.size)) * share
        if side != max(picture.size):
            scale = side / max(picture.size)
            width, height = (max(1, round(length * scale)) for length in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        text = question if point.text is None else worded(loaded, picture, question, round(point.text * share))
        asked.append(([picture], text))
    return asked


def worded(loaded: Loaded, picture: Image.Image, question: str, tokens: int) -> str:
    """The question's words as often as the prompt has at most ``tokens`` text tokens.

    Raises:
        ConfigError: if that is not even one word.
    """
    words = question.split()
    tokenize = loaded.processor.tokenizer

    def first(number: int) -> str:
        return " ".join(itertools.islice(itertools.cycle(words), number))

    def length(number: int) -> int:
        return len(tokenize(first(number)).input_ids)

    around = text_tokens(loaded, loaded.inputs(([picture], first(1))))[0] - length(1)
    number = bisect.bisect_right(range(tokens + 1), tokens, key=lambda n: around + length(n) if n else 0) - 1
    if number < 1:
        raise ConfigError(f"--text {tokens}: this model's prompt has {around + length(1)} tokens around one word alone")
    return first(number)


def visual(loaded: Loaded, inputs: Any) -> Tensor:
    """(B, N) bool: placeholders of visual tokens."""
    ids, found = inputs["input_ids"], None
    for token in find_adapter(loaded.base).placeholders().values():
        here = ids == token
        found = here if found is None else found | here
    if found is None:
        raise ConfigError(f"--model {loaded.name}: its prompts hold no visual tokens that could be counted")
    return found


def text_tokens(loaded: Loaded, inputs: Any) -> list[int]:
    """Text tokens of each row."""
    found: list[int] = (inputs["attention_mask"].bool() & ~visual(loaded, inputs)).sum(1).tolist()
    return found
