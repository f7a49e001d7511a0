"""What methods before the vision tower save on a rendered page, measured on a random Qwen3-VL.

A page of text is rendered and goes through the stock image processor. Each round times every case one after the other,
beginning with another one each round, so that a slower minute of the machine hits all of them. *choice* is what the
pixel method takes, *tower* the vision tower and the mergers, *prefill* the language model's forward up to the next
token's logits, as `generate()` runs them. The cap is the stock tower and a prompt without any visual token: what no
method behind the tower can pass.

    python bench/pixels.py --out bench/results/pixels.md
"""

from __future__ import annotations

import argparse
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
from PIL import Image, ImageDraw, ImageFont

from visiontok import __version__, compress, recipe

TRANSFORMERS: Any = T  # its config classes take more keywords than their signatures name
IMAGE, START, END = 31990, 31991, 31992
STOCK, CAP = "stock", "cap: no visual token behind the tower"
OVERHEAD_BAR = 0.02
WORDS = [
    "the",
    "tower",
    "reads",
    "every",
    "patch",
    "of",
    "a",
    "page",
    "although",
    "most",
    "of",
    "it",
    "is",
    "paper",
    "and",
    "what",
    "is",
    "printed",
    "repeats",
    "itself",
    "so",
    "a",
    "rule",
    "that",
    "an",
    "image",
    "coder",
    "would",
    "use",
    "tells",
    "which",
    "units",
    "carry",
    "anything",
    "new",
    "and",
    "which",
    "can",
    "be",
    "made",
    "again",
    "from",
    "others",
]


@dataclass(frozen=True)
class Case:
    """One way to run the prompt: a pixel method with options, or neither; without visual tokens for the cap."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    keep: float | None = None


CASES = (
    Case(STOCK),
    Case(CAP),
    Case("pixelprune, τ = 0", "pixelprune"),
    Case("pixelprune, τ = 0.05", "pixelprune", {"tau": 0.05}),
    Case("background", "background"),
    Case("trim", "trim"),
    Case("pixel_entropy, a quarter", "pixel_entropy", {}, 0.25),
    Case("resize, a quarter", "resize", {}, 0.25),
    Case("tower_cut, a quarter from layer 3", "tower_cut", {"layer": 3}, 0.25),
    Case("ipcv", "ipcv", {"layer": 3, "stabilised": 3}),
)


@dataclass
class Samples:
    """Seconds of one case, one entry per round; and the tokens it kept."""

    choice: list[float] = field(default_factory=list)
    tower: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    kept: int = 0
    flops: float | None = None

    @property
    def whole(self) -> list[float]:
        """Time to the first token of each round, without the processor, which is the same for all."""
        return [sum(parts) for parts in zip(self.choice, self.tower, self.prefill, strict=True)]


def page(side: int, seed: int = 0) -> Image.Image:
    """A page of black text on white: margins, a heading, paragraphs of one size and a ruled table."""
    image = Image.new("RGB", (side, side), "white")
    pen, margin = ImageDraw.Draw(image), side // 10
    font, large = ImageFont.load_default(size=side // 56), ImageFont.load_default(size=side // 30)
    draw = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=draw).tolist())

    pen.text((margin, margin * 0.7), words(4).title(), fill="black", font=large)
    y = margin * 1.4
    for _ in range(4):
        for _ in range(5):
            line = words(20)
            while pen.textlength(line, font=font) > side - 2 * margin:
                line = line.rsplit(" ", 1)[0]
            pen.text((margin, y), line, fill="black", font=font)
            y += side / 42
        y += side / 30
    step, across = side // 28, (side - 2 * margin) // 4
    for row in range(5):
        pen.line((margin, y + row * step, side - margin, y + row * step), fill="black")
        for column in range(4 if row < 4 else 0):
            cell = f"{int(torch.randint(1000, (), generator=draw))}.{row}"
            pen.text((margin + column * across + 4, y + row * step + 4), cell, fill="black", font=font)
    return image


def build(tower: tuple[int, int], text: tuple[int, int]) -> Any:
    """A random Qwen3-VL with layers and width of tower and language model."""
    (depth, width), (layers, hidden) = tower, text
    torch.manual_seed(0)
    config = TRANSFORMERS.Qwen3VLConfig(
        text_config={
            "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 5e6},
        },
        vision_config={
            "depth": depth, "hidden_size": width, "out_hidden_size": hidden, "num_heads": width // 64,
            "patch_size": 16, "intermediate_size": 4 * width, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [depth // 4, depth // 2],
        },
        image_token_id=IMAGE, video_token_id=IMAGE + 5, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return TRANSFORMERS.AutoModelForImageTextToText.from_config(config).eval()


def prepared(image: Image.Image, words: int) -> dict[str, torch.Tensor]:
    """The page as the family's processor makes it, in a prompt of ``words`` more tokens."""
    processor = TRANSFORMERS.Qwen2VLImageProcessor(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        min_pixels=32 * 32, max_pixels=4096 * 4096,
    )  # fmt: skip
    pixels = processor(images=[image], return_tensors="pt")
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(5, 30000, (words,), generator=draw).tolist()
    ids = torch.tensor([[*text[:10], START, *[IMAGE] * tokens, END, *text[10:]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


@torch.no_grad()
def measure(model: Any, inputs: dict[str, torch.Tensor], case: Case, into: Samples) -> None:
    """One prefill."""
    attached: Any = nullcontext()
    if case.method is not None:
        attached = compress(model, recipe(case.method, keep=case.keep, **case.options))
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    rest = {name: value for name, value in inputs.items() if name not in given}
    with attached as compression:
        start = time.perf_counter()
        output = model.model.get_image_features(**given, return_dict=True)
        encoded = time.perf_counter()
        if case.name == CAP:
            ids = rest["input_ids"][rest["input_ids"] != IMAGE][None]
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
        else:
            more = {"mm_encoder_outputs": {"image": output}, "image_grid_thw": given["image_grid_thw"]}
            model(**rest, **more, use_cache=True, logits_to_keep=1)
        end = time.perf_counter()
        report = None if compression is None else compression.report
    choice = 0.0 if report is None else report.seconds["pixels"] or 0.0
    into.choice.append(choice)
    into.tower.append(encoded - start - choice)
    into.prefill.append(end - encoded)
    visual = int((inputs["input_ids"] == IMAGE).sum())
    into.kept = 0 if case.name == CAP else visual if report is None else report.images[0].kept[0]
    ratio = None if report is None else report.account.speed_up()
    into.flops = None if ratio is None else ratio.time_to_first_token


def table(found: dict[str, Samples], setting: str, command: str) -> tuple[str, list[str]]:
    """Markdown, and which bars are missed."""
    stock, cap = found[STOCK], found[CAP]
    middle = statistics.median
    capped = middle([a / b for a, b in zip(stock.whole, cap.whole, strict=True)])
    lines = [
        "# Before the vision tower: a rendered page",
        "",
        setting,
        "",
        f"`{command}`",
        "",
        "| | tokens | choice ms | tower s | prefill s | first token s | speed-up | in FLOPs | choice / tower saved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name, mine in found.items():
        gain = middle([a / b for a, b in zip(stock.whole, mine.whole, strict=True)])
        saved = middle([a - b for a, b in zip(stock.tower, mine.tower, strict=True)])
        share = middle(mine.choice) / saved if saved > 0 and any(mine.choice) else None
        lines.append(
            f"| {name} | {mine.kept} | {middle(mine.choice) * 1e3:.1f} | {middle(mine.tower):.2f} "
            f"| {middle(mine.prefill):.2f} | {middle(mine.whole):.2f} | {gain:.2f} "
            f"| {'-' if mine.flops is None else f'{mine.flops:.2f}'} | {'-' if share is None else f'{share:.2%}'} |"
        )
        if name == "pixelprune, τ = 0" and gain <= capped:
            missed.append(f"{name}: {gain:.2f} does not pass the cap {capped:.2f}")
        if name.startswith("pixelprune, τ = 0.") and (share is None or share >= OVERHEAD_BAR):
            missed.append(f"{name}: the choice takes {share} of the tower time saved, not below {OVERHEAD_BAR}")
    met = (
        "Both bars are met: `pixelprune` at τ = 0 passes the cap, and τ > 0 takes less than 2 % of the tower time that "
        "it saves."
    )
    told = (
        "Medians over the rounds; speed-ups are medians of the ratios within a round, the processor, equal for all, "
        f"left out. The cap of every method behind the tower is {capped:.2f}. `ipcv` brings all tokens back behind it."
    )
    lines += ["", told, "", *([f"**Missed**: {each}" for each in missed] or [met])]
    return "\n".join(lines) + "\n", missed


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="pixels of the page's side")
    parser.add_argument("--tower", type=int, nargs=2, default=(8, 512), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--text", type=int, nargs=2, default=(8, 768), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail if a bar is missed")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    inputs = prepared(page(chosen.side), chosen.words)
    model = build(tuple(chosen.tower), tuple(chosen.text))
    found = {case.name: Samples() for case in CASES}
    for case in CASES:
        measure(model, inputs, case, Samples())
    for number in range(chosen.rounds):
        for case in (*CASES[number % len(CASES) :], *CASES[: number % len(CASES)]):
            measure(model, inputs, case, found[case.name])
    patches = int(inputs["image_grid_thw"].prod())
    setting = (
        f"A random Qwen3-VL of {chosen.tower[0]} tower layers of width {chosen.tower[1]} and {chosen.text[0]} decoder "
        f"layers of width {chosen.text[1]}, float32; a page of {chosen.side} × {chosen.side} pixels, {patches} "
        f"patches, {patches // 4} visual and {inputs['input_ids'].shape[1] - patches // 4} other tokens; "
        f"{chosen.rounds} rounds on {torch.get_num_threads()} thread(s) of a {platform.machine()} machine that other "
        f"work shared; torch {torch.__version__}, transformers {T.__version__}, visiontok {__version__}."
    )
    text, missed = table(found, setting, shlex.join(["python", "bench/pixels.py", *arguments]))
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text, encoding="utf-8")
    return int(chosen.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
