"""What an attached recipe costs the host, measured on a LLaVA that computes next to nothing.

With 32 decoder layers of width 8 that only attend, a forward is nothing but Python and dispatch, so that what a recipe
adds shows. Every case has a copy of the model and a cache of its own, and stands beside a stock copy whose cache stores
as many tokens per row, on average over the layers. Both decode the same steps, one right after the other and in turns
first; what is reported is the median of the differences, in the CPU time of this thread, which leaves out what other
processes take. The first case is a second stock copy: what it differs by is noise.

    python bench/overhead.py --check --out bench/results/overhead.md
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as T
from prefill import machine
from torch import nn

from visiontok import Budget, Mass, Recipe, compress
from visiontok.method import Stage
from visiontok.recipes import find

IMAGE_ID, WORDS, STEPS_TO_SETTLE = 60, 60, 4
PROMPT_BAR, LAYER_BAR = 1.0, 5.0  # µs per layer and decode step
IMAGES = {"alone": (1,), "ragged": (2, 1)}  # images of each row; rows with fewer are left padded


@dataclass(frozen=True)
class Case:
    """A recipe in a batch; None for the stock model."""

    recipe: str | None
    batch: str

    @property
    def name(self) -> str:
        return f"{self.recipe or 'stock'}, {self.batch}"


@dataclass
class Samples:
    """CPU seconds of stock and case, side by side; ``decode`` by hand, ``generate`` within it, ``prefill`` as a whole.

    Attributes:
        stored: tokens per row that the stock cache holds, and the recipe's on average over the layers.
        hooked: decoder layers in which the recipe has a hook.
    """

    prefill: list[tuple[float, float]] = field(default_factory=list)
    decode: list[tuple[float, float]] = field(default_factory=list)
    generate: list[tuple[float, float]] = field(default_factory=list)
    stored: tuple[int, ...] = ()
    hooked: int = 0


def build(layers: int) -> T.LlavaForConditionalGeneration:
    """A random LLaVA of width 8 with 16 visual tokens, in float32 and evaluation mode.

    Its decoder layers are emptied of projections, norms and MLPs: what is left is attention, cache and calls.
    """
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "eos_token_id": None,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 8,
    }
    model = T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_ID)
    )
    for layer in layers_of(model):
        for part in ("input_layernorm", "post_attention_layernorm", "mlp"):
            setattr(layer, part, nn.Identity())
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, part, nn.Identity())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def recipes(layers: int) -> dict[str | None, Recipe | None]:
    """None for the control; the others by name, prompt-only ones first."""

    def prompt(**extra: Any) -> Stage:
        return Stage(kind="prompt", method=find("divprune").build({}), keep=Budget.tokens(4), **extra)

    def cut(layer: int, keep: int, **extra: Any) -> Stage:
        return Stage(kind="cut", layer=layer, method=find("fastv").build({}), keep=Budget.tokens(keep), **extra)

    quarter = layers // 4
    return {
        None: None,
        "prompt": Recipe(stages=(prompt(),)),
        "cut": Recipe(stages=(cut(quarter, 4),)),
        "pyramid": Recipe(stages=tuple(cut(i * quarter, 16 >> i) for i in (1, 2, 3))),
        "inject and exit": Recipe(
            stages=(Stage(kind="inject", layer=quarter), Stage(kind="exit", layer=3 * quarter), prompt())
        ),
        "prompt, mass": Recipe(stages=(prompt(mass=Mass()),)),
        "cut, mass": Recipe(stages=(cut(quarter, 4, mass=Mass()),)),
    }


def layer_hooks(model: nn.Module) -> int:
    """Decoder layers with a hook, on themselves or in a module of theirs."""
    return sum(any(m._forward_pre_hooks or m._forward_hooks for m in layer.modules()) for layer in layers_of(model))


def inputs(rows: Sequence[Sequence[int]], images: int) -> dict[str, torch.Tensor]:
    """Prompts, left padded to the longest; pixels for ``images``, if any. No mask where there is no padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    out: dict[str, torch.Tensor] = {"input_ids": ids}
    if any(len(row) < width for row in rows):
        out["attention_mask"] = torch.tensor([[int(i >= width - len(row)) for i in range(width)] for row in rows])
    if images:
        out["pixel_values"] = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return out


def with_images(counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """One row per entry: so many images, each with text before it, and a question."""
    rows = [[*([1, 2, *[IMAGE_ID] * 16] * n), 3, 4, 5, 6] for n in counts]
    return inputs(rows, sum(counts))


class Side:
    """A model with a running decode.

    Args:
        model: stock, or with a recipe attached.
        given: what its prefill gets.
    """

    def __init__(self, model: Any, given: dict[str, torch.Tensor]) -> None:
        self.model, self.given = model, given

    def prefill(self) -> float:
        """CPU seconds of the whole forward, tower included; starts the decode anew."""
        start = time.thread_time()
        output = self.model(**self.given, use_cache=True)
        seconds = time.thread_time() - start
        self.cache, self.mask = output.past_key_values, self.given.get("attention_mask")
        self.token = torch.ones(len(self.given["input_ids"]), 1, dtype=torch.long)
        return seconds

    def step(self) -> float:
        """CPU seconds of one more token."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.token)], 1)
        start = time.thread_time()
        self.model(input_ids=self.token, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        return time.thread_time() - start

    def generate(self, steps: int) -> list[float]:
        """CPU seconds between the tokens that ``generate()`` makes."""
        clock = Stopwatch()
        self.model.generate(**self.given, max_new_tokens=steps + 1, do_sample=False, streamer=clock)
        return clock.between()


class Stopwatch:
    """A streamer that notes when tokens come; several rows are no trouble to it."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, and then one call per step."""
        self.marks.append(time.thread_time())

    def end(self) -> None:
        """Nothing is kept back."""

    def between(self) -> list[float]:
        """CPU seconds of each decode step: prompt and first token are of the prefill."""
        return [b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False)]


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, not within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def pair(model: Any, case: Case, recipe: Recipe | None, into: Samples) -> tuple[Side, Side, Side]:
    """Stock on the same inputs, stock with a cache of the stored length, and the case."""
    given = with_images(IMAGES[case.batch])
    mine = copy.deepcopy(model)
    stored = tuple(int(n) for n in given.get("attention_mask", torch.ones_like(given["input_ids"])).sum(1))
    if recipe is not None:
        attached = compress(mine, recipe)
        mine(**given, use_cache=True)
        kept = torch.stack([alive.sum(1) for alive in map(attached.ledger.alive, range(len(layers_of(mine))))])
        stored = tuple(kept.float().mean(0).round().int().tolist())
    into.stored, into.hooked = stored, layer_hooks(mine)
    short = given if recipe is None else inputs([[1 + i % (WORDS - 1) for i in range(n)] for n in stored], 0)
    return Side(model, given), Side(copy.deepcopy(model), short), Side(mine, given)


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers."""
    return model.model.language_model.layers


@torch.inference_mode()
def rounds(layers: int, todo: Sequence[Case], runs: int, steps: int) -> dict[str, Samples]:
    """Per round every case's prefill, ``steps`` decode steps by hand, interleaved step by step, and as many within
    ``generate()``; the first round warms up and does not count."""
    model, known = build(layers), recipes(layers)
    samples = {case.name: Samples() for case in todo}
    sides = {case.name: pair(model, case, known[case.recipe], samples[case.name]) for case in todo}
    for number in range(-1, runs):
        first = number % len(todo)
        for name in [case.name for case in (*todo[first:], *todo[:first])]:
            full, short, mine = sides[name]
            round_ = Samples()
            with no_collection():
                round_.prefill += _both(full.prefill, mine.prefill, number)
                short.prefill()
                for step in range(steps + STEPS_TO_SETTLE):
                    times = _both(short.step, mine.step, step)
                    round_.decode += times if step >= STEPS_TO_SETTLE else []
                a, b = (side.generate(steps + STEPS_TO_SETTLE)[STEPS_TO_SETTLE:] for side in (short, mine))
                round_.generate += zip(a, b, strict=True)
            if number >= 0:
                for kind in ("prefill", "decode", "generate"):
                    getattr(samples[name], kind).extend(getattr(round_, kind))
    return samples


def _both(stock: Any, mine: Any, turn: int) -> list[tuple[float, float]]:
    """Both once, the other one first each turn."""
    if turn % 2:
        a = stock()
        return [(a, mine())]
    b = mine()
    return [(stock(), b)]


def added(pairs: Sequence[tuple[float, float]], layers: int) -> dict[str, float]:
    """Of the differences in µs: the median, per layer the median and the quartiles; and the stock median."""
    differences = [1e6 * (b - a) for a, b in pairs]
    low, middle, high = statistics.quantiles(differences, n=4, method="inclusive")
    return {
        "stock": statistics.median(1e6 * a for a, _ in pairs),
        "total": middle,
        "per_layer": middle / layers,
        "low": low / layers,
        "high": high / layers,
    }


def summarise(samples: dict[str, Samples], todo: Sequence[Case], layers: int) -> dict[str, Any]:
    """What every case adds, and the bars."""
    rows: dict[str, Any] = {}
    bars: list[dict[str, Any]] = []
    for case in todo:
        s = samples[case.name]
        rows[case.name] = {
            "stored": s.stored,
            "hooked": s.hooked,
            **{kind: added(getattr(s, kind), layers) for kind in ("decode", "generate", "prefill")},
        }
        if case.recipe is None:
            continue
        prompt_only = case.recipe == "prompt"
        if prompt_only:
            bars.append({"what": f"{case.name}: layers with a hook", "limit": 0, "value": s.hooked})
        for kind, what in (("decode", "by hand"), ("generate", "in generate()")):
            bars.append(
                {
                    "what": f"{case.name}: µs per layer and step, {what}",
                    "limit": PROMPT_BAR if prompt_only else LAYER_BAR,
                    "value": rows[case.name][kind]["per_layer"],
                }
            )
    return {"cases": rows, "bars": bars}


def holds(bar: dict[str, Any]) -> bool:
    """Whether the value is within the limit."""
    return bool(bar["value"] <= bar["limit"])


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# Host overhead: {result['model']}",
        "",
        f"* Command: `{result['command']}`",
        f"* Machine: {result['machine']}",
        f"* {result['rounds']} rounds of {result['steps']} decode steps by hand and within `generate()`, each beside a",
        "  stock step on a cache that stores as many tokens. CPU time of the thread in µs: the median of the paired",
        "  differences, divided by the decoder layers, with its quartiles; and the whole, with what stock takes.",
        "* *alone* is one prompt with one image; *ragged* is one with two images and one with one, left padded.",
        "* The first row of each batch is a second stock copy: what it shows is noise.",
        "* Prefill is the whole forward, tower included, beside stock on the same inputs; it has no bar.",
        "",
        "| case | stored | hooked layers | decode, per layer | whole | in generate() | prefill, per layer | whole |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["cases"].items():
        stored = " + ".join(map(str, row["stored"]))
        cells = [name, stored, str(row["hooked"]), _layer(row["decode"]), _whole(row["decode"])]
        cells += [_layer(row["generate"]), _layer(row["prefill"]), _whole(row["prefill"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| bar | limit | measured | |", "|---|--:|--:|---|"]
    for bar in result["bars"]:
        lines.append(
            f"| {bar['what']} | {bar['limit']:g} | {bar['value']:.1f} | {'holds' if holds(bar) else 'MISSED'} |"
        )
    return "\n".join(lines) + "\n"


def _layer(row: dict[str, float]) -> str:
    return f"{row['per_layer']:.1f} ({row['low']:.1f}–{row['high']:.1f})"


def _whole(row: dict[str, float]) -> str:
    return f"{row['total']:.0f} on {row['stock']:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if ``--check`` finds a bar missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=8, help="rounds, 2 or more (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write the result to, beside printing it")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # nothing here is worth a second one, and only this one's time is read
    todo = [Case(name, batch) for batch in IMAGES for name in recipes(args.layers)]
    samples = rounds(args.layers, todo, args.runs, args.steps)
    result = {
        "model": f"random LLaVA, {args.layers} layers × 8, 16 visual tokens per image",
        "command": shlex.join(["python", "bench/overhead.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "rounds": args.runs,
        "steps": args.steps,
        **summarise(samples, todo, args.layers),
    }
    output = json.dumps(result, indent=2) + "\n" if args.json else table(result)
    print(output, end="")
    if args.out is not None:
        args.out.write_text(output)
    return 1 if args.check and not all(map(holds, result["bars"])) else 0


if __name__ == "__main__":
    sys.exit(main())
