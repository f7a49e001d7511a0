"""``visiontok calibrate``: from names and paths to an artefact on disk."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from ..errors import ConfigError
from ..named import Loaded, find_device, load_model, quiet
from ..options import read_value
from . import CALIBRATORS
from .artefact import Artefact
from .base import Calibrator
from .samples import Sample, digest, read
from .work import calibrate


def run_job(
    *,
    method: str,
    model: str = "tiny",
    data: str | None = None,
    samples: int = 20,
    out: str | None = None,
    device: str = "auto",
    options: Mapping[str, str] | None = None,
) -> tuple[Artefact, Path, Path]:
    """Calibrate a method, and write the artefact and its drawing.

    Everything that can be checked without the model is checked before it is loaded.

    Args:
        method: one of `CALIBRATORS`.
        model: ``tiny``, ``tiny-qwen``, or a Hugging Face id or folder.
        data: a folder or JSON Lines file of pictures and questions; None for scenes of the embedded models.
        samples: how many of them.
        out: path of the artefact, METHOD.json by default; the drawing is beside it, and so are intermediate results
            until the end, with which an interrupted calibration goes on.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …
        options: of the calibrator, as text.

    Returns:
        the artefact, and where it and its drawing are.

    Raises:
        ConfigError: for any argument that is wrong; names it, its value and the remedy.
        UnsupportedError: if the model cannot be measured.
    """
    calibrator = _calibrator(method, options or {})
    if samples < 1:
        raise ConfigError(f"samples={samples}: give at least 1")
    path = Path(out or f"{method}.json").expanduser()
    if path.suffix != ".json" or not path.parent.is_dir():
        raise ConfigError(f"--out {str(path)!r}: give the name of a .json file in a folder that exists")
    place = find_device(device)
    asked = scenes(samples) if data is None else read(data, samples)
    source = f"{len(asked)} scenes of visiontok.demo" if data is None else f"{len(asked)} samples of {data}"
    with quiet():
        loaded = load_model(model, place)
        artefact = calibrate(
            calibrator,
            loaded.model,
            [functools.partial(_inputs, loaded, sample) for sample in asked],
            name=model,
            data={"source": source, "samples": len(asked), "hash": digest(asked)},
            partial=path.with_suffix(".partial"),
            progress=_say,
        )
    return artefact, path, artefact.save(path)


def scenes(number: int) -> list[Sample]:
    """Scenes of the embedded models, each with one question, of every kind in turn."""
    from visiontok.demo import scene

    found = []
    for seed in range(number):
        picture, questions = scene(seed)
        found.append(Sample(picture, questions[seed % len(questions)].text))
    return found


def _inputs(loaded: Loaded, sample: Sample) -> Mapping[str, object]:
    inputs: Mapping[str, object] = loaded.inputs(([sample.picture], sample.question))
    return inputs


def _calibrator(method: str, options: Mapping[str, str]) -> Calibrator:
    if method not in CALIBRATORS:
        raise ConfigError(f"method={method!r}: has no calibration; there are {', '.join(CALIBRATORS)}")
    kind = CALIBRATORS[method]
    known, hints = [field.name for field in fields(kind)], get_type_hints(kind)
    for name, text in options.items():
        if name not in known:
            remedy = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"--option {name}={text}: the calibration of {method} has no such option; {remedy}")
    return kind(**{name: read_value(f"--option {name}={text}", text, hints[name]) for name, text in options.items()})


def _say(stage: str, done: int, of: int) -> None:
    """A line that overwrites itself, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{stage}: {done}/{of} samples", end="\n" if done == of else "", file=sys.stderr, flush=True)
