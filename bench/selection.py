"""What selecting costs: every greedy operator beside its floor, the Gram product, and the literal loop of its paper.

The literal loop computes all gains anew for every pick from the rows chosen so far, in as many passes over the N × N
table as published code takes. Operator and Gram product are timed in turns. That both choose alike is checked in the
same run: along the operator's order, the literal gains in float64 say whether each pick was the best one then.

    python bench/selection.py --check --out bench/results/selection.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefill import machine
from torch import Tensor
from visiontok.kernels import unit

import visiontok.functional as F
from visiontok.recipes.eadp import eadp
from visiontok.recipes.mmtok import cover_table, mmtok

WORDS = 24
TIMED, CHECKED = 8, 16  # picks of a literal loop with N × N work each, where N is large
LARGE = 1000
ROUNDING = 1e-6  # of the largest gain or of 1, by which a pick may miss the best
KINDS = ("clustered", "uniform")

Gain = Callable[[list[int]], Tensor]
"""The chosen tokens → the gain of each (N,)."""


@dataclass(frozen=True)
class Data:
    """What is selected from: x (N, D), scores s (N,), words t (T, D), features of the encoder e (N, E)."""

    x: Tensor
    s: Tensor
    t: Tensor
    e: Tensor

    def double(self) -> Data:
        """The same in float64."""
        return Data(self.x.double(), self.s.double(), self.t.double(), self.e.double())


@dataclass(frozen=True)
class Case:
    """An operator.

    Attributes:
        run: data and K → the picks in their order.
        literal: data and (N, N) cosines → the gains as the paper's loop computes them.
        to_gram: the most that the operator may cost, in Gram products; None without a bar.
        faster: how many times faster than the literal loop it must be at N = 2880; None without a bar.
        square: whether the literal loop does N × N work per pick.
    """

    run: Callable[[Data, int], Tensor]
    literal: Callable[[Data, Tensor], Gain]
    to_gram: float | None = None
    faster: float | None = None
    square: bool = False


def make(kind: str, n: int, width: int, seed: int = 0) -> Data:
    """Features of ``n`` tokens.

    Args:
        kind: ``clustered``, as towers make them: objects of a dozen tokens, a strong common mean, a spectrum that
            falls; or ``uniform``, independent normal numbers, in which all tokens are about equally far apart.
        n: tokens.
        width: D.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, e, t = normal(n, width), normal(n, width // 3), normal(WORDS, width)
    if kind == "clustered":
        spectrum = torch.arange(1, width + 1) ** -0.5
        home = torch.randint(0, max(1, n // 12), (n,), generator=g)
        common = spectrum.sqrt() * normal(width).sign()
        for y in (x, e):
            d = y.shape[1]
            y.mul_(0.6).add_(normal(max(1, n // 12), d)[home]).mul_(8 * spectrum[:d]).add_(5 * common[:d])
        t = 8 * spectrum * t + 5 * common
    return Data(x, torch.rand(n, generator=g) + 0.05, t, e)


# ------------------------------------------------------------------------------------------------ the literal loops


def cosine(x: Tensor) -> Tensor:
    """(N, N), as everybody writes it."""
    x = x / x.norm(dim=-1, keepdim=True)
    return x @ x.T


def farthest(d: Data, similarity: Tensor) -> Gain:
    """DivPrune: one minus the largest of the cosines to all chosen; at first, to all others."""

    def gain(chosen: list[int]) -> Tensor:
        if chosen:
            return 1 - similarity[chosen].amax(0)
        return 1 - similarity.clone().fill_diagonal_(-1).amax(0)

    return gain


def marginal(d: Data, similarity: Tensor) -> Gain:
    """IDPruner: half the score minus half the largest cosine."""
    return lambda chosen: 0.5 * d.s - 0.5 * similarity[chosen].amax(0) if chosen else d.s.clone()


def novelty(d: Data, similarity: Tensor) -> Gain:
    """ZOO-Prune: score times one minus the largest cosine."""
    return lambda chosen: d.s * (1 - similarity[chosen].amax(0)) if chosen else d.s.clone()


def remote(d: Data, similarity: Tensor) -> Gain:
    """ToDRE: minus the sum of all cosines to the chosen."""
    return lambda chosen: -similarity[chosen].sum(0) if chosen else d.s.clone()


def residual(d: Data, similarity: Tensor) -> Gain:
    """SIEVE: the score times what projections on the chosen leave."""
    return lambda chosen: d.s.log() + torch.log1p(-similarity[chosen].square()).sum(0)


def determinant(d: Data, similarity: Tensor) -> Gain:
    """CDPruner: conditional variances, by a Cholesky factor that grows by a row per pick."""
    kernel = d.s[:, None] * similarity * d.s
    variance, factor = kernel.diagonal().clone(), kernel.new_empty(0, len(kernel))

    def gain(chosen: list[int]) -> Tensor:
        nonlocal variance, factor
        for j in chosen[len(factor) :]:
            row = (kernel[j] - factor[:, j] @ factor) / variance[j].sqrt()
            factor, variance = torch.cat([factor, row[None]]), variance - row.square()
        return variance.clone()

    return gain


def covering(table: Tensor) -> Gain:
    """MMTok: how much better each token would cover the rows (R, N), all computed for every pick."""

    def gain(chosen: list[int]) -> Tensor:
        best = table[:, chosen].amax(1, keepdim=True).clamp_min(0) if chosen else table.new_zeros(len(table), 1)
        return (table - best).clamp_min(0).sum(0)

    return gain


def covering_scaled(table: Tensor, token_weight: Tensor) -> Gain:
    """SCOPE: the same with the columns of the chosen blanked first, times the tokens' weights."""

    def gain(chosen: list[int]) -> Tensor:
        best = table[chosen].amax(0).clamp_min(0) if chosen else torch.zeros_like(token_weight)
        blank = torch.zeros(len(table), dtype=torch.bool)
        blank[chosen] = True
        return (table.masked_fill(blank, 0) - best[:, None]).clamp_min(0).sum(0) * token_weight

    return gain


def covering_weighted(table: Tensor, row_weight: Tensor) -> Gain:
    """EADP: the rise of every row's best for each token, (N, N), times the rows' weights, and the sum of that."""

    def gain(chosen: list[int]) -> Tensor:
        best = table[chosen].amax(0) if chosen else torch.zeros_like(row_weight)
        return ((torch.maximum(table, best) - best) * row_weight).sum(1)

    return gain


def words_and_patches(d: Data) -> Tensor:
    """MMTok's (T + N, N) table."""
    return cover_table(d.t[None], d.x[None], d.e[None])[0]


CASES = {
    "maxmin": Case(lambda d, k: F.maxmin(d.x, k).order, farthest, to_gram=1.25),
    "mmr": Case(lambda d, k: F.mmr(d.x, d.s, k).order, marginal, to_gram=1.25),
    "product": Case(lambda d, k: F.product(d.x, d.s, k).order, novelty, to_gram=1.25),
    "dpp": Case(lambda d, k: F.dpp(d.x, d.s, k).order, determinant, to_gram=1.5),
    "maxsum": Case(lambda d, k: F.maxsum(d.x, d.s, k).order, remote, to_gram=1.0),
    "discount": Case(lambda d, k: F.discount(d.x, d.s, k).order, residual),
    "facility (SCOPE)": Case(
        lambda d, k: F.facility(d.x, k, scale=d.s).order,
        lambda d, similarity: covering_scaled(similarity, d.s),
        faster=15,
        square=True,
    ),
    "eadp": Case(
        lambda d, k: eadp(d.x[None], d.s[None], k).order[0],
        lambda d, similarity: covering_weighted((1 + similarity) / 2, d.s),
        faster=15,
        square=True,
    ),
    "coverage (MMTok)": Case(
        lambda d, k: mmtok(d.t[None], d.x[None], d.e[None], k).order[0],
        lambda d, similarity: covering(words_and_patches(d)),
        faster=15,
        square=True,
    ),
}


def loop(gain: Gain, k: int) -> list[int]:
    """The first ``k`` picks."""
    chosen: list[int] = []
    for _ in range(k):
        gains = gain(chosen)
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
    return chosen


def agreement(gain: Gain, order: Sequence[int]) -> dict[str, Any]:
    """How many picks had the largest gain when they were made, and by how much, as a part of the largest gain or of 1,
    the worst of the others missed it."""
    chosen: list[int] = []
    best, missed = 0, 0.0
    for pick in order:
        gains = gain(chosen)
        gains[chosen] = -torch.inf
        best += int(gains.argmax()) == pick
        top = float(gains.max())
        missed = max(missed, (top - float(gains[pick])) / max(abs(top), 1.0))
        chosen.append(pick)
    return {"picks": len(order), "best": best, "missed": missed}


# ---------------------------------------------------------------------------------------------------- measurements


def seconds(call: Callable[[], Any]) -> float:
    """CPU time of this thread if it is the only one, which leaves out what other processes take; else wall time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def literal_seconds(case: Case, data: Data, similarity: Tensor, k: int) -> float:
    """Of ``k`` picks, without the cosines; where every pick costs the same and much, a part is timed and scaled."""
    timed = min(k, TIMED) if case.square and len(data.x) > LARGE else k
    gains: list[Gain] = []
    table = seconds(lambda: gains.append(case.literal(data, similarity)))
    return table + seconds(lambda: loop(gains[0], timed)) * k / timed


@torch.inference_mode()
def measure(kind: str, n: int, width: int, runs: int) -> dict[str, Any]:
    """Gram product, operators and literal loops on one kind of features.

    Where that takes milliseconds, there are five times the rounds, after one that warms up and does not count.
    """
    data, k = make(kind, n, width), n // 9
    x = unit(data.x[None])
    gram: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(runs) if n > LARGE else range(-1, 5 * runs):
        names = [*CASES][number % len(CASES) :] + [*CASES][: number % len(CASES)]
        floor = seconds(lambda: x @ x.mT)
        round_ = {name: seconds(lambda name=name: CASES[name].run(data, k)) for name in names}  # type: ignore[misc]
        if number >= 0:
            gram.append(floor)
            for name, value in round_.items():
                times[name].append(value)
    rows: dict[str, Any] = {}
    similarity, exact = cosine(data.x), data.double()
    similarities = cosine(exact.x)
    for name, case in CASES.items():
        order = case.run(data, k).tolist()
        checked = order[:CHECKED] if case.square and n > LARGE else order
        literal = statistics.median(gram) + literal_seconds(case, data, similarity, k)
        rows[name] = {
            "seconds": statistics.median(times[name]),
            "to_gram": statistics.median(a / b for a, b in zip(times[name], gram, strict=True)),
            "literal": literal,
            "faster": literal / statistics.median(times[name]),
            **agreement(case.literal(exact, similarities), checked),
        }
    return {"kind": kind, "n": n, "k": k, "gram": statistics.median(gram), "cases": rows}


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What one measurement must hold."""
    out: list[dict[str, Any]] = []
    for name, row in result["cases"].items():
        where, case = f"{name}, {result['kind']}, N = {result['n']}", CASES[name]
        out.append(
            {
                "what": f"{where}: same picks as the literal loop",
                "value": row["missed"],
                "limit": ROUNDING,
                "holds": row["missed"] <= ROUNDING,
            }
        )
        if case.to_gram is not None:
            limit, value = case.to_gram, row["to_gram"]
            out.append({"what": f"{where}: in Gram products", "value": value, "limit": limit, "holds": value <= limit})
        if case.faster is not None and result["n"] == 2880:
            limit, value = case.faster, row["faster"]
            out.append(
                {
                    "what": f"{where}: faster than the literal loop",
                    "value": value,
                    "limit": limit,
                    "holds": value >= limit,
                }
            )
    return out


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    clock = "CPU time of the one thread" if result["threads"] == 1 else "wall time"
    lines = [
        f"# Selection: D = {result['width']}, K = N/9",
        "",
        f"* Command: `{result['command']}`",
        f"* Machine: {result['machine']}",
        f"* Medians of {result['rounds']} rounds (five times as many up to {LARGE} tokens), in {clock};",
        "  *× Gram* is the median of the ratios within a round.",
        "* *literal* is the Gram product and one run of the loop that computes all gains anew per pick; above",
        (
            f"  {LARGE} tokens loops with N × N work per pick are timed for {TIMED} picks and scaled, "
            f"and {CHECKED} are checked."
        ),
        "* *same* counts the picks that were the best by the literal gains in float64, of those checked; *missed* is",
        "  how far the worst of the others lay below, as a part of the largest gain or of 1.",
        "",
        "| features | N | operator | ms | × Gram | literal, ms | × faster | same | missed |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for part in result["parts"]:
        head = f"| {part['kind']} | {part['n']} |"
        lines.append(f"{head} Gram product | {part['gram'] * 1e3:.1f} | 1.00 | | | | |")
        for name, row in part["cases"].items():
            lines.append(
                f"{head} {name} | {row['seconds'] * 1e3:.1f} | {row['to_gram']:.2f} | {row['literal'] * 1e3:.0f} | "
                f"{row['faster']:.1f} | {row['best']}/{row['picks']} | {_small(row['missed'])} |"
            )
    lines += ["", "| bar | limit | value | |", "|---|--:|--:|---|"]
    for bar in result["bars"]:
        if not bar["what"].endswith("literal loop") or "faster" in bar["what"] or not bar["holds"]:
            verdict = "holds" if bar["holds"] else "MISSED"
            lines.append(f"| {bar['what']} | {bar['limit']:g} | {bar['value']:.3g} | {verdict} |")
    return "\n".join(lines) + "\n"


def _small(x: float) -> str:
    return "0" if x == 0 else f"1e{math.ceil(math.log10(x))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if ``--check`` finds a bar missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880, 4096], help="default: %(default)s")
    parser.add_argument("--width", type=int, default=3584, help="D (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file to write the result to, beside printing it")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    before = os.getloadavg()[0]
    parts = [measure(kind, n, args.width, args.runs) for n in args.tokens for kind in KINDS]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "bench/selection.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": f"{machine()}, {before:.1f} at the beginning",
        "width": args.width,
        "threads": args.threads,
        "rounds": args.runs,
        "parts": parts,
        "bars": [bar for part in parts for bar in bars(part)],
    }
    output = json.dumps(result, indent=2) + "\n" if args.json else table(result)
    print(output, end="")
    if args.out is not None:
        args.out.write_text(output)
    return 1 if args.check and not all(bar["holds"] for bar in result["bars"]) else 0


if __name__ == "__main__":
    sys.exit(main())
