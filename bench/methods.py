"""What every method costs and saves beside the stock model: tower, prefill, decoding and cache, on a random LLaVA.

Every registered method has the same budget, visual tokens averaged over all decoder layers, unless it takes none. Each
is measured in rounds, in turn with the stock model, so that a slower minute hits both; in CPU time of one thread, which
leaves out what other processes take. The cache is counted as the memory that its tensors hold on to, behind the last
decode step. Lines go to a file as they are measured: stopped and started again, the script goes on, and methods that
are new are added.

    python bench/methods.py --out bench/results/methods.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers as T
from prefill import Case, build, machine, prompt
from visiontok.eval.efficiency.measure import held

import visiontok
from visiontok import Budget, Recipe, compress
from visiontok.errors import VisiontokError

STOCK = "stock"
PARTS = ("first", "tower", "prefill", "decode")


def recipe(name: str, keep: Budget) -> Recipe | None:
    """A registered method with the budget, if it takes one; None for the stock model.

    Raises:
        ConfigError: the method cannot be had without weights or a calibration.
    """
    if name == STOCK:
        return None
    made = visiontok.recipe(name)
    return made.with_keep(keep) if visiontok.recipes.find(name).card.budget else made


@torch.inference_mode()
def measure(model: T.LlavaModel, made: Recipe | None, text: int, steps: int) -> dict[str, Any]:
    """One picture and its question.

    Returns:
        seconds of "tower", "prefill", "first" (both), and "decode" (median of the steps); "kv", bytes of the cache; and
        with a recipe "label", "average" and the share of "flops" of the decoder.

    Raises:
        ConfigError, UnsupportedError: the toolkit refuses the recipe on this model.
    """
    vision = model.config.vision_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    ids = prompt(Case("", (vision.image_size // vision.patch_size) ** 2, text))
    with nullcontext() if made is None else compress(model, made) as compression:
        start = time.thread_time()
        picture = {"image": model.get_image_features(pixel_values=pixels, return_dict=True)}
        seen = time.thread_time()
        cache = model(input_ids=ids, use_cache=True, mm_encoder_outputs=picture).past_key_values
        end = time.thread_time()
        found: dict[str, Any] = {"tower": seen - start, "prefill": end - seen, "first": end - start}
        if compression is not None:
            report = compression.report
            spent = report.account
            found |= {"label": report.recipe, "average": report.layer_average}
            found["flops"] = sum(spent.decoder or ()) / sum(spent.decoder_stock or ())
        seconds = []
        for _ in range(steps):
            start = time.thread_time()
            model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            seconds.append(time.thread_time() - start)
        return found | {"decode": statistics.median(seconds), "kv": held(cache)}


def beside(model: T.LlavaModel, made: Recipe | None, text: int, steps: int, runs: int) -> dict[str, Any]:
    """A method and the stock model in turn: per part, seconds of both in every round, and what `measure` says."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(runs):
        order = (None, made) if number % 2 else (made, None)
        one, other = (measure(model, each, text, steps) for each in order)
        pairs.append((one, other) if number % 2 else (other, one))
    stock, last = pairs[-1]
    said = {name: value for name, value in last.items() if name not in PARTS}
    return {
        **said,
        "kv_stock": stock["kv"],
        "seconds": {part: [[one[part], other[part]] for one, other in pairs] for part in PARTS},
    }


def attempt(model: T.LlavaModel, name: str, average: int, **given: int) -> dict[str, Any]:
    """`beside` for a method, or only "refused", why the toolkit does not run it."""
    reasons = []
    for keep in (Budget.layer_average(average), Budget.tokens(average)):
        try:
            return beside(model, recipe(name, keep), **given)
        except VisiontokError as error:
            reasons.append(" ".join(str(error).split()))
    return {"refused": reasons[0]}


def read(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of a file, by method; a last one that was torn off does not count.

    Raises:
        SystemExit: they were measured with other settings.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    for line in found:
        if line["settings"] != settings:
            sys.exit(f"--out: {path} was measured with {line['settings']}, not with {settings}; give another file")
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
    return {line["method"]: line for line in found}


def run(
    model: T.LlavaModel,
    names: Sequence[str],
    settings: dict[str, Any],
    path: Path,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, dict[str, Any]]:
    """Measure what is not in the file yet, and add it."""
    done, begun = read(path, settings), time.monotonic()
    missing = [name for name in names if name not in done]
    given = {name: settings[name] for name in ("text", "steps", "runs")}
    if missing:
        measure(model, None, given["text"], 1)  # the first call is slower
    for number, name in enumerate(missing, start=1):
        found = attempt(model, name, settings["average"], **given)
        done[name] = {"method": name, "settings": settings, "machine": machine(), **found}
        with path.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
        left = (time.monotonic() - begun) / number * (len(missing) - number) / 60
        told = found.get("refused") or f"{paired(found, 'first'):.2f} × stock to the first token"
        say(f"{number}/{len(missing)} {name}: {told}, about {left:.0f} min left")
    return {name: done[name] for name in names}


def paired(line: dict[str, Any], part: str) -> float:
    """Median over the rounds of a method's seconds over those of stock in the same round."""
    return statistics.median(mine / stock for stock, mine in line["seconds"][part])


def faster(line: dict[str, Any], part: str) -> bool:
    """Whether it took less than stock in every round."""
    return all(mine < stock for stock, mine in line["seconds"][part])


def negatives(done: dict[str, dict[str, Any]]) -> list[str]:
    """What saves nothing, by what it does not save."""
    measured = {name: line for name, line in done.items() if name != STOCK and "refused" not in line}
    found = {
        "to the first token, not faster than stock in every round": lambda line: not faster(line, "first"),
        "in decoding, not faster than stock in every round": lambda line: not faster(line, "decode"),
        "cache no smaller": lambda line: line["kv"] >= line["kv_stock"],
    }
    named = {what: [name for name, line in measured.items() if holds(line)] for what, holds in found.items()}
    return [f"* {what}: {', '.join(names) or 'none'}" for what, names in named.items()]


def table(done: dict[str, dict[str, Any]], settings: dict[str, Any], command: str) -> str:
    """The result as Markdown."""
    model = "random LLaVA, {layers} layers × {hidden}, {visual} visual + {text} text tokens".format(**settings)
    stock = [one for line in done.values() for one, _ in line.get("seconds", {}).get("first", ())]
    last = max(done.values(), key=lambda line: line["machine"].partition("; ")[2])
    lines = [
        f"# Methods: {model}, {settings['average']} of them per layer",
        "",
        f"* Command: `{command}`",
        f"* Machine: {last['machine']}",
        "* {runs} rounds, method and stock in turn, {steps} decode steps each. CPU time of one".format(**settings),
        "  thread. Ratios to stock are medians of those within a round, with the lowest and the highest; stock",
        f"  took {statistics.median(stock):.2f} s to the first token." if stock else "  was not measured.",
        "* The budget is an average over all decoder layers. Methods that take none have their own, and one whose cut",
        "  is too deep for it keeps as many tokens behind the cut. *First token* is tower and prefill with everything",
        "  visiontok does in them. The cache is the memory that its tensors hold.",
        "* Weights are random: what adapts to the picture or to attention may drop another number on a trained model.",
        "",
        "| method | acts | visual tokens¹ | FLOPs² | first token | tower | prefill | decode step | cache |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, line in done.items():
        if "refused" not in line:
            acts = "–" if name == STOCK else visiontok.recipes.find(name).card.stage
            tokens = [f"{line.get('average', settings['visual']):.1f}", f"{line.get('flops', 1):.3f}"]
            ratios = [_ratio(line, part) for part in PARTS]
            kept = f"{line['kv'] / line['kv_stock']:.3f}"
            label = "stock again" if name == STOCK else line["label"]
            lines.append(f"| {' | '.join([label, acts, *tokens, *ratios, kept])} |")
    lines += ["", "¹ average over all decoder layers. ² of the decoder layers, to stock (`visiontok.cost`).", ""]
    lines += ["What saves nothing:", "", *negatives(done)]
    refused = {name: line["refused"] for name, line in done.items() if "refused" in line}
    if refused:
        lines += ["", "Not measured:", "", *(f"* {name}: {why}" for name, why in refused.items())]
    return "\n".join(lines) + "\n"


def _ratio(line: dict[str, Any], part: str) -> str:
    ratios = [mine / stock for stock, mine in line["seconds"][part]]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=16, help="decoder layers (default: %(default)s)")
    add("--hidden", type=int, default=1024, help="width of the language model (default: %(default)s)")
    add("--heads", type=int, default=16, help="its attention heads (default: %(default)s)")
    add("--tower-layers", type=int, default=24, help="layers of the tower (default: %(default)s)")
    add("--tower-hidden", type=int, default=512, help="width of the tower (default: %(default)s)")
    add("--image-size", type=int, default=336, help="pixels along a side (default: %(default)s)")
    add("--text", type=int, default=40, help="text tokens of the prompt (default: %(default)s)")
    add("--average", type=int, default=192, help="visual tokens per layer (default: %(default)s)")
    add("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    add("--steps", type=int, default=8, help="decode steps per round (default: %(default)s)")
    add("--methods", nargs="+", metavar="METHOD", help="names (default: all that are registered)")
    add("--out", type=Path, required=True, help="Markdown file; the lines stand beside it, with the suffix .jsonl")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # only this one's time is read
    shape = {name: getattr(args, name) for name in ("layers", "hidden", "heads", "tower_layers", "tower_hidden")}
    model = build(**shape, image_size=args.image_size)
    visual = (args.image_size // model.config.vision_config.patch_size) ** 2
    given = {name: getattr(args, name) for name in ("text", "average", "runs", "steps")}
    names = [STOCK, *(args.methods or [card.name for card in visiontok.methods()])]
    settings = {**shape, "visual": visual, **given}
    done = run(model, names, settings, args.out.with_suffix(".jsonl"))
    command = shlex.join(["python", "bench/methods.py", *(sys.argv[1:] if argv is None else argv)])
    args.out.write_text(table(done, settings, command))
    print(args.out.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
