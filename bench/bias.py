"""What a bias per key costs attention: every way of ``visiontok.kernels.bias.variants`` beside attention without one.

Rounds take all ways in turn, in CPU time of one thread; the error is the largest of an outcome against the definition
in float64, as a part of the largest value.

    python bench/bias.py --out bench/results/bias.md
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from prefill import machine
from torch import Tensor
from visiontok.kernels.bias import variants

HEADS = {"prefill": (8, 2), "decode step": (32, 8)}
"""Heads of queries, and of keys."""
HEAD_DIM = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(phase: str, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a bias of logarithms of 1 to 9 on two keys of three."""
    g = torch.Generator().manual_seed(0)
    queries, keys = HEADS[phase]
    rows = n if phase == "prefill" else 1
    q, k, v = (torch.randn(1, h, m, HEAD_DIM, generator=g) for h, m in ((queries, rows), (keys, n), (keys, n)))
    mass = torch.randint(1, 10, (1, n), generator=g) * (torch.arange(n) % 3 > 0) + (torch.arange(n) % 3 == 0)
    return q.to(dtype), k.to(dtype), v.to(dtype), mass.float().log()


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, last: int) -> Tensor:
    """The definition, of the last queries."""
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    q, k, v = (x.double() for x in (q[:, :, -last:], k, v))
    logits = scale * q @ k.repeat_interleave(groups, 1).transpose(2, 3) + bias.double()[:, None, None]
    seen = torch.ones(q.shape[2], n, dtype=torch.bool).tril(n - q.shape[2])
    return logits.masked_fill(~seen, -math.inf).softmax(-1) @ v.repeat_interleave(groups, 1)


def measure(phase: str, n: int, dtype: str, rounds: int) -> list[dict[str, object]]:
    """A row per way; the first has no bias."""
    q, k, v, bias = make(phase, n, DTYPES[dtype])
    scale, causal = HEAD_DIM**-0.5, phase == "prefill"

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    ways: dict[str, Callable[[], Tensor]] = {"without a bias": plain}
    ways |= {name: way(q, k, v, bias, scale) for name, way in variants().items()}
    expected = dense(q, k, v, bias, scale, 64)
    errors = {name: (run()[:, :, -64:] - expected).abs().max() / v.double().abs().max() for name, run in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    repeats = 1 if causal else 50
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.thread_time()
            for _ in range(repeats):
                run()
            times[name].append((time.thread_time() - start) / repeats)
    first, second = times["mask of numbers"], times["columns"]
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return [
        {
            "phase": phase, "tokens": n, "dtype": dtype, "way": name, "ms": 1000 * statistics.median(times[name]),
            "ratio": ratio if name == "columns" else None,
            "error": None if name == "without a bias" else float(errors[name]),
        }
        for name in ways
    ]  # fmt: skip


def table(rows: list[dict[str, object]], command: str, where: str, rounds: int) -> str:
    """Markdown."""
    heads = "; ".join(f"{phase}: {q} heads on {k}" for phase, (q, k) in HEADS.items())
    lines = [
        "# Attention with a bias per key",
        "",
        f"* Command: `{command}`",
        f"* Machine: {where}",
        f"* Head dimension {HEAD_DIM}; {heads}. Causal, no padding. Medians of {rounds} rounds, in CPU",
        "  time of the one thread; *ratio* is the median of columns ÷ mask within a round. What all layers share,",
        "  the mask or the columns, is made beforehand.",
        "* *error*: the largest of an outcome, as a part of the largest value, against the definition in float64.",
        "",
        "| | tokens | dtype | way | ms | ratio | error |",
        "|---|--:|---|---|--:|--:|--:|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        known = " | ".join(str(row[name]) for name in ("phase", "tokens", "dtype", "way"))
        lines.append(f"| {known} | {row['ms']:.3g} | {ratio} | {error} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 576, 1440, 2880], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file to write the result to, beside printing it")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    rows = [
        row for phase in HEADS for dtype in DTYPES for n in args.tokens for row in measure(phase, n, dtype, args.rounds)
    ]
    command = shlex.join(["python", "bench/bias.py", *(sys.argv[1:] if argv is None else argv)])
    output = table(rows, command, f"{machine()}, {before:.1f} at the beginning", args.rounds)
    print(output, end="")
    if args.out is not None:
        args.out.write_text(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
