"""Tasks: which questions a benchmark asks, in which words, and what their answers are compared with.

A task is a YAML file; those in `eval/tasks` are built in. Its keys are the fields of `Task`, and `base`, the name of a
task whose keys it takes over where it has none of its own. See `Task` for what they mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import yaml

from visiontok.errors import ConfigError, ImageError

from . import tables
from .items import Item, Stored
from .scenes import Scenes
from .tables import Hub, Row

FOLDER = Path(__file__).parent / "tasks"
KINDS = ("ocr", "perception", "reasoning", "other")
"""What a benchmark mostly asks for; comparisons over several tasks can be made within each."""
TARGETS = ("text", "texts", "choice", "box")
_FIELDS = ("id", "cluster", "image", "question", "hint", "ocr", "options", "option_columns", "answer", "size")
_GAPS = ("question", "hint", "ocr", "options")  # of a prompt
_GAP = re.compile(r"\{(\w+)\}")
_COLUMN = re.compile(r"\{([^{}%]+)(?:%(\d+))?\}")
_MISSING = (None, "", "nan")

Entry = str | tuple[str, ...]


@dataclass(frozen=True)
class Clean:
    """What is done to a question before it enters the prompt, in this order.

    Attributes:
        strip: remove space around it.
        remove: a text to leave out.
        capitalize: first letter large, all others small.
    """

    strip: bool = False
    remove: str = ""
    capitalize: bool = False

    def __call__(self, text: str) -> str:
        text = text.strip() if self.strip else text
        text = text.replace(self.remove, "") if self.remove else text
        return text.capitalize() if self.capitalize else text


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    An entry of `fields` and `groups` says where a value comes from: the name of a column, or a template with columns in
    braces ("{set_id}-{figure_id}", "{index%1000000}" for the remainder, "{row}" for the row's number from 0, "{image}"
    for the name of the picture, "{nth}" to count the rows that are else alike), or a list of these, of which the first
    counts whose columns the row has.

    Attributes:
        name: of the file.
        title: for tables.
        version: raised whenever results change.
        metric: a name of visiontok.eval.scoring.
        dialect: whose reading of the answers, a name of visiontok.eval.scoring.
        max_new_tokens: longest answer.
        prompts: family (`model_type` of the model's configuration) or "default" → template with {question}, {hint},
            {ocr} and {options}. Where questions with options and without are mixed, a mapping of "choice" and "open".
        target: what `answer` is: "text"; "texts", several accepted ones; "choice", the letter or the index of one of
            the options; "box", x, y, width and height in pixels.
        hub: the data set.
        scenes: questions about scenes of the embedded models, drawn instead of loaded.
        fields: what a question is made of: "id", "cluster", "image" (a list of columns for several, of which those are
            shown that the question names as <image 1>, …), "question", "hint", "ocr", "options" (a column with a list)
            or "option_columns" (one for each), "answer" and "size" (a template "{width}x{height}"; without it boxes
            take the picture's).
        groups: what results are broken down by.
        clean: what is done to questions.
        wrap: how "hint" and "ocr" enter a prompt where a question has them, with {} for the text.
        where: column → value; other rows are no questions of the task. Rows without the column are.
        each: a column with a list; its row is a question for each entry, with "-0", "-1", … behind its id.
        translate: answer in the data → answer to compare with.
        kind: one of KINDS: "ocr", text in the picture; "perception", what is where; "reasoning", what follows from it.
        url: where the benchmark is described.
        licence: of the data.
        note: what a reader of results must know.
    """

    name: str
    title: str
    version: int
    metric: str
    dialect: str
    max_new_tokens: int
    prompts: Mapping[str, str | Mapping[str, str]]
    target: str = "text"
    hub: Hub | None = None
    scenes: Scenes | None = None
    fields: Mapping[str, Entry] = field(default_factory=dict)
    groups: Mapping[str, Entry] = field(default_factory=dict)
    clean: Clean = Clean()
    wrap: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    each: str | None = None
    translate: Mapping[str, str] = field(default_factory=dict)
    kind: str = "other"
    url: str = ""
    licence: str = ""
    note: str = ""

    @property
    def digest(self) -> str:
        """Hash of all that changes a result."""
        content = dataclasses.asdict(self)
        for name in ("title", "kind", "url", "licence", "note"):
            del content[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def items(self, source: str | None = None, family: str = "default", limit: int | None = None) -> Sequence[Item]:
        """The questions, in the order of the data set.

        Args:
            source: a file or folder as `visiontok.eval.tables.read` takes them; None loads the data set from the hub,
                or draws it.
            family: `model_type` of the model, for which a task may have a prompt of its own.
            limit: only the first so many.

        Raises:
            ConfigError: the data are missing or not what the task expects; names the file, the line and the remedy. A
                picture that cannot be read raises when it is opened, not here.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"limit={limit}: give at least 1")
        template = self.prompts.get(family, self.prompts["default"])
        if self.scenes is not None:
            if source is not None:
                raise ConfigError(f"data={source!r}: task {self.name!r} draws its questions; leave the data away")
            if not isinstance(template, str):
                raise ConfigError(f"task {self.name!r}: scenes have no options; give one prompt, not choice and open")
            return self.scenes.items(template, limit)
        if source is not None:
            rows = tables.read(source, self._columns, self._pictures)
        elif self.hub is not None:
            rows = tables.load(self.hub, self._columns, self._pictures)
        else:
            raise ConfigError(f"task {self.name!r} has no data set on the hub; give the path of the data")
        items: dict[str, Item] = {}
        alike: Counter[str] = Counter()
        for row in self._rows(rows):
            item = self._item(row, template, alike)
            if item.id in items:
                raise ConfigError(
                    f"{row.where}: the id {item.id!r} (from {self.fields['id']!r}) was there before; remove the "
                    "repeated row"
                )
            items[item.id] = item
            if len(items) == limit:
                break
        if not items:
            raise ConfigError(
                f"{rows[0].where}: no row has {dict(self.where)}; task {self.name!r} asks only about those"
            )
        return tuple(items.values())

    # ------------------------------------------------------------------------------------------------------ its columns

    @property
    def _pictures(self) -> tuple[str, ...]:
        return _each(self.fields["image"])

    @property
    def _columns(self) -> frozenset[str]:
        """All that an entry may name."""
        entries = [*self.fields.values(), *self.groups.values()]
        named = [one for entry in entries for one in _each(entry)]
        columns = {name for one in named for name in (_columns_of(one) if "{" in one else (one,))}
        extra = [self.each] if self.each else []
        join = self.hub.pictures["key"] if self.hub and self.hub.pictures else None
        return frozenset({*columns, *self.where, *extra, *([join] if join else [])})

    def _rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Those that are questions of the task."""
        for row in rows:
            if any(str(row.values[name]) != value for name, value in self.where.items() if name in row.values):
                continue
            if self.each is None:
                yield row
                continue
            if self.each not in row.values:
                raise self._no_column(row, "questions", self.each)
            for number, part in enumerate(tables.listed(row.values[self.each]) or [row.values[self.each]]):
                yield dataclasses.replace(row, values={**row.values, self.each: part, "part": number})

    def _no_column(self, row: Row, what: str, entry: object) -> ConfigError:
        return ConfigError(
            f"{row.where}: there is no column {entry!r}, from which task {self.name!r} takes its {what}; there are "
            f"{', '.join(map(repr, row.columns))}"
        )

    def _value(self, row: Row, what: str, entry: Entry, alike: Counter[str] | None = None) -> Any:
        """What the first fitting entry says: the cell of a column, or a text."""
        for one in _each(entry):
            if "{" not in one:
                if one in row.values:
                    return row.values[one]
            elif all(name in row.values for name in _columns_of(one)):
                return self._filled(row, what, one, alike)
        raise self._no_column(row, what, entry)

    def _filled(self, row: Row, what: str, template: str, alike: Counter[str] | None) -> str:
        def cell(match: re.Match[str]) -> str:
            name, divisor = match.groups()
            if name == "row":
                return str(row.number)
            if name == "nth":
                return "{nth}"
            if name in self._pictures:
                pictures = row.values[name]
                return pictures[0].name if pictures else ""
            value = row.values[name]
            if divisor is None:
                return str(value)
            if not str(value).isdecimal():
                raise ConfigError(
                    f"{row.where}: {name}={value!r} is no number, which task {self.name!r} needs for {what}"
                )
            return str(int(value) % int(divisor))

        text = _COLUMN.sub(cell, template)
        if "{nth}" in text and alike is not None:
            alike[text] += 1
            return text.replace("{nth}", str(alike[text] - 1))
        return text

    # ----------------------------------------------------------------------------------------------------- one question

    def _item(self, row: Row, template: str | Mapping[str, str], alike: Counter[str]) -> Item:
        id_ = str(self._value(row, "id", self.fields["id"], alike))
        if self.each is not None:
            id_ += f"-{row.values['part']}"
        choices = self._choices(row)
        raw = str(self._value(row, "question", self.fields["question"]) or "")
        if not raw.strip():
            raise ConfigError(
                f"{row.where}: the question ({self.fields['question']!r}) is empty; remove or correct the row"
            )
        prompt = self._prompt(template, raw, choices, {name: self._optional(row, name) for name in ("hint", "ocr")})
        images = self._images(row, "\n".join((raw, *choices)))
        groups = {name: str(self._value(row, f"group {name!r}", entry)) for name, entry in self.groups.items()}
        cluster = str(self._value(row, "cluster", self.fields["cluster"])) if "cluster" in self.fields else id_
        return Item(id_, images, prompt, self._target(row, choices, images), cluster, groups)

    def _prompt(
        self, template: str | Mapping[str, str], question: str, choices: Sequence[str], more: Mapping[str, str]
    ) -> str:
        gaps = {"question": self.clean(question), **more}
        gaps["options"] = "\n".join(f"{_letter(number)}. {text}" for number, text in enumerate(choices))
        if not isinstance(template, str):
            template = template["choice" if choices else "open"]
        return _GAP.sub(lambda match: gaps[match[1]], template)  # in one go: a question may have braces

    def sample_prompt(self, family: str = "default") -> str:
        """How one made-up question is put, with everything that a question of this task may have.

        Args:
            family: as in :meth:`items`.
        """
        choices = ("a cat", "a dog") if {"options", "option_columns"} & self.fields.keys() else ()
        more = {name: text.replace("{}", f"some {name}") for name, text in self.wrap.items()}
        return self._prompt(self.prompts.get(family, self.prompts["default"]), "What is this?", choices, more)

    def _optional(self, row: Row, name: str) -> str:
        """Hint or OCR tokens as they enter the prompt; empty where the question has none."""
        value = next((row.values[one] for one in _each(self.fields.get(name, ())) if one in row.values), None)
        parts = tables.listed(value) if name == "ocr" else None
        value = ", ".join(map(str, parts)) if parts is not None else value
        return "" if _missing(value) else self.wrap[name].replace("{}", str(value))

    def _choices(self, row: Row) -> tuple[str, ...]:
        """The texts of the options; none where the question is open."""
        lists, columns = _each(self.fields.get("options", ())), _each(self.fields.get("option_columns", ()))
        column = next((name for name in lists if name in row.values), None)
        if column is not None:
            found = tables.listed(row.values[column])
            if found is None:
                raise ConfigError(
                    f"{row.where}: {column}={row.values[column]!r} is no list of options; write it as JSON"
                )
            return tuple(map(str, found))
        if not lists and not columns:
            return ()
        cells = [row.values[name] for name in columns if name in row.values]
        texts = tuple(str(cell) for cell in cells if not _missing(cell))
        if not texts:
            raise self._no_column(row, "options", (*lists, *columns)[0])
        if any(_missing(cell) for cell in cells[: len(texts)]):
            raise ConfigError(f"{row.where}: an option before the last is missing; fill {', '.join(columns)} in order")
        return texts

    def _images(self, row: Row, text: str) -> tuple[Stored, ...]:
        columns = self._pictures
        if len(columns) == 1:
            return tuple(self._value(row, "picture", columns[0]))
        # Of several columns those count that the question mentions, in the order of the columns.
        named = sorted({int(number) for number in re.findall(r"<image (\d+)>", text)})
        for number in named:
            if not 1 <= number <= len(columns):
                raise ConfigError(
                    f"{row.where}: <image {number}> is not among {', '.join(columns)}; correct the question"
                )
        return tuple(one for number in named for one in self._value(row, "picture", columns[number - 1]))

    def _target(self, row: Row, choices: tuple[str, ...], images: tuple[Stored, ...]) -> dict[str, Any]:
        value = self._value(row, "answer", self.fields["answer"])
        if value is None or value == "":
            raise ConfigError(f"{row.where}: the answer is empty; this split may have none: use the one with answers")
        if self.target == "box":
            return self._box(row, value, images)
        if self.target == "texts":
            parts = tables.listed(value)
            parts = [value] if parts is None else parts
            return {"answers": [str(one["answer"] if isinstance(one, Mapping) else one) for one in parts]}
        answer = str(value)
        if self.target == "choice" and choices:
            return {"answers": [self._right_letter(row, answer, len(choices))], "choices": list(choices)}
        if self.translate:
            if answer not in self.translate:
                raise ConfigError(
                    f"{row.where}: the answer {answer!r} is not one of {', '.join(self.translate)}; correct it"
                )
            answer = self.translate[answer]
        return {"answers": [answer]}

    def _right_letter(self, row: Row, answer: str, options: int) -> str:
        number = int(answer) if answer.isdecimal() else ord(answer) - ord("A") if len(answer) == 1 else -1
        if not 0 <= number < options:
            raise ConfigError(
                f"{row.where}: the answer {answer!r} is none of the {options} options; give a letter up to "
                f"{_letter(options - 1)} or an index from 0 to {options - 1}"
            )
        return _letter(number)

    def _box(self, row: Row, value: Any, images: tuple[Stored, ...]) -> dict[str, Any]:
        numbers = tables.listed(value)
        try:
            x, y, width, height = (float(number) for number in numbers or ())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{row.where}: the box {value!r} is not [x, y, width, height]; correct it") from error
        target: dict[str, Any] = {"answers": [], "box": [x, y, x + width, y + height]}
        size = self._size(row, images)
        return target if size is None else target | {"size": list(size)}

    def _size(self, row: Row, images: tuple[Stored, ...]) -> tuple[int, int] | None:
        """Width and height of the picture, None if it cannot be read, which it says itself when it is opened."""
        if "size" in self.fields:
            text = str(self._value(row, "size", self.fields["size"]))
            width, _, height = text.partition("x")
            if not (width.isdecimal() and height.isdecimal()):
                raise ConfigError(f"{row.where}: the size {text!r} is not width x height in pixels; correct it")
            return int(width), int(height)
        try:
            data = images[0].data()
            with PIL.Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:  # reads its head alone
                return image.size
        except (ImageError, IndexError, OSError, ValueError, SyntaxError):
            return None


def _each(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _missing(value: Any) -> bool:
    return value in _MISSING or value != value  # NaN


def _columns_of(template: str) -> list[str]:
    return [name for name, _ in _COLUMN.findall(template) if name not in ("row", "nth")]


# ------------------------------------------------------------------------------------------------------------ from YAML


def names() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Task:
    """A task by its name, or from a YAML file of your own (a path that ends in .yaml).

    Raises:
        ConfigError: there is no such task, or its file is wrong; names the key.
    """
    return _parse(*_read(name))


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """Where a task is written, and its keys, with those of its base."""
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if path.parent == FOLDER and path.stem not in names():
        close = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known tasks: {', '.join(names())}"
        raise ConfigError(f"task={name!r}: unknown; {hint}")
    if not path.is_file():
        raise ConfigError(f"task={name!r}: there is no such file; known tasks: {', '.join(names())}")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({error})") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: must be a mapping of keys")
    if "base" in keys:
        keys = {**_read(str(keys.pop("base")))[1], **keys}
    return str(path), {**keys, "name": path.stem}


def _parse(where: str, keys: dict[str, Any]) -> Task:
    def wrong(key: str, reason: str) -> ConfigError:
        return ConfigError(f"{where}: {key}={keys.get(key)!r}: {reason}")

    known = {one.name: one for one in dataclasses.fields(Task)}
    for key in keys:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; a task has {', '.join(('base', *known))}")
    for key, one in known.items():
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and key not in keys:
            raise ConfigError(f"{where}: the key {key!r} is missing")
    for key in ("version", "max_new_tokens"):
        if type(keys[key]) is not int or keys[key] < 1:
            raise wrong(key, "must be a whole number from 1")
    for key in ("title", "metric", "dialect", "target", "each", "url", "licence", "note"):
        if not isinstance(keys.get(key, ""), str):
            raise wrong(key, "must be a text")
    for key in ("prompts", "fields", "groups", "wrap", "where", "translate", "hub", "scenes", "clean"):
        if not isinstance(keys.get(key, {}), dict):
            raise wrong(key, "must be a mapping")
    for key in ("wrap", "where", "translate"):
        if not all(isinstance(text, str) for pair in keys.get(key, {}).items() for text in pair):
            raise wrong(key, "must map texts to texts; quote numbers")
    if keys.get("kind", "other") not in KINDS:
        raise wrong("kind", f"must be one of {', '.join(KINDS)}")
    if keys.get("target", "text") not in TARGETS:
        raise wrong("target", f"must be one of {', '.join(TARGETS)}")
    if ("hub" in keys or "fields" in keys) == ("scenes" in keys):
        raise ConfigError(f"{where}: a task has either `fields` (and `hub`) or `scenes`")
    values = dict(keys)
    for key, kind in (("hub", Hub), ("scenes", Scenes), ("clean", Clean)):
        if key in keys:
            allowed = [one.name for one in dataclasses.fields(kind)]
            for name in keys[key]:
                if name not in allowed:
                    raise ConfigError(f"{where}: unknown key {name!r} in {key}; it has {', '.join(allowed)}")
            try:
                values[key] = kind(**keys[key])
            except TypeError as error:
                raise wrong(key, str(error)) from error
    _check_hub(where, values.get("hub"))
    for key in ("fields", "groups"):
        values[key] = {str(name): _entry(where, name, entry) for name, entry in keys.get(key, {}).items()}
    for name in values["fields"]:
        if name not in _FIELDS:
            raise ConfigError(f"{where}: unknown key {name!r} in fields; it has {', '.join(_FIELDS)}")
    if "scenes" not in keys:
        for name in ("id", "image", "question", "answer"):
            if name not in values["fields"]:
                raise ConfigError(f"{where}: fields lacks {name!r}")
        for name in ("hint", "ocr"):
            if (name in values["fields"]) != (name in keys.get("wrap", {})):
                raise ConfigError(f"{where}: {name!r} must be both in fields and in wrap, or in neither")
    gaps = {"question"} if "scenes" in keys else {*_GAPS} & {*values["fields"]}
    if "option_columns" in values["fields"]:
        gaps.add("options")
    _check_prompts(where, keys["prompts"], gaps)
    return Task(**values)


def _check_hub(where: str, hub: Hub | None) -> None:
    if hub is None:
        return
    for name in ("id", "split", "config", "revision"):
        if not isinstance(getattr(hub, name), str) and (name, hub.config) != ("config", None):
            raise ConfigError(f"{where}: hub.{name}={getattr(hub, name)!r}: must be a text")
    join = {"config", "split", "key", "id", "column"}
    if hub.pictures is not None and (not isinstance(hub.pictures, dict) or set(hub.pictures) != join):
        raise ConfigError(f"{where}: hub.pictures={hub.pictures!r}: must have the keys {', '.join(sorted(join))}")


def _entry(where: str, name: str, entry: Any) -> Entry:
    if isinstance(entry, list) and entry and all(isinstance(one, str) for one in entry):
        return tuple(entry)
    if not isinstance(entry, str):
        raise ConfigError(f"{where}: {name}={entry!r}: must be a column, a template in quotes, or a list of these")
    return entry


def _check_prompts(where: str, prompts: Mapping[str, Any], gaps: set[str]) -> None:
    if "default" not in prompts:
        raise ConfigError(f"{where}: prompts lacks 'default'")
    for family, prompt in prompts.items():
        parts = prompt if isinstance(prompt, dict) else {"": prompt}
        if isinstance(prompt, dict) and set(prompt) != {"choice", "open"}:
            raise ConfigError(f"{where}: prompts.{family} must be a text, or have the keys 'choice' and 'open'")
        for text in parts.values():
            if not isinstance(text, str) or "{question}" not in text:
                raise ConfigError(f"{where}: prompts.{family}={text!r}: must be a text with {{question}}")
            for gap in _GAP.findall(text):
                if gap not in gaps:
                    raise ConfigError(f"{where}: prompts.{family} has {{{gap}}}; it may have {', '.join(sorted(gaps))}")
