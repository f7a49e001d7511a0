"""What published tables call FLOPs: four formulas by name, for schedules as they are quoted.

With n tokens in a layer, width d, MLP width m, key width k and h query heads, a layer costs

* A: `4 n d² + 2 n² d + 2 n d m`, multiply-accumulates of a 2-matrix MLP, which no LLaMA has. FastV (arXiv 2403.06764,
  section 4).
* B: `4 n d² + 2 n² d + 3 n d m`, multiply-accumulates. PyramidDrop, SparseVLM, FitPrune.
* C: `8 n d² + 4 n² d + 6 n d m`, FLOPs, twice B. EntropyPrune, calflops.
* D: `2 n (2 d² + 2 d k + 3 d m) + 4 n² d + 5 h n² + 18 n d`, FLOPs with grouped keys, softmax, norms, residuals and
  activation as LLM-Viewer (arXiv 2402.16363) counts them. AIM, FiCoCo.

All count the full n² and leave out head, tower and projector. Tables by A and B usually count visual tokens only, those
by D the text as well. What is executed is in :mod:`visiontok.cost`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .cost import Load, Widths, kv_bytes, load_flops
from .errors import ConfigError, UnsupportedError

MEANING = {
    "A": "multiply-accumulates, 2-matrix MLP (FastV)",
    "B": "multiply-accumulates (PyramidDrop, SparseVLM, FitPrune)",
    "C": "FLOPs, twice B (EntropyPrune, calflops)",
    "D": "FLOPs with grouped keys, softmax, norms (LLM-Viewer: AIM, FiCoCo)",
}
CONVENTIONS = tuple(MEANING)
_SHAPE = re.compile(r"(single|geometric|linear|concave)@(\d+(?:,\d+)*)(?::(\d+(?:,\d+)*))?")
_ITEM = re.compile(r"(?:(\d+)x)?(kv)?(\d+)(?:>(\d+))?")


def published_flops(convention: str, loads: Sequence[Load], widths: Widths) -> int:
    """A published table's "FLOPs" of the decoder layers.

    Where not every token takes part in everything, each term counts its own: keys and values those with keys, the
    output projection and the MLP those behind the attention. That is FitPrune's variant of B, in which tokens are
    deleted within a layer, and that of ShortV, whose frozen tokens have keys and values and nothing else.

    Args:
        convention: "A", "B", "C" or "D".
        loads: the tokens of each layer.
        widths: of the decoder.

    Returns:
        The sum over layers.

    Raises:
        ConfigError: for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r}: no such FLOPs convention; use one of {', '.join(CONVENTIONS)}")
    _, d, m, kv, heads = widths
    keys, queries, out = (sum(column) for column in zip(*loads, strict=True))
    pairs = sum(load.queries * load.keys for load in loads)
    if convention == "D":
        linear = 2 * d * (d * (queries + out) + 2 * kv * keys + 3 * m * out)
        rest = d * (7 * keys + 11 * out)  # a norm before the attention; another one, two residuals and a gate behind it
        return linear + rest + pairs * (4 * d + 5 * heads)
    matrices = 2 if convention == "A" else 3
    accumulates = d * d * (queries + 2 * keys + out) + matrices * d * m * out + 2 * d * pairs
    return 2 * accumulates if convention == "C" else accumulates


# ------------------------------------------------------------------------------------------------------------ schedules


def parse_schedule(text: str) -> list[Load]:
    """Visual tokens per layer, as tables quote them.

    Args:
        text: `LAYERSxTOKENS` one behind the other, "2x576,30x288"; `LAYERSx` may be left out for one layer.
            "576>513" is a layer that 576 tokens enter and whose attention 513 leave; "kv576" one where 576 tokens have
            keys and values and nothing else.

    Raises:
        ConfigError: for anything else; says which part.
    """
    loads: list[Load] = []
    for part in text.split(","):
        match = _ITEM.fullmatch(part.strip())
        if match is None or (match[2] and match[4]):
            raise ConfigError(
                f"schedule={text!r}: cannot read {part.strip()!r}; write LAYERSxTOKENS, as in 2x576,30x288 (576>513: "
                "dropped behind the attention, kv576: keys and values only)"
            )
        n = int(match[3])
        left = 0 if match[2] else int(match[4] or n)
        if left > n:
            raise ConfigError(f"schedule={text!r}: in {part.strip()!r} more tokens leave than enter; swap them")
        loads += [Load(keys=n, queries=0 if match[2] else n, out=left)] * int(match[1] or 1)
    return loads


def format_schedule(loads: Sequence[Load]) -> str:
    """The form :func:`parse_schedule` reads back."""

    def tokens(load: Load) -> str:
        if not load.queries and load.keys:
            return f"kv{load.keys}"
        return f"{load.keys}" if load.out == load.keys else f"{load.keys}>{load.out}"

    return ",".join(f"{len(list(run))}x{tokens(load)}" for load, run in groupby(loads))


def solve_schedule(
    text: str, n: int, average: float, *, depth: int, start: int = 0, stop: int | None = None
) -> list[Load]:
    """A shape of pruning with the layer average that is wanted; see :mod:`visiontok.schedules`.

    Args:
        text: "single@2", "geometric@8,16,24", "linear@14" (its first layer), or "concave@10,14,16,18:10,5,1" (cuts, and
            tokens after each but the first).
        n: visual tokens of the stock model.
        average: wanted mean, in tokens per layer.
        depth: decoder layers.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Raises:
        ConfigError: for anything else, or an average that the shape cannot have.
    """
    from .allocators import layer_average
    from .schedules import concave, geometric, linear

    match = _SHAPE.fullmatch(text.replace(" ", ""))
    if match is None or (match[1] in ("single", "linear") and "," in match[2]):
        raise ConfigError(
            f"schedule={text!r}: write single@2, geometric@8,16,24, linear@14 or concave@10,14,16,18:10,5,1 for an "
            "average"
        )
    cuts, tail = ([int(x) for x in (part or "").split(",") if x] for part in match.groups()[1:])
    limits: dict[str, Any] = {"depth": depth, "start": start, "stop": stop}
    if match[1] == "linear":
        counts = linear(n, average, first=cuts[0], **limits)
        cuts = list(range(cuts[0], cuts[0] + len(counts)))
    elif match[1] == "concave":
        counts = concave(n, average, cuts=cuts, tail=tail, **limits)
    else:
        counts = (layer_average if match[1] == "single" else geometric)(n, average, cuts=cuts, **limits)
    end = depth if stop is None else stop
    edges = [*cuts, end]
    tokens = [0] * start + [n] * (cuts[0] - start)
    for count, (a, b) in zip(counts, pairwise(edges), strict=True):
        tokens += [count] * (b - a)
    return [Load.all(count) for count in tokens + [0] * (depth - end)]


# --------------------------------------------------------------------------------------------------------------- models


def _decoder(family: str, layers: int, d: int, m: int, heads: int, kv_heads: int) -> SimpleNamespace:
    return SimpleNamespace(
        model_type=family,
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=m,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


_VICUNA_7B, _VICUNA_13B = _decoder("llama", 32, 4096, 11008, 32, 32), _decoder("llama", 40, 5120, 13824, 40, 40)
_QWEN2_7B = _decoder("qwen2", 28, 3584, 18944, 28, 4)
DECODERS: dict[str, Any] = {
    "llava-1.5-7b": _VICUNA_7B,
    "llava-1.5-13b": _VICUNA_13B,
    "llava-next-7b": _VICUNA_7B,
    "llava-next-13b": _VICUNA_13B,
    "llava-onevision-7b": _QWEN2_7B,
    "qwen2-vl-7b": _QWEN2_7B,
    "qwen2.5-vl-3b": _decoder("qwen2", 36, 2048, 11008, 16, 2),
    "qwen2.5-vl-7b": _QWEN2_7B,
}
"""Language models of published tables, as configurations."""


def decoder_config(model: str) -> Any:
    """The configuration of a language model.

    Args:
        model: a name in `DECODERS`, or a folder with a config.json, or such a file.

    Raises:
        ConfigError: if it is neither.
    """
    if model in DECODERS:
        return DECODERS[model]
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"model={model!r}: no folder with a config.json; give one, or one of {', '.join(DECODERS)}")
    from transformers import AutoConfig

    try:
        kind = json.loads(file.read_text())["model_type"]
        return AutoConfig.for_model(kind).from_dict(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model={model!r}: {file} is no model configuration ({error}); give another one") from error


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Bill:
    """What a schedule costs in the decoder layers.

    Attributes:
        schedule: as :func:`parse_schedule` reads it.
        layer_average: visual tokens per layer.
        published: by convention.
        exact: FLOPs that are executed; None where the cost model does not know the family.
        kv: bytes of keys and values, 2 per number; None likewise.
    """

    schedule: str
    layer_average: float
    published: dict[str, int]
    exact: int | None
    kv: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def bill(config: Any, loads: Sequence[Load], *, text: int = 0, conventions: Sequence[str] = CONVENTIONS) -> Bill:
    """What a schedule costs by published conventions, and exactly.

    Args:
        config: of the model.
        loads: visual tokens of each layer.
        text: text tokens, which every layer sees whole.
        conventions: which ones.

    Raises:
        ConfigError: if there are more or fewer layers than in the model, or ``text`` is negative.
        UnsupportedError: if the config describes no decoder.
    """
    widths = Widths.of(config)
    if len(loads) != widths.layers:
        raise ConfigError(
            f"schedule={format_schedule(loads)!r}: has {len(loads)} layers, the model {widths.layers}; name every one"
        )
    if text < 0:
        raise ConfigError(f"text={text}: give a number of tokens, at least 0")
    whole = [Load(*(n + text for n in load)) for load in loads]
    exact: int | None = None
    kv: int | None = None
    try:
        exact = sum(load_flops(config, whole))
        kv = kv_bytes(config, [load.keys for load in whole])
    except UnsupportedError:
        pass  # the formulas need no more than the widths
    return Bill(
        schedule=format_schedule(loads),
        layer_average=sum(load.keys for load in loads) / len(loads),
        published={name: published_flops(name, whole, widths) for name in conventions},
        exact=exact,
        kv=kv,
    )
