"""What other programs ask for, in plain data: which recipe, and a conversation with pictures in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import PIL.Image

from visiontok.errors import ConfigError, ImageError
from visiontok.images import load_image
from visiontok.named import Prompt, named_recipe
from visiontok.recipe import Recipe
from visiontok.recipes import find as find_method

from .items import Image
from .runner import FULL

KEYS = ("method", "keep", "options", "seed", "recipe")


def asked_recipe(given: Mapping[str, Any], *, files: bool) -> Recipe | None:
    """The recipe that is asked for; None for the stock model.

    Args:
        given: "method", the name of one or ``full``, with "keep", "options" (a mapping) and "seed"; or "recipe", what
            :meth:`visiontok.Recipe.to_dict` returns. Mappings may be given as their JSON. Never the path of a recipe:
            what runs is to be seen by whoever compares answers or keeps them in a cache.
        files: whether options may name files and other models, which are then read; not for a stranger to say.

    Raises:
        ConfigError: for anything else; names the key, its value and the remedy.
    """
    for key in given:
        if key not in KEYS:
            raise ConfigError(f"{key}={given[key]!r}: there is no such key; use {', '.join(KEYS)}")
    if "recipe" in given:
        if len(given) > 1:
            raise ConfigError(
                f"recipe: says everything; leave {', '.join(key for key in given if key != 'recipe')} out"
            )
        data = _mapping("recipe", given["recipe"])
        if not files:
            _refuse_files_in(data)
        return Recipe.from_dict(data)
    if "method" not in given:
        raise ConfigError(f"method: is missing; name a method, or {FULL!r} for the stock model")
    method, keep, seed = given["method"], given.get("keep"), given.get("seed", 0)
    options = _mapping("options", given.get("options", {}))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed={seed!r}: give a whole number")
    if method == FULL:
        for name in ("keep", "options", "seed"):
            if name in given:
                raise ConfigError(f"{name}={given[name]!r}: the stock model has none; leave it out, or name a method")
        return None
    find_method(method)  # a name, never a file
    if not files:
        _refuse_files(method, options)
    return named_recipe(method, keep, {name: _text(value) for name, value in options.items()}, seed)


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}={value!r}: is no JSON ({error}); give the {key} itself, not a path") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r}: give a mapping, as JSON")
    return value


def _text(value: Any) -> str:
    """An option as a command line has it."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _refuse_files_in(recipe: Mapping[str, Any]) -> None:
    if "calibration" in recipe:
        raise ConfigError("recipe: is a calibration; give the recipe that it recommends")
    for stage in recipe["stages"] if isinstance(recipe.get("stages"), list) else ():
        if isinstance(stage, Mapping) and "method" in stage and isinstance(options := stage.get("options"), Mapping):
            _refuse_files(stage["method"], options)


def _refuse_files(method: str, options: Mapping[str, Any]) -> None:
    """Options that are any text name files or models, which the methods load."""
    hints = get_type_hints(find_method(method))
    for name, value in options.items():
        hint = hints.get(name)
        if isinstance(value, str) and str in (hint, *get_args(hint)):
            raise ConfigError(
                f"{name}={value!r}: {method} would load this; such options are given where the program is started"
            )


@dataclass(frozen=True)
class Given:
    """A picture that came with a question.

    The pixels are those of :class:`~visiontok.eval.items.Stored`.

    Attributes:
        name: for messages.
        source: an image file's bytes or path, or an open image.
    """

    name: str
    source: bytes | str | Path | PIL.Image.Image = field(compare=False, repr=False)

    def open(self) -> PIL.Image.Image:
        try:
            return load_image(self.source, as_stored=True)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error}") from error


Turn = tuple[str, Sequence[str | Image]]
"""Who speaks ("system", "user" or "assistant"), and texts and pictures in their order."""


def conversation(turns: Sequence[Turn]) -> tuple[tuple[Image, ...], Prompt]:
    """Pictures and prompt, as an :class:`~visiontok.eval.items.Item` has them.

    A single question behind its pictures is a question like those of tasks; anything else stays a conversation.
    """
    images = tuple(part for _, parts in turns for part in parts if not isinstance(part, str))
    if len(turns) == 1 and turns[0][0] == "user":
        parts = turns[0][1]
        if parts and isinstance(parts[-1], str) and len(images) == len(parts) - 1:
            return images, parts[-1]
    return images, [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
            ],
        }
        for role, parts in turns
    ]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before whichever of ``stops`` comes first."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
