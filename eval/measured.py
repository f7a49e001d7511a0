"""What ``visiontok bench`` measured, for the runs of a report: time to first token and FLOPs of each method."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontok.errors import ConfigError

from .runner import Cell

SCHEMA = 1
_SETTING = ("configuration", "batch", "side", "text")
_ORDER = ("dynamic", "static", "compiled")


@dataclass(frozen=True)
class Efficiency:
    """Measurements at one setting.

    Attributes:
        setting: configuration, batch, side of the pictures and text tokens.
        device: kind of device; empty where the file does not say.
        where: its name, likewise.
        rows: method and budget → its row.
        failed: method and budget → why there are no numbers.
    """

    setting: Mapping[str, Any]
    device: str
    where: str
    rows: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]

    def first_token(self, name: str) -> float | None:
        """Median seconds from pictures to first token, vision tower included."""
        row = self.rows.get(name)
        return None if row is None else row["seconds"]["first_token"]["median"]

    def flops(self, name: str) -> float | None:
        """Of vision tower, projector and language model, to the first token."""
        row = self.rows.get(name)
        return None if row is None or not row.get("flops") else row["flops"]["total"]

    def __str__(self) -> str:
        given = self.setting
        return (
            f"{given['configuration']} generation, batch {given['batch']}, pictures of {given['side']} pixels, "
            f"{given['text']} text tokens; {self.where or 'on an unknown device'}"
        )


def read(file: str | Path, model: Mapping[str, Any]) -> Efficiency:
    """Measurements of a model at the setting that most methods were measured at.

    Of settings with as many methods: generation as it is without options, then the smallest batch.

    Args:
        file: ``efficiency.json`` of ``visiontok bench``.
        model: of the protocol of the evaluation.

    Raises:
        ConfigError: if it is no such file, of another model, or holds no measurement.
    """
    place = Path(file).expanduser()
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--bench {str(file)!r}: cannot be read ({error}); give what `visiontok bench` wrote"
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"--bench {str(file)!r}: is no efficiency.json of schema {SCHEMA}; measure it again")
    measured = data["protocol"].get("model")
    measured = measured if isinstance(measured, Mapping) else {"name": measured}
    for field in ("name", "weights", "dtype"):
        if field in measured and measured[field] != model[field]:
            raise ConfigError(
                f"--bench {str(file)!r}: measured model.{field}={measured[field]!r}, but the answers are of "
                f"{model[field]!r}; measure the model that was evaluated"
            )
    good = [row for row in data["rows"] if not row["error"]]
    if not good:
        raise ConfigError(f"--bench {str(file)!r}: holds no measurement; every row is an error")
    counts = Counter(tuple(row[name] for name in _SETTING) for row in good)

    def rank(setting: tuple[Any, ...]) -> tuple[int, int, int]:
        configuration, batch = setting[:2]
        return -counts[setting], _ORDER.index(configuration) if configuration in _ORDER else len(_ORDER), batch

    setting = min(counts, key=rank)
    device, name = (data["protocol"].get(field) or "" for field in ("device", "device_name"))
    here = [row for row in data["rows"] if tuple(row[name] for name in _SETTING) == setting]
    named = [(str(Cell(row["method"], row["keep"], None)), row) for row in here]
    return Efficiency(
        dict(zip(_SETTING, setting, strict=True)),
        device.partition(":")[0],
        name,
        {name: row for name, row in named if not row["error"]},
        {name: row["error"] for name, row in named if row["error"]},
    )
