"""Images per second of timm's ViT-B at 384 pixels, with tokens merging and without, on this machine.

Random weights and random pictures: how many tokens merge depends on the schedule alone. Every case runs in every round,
stock among them, beginning with another one each round; what is reported is the median over rounds, and the
median of the ratios to the stock run of the same round, which suffers less from a machine that others use. CPU time of
the process, beside it, leaves out what others take.

    python bench/merging.py --check --out bench/results/merging.md
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prefill import machine

from visiontok import compress

MODEL, PIXELS = "vit_base_patch16_384", 384
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "half, as many in each layer": ("tome", {"keep": 0.5}),
    "half, early layers more (inflect=-1)": ("tome", {"keep": 0.5, "inflect": -1.0}),
    "half, late layers more (inflect=1)": ("tome", {"keep": 0.5, "inflect": 1.0}),
    "a quarter": ("tome", {"keep": 0.25}),
    "r=23, as in the paper for ViT-L": ("tome", {"r": 23}),
    "all kept (keep=1.0)": ("tome", {"keep": 1.0}),
}
BAR_CASE, BAR = "half, early layers more (inflect=-1)", 1.4


Times = dict[str, list[tuple[float, float]]]


def measure(model: Any, batch: torch.Tensor, rounds: int) -> tuple[Times, dict[str, Any]]:
    """Seconds, and those of the processor, per round of stock and every case; and the last report of each case."""
    seconds: Times = {name: [] for name in ("stock", *CASES)}
    reports: dict[str, Any] = {}

    def once() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        model(batch)
        return time.perf_counter() - wall, time.process_time() - cpu

    order = list(seconds)
    for number in range(rounds + 1):  # the first one warms up
        for name in order[number % len(order) :] + order[: number % len(order)]:
            if name == "stock":
                spent = once()
            else:
                method, options = CASES[name]
                with compress(model, method, **options) as compression:
                    spent = once()
                    if options.get("keep") != 1.0:
                        reports[name] = compression.report
            if number:
                seconds[name].append(spent)
    return seconds, reports


def main() -> int:
    """Measure, write, and say whether the bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="pictures per run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    import timm

    model = timm.create_model(MODEL, pretrained=False).eval()
    batch = torch.randn(arguments.batch, 3, PIXELS, PIXELS)
    with torch.inference_mode():
        seconds, reports = measure(model, batch, arguments.rounds)
    ratios, cpu = (
        {
            name: statistics.median(a[kind] / b[kind] for a, b in zip(seconds["stock"], times, strict=True))
            for name, times in seconds.items()
        }
        for kind in (0, 1)
    )
    lines = [
        f"# Merging: {MODEL}, random weights, {arguments.batch} pictures at a time",
        "",
        f"* Command: `python {shlex.join(sys.argv)}`",
        f"* Machine: {machine()}",
        f"* {arguments.rounds} rounds; images/s by the median time, the ratio to stock as the median over rounds.",
        "* FLOPs of the blocks, matching included; a budget counts patches that are left behind the last layer.",
        "",
        "| tome | slots per layer, first – last | images/s | × stock | × in CPU time | × in FLOPs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, times in seconds.items():
        report = reports.get(name)
        slots = "577" if report is None else f"{report.layer_tokens[0]} – {report.layer_tokens[-1]}"
        flops = 1.0 if report is None else sum(report.flops_stock) / (sum(report.flops) + report.matching)
        rate = arguments.batch / statistics.median(wall for wall, _ in times)
        lines.append(f"| {name} | {slots} | {rate:.2f} | {ratios[name]:.2f} | {cpu[name]:.2f} | {flops:.2f} |")
    holds = ratios[BAR_CASE] >= BAR
    lines += ["", f"Bar: {BAR_CASE}, at least {BAR} × stock: {ratios[BAR_CASE]:.2f}, {'holds' if holds else 'MISSED'}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    return int(arguments.check and not holds)


if __name__ == "__main__":
    sys.exit(main())
