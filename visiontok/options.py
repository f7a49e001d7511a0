"""Options of methods as text, on a command line: read in the types of the method's fields."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .method import Method

_WORDS: dict[Any, dict[str, Any]] = {
    bool: {"true": True, "false": False},
    types.NoneType: {"none": None},
}


def typed_options(method: type[Method], options: Mapping[str, str]) -> dict[str, Any]:
    """The options, which come as text, in the types of the method's fields."""
    hints = get_type_hints(method)
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in method.__dataclass_fields__:
            method.build({name: text})  # raises and lists the options there are
        values[name] = read_value(f"{method.card.name}: --option {name}={text}", text, hints[name])
    return values


def read_value(what: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``: a plain type, a Literal, None, a tuple with commas, or a union."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices: dict[str, Any] = {}
    for member in members:
        choices |= {str(choice): choice for choice in get_args(member)} if get_origin(member) is Literal else {}
        choices |= _WORDS.get(member, {})
    if text in choices:
        return choices[text]
    for member in members:
        if get_origin(member) is tuple and (text.strip() or None):
            return tuple(read_value(what, part, get_args(member)[0]) for part in text.split(","))
    readers = [reader for reader in (int, float, str) if reader in members]  # the narrowest first
    for reader in readers:
        try:
            return reader(text)
        except ValueError:
            continue
    allowed = ", ".join([*choices, *(reader.__name__ for reader in readers)])
    raise ConfigError(f"{what}: this option takes {allowed}")
