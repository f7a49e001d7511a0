"""What was answered, question by question, in files that a kill at any byte leaves readable.

Questions go in fixed blocks. A block's lines are written at once, and a block counts as answered when all of them are
there, so where a run was killed, or how many processes shared it, changes nothing in what is answered together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from visiontok.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
TIMES = "seconds"
"""Field of a row that two equal runs may differ in."""
PROTOCOL = "protocol.json"


def split(ids: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The questions in blocks of ``size``, the last one shorter.

    Raises:
        ConfigError: if ``size`` is below 1, there are no questions, or two have one id.
    """
    if size < 1:
        raise ConfigError(f"batch={size}: questions are answered in blocks of at least 1")
    if not ids:
        raise ConfigError("there are no questions; give data that holds some, or a larger limit")
    if len(set(ids)) < len(ids):
        twice = next(one for at, one in enumerate(ids) if one in ids[:at])
        raise ConfigError(f"two questions have the id {twice!r}: every question needs one of its own")
    return [tuple(ids[begin : begin + size]) for begin in range(0, len(ids), size)]


def keep_protocol(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Write down how the answers of ``folder`` come about, or compare with what is there.

    Raises:
        ConfigError: if the folder holds answers that came about in another way.
    """
    file = folder / PROTOCOL
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, protocol)
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: is no JSON ({error}); give another folder, or delete this one") from error
    found = differences(before, json.loads(json.dumps(protocol)))
    if found:
        raise ConfigError(f"{folder}: holds answers made otherwise: {'; '.join(found)}; give another folder")


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Fields, by dotted name, in which two pieces of plain data differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        parts = [differences(one.get(key), other.get(key), f"{name}.{key}" if name else str(key)) for key in keys]
        return [line for part in parts for line in part]
    return [] if one == other else [f"{name} was {json.dumps(one)} and is {json.dumps(other)}"]


def write_json(file: Path, data: Any) -> None:
    """Write all of it or nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    part.replace(file)


def digest(rows: Sequence[Row]) -> str:
    """16 hex digits of all rows but their times."""
    found = hashlib.sha256()
    for row in rows:
        kept = {name: value for name, value in row.items() if name != TIMES}
        found.update(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return found.hexdigest()[:16]


class Records:
    """The answers in a folder; a context manager.

    Attributes:
        blocks: ids of the questions that are answered together.
        done: rows of the blocks that are answered, by any process.
    """

    def __init__(
        self, folder: Path, blocks: Sequence[tuple[str, ...]], rank: int | None = None, world: int = 1
    ) -> None:
        """Read what is there.

        Args:
            folder: of one run.
            blocks: from :func:`split`.
            rank: number of this process among ``world`` that share the blocks; None to read only.
            world: see there.

        Raises:
            ConfigError: if a file in the folder is corrupt, holds answers to other questions or a block that another
                file holds, or is being written by another run.
        """
        self.folder, self.blocks, self.rank, self.world = folder, blocks, rank, world
        self.done: dict[int, list[Row]] = {}
        self._file: BinaryIO | None = None
        own = folder / f"answers-{rank}-of-{world}.jsonl"
        try:
            if rank is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = own.open("ab")
                self._lock(self._file, own)
                self._file.truncate(self._read(own))  # a block that was cut off is answered again
            for file in sorted(folder.glob("answers-*.jsonl")):
                if self._file is None or file != own:
                    self._read(file)
        except BaseException:
            self.__exit__()
            raise

    @classmethod
    def found(cls, folder: Path) -> Records:
        """Those of a run of which only the answers say what was asked.

        Raises:
            ConfigError: if there are none, or a file in the folder is corrupt.
        """
        ids: dict[int, list[str]] = {}
        for file in sorted(folder.glob("answers-*.jsonl")):
            for at, line in enumerate(file.read_bytes().split(b"\n")[:-1]):
                row = cls._row(file, at, line)
                if not {"block", "id"} <= row.keys():
                    raise ConfigError(f"{file}: line {at + 1} says not what it answers; delete the file from there on")
                ids.setdefault(row["block"], []).append(row["id"])
        if not ids:
            raise ConfigError(f"{folder}: there are no answers; run it first")
        return cls(folder, [tuple(ids[number]) for number in sorted(ids)])

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _lock(opened: BinaryIO, file: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{file}: another run is writing here; wait for it, or give another folder") from error

    def _read(self, file: Path) -> int:
        """Take up the complete blocks of a file; returns where the last one ends."""
        content = file.read_bytes()
        lines = content.split(b"\n")[:-1]  # what follows the last line's end was cut off
        end = begin = at = 0
        while at < len(lines):
            rows: list[Row] = []
            number = self._row(file, at, lines[at]).get("block")
            if not isinstance(number, int) or not 0 <= number < len(self.blocks):
                raise ConfigError(f"{file}: line {at + 1} is of block {number!r}, which there is not; delete the file")
            wanted = self.blocks[number]
            for line in lines[at : at + len(wanted)]:
                rows.append(self._row(file, at + len(rows), line))
                begin += len(line) + 1
            if [row.get("id") for row in rows] != list(wanted[: len(rows)]):
                raise ConfigError(f"{file}: line {at + 1} answers another question; give another folder")
            at += len(rows)
            if len(rows) < len(wanted):
                break
            if number in self.done:
                raise ConfigError(f"{file}: block {number} is answered in two places; delete this file")
            self.done[number], end = rows, begin
        return end

    @staticmethod
    def _row(file: Path, at: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}: line {at + 1} is corrupt ({error}); delete the file from there on") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}: line {at + 1} is no record; delete the file from there on")
        return row

    def missing(self) -> list[int]:
        """Blocks that this process has to answer."""
        if self.rank is None:
            return []
        return [number for number in range(self.rank, len(self.blocks), self.world) if number not in self.done]

    def append(self, number: int, rows: Sequence[Row]) -> None:
        """Write the answers of one block."""
        rows = [{"block": number, **row} for row in rows]
        if [row["id"] for row in rows] != list(self.blocks[number]):
            raise ValueError(f"block {number} has other questions than these")
        if self._file is None:
            raise ValueError("these records are open for reading only")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[number] = rows

    def rows(self) -> list[Row]:
        """All answers, in the order of the questions.

        Raises:
            ConfigError: if some are missing.
        """
        absent = len(self.blocks) - len(self.done)
        if absent:
            raise ConfigError(
                f"{self.folder}: {absent} of {len(self.blocks)} blocks are not answered yet; run it to its end"
            )
        return [row for number in range(len(self.blocks)) for row in self.done[number]]
