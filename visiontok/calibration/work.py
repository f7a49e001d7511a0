"""Run a calibrator over samples, with intermediate results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..api import base_model
from ..errors import ConfigError
from ..weights import fingerprint
from .artefact import Artefact
from .base import Calibrator, Reading, Row
from .probe import Probe


def calibrate(
    calibrator: Calibrator,
    model: nn.Module,
    inputs: Sequence[Callable[[], Mapping[str, Any]]],
    *,
    name: str,
    data: Mapping[str, Any],
    partial: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> Artefact:
    """Calibrate a method on a model.

    Args:
        calibrator: what to measure.
        model: a Hugging Face vision-language model, in evaluation mode.
        inputs: makes what ``generate()`` takes, for each sample one row with a picture and a question.
        name: of the model, for the artefact.
        data: what the artefact says of the samples, a hash among it.
        partial: file for intermediate results, with which an interrupted calibration goes on; removed at the end.
        progress: called with the round, and how many of how many samples it has measured.

    Raises:
        ConfigError: if there is no sample, or the intermediate results belong to another calibration.
        UnsupportedError: for a model that visiontok cannot attach to.
    """
    if not inputs:
        raise ConfigError("samples=0: a calibration needs at least one picture with a question")
    base: Any = base_model(model)
    probe = Probe(model)
    described = {
        "name": name,
        "type": base.config.model_type,
        "layers": len(probe.layers),
        "weights": fingerprint(model),
    }
    known = _Partial(partial, {"calibration": calibrator.method, "model": described, "data": dict(data)})

    def measure(stage: str, reading: Reading) -> list[Row]:
        rows = []
        for sample, make in enumerate(inputs):
            progress(stage, sample, len(inputs))
            rows.append(known.get(stage, sample, lambda make=make, sample=sample: reading(probe, make(), sample)))  # type: ignore[misc]
        progress(stage, len(inputs), len(inputs))
        return rows

    found = calibrator.find(measure, base.config)
    known.remove()
    return Artefact(
        calibration=calibrator.method,
        title=calibrator.title,
        source=calibrator.source,
        model=described,
        data=data,
        options=asdict(calibrator),
        recommended=found.recommended,
        curves={curve: list(points.items()) for curve, points in found.curves.items()},
        notes=found.notes,
        axis=calibrator.axis,
    )


class _Partial:
    """Rows that are known, in memory and in a file.

    Args:
        path: of the file; None for none.
        header: what the rows belong to.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[tuple[str, int], Row] = {}
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps(header) + "\n")
            return
        first, *lines = path.read_text().split("\n")
        if first != json.dumps(header):
            raise ConfigError(
                f"{path}: intermediate results of another method, model or data; delete it, or choose another output"
            )
        whole = lines[:-1]  # the last is empty, or was cut off
        for line in map(json.loads, whole):
            self.rows[line["round"], line["sample"]] = line["row"]
        path.write_text("\n".join([first, *whole]) + "\n")

    def get(self, stage: str, sample: int, make: Callable[[], Row]) -> Row:
        if (stage, sample) not in self.rows:
            self.rows[stage, sample] = row = make()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"round": stage, "sample": sample, "row": row}) + "\n")
        return self.rows[stage, sample]

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink()
