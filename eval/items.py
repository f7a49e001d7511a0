"""Questions, and their pictures, which are read when they are opened."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from visiontok.errors import ImageError
from visiontok.images import load_image
from visiontok.named import Prompt

SHORTEST_BASE64 = 65  # characters; VLMEvalKit takes anything shorter for the index of the row that has the picture
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


class Image(Protocol):
    """A picture that is not opened yet; equal names in one task are equal pictures."""

    @property
    def name(self) -> str: ...

    def open(self) -> PIL.Image.Image:
        """The picture in mode "RGB".

        Raises:
            ImageError: it cannot be read; names the file.
        """


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in the task.
        images: pictures in the order in which the model sees them; empty for none.
        prompt: what the model is asked, without image placeholders or chat template; or a conversation.
        target: what the metric compares with, ready for JSON: "answers", a list, and where there are any "choices"
            (texts of the options, of A first; the answer is a letter then), "box" (x1, y1, x2, y2 in pixels of the
            picture) and "size" (its width and height).
        cluster: what questions share, so that their results are not independent: a picture, a pair, a rotation group.
        groups: what results are broken down by, and metrics put questions together by.
    """

    id: str
    images: tuple[Image, ...]
    prompt: Prompt
    target: Mapping[str, Any]
    cluster: str
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Stored:
    """A picture as a data set holds it.

    The pixels are what LLaVA's scripts and VLMEvalKit show to a model: the EXIF orientation is not applied, and other
    modes are converted to RGB by Pillow alone.

    Attributes:
        name: the path of the file, or the row and the column.
        read: gets what the data set holds: a path, bytes, base64 text, a data URL or {"bytes", "path"}.
        folder: what paths are relative to.
    """

    name: str
    read: Callable[[], Any] = field(compare=False, repr=False)
    folder: Path = Path()

    def data(self) -> bytes | Path:
        """The file's bytes or path.

        Raises:
            ImageError: there is no picture, or its encoding is broken.
        """
        value = self.read()
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            kind = (
                "nothing" if value is None or value == "" else f"{len(value)} pictures" if _many(value) else repr(value)
            )
            raise ImageError(f"{self.name}: holds {kind[:80]} instead of one picture; give a path, bytes or base64")
        if value.startswith("data:"):
            value = value.partition(",")[2]
        elif not is_base64(value):
            return find(self.folder, value)
        try:
            return base64.b64decode(value, validate=False)
        except binascii.Error as error:
            raise ImageError(f"{self.name}: its base64 is broken ({error}); export the file again") from error

    def open(self) -> PIL.Image.Image:
        data = self.data()
        try:
            return load_image(data, as_stored=True)
        except ImageError as error:
            if isinstance(data, Path):  # which the message names
                raise
            raise ImageError(f"{self.name}: {error}") from error


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def is_base64(text: str) -> bool:
    """Whether a cell holds a picture rather than its path; paths of that length have an extension."""
    return len(text) >= SHORTEST_BASE64 and _BASE64.fullmatch(text) is not None


def find(folder: Path, path: str) -> Path:
    """Where a picture lies: beside the questions, or in their folder `images`."""
    beside = folder / Path(path).expanduser()
    inside = folder / "images" / path
    return inside if inside.exists() and not beside.exists() else beside
