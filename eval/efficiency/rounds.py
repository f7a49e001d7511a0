"""All rows of one point of a sweep, measured in turn, so that a noisy machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from visiontok.api import refuse_memory
from visiontok.budget import Budget
from visiontok.cost import time_to_first_token_cap
from visiontok.errors import VisiontokError
from visiontok.named import Loaded, named_recipe
from visiontok.stopwatch import Seconds

from ..runner import FULL
from .measure import COMPILED, DYNAMIC, STATIC, Batch, Books, Variant
from .nearest import nearest
from .requests import text_tokens, visual

BASELINES = ("random", "resize")
BASELINE, EQUAL_TOKENS = "baseline", "equal tokens"
PARTS = ("preprocess", "vision", "selection", "prefill", "other", "first_token", "decode_token")
PAIRS = 5
"""Measurements of a baseline and of a method, in turn, at each budget that the search for equal time tries."""


@dataclass
class Line:
    """What is known of a variant.

    Attributes:
        variant: which one.
        whys: why it is there, one row for each; None for what was asked for.
        books: None until it has run.
        seconds: of every round.
        peak: the most bytes of all rounds.
        error: why it could not run.
    """

    variant: Variant
    whys: list[str | None]
    books: Books | None = None
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    error: str | None = None


class Rounds:
    """The lines of one point.

    Args:
        loaded: model and processor.
        batch: what is asked.
        variants: methods that were asked for; the stock model and the baselines beside them come by themselves.
        seed: of the draws of ``random``.
        tell: told how many of how many steps are done.

    Attributes:
        lines: by variant.
        sizes: visual tokens of each request.
        text_tokens: of the longest prompt.
        text: seconds of the text's prefill alone, in every round.
    """

    def __init__(
        self,
        loaded: Loaded,
        batch: Batch,
        variants: Sequence[Variant],
        *,
        seed: int = 0,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.loaded, self.batch, self.seed, self.tell = loaded, batch, seed, tell
        self.lines: dict[tuple[str, str | None, str], Line] = {}
        self.text: list[float] = []
        inputs = loaded.inputs(*batch.asked)
        self.sizes: list[int] = visual(loaded, inputs).sum(1).tolist()
        self.text_tokens = max(text_tokens(loaded, inputs))
        for configuration in (DYNAMIC, STATIC, COMPILED):
            self._add(Variant(FULL, None, None, configuration), BASELINE)
        for variant in variants:
            self._add(variant, None)

    def measure(self, runs: int, warm_up: int) -> None:
        """First runs, baselines of equal tokens and equal time, and the rounds.

        Raises:
            ConfigError: if a vision memory is on the model.
        """
        refuse_memory(self.loaded.model)
        torch.compiler.reset()
        # Decoding that is silently not compiled any more must not pass for compiled.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True), torch.inference_mode():
            for line in list(self.lines.values()):
                self._first(line)
            methods = [
                (line.variant, line.books)
                for line in self.lines.values()
                if line.books is not None
                and line.variant.configuration == DYNAMIC
                and line.variant.method not in (FULL, *BASELINES)
            ]
            for variant, known in methods:
                for name in BASELINES:
                    self._beside(name, self._equal_tokens(variant, known), EQUAL_TOKENS)
            for variant, _ in methods:
                for name in BASELINES:
                    keep = self._equal_time(variant, name)
                    if keep is not None:
                        why = " ".join(filter(None, ("equal time of", variant.name, variant.keep)))
                        self._beside(name, keep, why)
            prompt = _TextPrompt(self.loaded, self.batch)
            for number in range(1 - warm_up, runs):  # the first runs were a round of warming up
                alive = [line for line in self.lines.values() if line.error is None]
                first = number % len(alive) if alive else 0
                for line in (*alive[first:], *alive[:first]):
                    self._round(line, counts=number >= 0)
                seconds = prompt.seconds()
                if number >= 0:
                    self.text.append(seconds)
                self.tell(number + warm_up, runs + warm_up - 1)

    def _add(self, variant: Variant, why: str | None) -> Line:
        line = self.lines.setdefault(variant.key, Line(variant, []))
        if why not in line.whys:
            line.whys.append(why)
        return line

    def _first(self, line: Line) -> None:
        try:
            line.books = self.batch.first(line.variant)
        except Exception as error:  # a row that fails is a row with its error
            line.error = _told(error)

    def _round(self, line: Line, *, counts: bool) -> None:
        try:
            found, peak = self.batch.run(line.variant)
        except Exception as error:
            line.error = _told(error)
            return
        if counts:
            line.seconds.append(parts(found.seconds, self.batch.new_tokens))
            line.peak = None if peak is None else max(peak, line.peak or 0)

    def _beside(self, name: str, keep: str, why: str) -> None:
        """A baseline's line with a budget, run once if it is new."""
        made = self._add(Variant(name, keep, named_recipe(name, keep, {}, self.seed)), why)
        if made.books is None and made.error is None:
            self._first(made)

    def _equal_tokens(self, variant: Variant, known: Books) -> str:
        """The budget with which a baseline keeps as many tokens as the method on average over layers."""
        if variant.keep is not None and _keeps(self.sizes, variant.keep) == known.layer_average:
            return variant.keep
        return self._keep(known.layer_average / known.visual_tokens)

    def _equal_time(self, variant: Variant, name: str) -> str | None:
        """The budget with which a baseline's time to first token is nearest to the method's; None if it cannot run."""
        most = max(self.sizes)

        def ratio(k: int) -> float:
            baseline = Variant(name, None, named_recipe(name, self._keep(k / most), {}, self.seed))
            both = [(self._first_token(baseline), self._first_token(variant)) for _ in range(PAIRS)]
            return statistics.median(its / mine for its, mine in both)

        try:
            return self._keep(nearest(ratio, 1, most) / most)
        except VisiontokError:
            return None  # the row of equal tokens says why

    def _first_token(self, variant: Variant) -> float:
        seconds = self.batch.run(variant, 1)[0].seconds
        return seconds.first_token - seconds.preprocess

    @staticmethod
    def _keep(share: float) -> str:
        """The budget that is a share of every picture's tokens."""
        return str(min(max(round(share, 4), 1e-4), 1.0))

    # ------------------------------------------------------------------------------------------------------------ rows

    def rows(self, memory: int | None) -> list[dict[str, Any]]:
        """Every line as plain data; see ``docs/bench.md``."""
        best = self.best_stock()
        return [self._row(line, why, best, memory) for line in self.lines.values() for why in line.whys]

    def best_stock(self) -> Line | None:
        """The stock configuration with the least median time to first token."""
        stock = [line for line in self.lines.values() if line.variant.method == FULL and line.error is None]
        return min(stock, key=lambda line: statistics.median(_column(line, "first_token")), default=None)

    def _row(self, line: Line, why: str | None, best: Line | None, memory: int | None) -> dict[str, Any]:
        variant, known = line.variant, line.books
        row: dict[str, Any] = {
            "method": variant.name,
            "keep": variant.keep,
            "recipe": None if variant.recipe is None else variant.recipe.hash(),
            "configuration": variant.configuration,
            "why": why,
            "visual_tokens": None,
            "layer_average": None,
            "seconds": None,
            "peak_bytes": None,
            "kv_bytes": None,
            "kv_model_bytes": None,
            "requests": None,
            "flops": None,
            "conventions": None,
            "speed_up": None,
            "cap": None,
            "error": line.error,
            "warnings": [],
        }
        if known is None or line.error is not None:
            return row
        requests = len(self.batch.asked)
        ratio = None
        if best is not None:
            ratio = spread([a / b for a, b in zip(*(_column(x, "first_token") for x in (best, line)), strict=True)])
        cap = None if best is None or _shrinks_pictures(variant) else self._cap(best)
        warnings = list(known.warnings)
        if ratio is not None and cap is not None and ratio["median"] > cap:
            warnings.append("the speed-up lies above its cap: the difference is noise of the measurement")
        return row | {
            "visual_tokens": known.visual_tokens,
            "layer_average": known.layer_average,
            "seconds": {name: spread(_column(line, name)) for name in (*PARTS, "with_preprocess")},
            "peak_bytes": line.peak,
            "kv_bytes": known.kv,
            "kv_model_bytes": known.kv_model,
            "requests": concurrent(memory, self.batch.weights, known.kv, requests),
            "flops": known.flops,
            "conventions": known.conventions,
            "speed_up": ratio,
            "cap": cap,
            "warnings": warnings,
        }

    def _cap(self, best: Line) -> float:
        median = {name: statistics.median(_column(best, name)) for name in ("vision", "prefill", "other")}
        return time_to_first_token_cap(
            preprocess=max(median["other"], 0.0),
            vision=median["vision"],
            prefill=median["prefill"],
            prefill_text=min(statistics.median(self.text), median["prefill"]),
        )


class _TextPrompt:
    """The prompts without their visual tokens, for the language model alone."""

    def __init__(self, loaded: Loaded, batch: Batch) -> None:
        inputs = loaded.inputs(*batch.asked)
        text = inputs["attention_mask"].bool() & ~visual(loaded, inputs)
        width = int(text.sum(1).max())
        self._loaded = loaded
        self._mask = torch.zeros(len(text), width, dtype=torch.long, device=text.device)
        ids = self._mask.clone()
        for row, mine in enumerate(text):
            words = inputs["input_ids"][row, mine]
            ids[row, width - len(words) :], self._mask[row, width - len(words) :] = words, 1
        self._embeds = loaded.base.get_input_embeddings()(ids)

    def seconds(self) -> float:
        """Of their prefill."""
        self._loaded.synchronize()
        start = time.perf_counter()
        self._loaded.text(inputs_embeds=self._embeds, attention_mask=self._mask, use_cache=True)
        self._loaded.synchronize()
        return time.perf_counter() - start


def parts(seconds: Seconds, new_tokens: int) -> dict[str, float]:
    """The parts of a row of one run; vision, selection, prefill and other add up to ``first_token``."""
    found = {name: asdict(seconds)[name] for name in ("preprocess", "vision", "selection", "prefill")}
    return found | {
        "other": seconds.rest,
        "first_token": seconds.first_token - seconds.preprocess,
        "with_preprocess": seconds.first_token,
        "decode_token": seconds.decode / (new_tokens - 1),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": median, "low": low, "high": high}


def concurrent(memory: int | None, weights: int, kv: int, requests: int) -> int | None:
    """Requests whose keys and values fit beside the weights, if each needs what one of a batch of ``requests`` has."""
    return None if memory is None else max((memory - weights) * requests // kv, 0)


def _column(line: Line, name: str) -> list[float]:
    return [seconds[name] for seconds in line.seconds]


def _keeps(sizes: Sequence[int], keep: str) -> float | None:
    """Tokens that are left of pictures on average, if the budget fixes it."""
    budget = Budget.parse(keep)
    return float(budget.counts(sizes).double().mean()) if budget.kind in ("tokens", "ratio") else None


def _shrinks_pictures(variant: Variant) -> bool:
    return variant.recipe is not None and any(stage.kind == "pixel" for stage in variant.recipe.stages)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        torch.accelerator.empty_cache()
        return f"out of memory: {text}"
    return text if isinstance(error, VisiontokError) else f"{type(error).__name__}: {text}"
