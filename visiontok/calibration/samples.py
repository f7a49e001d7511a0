"""What a calibration is measured on: pictures and questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from ..errors import ConfigError
from ..images import load_image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUESTION = "Describe the image."


@dataclass(frozen=True)
class Sample:
    """A picture, RGB, and what is asked about it."""

    picture: Image
    question: str


def read(source: str, number: int) -> list[Sample]:
    """The first ``number`` samples of a folder or a JSON Lines file.

    Args:
        source: a folder of pictures, each with its question in a .txt of the same name (without one: "Describe the
            image."), or a file with one ``{"image": path, "question": text}`` in a line, paths as seen from the file.
        number: how many; fewer if there are no more.

    Raises:
        ConfigError: if there are none, or a line is something else.
        ImageError: if a picture cannot be read.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES)[:number]
        pairs = [(file, _question(file.with_suffix(".txt"))) for file in files]
    elif place.is_file():
        lines = [line for line in place.read_text().splitlines() if line.strip()][:number]
        pairs = [_pair(source, place.parent, count, line) for count, line in enumerate(lines, 1)]
    else:
        raise ConfigError(f"data={source!r}: there is no such folder or file; give pictures or a .jsonl of them")
    if not pairs:
        raise ConfigError(f"data={source!r}: holds no picture; put some in ({', '.join(_SUFFIXES)}), or list them")
    return [Sample(load_image(file), question) for file, question in pairs]


def _question(file: Path) -> str:
    return (file.read_text().strip() if file.is_file() else "") or QUESTION


def _pair(source: str, folder: Path, number: int, line: str) -> tuple[Path, str]:
    try:
        entry = json.loads(line)
        image, question = entry["image"], entry["question"]
        if not isinstance(image, str) or not isinstance(question, str):
            raise TypeError("both are text")
        return folder / image, question
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'data={source!r}: line {number} is not {{"image": path, "question": text}} ({error}); correct it'
        ) from error


def digest(samples: Sequence[Sample]) -> str:
    """16 hex digits of all pixels and questions."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(repr((sample.picture.size, sample.question)).encode())
        found.update(sample.picture.tobytes())
    return found.hexdigest()[:16]
