"""What a recipe costs and saves in batches: equal rows, left-padded rows, and rows that keep different counts.

Everything runs on one random LLaVA without head, beside the stock model on the same inputs and beside the stock model
on prompts of text that are as long, row by row, as what the recipe leaves on average over the layers. All cases of a
batch are timed in every round, beginning with another one each round; in CPU time of one thread, which leaves out what
other processes take.

    python bench/batches.py --out bench/results/batches.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as T
from prefill import IMAGE_ID, build, machine, ratio

from visiontok import Context, Recipe, compress
from visiontok.api import Callback, Compression
from visiontok.method import Stage

FULL = "stock"
SLOWER, DEARER = 1.0, 1.10  # × stock on the same inputs, × stock at the kept length: what counts as a negative


@dataclass(frozen=True)
class Batch:
    """Rows of one image and some text.

    Attributes:
        name: in the table.
        text: text tokens of each row; shorter rows are left padded.
        pad: padding in front of the longest.
        kept: visual tokens that each row keeps.
    """

    name: str
    text: tuple[int, ...]
    kept: tuple[int, ...]
    pad: int = 0


@dataclass
class Samples:
    """CPU seconds of one case, one entry per round; ``tokens`` of each row, ``slots`` of all: average over layers."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    slots: float = 0.0


def batches(text: int, keep: int, rows: int) -> list[Batch]:
    """One row and several; spread over them, text lengths and counts have the same mean as without."""
    spread = [-0.75 + 1.5 * row / (rows - 1) for row in range(rows)]
    texts = tuple(round(text * (1 + x)) for x in spread)
    counts = tuple(round(keep * (1 + x)) for x in spread)
    return [
        Batch("1 row", (text,), (keep,)),
        Batch("1 row, left padded", (text,), (keep,), pad=text),
        Batch(f"{rows} equal rows", (text,) * rows, (keep,) * rows),
        Batch(f"{rows} rows, left padded", texts, (keep,) * rows),
        Batch(f"{rows} rows, ragged counts", (text,) * rows, counts),
    ]


def recipes(batch: Batch, cut: int) -> dict[str, Recipe]:
    """One that selects before the language model and one that cuts between two layers, by length of the tokens."""

    def longest(ctx: Context) -> torch.Tensor:
        place = ctx.features.norm(dim=-1).masked_fill(~ctx.valid, -1).argsort(1, descending=True).argsort(1)
        return place < torch.tensor(batch.kept)[:, None]

    method = Callback(longest)
    return {
        "prompt": Recipe(stages=(Stage(kind="prompt", method=method),)),
        f"cut at {cut}": Recipe(stages=(Stage(kind="cut", layer=cut, method=method),)),
    }


def prompts(lengths: Sequence[int], visual: int, pad: int) -> dict[str, torch.Tensor]:
    """Ids and mask of rows with ``lengths`` text tokens and ``visual`` visual ones; no mask where nothing is padded."""
    width = max(lengths) + visual + pad
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, text in enumerate(lengths):
        words = torch.arange(1, text + 1)
        before = min(2, text - 1)
        ids[row, width - text - visual :] = torch.cat([words[:before], torch.full((visual,), IMAGE_ID), words[before:]])
        mask[row, width - text - visual :] = 1
    return {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def measure(
    model: T.LlavaModel, given: dict[str, torch.Tensor], pixels: Any, recipe: Recipe | None, steps: int, into: Samples
) -> None:
    """One prefill without its tower, and the median of ``steps`` decode steps behind it."""
    with nullcontext() if recipe is None else compress(model, recipe) as compression:
        picture = {}
        if pixels is not None:
            picture["mm_encoder_outputs"] = {"image": model.get_image_features(pixel_values=pixels, return_dict=True)}
        start = time.thread_time()
        output = model(**given, use_cache=True, **picture)
        into.prefill.append(time.thread_time() - start)
        ids, mask = given["input_ids"], given.get("attention_mask")
        attended = torch.ones_like(ids) if mask is None else mask
        into.tokens, into.slots = tuple(attended.sum(1).tolist()), float(ids.shape[1])
        if isinstance(compression, Compression):
            ledger = compression.ledger
            alive = [ledger.alive(layer).sum(1).float() for layer in range(len(model.language_model.layers))]
            into.tokens = tuple(torch.stack(alive).mean(0).round().int().tolist())
            into.slots = statistics.mean(ledger.tokens())
        cache, token, seconds = output.past_key_values, torch.ones(len(ids), 1, dtype=torch.long), []
        for _ in range(steps):
            mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], 1)
            start = time.thread_time()
            model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            seconds.append(time.thread_time() - start)
        into.decode.append(statistics.median(seconds))


def rounds(model: T.LlavaModel, batch: Batch, cut: int, runs: int, steps: int) -> dict[str, Samples]:
    """Stock, every recipe and stock at its kept length, ``runs`` times after one round that does not count."""
    vision = model.config.vision_config
    visual = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(batch.text), 3, vision.image_size, vision.image_size, generator=generator)
    given = prompts(batch.text, visual, batch.pad)
    todo: dict[str, tuple[Any, Any, Recipe | None]] = {FULL: (given, pixels, None)}
    for name, recipe in recipes(batch, cut).items():
        probe = Samples()
        measure(model, given, pixels, recipe, 1, probe)
        todo[name] = given, pixels, recipe
        todo[at_kept_length(name)] = prompts(probe.tokens, 0, 0), None, None
    samples = {name: Samples() for name in todo}
    names = list(todo)
    for number in range(-1, runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measure(model, *todo[name], steps, samples[name] if number >= 0 else Samples())
    return samples


def at_kept_length(name: str) -> str:
    """The stock case beside a recipe."""
    return f"{FULL} as short as {name}"


def summarise(samples: dict[str, Samples]) -> dict[str, Any]:
    """Medians and ratios of every case of a batch."""
    full, rows = samples[FULL], {}
    for name, s in samples.items():
        short = samples.get(at_kept_length(name))
        rows[name] = {"tokens": s.tokens, "slots": s.slots, "filled": statistics.mean(s.tokens) / s.slots}
        for kind in ("prefill", "decode"):
            mine = getattr(s, kind)
            rows[name][kind] = {
                "median": statistics.median(mine),
                "to_full": ratio(mine, getattr(full, kind)),
                "to_kept_length": None if short is None else ratio(mine, getattr(short, kind)),
            }
    return rows


def negatives(result: dict[str, Any]) -> list[str]:
    """A line for everything that is slower than stock, or much slower than stock at the kept length."""
    lines = []
    for batch, rows in result["batches"].items():
        for name, row in rows.items():
            for kind in ("prefill", "decode"):
                full, kept = row[kind]["to_full"]["paired"], row[kind]["to_kept_length"]
                if kept is None:
                    continue
                if full > SLOWER:
                    lines.append(f"{batch}, {name}: {kind} is slower than stock ({full:.2f} ×)")
                if kept["paired"] > DEARER:
                    lines.append(f"{batch}, {name}: {kind} costs {kept['paired']:.2f} × stock at the kept length")
    return lines


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# Batches: {result['model']}",
        "",
        f"* Command: `{result['command']}`",
        f"* Machine: {result['machine']}",
        f"* {result['rounds']} interleaved rounds. Medians of one thread's CPU time in ms: a prefill without its",
        "  tower, and a decode step. In `a / b`, a is the ratio of medians and b the median of the ratios in a round.",
        "* *Slots* is what a layer computes per row, averaged over the layers; *filled* is the share that is a token.",
        "  A batch is as wide as its longest row: what is not filled is paid for and lost, in stock too.",
        "",
        "| batch | case | slots | filled | prefill | × stock | × kept length | decode | × stock | × kept length |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for batch, rows in result["batches"].items():
        for name, row in rows.items():
            cells = [batch, name, f"{row['slots']:.0f}", f"{row['filled']:.2f}"]
            for kind in ("prefill", "decode"):
                r = row[kind]
                cells += [f"{1e3 * r['median']:.1f}", _ratios(r["to_full"]), _ratios(r["to_kept_length"])]
            lines.append(f"| {' | '.join(cells)} |")
    found = negatives(result)
    lines += ["", "Negatives, by the median of the ratios within a round:" if found else "No negatives.", ""]
    return "\n".join([*lines, *(f"* {line}" for line in found)]).rstrip() + "\n"


def _ratios(pair: dict[str, float] | None) -> str:
    return "–" if pair is None else f"{pair['medians']:.2f} / {pair['paired']:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="its attention heads (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=168, help="pixels along a side (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--text", type=int, default=24, help="text tokens of a prompt (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=36, help="visual tokens kept per image (default: %(default)s)")
    parser.add_argument("--cut", type=int, default=2, help="layer of the cut (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="decode steps per round (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write the result to, beside printing it")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # only this one's time is read
    tower = {"tower_layers": 2, "tower_hidden": 64, "image_size": args.image_size}
    model = build(args.layers, args.hidden, heads=args.heads, **tower)
    tiny = build(2, 32, heads=1, tower_layers=2, tower_hidden=32, image_size=56)
    done = {
        batch.name: summarise(rounds(model, batch, args.cut, args.runs, args.steps))
        for batch in batches(args.text, args.keep, args.rows)
    }
    done["tiny model, 1 row"] = summarise(rounds(tiny, Batch("tiny", (args.text,), (4,)), 1, args.runs, args.steps))
    result = {
        "model": f"random LLaVA, {args.layers} layers × {args.hidden}, {(args.image_size // 14) ** 2} visual tokens of "
        f"which {args.keep} are kept, {args.text} text tokens; tiny: 2 layers × 32, 4 of 16 kept",
        "command": shlex.join(["python", "bench/batches.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "rounds": args.runs,
        "batches": done,
    }
    output = json.dumps(result, indent=2) + "\n" if args.json else table(result)
    print(output, end="")
    if args.out is not None:
        args.out.write_text(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
