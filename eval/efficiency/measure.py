"""One way of answering a batch, run once: its times, its memory, and what it cost by the books."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from visiontok.api import compress, compress_inputs
from visiontok.conventions import CONVENTIONS, published_flops
from visiontok.cost import Account, Load, VisionInputs, Widths, account, kv_bytes
from visiontok.errors import UnsupportedError
from visiontok.named import Loaded
from visiontok.stopwatch import Timed, timed

from .requests import text_tokens, visual

if TYPE_CHECKING:
    from visiontok.recipe import Recipe
    from visiontok.report import Report

    from ..runner import Asked

DYNAMIC, STATIC, COMPILED = "dynamic", "static", "compiled"
"""A cache that grows; one allocated for the whole answer; the same with decode steps that ``generate()`` compiles."""


@dataclass(frozen=True)
class Variant:
    """One way of answering.

    Attributes:
        method: a method's name, a recipe's file, or ``full``, the stock model.
        keep: budget as text; None for the method's own, or for none.
        recipe: what is attached; None for the stock model.
        configuration: DYNAMIC, STATIC or COMPILED. In the latter two a recipe makes the inputs shorter, and the stock
            model gets them; in the first it is attached.
    """

    method: str
    keep: str | None
    recipe: Recipe | None
    configuration: str = DYNAMIC

    @property
    def name(self) -> str:
        """The method, without the folder and suffix of a file."""
        return Path(self.method).stem if self.method.endswith((".json", ".yaml", ".yml", ".py")) else self.method

    @property
    def key(self) -> tuple[str, str | None, str]:
        """What no other variant of a batch has."""
        return self.method, self.keep, self.configuration

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.keep, self.configuration)))


@dataclass(frozen=True)
class Books:
    """What is the same in every run.

    Attributes:
        visual_tokens: of the stock model, per request.
        layer_average: visual tokens per request, averaged over all decoder layers.
        kv: bytes that keys, values and a bias per key hold on to behind the last decode step, of all requests.
        kv_model: the same by the cost model; None where a cache stage goes on thinning, or the family is not in it.
        flops: of the prefill of all requests; ``head`` is the language-model head for one token each.
        conventions: what published tables would call their FLOPs, of visual tokens alone.
        warnings: what a reader must know before trusting the numbers.
    """

    visual_tokens: float
    layer_average: float
    kv: int
    kv_model: int | None
    flops: dict[str, int | None]
    conventions: dict[str, int]
    warnings: tuple[str, ...]


class Batch:
    """Answers of forced length to the same requests, over and over.

    Attributes:
        loaded: model and processor.
        asked: the requests.
        new_tokens: length of every answer.
        weights: bytes of the model's parameters and buffers.
    """

    def __init__(self, loaded: Loaded, asked: Sequence[Asked], new_tokens: int) -> None:
        self.loaded, self.asked, self.new_tokens = loaded, asked, new_tokens
        self.weights = weight_bytes(loaded.model)
        self._caches: dict[tuple[str, str | None, str], Any] = {}

    def run(self, variant: Variant, new_tokens: int | None = None) -> tuple[Timed, int | None]:
        """One run, and the most bytes that the device held in it, weights included; None where it does not count.

        Raises:
            ConfigError, UnsupportedError: if the variant cannot run here.
        """
        tokens = self.new_tokens if new_tokens is None else new_tokens
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "return_dict_in_generate": True}
        cache = None
        if variant.configuration != DYNAMIC:
            cache = options["past_key_values"] = self._static(variant)
            options["disable_compile"] = variant.configuration == STATIC
        if variant.configuration == COMPILED:
            options["compile_config"] = transformers.CompileConfig()
            options["compile_config"]._compile_all_devices = True  # it is asked for, on a CPU too
        attached = variant.recipe if variant.configuration == DYNAMIC else None
        shorten = variant.recipe if attached is None else None
        attach = contextlib.nullcontext() if attached is None else compress(self.loaded.model, attached)
        with attach as compression:
            peak = _Peak(self.loaded, self.weights + (0 if cache is None else held(cache)))
            found = timed(self.loaded, self.asked, compression=compression, shorten=shorten, **options)
            return found, peak.read()

    def first(self, variant: Variant) -> Books:
        """The first run of a variant, which compiles what is to be compiled, and the books it leaves.

        Raises:
            ConfigError, UnsupportedError: if the variant cannot run here.
        """
        with _compiling(self.loaded.model) as compiled:
            found, _ = self.run(variant)
        if variant.configuration == COMPILED and not compiled:
            raise UnsupportedError(
                f"{variant}: generate() does not compile decoding of this model, cache or quantisation; it would run "
                "like static"
            )
        return books(self.loaded, variant, found, self.new_tokens)

    def _static(self, variant: Variant) -> Any:
        """The variant's own cache, emptied; of as many places as its prompt and answer need."""
        if variant.key not in self._caches:
            inputs: Any = self.loaded.inputs(*self.asked)
            if variant.recipe is not None:
                inputs = compress_inputs(self.loaded.model, inputs, variant.recipe)
            places = inputs["attention_mask"].shape[1] + self.new_tokens - 1
            self._caches[variant.key] = transformers.StaticCache(self.loaded.model.config, max_cache_len=places)
        cache = self._caches[variant.key]
        cache.reset()
        return cache


@contextlib.contextmanager
def _compiling(model: Any) -> Iterator[list[bool]]:
    """Notes whether ``generate()`` asks for a compiled forward."""
    asked: list[bool] = []
    stock = model.get_compiled_call

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        return stock(*args, **kwargs)

    model.__dict__["get_compiled_call"] = noted
    try:
        yield asked
    finally:
        del model.__dict__["get_compiled_call"]


class _Peak:
    """The allocator's high-water mark of a run; ``own`` bytes of what was there before belong to it."""

    def __init__(self, loaded: Loaded, own: int) -> None:
        self._device = loaded.device
        module: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._module = module if hasattr(module, "max_memory_allocated") else None
        if self._module is not None:
            self._module.reset_peak_memory_stats(self._device)
            self._others = self._module.memory_allocated(self._device) - own

    def read(self) -> int | None:
        if self._module is None:
            return None
        return int(self._module.max_memory_allocated(self._device) - self._others)


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def held(cache: Any) -> int:
    """Bytes of memory that a cache's keys and values hold on to; a view counts as all that it keeps alive.

    A bias per key is counted with them; counters, and the masks of padded rows, one byte per slot, are not.
    """
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    stored = [x.untyped_storage() for x in tensors if x.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())


# ---------------------------------------------------------------------------------------------------------------- books


def books(loaded: Loaded, variant: Variant, found: Timed, new_tokens: int) -> Books:
    """What a run of ``new_tokens`` cost by the books."""
    config, inputs, report = loaded.model.config, found.inputs, found.report
    rows, depth = len(inputs["input_ids"]), Widths.of(config).layers
    stock = visual(loaded, inputs).sum(1).tolist()
    spent = stock_account(loaded, inputs) if report is None else report.account
    loads = [[Load.all(n)] * depth for n in stock] if report is None else visual_loads(report)
    widths = Widths.of(config)
    kinds = {stage.kind for stage in variant.recipe.stages} if variant.recipe is not None else set()
    warnings = [*(report.warnings if report is not None else ()), *spent.not_counted]
    if "cut" in kinds:
        warnings.append("selection inside the language model is counted as prefill")
    return Books(
        visual_tokens=sum(stock) / rows,
        layer_average=sum(load.keys for row in loads for load in row) / depth / rows,
        kv=held(found.output.past_key_values),
        kv_model=None if "cache" in kinds else _kv_model(loaded, found, new_tokens),
        flops=_flops(spent),
        conventions={name: sum(published_flops(name, row, widths) for row in loads) for name in CONVENTIONS},
        warnings=tuple(warnings),
    )


def stock_account(loaded: Loaded, inputs: Mapping[str, Any]) -> Account:
    """FLOPs and bytes of the stock model's prefill."""
    rows, width = inputs["input_ids"].shape
    counts = [width] * Widths.of(loaded.model.config).layers
    return account(
        loaded.model.config,
        VisionInputs.from_call(loaded.model.config, inputs),
        stock=counts,
        kept=counts,
        text=max(text_tokens(loaded, inputs)),
        batch=rows,
        dtype_bytes=loaded.model.dtype.itemsize,
    )


def visual_loads(report: Report) -> list[list[Load]]:
    """Visual tokens of every image in every decoder layer."""
    frozen = [a - b for a, b in zip(report.layer_tokens, report.layer_computed, strict=True)]
    # A layer freezes as many slots of every row; a row with fewer visual tokens freezes all it has.
    return [
        [Load.frozen(n, max(n - still, 0)) for n, still in zip(image.kept, frozen, strict=True)]
        for image in report.images
    ]


def _flops(spent: Account) -> dict[str, int | None]:
    vision = None if spent.vision is None else spent.vision.tower
    projector = None if spent.vision is None else spent.vision.projector
    decoder = None if spent.decoder is None else sum(spent.decoder)
    total = None if vision is None or projector is None or decoder is None else vision + projector + decoder
    return {
        "vision": vision,
        "projector": projector,
        "decoder": decoder,
        "head": spent.lm_head,
        "total": None if total is None else total + spent.lm_head,
    }


def _kv_model(loaded: Loaded, found: Timed, new_tokens: int) -> int | None:
    """Bytes of keys and values of prompt and answer; the last token of the answer has none."""
    rows, width = found.inputs["input_ids"].shape
    config = loaded.model.config
    prompt = [width] * Widths.of(config).layers if found.report is None else list(found.report.layer_tokens)
    try:
        counts = [n + new_tokens - 1 for n in prompt]
        return kv_bytes(config, counts, dtype_bytes=loaded.model.dtype.itemsize, batch=rows)
    except UnsupportedError:
        return None
