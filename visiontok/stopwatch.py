"""One ``generate()`` taken apart in time, of the stock model and of a compressed one alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .api import Compression, compress_inputs, refuse_memory
from .engine.clock import Clock
from .named import Loaded, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from .recipe import Recipe
    from .report import Report


@dataclass(frozen=True)
class Seconds:
    """Where the time of one answer went, in seconds.

    Attributes:
        preprocess: from the picture and the question to tensors on the device.
        vision: vision tower and projector.
        selection: scoring and selecting before the language model; inside it, it is part of ``prefill``.
        prefill: the language model over the whole prompt.
        rest: what else comes before the first token: merging the features into the prompt, the head, the bookkeeping of
            ``generate()``. The sum of the parts and it is ``first_token``.
        first_token: all of it, measured as one: until the first generated token is known.
        decode: the other tokens.
    """

    preprocess: float
    vision: float
    selection: float
    prefill: float
    rest: float
    first_token: float
    decode: float

    @classmethod
    def median(cls, runs: list[Seconds]) -> Seconds:
        """The median of each part."""
        columns = zip(*(asdict(run).values() for run in runs), strict=True)
        return cls(*map(statistics.median, columns))


@dataclass(frozen=True)
class Timed:
    """One run.

    Attributes:
        inputs: what the processor made.
        output: what ``generate()`` returned.
        report: of the compressed run; None for stock.
        seconds: where its time went.
    """

    inputs: Any
    output: Any
    report: Report | None
    seconds: Seconds


class Stopwatch(transformers.StoppingCriteria):
    """Marks the parts of one ``generate()`` up to its first token, and is gone from the model then.

    It is entered after a recipe is attached and left before it is removed, so its hooks lie around those of the engine.
    They only look: what they see is handed on untouched, so the stock model stays stock.
    """

    def __init__(self, loaded: Loaded, stop: Callable[[], bool] | None = None) -> None:
        self.loaded, self.stop, self.clock, self.first_token = loaded, stop, Clock(), 0.0
        self._hooks: list[Any] = []

    def mark(self, name: str) -> None:
        # Clock knows events of CUDA only; other accelerators have to be waited for.
        if self.loaded.device.type not in ("cpu", "cuda"):
            self.loaded.synchronize()
        self.clock.mark(name)

    def __enter__(self) -> Stopwatch:
        base, text = self.loaded.base, self.loaded.text
        encode = base.get_image_features

        @functools.wraps(encode)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark("vision")
            output = encode(*args, **kwargs)
            self.mark("seen")
            return output

        # generate() calls this method before the model's forward, so a module hook would not see all of it.
        self._covered = base.__dict__.get("get_image_features")
        base.__dict__["get_image_features"] = timed
        self._hooks = [
            text.register_forward_pre_hook(lambda *_: self.mark("prefill"), prepend=True),
            text.register_forward_hook(lambda *_: self.mark("prefilled")),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._covered is None:
            del self.loaded.base.__dict__["get_image_features"]
        else:
            self.loaded.base.__dict__["get_image_features"] = self._covered

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Called after every token; stops where the caller wants to."""
        if not self.first_token:
            input_ids[:, -1].tolist()  # wait until it is known
            self.first_token = time.perf_counter()
            self.__exit__()  # decoding is not to be slowed down, nor compiled with hooks in it
        ends = self.stop is not None and self.stop()
        return torch.full((len(input_ids),), ends, device=input_ids.device)  # type: ignore[return-value]

    def between(self, start: str, end: str) -> float:
        """Seconds between two marks; 0 where a part did not run."""
        return self.clock.seconds(start, end) or 0.0


def timed(
    loaded: Loaded,
    asked: Sequence[tuple[Sequence[Image], Prompt]],
    *,
    compression: Compression | None = None,
    shorten: Recipe | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Timed:
    """Answers to a batch of questions, from the pictures to the last token, greedily.

    Args:
        loaded: model and processor.
        asked: pictures and question of each row.
        compression: what is attached to the model.
        shorten: a recipe of prompt stages that makes the inputs shorter instead; nothing is attached then.
        stop: asked behind every token whether to end there.
        **options: of ``generate()``.

    Raises:
        ConfigError: if a vision memory is on the model, which would take the tower's work away.
    """
    refuse_memory(loaded.model)
    watch = Stopwatch(loaded, stop)
    loaded.synchronize()
    start = time.perf_counter()
    inputs = loaded.inputs(*asked)
    loaded.synchronize()
    ready = time.perf_counter()
    short = None if shorten is None else compress_inputs(loaded.model, inputs, shorten)
    with watch:
        output = loaded.model.generate(
            **(inputs if short is None else short),
            do_sample=False,
            num_beams=1,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
            **options,
        )
    loaded.synchronize()
    end = time.perf_counter()
    report = short.report if short is not None else None if compression is None else compression.report
    recipe = shorten if compression is None else compression.recipe
    vision, selection, prefill = watch.between("vision", "seen"), 0.0, watch.between("prefill", "prefilled")
    if report is not None and recipe is not None:
        if any(stage.kind in ("pixel", "encoder", "merge", "prompt") for stage in recipe.stages):
            selection = report.seconds["selection"] or 0.0
        if report.plane == "hooks":
            prefill -= selection  # there it runs inside the language model's forward
        if short is not None:
            vision = report.seconds["vision"] or 0.0
    whole, preprocess = watch.first_token - start, ready - start
    rest = whole - preprocess - vision - selection - prefill
    seconds = Seconds(preprocess, vision, selection, prefill, rest, whole, end - watch.first_token)
    return Timed(inputs, output, report, seconds)
