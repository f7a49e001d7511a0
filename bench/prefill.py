"""What a recipe costs and saves in the language model's prefill, measured on a random LLaVA.

Every case is timed in every round, one after the other, beginning with another one each round, so that a slower minute
of the machine hits all of them. Each measurement is what ``generate()`` does: the vision tower encodes the picture,
then the base model runs with ``mm_encoder_outputs``. The first is timed as *tower*, the second as *prefill*: with a
recipe attached it holds everything visiontok does in the call, selection included.

    python bench/prefill.py --check --out bench/results/prefill.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from visiontok import __version__, compress
from visiontok.api import Compression
from visiontok.cost import decoder_flops, speed_up

IMAGE_ID = 31999
OTHERS = ("cls_topk", "hiprune", "idpruner", "fastv", "vtw")
FULL, KEPT, TEXT, IDENTITY = "stock, full prompt", "stock, kept length", "stock, text only", "keep=1.0"
PREFILL_BAR, IDENTITY_BAR = 1.10, 1.03


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in the table.
        visual: visual tokens in the prompt; all that the tower makes, or 0 for a prompt of text.
        text: text tokens in the prompt.
        method: attached method, or None for the stock model.
        keep: its budget; None for methods that have none.
    """

    name: str
    visual: int
    text: int
    method: str | None = None
    keep: int | float | None = None


@dataclass
class Samples:
    """Seconds of one case, one entry per round, and what the case left of the picture.

    Attributes:
        tower: vision tower and projector.
        prefill: base model without the tower.
        selection: part of ``prefill`` spent in selecting before the first layer; empty for the stock model.
        layer_tokens: tokens each decoder layer computes, text included.
    """

    tower: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    layer_tokens: tuple[int, ...] = ()


def build(
    layers: int = 16,
    hidden: int = 1024,
    *,
    heads: int = 16,
    tower_layers: int = 24,
    tower_hidden: int = 512,
    image_size: int = 336,
    patch_size: int = 14,
) -> T.LlavaModel:
    """A random LLaVA without head: CLIP tower, projector and Llama, in float32 and evaluation mode.

    Args:
        layers: decoder layers.
        hidden: width of the language model; its gated MLP is 11/4 as wide.
        heads: attention heads of the language model.
        tower_layers: layers of the tower, CLIP-L's 24 by default.
        tower_hidden: width of the tower, half of CLIP-L's by default; the tower is timed apart.
        image_size: pixels along a side.
        patch_size: pixels along a side of a patch.
    """
    torch.manual_seed(0)
    config = T.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": tower_hidden,
            "intermediate_size": 4 * tower_hidden,
            "num_hidden_layers": tower_layers,
            "num_attention_heads": max(1, tower_hidden // 64),
            "image_size": image_size,
            "patch_size": patch_size,
            "projection_dim": tower_hidden,
        },
        vision_feature_layer=-2,
        image_token_id=IMAGE_ID,
    )
    return T.LlavaModel(config).eval()


def cases(visual: int, text: int, keep: int, method: str) -> list[Case]:
    """Stock at three lengths, ``method`` at ``keep`` tokens and at all of them, and the other methods at ``keep``.

    What a bar compares stands side by side, so that it is timed within seconds. VTW takes no budget: its layer fixes
    what is dropped.
    """
    others = [Case(name, visual, text, name, None if name == "vtw" else keep) for name in OTHERS if name != method]
    return [
        Case(FULL, visual, text),
        Case(IDENTITY, visual, text, method, 1.0),
        Case(KEPT, 0, keep + text),
        Case(method, visual, text, method, keep),
        Case(TEXT, 0, text),
        *others,
    ]


def prompt(case: Case) -> torch.Tensor:
    """(1, N) token ids: a few words, the picture, the question."""
    words = torch.arange(1, case.text + 1)
    before = min(5, case.text - 1)
    return torch.cat([words[:before], torch.full((case.visual,), IMAGE_ID), words[before:]])[None]


@torch.inference_mode()
def measure(model: T.LlavaModel, case: Case, pixels: torch.Tensor, into: Samples) -> None:
    """Tower and prefill once; the tower runs for prompts of text too, so that every case finds the same caches."""
    ids = prompt(case)
    attached = nullcontext() if case.method is None else compress(model, case.method, keep=case.keep)
    with attached as compression:
        start = time.perf_counter()
        encoded = model.get_image_features(pixel_values=pixels, return_dict=True)
        into.tower.append(time.perf_counter() - start)
        picture: dict[str, Any] = {"mm_encoder_outputs": {"image": encoded}} if case.visual else {}
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **picture)
        into.prefill.append(time.perf_counter() - start)
        into.layer_tokens = (ids.shape[1],) * len(model.language_model.layers)
        if isinstance(compression, Compression):
            report = compression.report
            into.layer_tokens = report.layer_tokens
            into.selection.append(report.seconds["selection"] or 0.0)


def rounds(model: T.LlavaModel, todo: Sequence[Case], runs: int, warmup: int = 1) -> dict[str, Samples]:
    """Measure all cases ``runs`` times after ``warmup`` rounds that do not count, interleaved."""
    vision = model.config.vision_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    kept = {case.name: Samples() for case in todo}
    for number in range(-warmup, runs):
        first = number % len(todo)
        for case in (*todo[first:], *todo[:first]):
            measure(model, case, pixels, kept[case.name] if number >= 0 else Samples())
    return kept


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """``a`` over ``b``: the ratio of their medians, and the median of the ratios of each round."""
    return {
        "medians": statistics.median(a) / statistics.median(b),
        "paired": statistics.median(x / y for x, y in zip(a, b, strict=True)),
    }


def summarise(config: Any, samples: dict[str, Samples], text: int, method: str) -> dict[str, Any]:
    """Medians, ranges and ratios of every case, the bars and whether they hold.

    Args:
        config: of the model.
        samples: by name of the case.
        text: text tokens of the prompt.
        method: the one the bars are about.
    """
    full, kept = samples[FULL], samples[KEPT]
    flops = {name: sum(decoder_flops(config, s.layer_tokens)) for name, s in samples.items()}
    median = statistics.median
    rows: dict[str, Any] = {}
    for name, s in samples.items():
        row = rows[name] = {
            "visual_layer_average": statistics.mean(s.layer_tokens) - text,
            "flops_ratio": flops[name] / flops[FULL],
            "tower": _spread(s.tower),
            "prefill": _spread(s.prefill),
            "selection": median(s.selection) if s.selection else None,
            "to_full": ratio(s.prefill, full.prefill),
            "to_kept_length": ratio(s.prefill, kept.prefill),
            "time_to_first_token": None,
        }
        if s.selection:
            row["time_to_first_token"] = speed_up(
                vision_stock=median(full.tower),
                vision=median(s.tower),
                prefill_stock=median(full.prefill),
                prefill=median(s.prefill),
                prefill_text=median(samples[TEXT].prefill),
            ).to_dict()
    compressed, identity = rows[method]["to_kept_length"], rows[IDENTITY]["to_full"]
    return {
        "cases": rows,
        "bars": [
            {"what": f"{method}, selection included, to stock at the kept length", "limit": PREFILL_BAR, **compressed},
            {"what": f"{method} at keep=1.0 to stock at full length", "limit": IDENTITY_BAR, **identity},
        ],
    }


def holds(bar: dict[str, Any]) -> bool:
    """Whether the ratio of the medians is within the limit."""
    return bool(bar["medians"] <= bar["limit"])


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def machine() -> str:
    """Processor, cores, threads used, versions, date and load."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores; float32, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread(s); Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {T.__version__}, visiontok {__version__}; {time.strftime('%Y-%m-%d', time.gmtime())}, "
        f"load average {os.getloadavg()[0]:.1f} at the end"
    )


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["cases"]
    cap = next(r["time_to_first_token"]["cap"] for r in rows.values() if r["time_to_first_token"])
    lines = [
        f"# Prefill: {result['model']}",
        "",
        f"* Command: `{result['command']}`",
        f"* Machine: {result['machine']}",
        f"* {result['rounds']} interleaved rounds. Times are medians (min–max) in ms. In `a / b`, a is the ratio of",
        "  the medians and b the median of the ratios within a round.",
        "* Prefill is the base model without its tower; with a recipe, all of visiontok's work is in it. *Selection*",
        "  is the part of it before the first layer; FastV and VTW work between layers.",
        f"* TTFT is the speed-up of tower + prefill over stock; dropping all visual tokens for free gives {cap:.2f}.",
        "  The tower here is random and narrower than CLIP-L: read it as arithmetic, not as a promise.",
        "",
        "| case | visual tokens¹ | FLOPs² | tower | prefill | selection | × full | × kept length | TTFT |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        selection, first = row["selection"], row["time_to_first_token"]
        cells = [
            name,
            f"{row['visual_layer_average']:.0f}",
            f"{row['flops_ratio']:.3f}",
            _ms(row["tower"]),
            _ms(row["prefill"]),
            "–" if selection is None else f"{selection * 1e3:.1f}",
            _ratios(row["to_full"]),
            _ratios(row["to_kept_length"]),
            "–" if first is None else f"{first['time_to_first_token']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "¹ average over all decoder layers. ² of the decoder layers, to stock at full length (`visiontok.cost`).",
        "",
        "| bar | limit | ratio of medians | median of ratios | |",
        "|---|--:|--:|--:|---|",
    ]
    for bar in result["bars"]:
        verdict = "holds" if holds(bar) else "MISSED"
        lines.append(f"| {bar['what']} | {bar['limit']} | {bar['medians']:.3f} | {bar['paired']:.3f} | {verdict} |")
    return "\n".join(lines) + "\n"


def _ms(spread: dict[str, float]) -> str:
    return "{:.0f} ({:.0f}–{:.0f})".format(*(1e3 * spread[k] for k in ("median", "min", "max")))


def _ratios(pair: dict[str, float]) -> str:
    return f"{pair['medians']:.3f} / {pair['paired']:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if ``--check`` finds a bar missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the language model (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="its attention heads (default: %(default)s)")
    parser.add_argument("--tower-layers", type=int, default=24, help="layers of the tower (default: %(default)s)")
    parser.add_argument("--tower-hidden", type=int, default=512, help="width of the tower (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=336, help="pixels along a side (default: %(default)s)")
    parser.add_argument("--text", type=int, default=40, help="text tokens of the prompt (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens kept (default: %(default)s)")
    parser.add_argument("--method", default="divprune", help="method the bars are about (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=9, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file to write the result to, beside printing it")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    model = build(
        args.layers,
        args.hidden,
        heads=args.heads,
        tower_layers=args.tower_layers,
        tower_hidden=args.tower_hidden,
        image_size=args.image_size,
    )
    vision = model.config.vision_config
    visual = (vision.image_size // vision.patch_size) ** 2
    samples = rounds(model, cases(visual, args.text, args.keep, args.method), args.runs)
    result = {
        "model": f"random LLaVA, {args.layers} layers × {args.hidden}, {visual} visual + {args.text} text tokens, "
        f"{args.method} keep={args.keep}",
        "command": shlex.join(["python", "bench/prefill.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "rounds": args.runs,
        **summarise(model.config, samples, args.text, args.method),
    }
    output = json.dumps(result, indent=2) + "\n" if args.json else table(result)
    print(output, end="")
    if args.out is not None:
        args.out.write_text(output)
    return 1 if args.check and not all(map(holds, result["bars"])) else 0


if __name__ == "__main__":
    sys.exit(main())
