"""A question asked with two settings: both answers token by token, and what they cost, measured on the way.

The sides answer one after the other, so that neither slows the other down. Each first answers once more for nothing,
which warms caches up; then it is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer
from visiontok.adapters.base import find as find_adapter

from visiontok.api import compress
from visiontok.budget import Budget
from visiontok.errors import ConfigError, ImageError, VisiontokError
from visiontok.images import load_image
from visiontok.method import Stage
from visiontok.named import Loaded, quiet
from visiontok.places import Crop, find_places
from visiontok.recipe import Recipe, recipe
from visiontok.recipes import find as find_method
from visiontok.report import Report
from visiontok.run import Seconds, timed_answer

from .fate import Fate

NONE = "none"
"""The stock model, as it is."""
LARGEST = 40_000_000  # pixels
RUNS = 3  # timed runs; the first is the one that is streamed, the others end with the first token


@dataclass(frozen=True)
class Setting:
    """How one side answers.

    Attributes:
        method: its name, or ``NONE``.
        keep: share of the visual tokens, for methods that take a budget.
        layer: decoder layer on whose input they are dropped; None for where the method does it by itself.
    """

    method: str = NONE
    keep: float = 0.25
    layer: int | None = None

    def recipe(self) -> Recipe | None:
        """What to attach; None for the stock model.

        Raises:
            ConfigError: for an unknown method or a layer that it cannot take.
        """
        if self.method == NONE:
            return None
        found, budget = find_method(self.method), Budget.ratio(self.keep)
        if self.layer is not None and takes_layer(self.method):
            made = recipe(self.method, layer=self.layer)
        else:
            made = recipe(self.method)
            if self.layer is not None:
                made = dataclasses.replace(made, stages=tuple(_inside(stage, self.layer) for stage in made.stages))
        return made.with_keep(budget) if found.card.budget else made

    def in_python(self, model: str, question: str) -> str:
        """Lines that answer the same way."""
        lines = [
            "import visiontok",
            "from visiontok.images import load_image",
            "from visiontok.named import find_device, load_model",
            "",
        ]
        lines += [
            f"loaded = load_model({model!r}, find_device('auto'))",
            f"inputs = loaded.inputs(([load_image('picture.png')], {question!r}))",
        ]
        made = self.recipe()
        generate = "output = loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)"
        answer = (
            "loaded.processor.tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)"
        )
        if made is None:
            return "\n".join([*lines, generate, f"print({answer})"])
        lines += [
            f"recipe = visiontok.Recipe.from_dict({_plain(made)!r})",
            "with visiontok.compress(loaded.model, recipe) as compression:",
            f"    {generate}",
            f"print({answer})",
            "print(compression.report)",
        ]
        return "\n".join(lines)

    def in_shell(self, model: str, question: str) -> str:
        """The command that answers the same way, with the stock model beside it."""
        asked = f"--image picture.png --ask {shlex.quote(question)} --model {shlex.quote(model)} --overlay kept.png"
        made = self.recipe()
        if made is None:
            return f"visiontok run {asked}    # its column 'stock'"
        if self.layer is None:
            budget = f" --keep {self.keep:g}" if find_method(self.method).card.budget else ""
            return f"visiontok run {asked} --method {self.method}{budget}"
        written = shlex.quote(json.dumps(_plain(made)))
        return f"echo {written} > recipe.json\nvisiontok run {asked} --method recipe.json"


def takes_layer(method: str) -> bool:
    """Whether a method acts at one decoder layer of its choice."""
    found = find_method(method)
    return found.card.stage == "decoder" and "layer" in found.__dataclass_fields__


def takes_stage(method: str) -> bool:
    """Whether a method selects before the language model and can be asked to do so inside it."""
    stages = find_method(method)().stages()
    return all(stage.kind == "prompt" for stage in stages)


def _inside(stage: Stage, layer: int) -> Stage:
    if stage.kind != "prompt":
        raise ConfigError(f"layer={layer}: {stage.label} has its own places in the model; leave the layer out")
    return dataclasses.replace(stage, kind="cut", layer=layer)


def _plain(made: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(made.to_dict()))
    return found


@dataclass(frozen=True)
class Answer:
    """One side.

    Attributes:
        setting: how it was answered.
        label: the method as results name it.
        text: the answer.
        generated: its tokens, the end token included.
        seconds: of the median of ``RUNS`` runs by time to first token; ``decode`` is of the streamed one.
        kept: visual tokens in each decoder layer.
        tokens: visual tokens of the stock model.
        kv_bytes: of the prefill's keys and values; None where they are not counted.
        flops: (vision tower, language model) to the first token; None where they are not counted.
        fate: what became of each token.
        crops: where tokens lie on the picture; empty where it is not known.
        notes: what a reader must know.
    """

    setting: Setting
    label: str
    text: str
    generated: int
    seconds: Seconds
    kept: tuple[int, ...]
    tokens: int
    kv_bytes: int | None
    flops: tuple[int, int] | None
    fate: Fate
    crops: Sequence[Crop]
    notes: tuple[str, ...]

    @property
    def operations(self) -> int | None:
        """FLOPs to the first token."""
        return None if self.flops is None else sum(self.flops)

    @property
    def average(self) -> float:
        """Visual tokens, averaged over decoder layers."""
        return sum(self.kept) / len(self.kept)


def read_picture(path: str | Path | None) -> tuple[Image.Image, str]:
    """An uploaded picture, and what to say about it (empty for nothing).

    Raises:
        ConfigError: without one, or for one that is too large.
        ImageError: for a broken file.
    """
    if path is None:
        raise ConfigError("choose a picture first: upload one, or click an example")
    note = ""
    try:
        with Image.open(path) as opened:
            frames, (width, height) = getattr(opened, "n_frames", 1), opened.size
    except Exception:  # load_image says what is wrong
        frames, width, height = 1, 0, 0
    if width * height > LARGEST:
        raise ConfigError(
            f"this picture has {width * height / 1e6:.0f} megapixels; scale it down to at most {LARGEST // 10**6}"
        )
    if frames > 1:
        note = f"the file has {frames} frames, of which the first is shown"
    try:
        return load_image(path), note
    except ImageError as error:
        raise ImageError(str(error).replace(str(Path(path).expanduser()), Path(path).name)) from error


def ask(
    loaded: Loaded,
    picture: Image.Image,
    question: str,
    setting: Setting,
    *,
    stop: threading.Event,
    longest: int = 32,
) -> Iterator[str | Answer]:
    """Answer once: yields the text as it grows, and in the end the :class:`Answer`.

    Generation ends at the next token when ``stop`` is set, or when the iterator is closed; then no answer follows.

    Raises:
        ConfigError: for an empty question and for settings that do not fit the model.
        UnsupportedError: where the model cannot do it.
    """
    if not question.strip():
        raise ConfigError("the question is empty; ask something about the picture")
    made, left = setting.recipe(), threading.Event()
    news: queue.Queue[str | Answer | BaseException | None] = queue.Queue()

    def stopped() -> bool:
        return stop.is_set() or left.is_set()

    def work() -> None:
        try:
            with quiet(), torch.inference_mode():
                news.put(_measured(loaded, picture, question, setting, made, stopped, longest, news.put))
        except BaseException as error:  # is raised again where the answer is read
            news.put(error)

    worker = threading.Thread(target=work, name="visiontok demo", daemon=True)
    worker.start()
    try:
        while True:
            item = news.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
            if isinstance(item, Answer):
                return
    finally:
        left.set()
        worker.join()


def _measured(
    loaded: Loaded,
    picture: Image.Image,
    question: str,
    setting: Setting,
    made: Recipe | None,
    stopped: Callable[[], bool],
    longest: int,
    tell: Callable[[str], None],
) -> Answer | None:
    """The answer, timed; None if it was stopped."""
    everything = recipe("random", keep=1.0)  # drops nothing and runs stock, and still keeps the books
    with compress(loaded.model, everything if made is None else made) as books:
        timed_answer(loaded, picture, question, 1, books, stop=stopped)
        ledger, report = books.ledger, books.report
        if stopped():
            return None
    runs = []
    with contextlib.nullcontext() if made is None else compress(loaded.model, made) as compression:
        for number in range(RUNS):
            pieces = None if number else _Pieces(loaded.processor.tokenizer, tell)
            runs.append(
                timed_answer(
                    loaded, picture, question, 1 if number else longest, compression, streamer=pieces, stop=stopped
                )
            )
            if stopped():
                return None
    first = runs[0]
    # One run, whose parts add up, as medians of parts would not.
    middle = sorted((run.seconds for run in runs), key=lambda seconds: seconds.first_token)[RUNS // 2]
    seconds = dataclasses.replace(middle, decode=first.seconds.decode)
    notes = [] if made is None else [*report.warnings, *report.account.not_counted]
    if made is not None and any(stage.kind == "cut" for stage in made.stages):
        notes.append("selection inside the language model is counted as prefill")
    unknown = loaded.processor.tokenizer.unk_token_id
    if unknown is not None and unknown in loaded.processor.tokenizer(question)["input_ids"]:
        notes.append("the question has words that this model's vocabulary lacks")
    crops: Sequence[Crop] = ()
    try:
        adapter = find_adapter(loaded.base, inside=False)
        crops = find_places(adapter, ledger.units, [picture], lambda like: loaded.processed((like, question)))
    except VisiontokError as error:
        notes.append(str(error))
    return Answer(
        setting=setting,
        label="stock model" if made is None else report.recipe,
        text=first.answer,
        generated=first.generated,
        seconds=seconds,
        kept=tuple(sum(layer) for layer in zip(*(image.kept for image in report.images), strict=True)),
        tokens=sum(image.tokens for image in report.images),
        kv_bytes=report.account.kv,
        flops=_flops(report),
        fate=Fate(ledger),
        crops=crops,
        notes=tuple(notes),
    )


def _flops(report: Report) -> tuple[int, int] | None:
    costs = report.account
    if costs.vision is None or costs.decoder is None:
        return None
    return costs.vision.tower + costs.vision.projector, sum(costs.decoder) + costs.lm_head


class _Pieces(BaseStreamer):
    """Tells the text so far, token by token."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then every token."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True).strip())

    def end(self) -> None:
        """Nothing is held back."""
