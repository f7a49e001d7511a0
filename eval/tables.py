"""Rows of data sets: local files in the formats people have them in, and the Hugging Face hub."""

from __future__ import annotations

import ast
import csv
import functools
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visiontok.errors import ConfigError

from .items import SHORTEST_BASE64, Stored, find, is_base64

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
_LONG = 4096  # characters; a longer cell with a picture stays in its file until the picture is opened
_EXTRA = "pip install 'visiontok[data]'"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: the file and the line, for messages.
        number: from 0.
        values: what the columns hold that were asked for, and others; in those with pictures, a tuple of them.
        columns: all there are.
    """

    where: str
    number: int
    values: Mapping[str, Any]
    columns: Collection[str]


def read(source: str, columns: Collection[str], pictures: Collection[str]) -> list[Row]:
    """The rows of a local data set.

    Args:
        source: a JSON Lines, JSON (a list of objects, or {"data": [...]}), CSV, TSV (as VLMEvalKit has them: pictures
            in base64, or the index of the row that has the same) or Parquet file, or a folder with one such file or the
            shards of one. Paths of pictures are relative to the file, or to the folder `images` beside it.
        columns: those that are needed, where the file has them.
        pictures: those of them that hold pictures.

    Raises:
        ConfigError: there is nothing to read, or a line is something else; names the file, the line and the remedy.
    """
    place = Path(source).expanduser()
    if not place.exists():
        raise ConfigError(
            f"data={source!r}: there is no such file or folder; check the path (looked from {Path.cwd()})"
        )
    files = _files(place) if place.is_dir() else [place]
    if all(file.suffix.lower() == ".parquet" for file in files):
        rows = [row for file in files for row in _parquet(file, columns, pictures)]
    elif files[0].suffix.lower() in _TEXT:
        rows = _text(files[0], pictures)
    else:
        raise ConfigError(
            f"data={source!r}: cannot read {files[0].suffix or 'a file without extension'}; give "
            f"{', '.join((*_TEXT, '.parquet'))}, or a folder with one of these"
        )
    if not rows:
        raise ConfigError(f"data={source!r}: holds no question; export the data set again")
    return [replace(row, number=number) for number, row in enumerate(rows)]


def _files(folder: Path) -> list[Path]:
    shards = sorted(folder.rglob("*.parquet"))
    texts = sorted(file for file in folder.iterdir() if file.suffix.lower() in _TEXT)
    if shards and not texts:
        return shards
    if len(texts) != 1 or shards:
        found = ", ".join(file.name for file in (*texts, *shards)) or "nothing that could be"
        raise ConfigError(
            f"data={str(folder)!r}: must hold one file with the questions ({', '.join(_TEXT)}, or .parquet shards), "
            f"but has {found}; give the path of the file"
        )
    return texts


# ----------------------------------------------------------------------------------------------------------- text files


@dataclass(frozen=True)
class _Span:
    """Where a row lies in its file, in bytes; None: all of the file was read at once."""

    file: Path
    start: int
    end: int
    parse: Callable[[str], Mapping[str, Any]]

    def cell(self, column: str) -> Any:
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            text = stream.read(self.end - self.start).decode("utf-8-sig")
        return self.parse(text)[column]


def _text(file: Path, pictures: Collection[str]) -> list[Row]:
    kind = file.suffix.lower()
    reader = {".jsonl": _json_lines, ".json": _json}.get(kind) or functools.partial(
        _separated, separator="\t" if kind == ".tsv" else ","
    )
    rows: list[Row] = []
    holders: dict[str, tuple[Stored, ...]] = {}  # index → the row's picture, which other rows may refer to
    try:
        for number, (where, values, span) in enumerate(reader(file)):
            seen = dict(values)
            for column in set(pictures) & seen.keys():
                seen[column] = _stored(file, where, column, values[column], span, holders)
                if kind in (".tsv", ".csv") and "index" in values and seen[column]:
                    holders[values["index"]] = seen[column]
            rows.append(Row(where, number, seen, seen.keys()))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 ({error}); save it as UTF-8") from error
    return rows


def _stored(
    file: Path,
    where: str,
    column: str,
    value: Any,
    span: _Span | None,
    holders: Mapping[str, tuple[Stored, ...]],
) -> tuple[Stored, ...]:
    """The pictures of a cell."""
    folder = file.parent
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str) and value[:1] == "[":
        value = listed(value)
        if value is None:
            raise ConfigError(f"{where}: {column} begins like a list and is none; write it as JSON")
        span = None
    if isinstance(value, list):
        return tuple(one for part in value for one in _stored(file, where, column, part, None, holders))
    if (
        isinstance(value, str)
        and len(value) < SHORTEST_BASE64
        and value in holders
        and not find(folder, value).exists()
    ):
        return holders[value]
    if isinstance(value, str) and not is_base64(value) and not value.startswith("data:"):
        return (Stored(value, functools.partial(_given, value), folder),)
    name = f"{where.removeprefix(f'{folder}/')}, {column}"
    if isinstance(value, str) and len(value) > _LONG and span is not None:
        return (Stored(name, functools.partial(span.cell, column), folder),)
    return (Stored(name, functools.partial(_given, value), folder),)


def _given(value: Any) -> Any:
    return value


def listed(value: Any) -> list[Any] | None:
    """A cell as a list: it is one, or is written as one in JSON or in Python; None otherwise."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and value[:1] == "[":
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError):
                continue
            if isinstance(found, list):
                return found
    return None


_Rows = Iterator[tuple[str, Mapping[str, Any], _Span | None]]


def _json_lines(file: Path) -> _Rows:
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            end = start + len(line)
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _object(where, line.decode("utf-8-sig")), _Span(file, start, end, json.loads)
            start = end


def _object(where: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON ({error}); write one object in each line") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: is a {type(value).__name__}, not an object; write one object in each line")
    return value


def _json(file: Path) -> _Rows:
    try:
        value = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: is not JSON ({error}); export it again") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file}: is neither a list of objects nor {{'data': [...]}} with such a list; rewrite it so")
    for number, row in enumerate(rows, 1):
        yield f"{file}, entry {number}", row, None


def _separated(file: Path, separator: str) -> _Rows:
    csv.field_size_limit(2**31 - 1)  # for all readers of the process, alas; pictures are longer than its default
    ends = [0]

    def lines() -> Iterator[str]:
        with file.open("rb") as stream:
            for line in stream:
                ends.append(ends[-1] + len(line))
                yield line.decode("utf-8-sig" if len(ends) == 2 else "utf-8")

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        first = reader.line_num
        for cells in reader:
            where = f"{file}, line {first + 1}"
            span = _Span(file, ends[first], ends[reader.line_num], functools.partial(_cells, header, separator))
            first = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise ConfigError(f"{where}: has {len(cells)} cells under {len(header)} headings; quote the separators")
            yield where, dict(zip(header, cells, strict=True)), span
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: {error}; check its quotes") from error


def _cells(header: list[str], separator: str, text: str) -> Mapping[str, Any]:
    (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    return dict(zip(header, cells, strict=True))


# ------------------------------------------------------------------------------------------------------ Parquet and hub


def _parquet(file: Path, columns: Collection[str], pictures: Collection[str]) -> list[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet needs pyarrow ({_EXTRA}), or export the data set as JSON Lines") from error
    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        plain = table.read([name for name in names if name in columns and name not in pictures]).to_pylist()
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as Parquet ({error}); fetch it again") from error
    places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    rows = []
    for number, (values, (group, place)) in enumerate(zip(plain, places, strict=True)):
        where = f"{file}, row {number + 1}"
        stored = {}
        for name in set(pictures).intersection(names):
            read = functools.partial(_group_cell, str(file), group, place, name)
            stored[name] = (Stored(f"{file.name}, row {number + 1}, {name}", read, file.parent),)
        rows.append(Row(where, number, values | stored, names))
    return rows


def _group_cell(file: str, group: int, row: int, column: str) -> Any:
    return _group(file, group, column)[row].as_py()


@functools.lru_cache(maxsize=2)
def _group(file: str, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file).read_row_group(group, columns=[column]).column(0)


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub.

    Attributes:
        id: owner/name.
        split: of the data set.
        config: its configuration; None for the only one.
        revision: branch, tag or commit.
        pictures: where a table of its own holds the pictures: {"config", "split", "key", "id", "column"}; the row's
            `key` equals the `id` there, and `column` is added to the row.
    """

    id: str
    split: str
    config: str | None = None
    revision: str = "main"
    pictures: Mapping[str, str] | None = None


def load(hub: Hub, columns: Collection[str], pictures: Collection[str]) -> list[Row]:
    """The rows of a data set of the hub, downloaded or from the cache of `datasets`; arguments as of `read`.

    Raises:
        ConfigError: `datasets` is missing, or cannot get it.
    """
    table, join = _load(hub, hub.config, hub.split), hub.pictures
    names = table.column_names
    other, numbers = table, {}
    if join is not None:
        other = _load(hub, join["config"], join["split"])
        numbers = {str(values[join["id"]]): number for number, values in enumerate(_plain(other, [join["id"]]))}
        pictures = {join["column"]}
    rows = []
    for number, values in enumerate(
        _plain(table, [name for name in names if name in columns and name not in pictures])
    ):
        where, place = f"{hub.id} ({hub.split}), row {number + 1}", number
        if join is not None:
            key = str(values[join["key"]])
            if key not in numbers:
                raise ConfigError(f"{where}: {join['key']}={key!r} is not in {join['config']!r}; check the revision")
            place = numbers[key]
        stored = {}
        for name in set(pictures).intersection(other.column_names):
            source = f"{hub.id} ({join['config'] if join else hub.split}), row {place + 1}, {name}"
            stored[name] = (Stored(source, functools.partial(_hub_cell, other, place, name)),)
        rows.append(Row(where, number, values | stored, names))
    return rows


def _load(hub: Hub, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{hub.id}: the hub needs `datasets` ({_EXTRA}); or give the path of a local copy as the data"
        ) from error
    try:
        # In Arrow's format nothing is decoded: a picture stays {"bytes", "path"} until it is opened.
        return datasets.load_dataset(hub.id, config, split=split, revision=hub.revision).with_format("arrow")
    # It raises nearly anything: its own errors, those of the hub's client, OSError, ValueError, …
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{hub.id}: cannot be loaded from the hub ({reason}); check the network and your login (`hf auth login`), "
            "or give the path of a local copy as the data"
        ) from error


def _plain(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.select_columns(columns).iter(batch_size=1000):
        yield from batch.to_pylist()


def _hub_cell(table: Any, row: int, column: str) -> Any:
    return table.select_columns([column])[row : row + 1].column(0)[0].as_py()
