"""Every kernel beside its physical floor, the PyTorch twin, the literal loop of the published code, and what it serves.

    python -m visiontok.kernels.bench --out kernels.csv      # and kernels.svg beside it

On a GPU a case is timed as Triton, as PyTorch launches it ("eager") and as a CUDA graph of that. On a CPU there is no
Triton: the PyTorch twin stands beside the literal loop, and cases that take a GPU's memory are left out. Variants of a
case are timed in turns, and the median is told. A floor is what moving the bytes or multiplying the numbers takes at
the rates measured on this machine in the same run; latency has no floor here. What pruning saves is a formula: the
prefill of a 7-billion-parameter model on an H200 at 65 % of its peak, for N and for K visual tokens.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_columns, cosines, gather_rows, ops, segment_mean, sight
from . import nearest as nearest_rows
from .bias import variants
from .reference import bounds
from .runtime import VARIABLE

SELECTIONS = ((576, 64, 4096), (2880, 320, 4096), (4096, 410, 3584), (6272, 627, 3584), (16384, 1638, 3584))
"""Visual tokens N, kept K and feature width D: LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL, a video, Qwen2.5-VL at full size."""
ATTENTIONS = (
    ("CLIP-L", 577, 16, 16, 64, False),
    ("SigLIP", 729, 16, 16, 72, False),
    ("LLaVA-NeXT, a layer of its language model", 2944, 32, 32, 128, True),
    ("Qwen2.5-VL tower", 16384, 16, 16, 80, False),
    ("Qwen2.5-VL, a layer of its language model", 16448, 28, 4, 128, True),
)
"""Whose attention, rows N, heads, heads of the keys, their width, and whether it is causal."""
CACHES = ((28, 4, 128, 4096, 410), (28, 4, 128, 16384, 1638), (32, 32, 128, 2880, 320))
"""Layers, heads and width of a cache, its slots N and those kept K."""
MATCHES = ((288, 64), (1440, 4096), (8192, 3584))
"""Tokens on either side, and feature width."""
MERGES = ((576, 64, 1024), (2880, 320, 4096), (16384, 1638, 3584))
"""Tokens N, groups K and feature width."""
ON_CPU = 4096
"""Most visual tokens of a case that a CPU is asked for."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        kernel: operator and kind.
        shape: its sizes, for the table.
        call: runs the operator, whichever twin.
        literal: does what published code does, or None.
        moved: bytes that have to be read and written.
        products: floating-point operations of matrix products.
        exponentials: how many are taken.
        saves: milliseconds of prefill that the pruning saves, None where it serves none by itself.
        picks: steps one after the other.
    """

    kernel: str
    shape: str
    call: Call
    literal: Call | None = None
    moved: float = 0.0
    products: float = 0.0
    exponentials: float = 0.0
    saves: float | None = None
    picks: int | None = None


@dataclass(frozen=True)
class Row:
    """Milliseconds, where nothing else is said; None where it was not measured."""

    kernel: str
    shape: str
    triton: float | None
    eager: float
    graphed: float | None
    literal: float | None
    floor: float
    of_floor: float
    us_per_pick: float | None
    prefill_saved: float | None
    share_of_saved: float | None


# ---------------------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a copy, operations per second of a matrix product in the dtype of models, and exponentials
    per second: 16 per cycle and multiprocessor of a GPU, which is not measured; on a CPU they are not counted."""

    copy: float
    product: float
    exponential: float

    def floor(self, case: Case) -> float:
        """Milliseconds that a case takes at least."""
        return 1e3 * max(case.moved / self.copy, case.products / self.product, case.exponentials / self.exponential)


def rates(device: torch.device) -> Rates:
    """Measured on large operands."""
    size, width = (1 << 28, 8192) if device.type == "cuda" else (1 << 24, 1024)
    x, y = torch.zeros(size, device=device), torch.empty(size, device=device)
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    copy, product = timed([lambda: y.copy_(x), lambda: a @ a], device)
    exponential = math.inf
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        exponential = 16e3 * properties.multi_processor_count * properties.clock_rate
    return Rates(2e3 * x.nbytes / copy, 2e3 * width**3 / product, exponential)


def timed(calls: Sequence[Call], device: torch.device, rounds: int = 7) -> list[float]:
    """Median milliseconds of each, in turns; calls that take seconds are made less often."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:  # compile, fill caches
        call()
    for turn in range(rounds):
        for call, found in zip(calls, samples, strict=True):
            if turn and found[0] > 2000:
                continue
            found.append(_once(call, device))
    return [statistics.median(found) for found in samples]


def _once(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(1 << 26, dtype=torch.int32, device=device).zero_()  # other data than the call's in the cache
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


@contextmanager
def twin(choice: str) -> Iterator[None]:
    """Operators take this twin inside."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def graphed(call: Call) -> Call | None:
    """The call as a CUDA graph; None if it asks the device for a value on its way."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure(case: Case, device: torch.device, speed: Rates) -> Row:
    """Time a case in all its forms."""

    def taking(choice: str) -> Call:
        def call() -> object:
            with twin(choice):
                return case.call()

        return call

    forms: dict[str, Call] = {"eager": taking("reference")}
    if device.type == "cuda":
        forms["triton"] = taking("triton")
        forms["eager"]()
        replay = graphed(forms["eager"])
        if replay is not None:
            forms["graphed"] = replay
    if case.literal is not None:
        forms["literal"] = case.literal
    took = dict(zip(forms, timed(list(forms.values()), device), strict=True))
    best, floor = took.get("triton", took["eager"]), speed.floor(case)
    return Row(
        kernel=case.kernel,
        shape=case.shape,
        triton=took.get("triton"),
        eager=took["eager"],
        graphed=took.get("graphed"),
        literal=took.get("literal"),
        floor=floor,
        of_floor=floor / best,
        us_per_pick=None if case.picks is None else 1e3 * best / case.picks,
        prefill_saved=case.saves,
        # the formula is an H200's
        share_of_saved=best / case.saves if case.saves is not None and device.type == "cuda" else None,
    )


def prefill(tokens: int) -> float:
    """Milliseconds of a prefill of a model of 7.6 billion parameters, 28 layers and width 3584 in bfloat16: an H200 at
    65 % of 790 TFLOP/s, or reading the weights at 4.3 TB/s."""
    parameters, layers, width = 7.6e9, 28, 3584
    flops = 2 * parameters * tokens + 2 * tokens**2 * width * layers
    return 1e3 * max(flops / (0.65 * 790e12), 2 * parameters / 4.3e12)


# ----------------------------------------------------------------------------------------------------------- selections


def _literal(gain: Callable[[list[int]], Tensor], k: int) -> Call:
    """A loop that computes all gains anew from the list of what was chosen, and reads every pick on the host."""

    def call() -> list[int]:
        chosen: list[int] = []
        for _ in range(k):
            now = gain(chosen)
            now[chosen] = -torch.inf
            chosen.append(int(now.argmax()))
        return chosen

    return call


def _selection(device: torch.device, n: int, k: int, width: int) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, n, width, device=device, generator=generator)
    score = torch.rand(1, n, device=device, generator=generator)
    table, usable = cosines(x)
    bound, count = bounds(torch.ones_like(usable), usable), torch.tensor([k], device=device)
    one, s = torch.ones(1, device=device), score[0]

    def running_max(offset: Tensor, slope: Tensor) -> Call:
        return lambda: ops.running_max(table, offset, slope, score, bound, count, k)

    def nearest(chosen: list[int]) -> Tensor:
        return table[0, chosen].amax(0)

    def case(name: str, call: Call, gain: Callable[[list[int]], Tensor]) -> Case:
        literal = _literal(lambda chosen: gain(chosen) if chosen else s.clone(), k)
        moved = 4.0 * n * k  # the rows of the picks
        return Case(name, f"N={n} K={k}", call, literal, moved, saves=prefill(n) - prefill(k), picks=k)

    def variance(chosen: list[int]) -> Tensor:
        """Conditional variances, by solving for all candidates anew."""
        kernel = s[:, None] * table[0] * s
        if not chosen:
            return kernel.diagonal().clone()
        across = kernel[chosen]
        inner = kernel[chosen][:, chosen] + 1e-6 * torch.eye(len(chosen), device=device)
        return kernel.diagonal() - (across * torch.linalg.solve(inner, across)).sum(0)

    def covering(chosen: list[int]) -> Tensor:
        """Gains of all candidates, from the whole table."""
        best = table[0, chosen].amax(0).clamp_min(0) if chosen else torch.zeros(n, device=device)
        return (table[0] - best[:, None]).clamp_min(0).sum(0)

    kernel = table * score[:, :, None] * score[:, None]
    yield Case("cosines", f"N={n} D={width}", lambda: cosines(x), products=n * n * width)  # of a symmetric table
    yield case("max-min", running_max(one, one), lambda chosen: 1 - nearest(chosen))
    yield case("mmr", running_max(0.5 * score, 0.5 * one), lambda chosen: 0.5 * (s - nearest(chosen)))
    yield case("product", running_max(score, score), lambda chosen: s * (1 - nearest(chosen)))
    yield case(
        "max-sum", lambda: ops.running_sum(table, score, bound, count, k), lambda chosen: -table[0, chosen].sum(0)
    )
    yield case("dpp", lambda: ops.determinant(kernel, score, bound, count, k), variance)
    yield case("facility", lambda: ops.coverage(table, None, None, None, 0.0, bound, count, k), covering)


def selections(device: torch.device) -> Iterator[Case]:
    """Greedy selections, from similarities that are there: the product that makes them is a case of its own."""
    for n, k, width in SELECTIONS:
        if device.type == "cuda" or n <= ON_CPU:
            yield from _selection(device, n, k, width)


# ------------------------------------------------------------------------------------------------------ other operators


def attentions(device: torch.device) -> Iterator[Case]:
    """What every key receives from all queries, in the dtype of models."""
    for whose, n, heads, groups, width, causal in ATTENTIONS:
        if device.type != "cuda" and n > ON_CPU:
            continue
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q = torch.randn(1, heads, n, width, device=device, generator=generator).to(dtype)
        k = torch.randn(1, groups, n, width, device=device, generator=generator).to(dtype)

        def dense(q: Tensor = q, k: Tensor = k, causal: bool = causal) -> Tensor:
            """Eager attention, whose map is summed."""
            logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
            if causal:
                logits = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -torch.inf)
            return logits.float().softmax(-1).sum((1, 2))

        yield Case(
            kernel="attention columns",
            shape=f"{whose}: N={n} H={heads}/{groups} d={width}" + (", causal" if causal else ""),
            call=functools.partial(_columns, q, k, causal),
            literal=dense if 4 * heads * n * n < 2**33 else None,  # bytes of its map, of which it needs a few
            moved=2.0 * n * width * (heads + groups),
            # both twice: the sums of the rows come first
            products=4.0 * heads * n * n * width / (2 if causal else 1),
            exponentials=2.0 * heads * n * n / (2 if causal else 1),
        )


def _columns(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    return attention_columns(q, k, q.new_ones(1, dtype=torch.float32), sight(q, k, causal=causal))


def compactions(device: torch.device) -> Iterator[Case]:
    """Keys and values of all layers cut to the slots that stay."""
    for layers, heads, width, n, kept in CACHES:
        if device.type != "cuda" and n > ON_CPU:
            continue
        shape = (1, heads, n, width)
        tensors = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2 * layers)]
        by_head = [x.transpose(0, 1) for x in tensors]  # the batch stands before the slots
        slots = torch.randperm(n, device=device)[:kept].sort().values[None]
        yield Case(
            kernel="compaction",
            shape=f"{layers} layers, N={n} K={kept}",
            call=functools.partial(gather_rows, by_head, [2] * len(by_head), slots),
            literal=lambda tensors=tensors, slots=slots: [x.index_select(2, slots[0]) for x in tensors],  # type: ignore[misc]
            moved=2.0 * sum(x.nbytes for x in tensors) * kept / n,
            saves=prefill(n) - prefill(kept),
        )


def matches(device: torch.device) -> Iterator[Case]:
    """Most similar token on the other side, and means of groups."""
    for n, width in MATCHES:
        if device.type != "cuda" and n > ON_CPU:
            continue
        x, y = (torch.randn(1, n, width, device=device) for _ in range(2))
        yield Case(
            kernel="nearest",
            shape=f"N={n} D={width}",
            call=functools.partial(nearest_rows, x, y),
            literal=lambda x=x, y=y: (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT).max(-1),  # type: ignore[misc]
            products=2.0 * n * n * width,
        )
    for n, kept, width in MERGES:
        if device.type != "cuda" and n > ON_CPU:
            continue
        x, group = torch.randn(1, n, width, device=device), torch.randint(kept, (1, n), device=device)
        weight = torch.ones(1, n, device=device)
        yield Case(
            kernel="segment mean",
            shape=f"N={n} K={kept} D={width}",
            call=functools.partial(segment_mean, x, group, kept, weight),
            literal=lambda x=x, group=group, kept=kept: _one_hot_mean(x, group, kept),  # type: ignore[misc]
            moved=4.0 * (n + kept) * width,
        )


def _one_hot_mean(x: Tensor, group: Tensor, count: int) -> Tensor:
    member = F.one_hot(group, count).to(x.dtype)
    return member.mT @ x / member.sum(1)[..., None].clamp_min(1)


def biases(device: torch.device) -> Iterator[Case]:
    """Attention with a bias per key: each way is a case, and its floor is the product without one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for n in (640, 2944):
        for rows in (n, 1):
            q = torch.randn(1, 32, rows, 128, device=device).to(dtype)
            k, v = (torch.randn(1, 8, n, 128, device=device).to(dtype) for _ in range(2))
            bias = torch.rand(1, n, device=device)
            for name, variant in variants().items():
                yield Case(
                    kernel=f"attention with bias, {name}",
                    shape=f"{'prefill' if rows > 1 else 'decode'} N={n} H=32/8 d=128",
                    call=variant(q, k, v, bias, 128**-0.5),
                    moved=2.0 * n * 8 * 128 * q.element_size(),
                    products=4.0 * 32 * rows * n * 128 / (2 if rows > 1 else 1),
                )


GROUPS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "selections": selections,
    "attentions": attentions,
    "compactions": compactions,
    "matches": matches,
    "biases": biases,
}


# -------------------------------------------------------------------------------------------------------------- output


def plot(rows: Sequence[Row], title: str) -> str:
    """Times of all cases on a logarithmic axis, as SVG."""
    left, top, width, line = 230, 46, 560, 16
    marks = {"triton": "#c0392b", "eager": "#2c3e50", "graphed": "#8e44ad", "literal": "#95a5a6", "floor": "#27ae60"}
    values = [t for row in rows for name in marks if (t := getattr(row, name))]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(ms: float) -> float:
        return left + width * (math.log10(ms) - low) / max(1, high - low)

    height = top + line * len(rows) + 30
    box = f'viewBox="0 0 {left + width + 30} {height}" font-size="11" font-family="sans-serif"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16">{title}</text>',
    ]
    for at, (name, colour) in enumerate(marks.items()):
        out.append(f'<circle cx="{left + 90 * at}" cy="30" r="4" fill="{colour}"/>')
        out.append(f'<text x="{left + 90 * at + 8}" y="34">{name}</text>')
    for power in range(low, high + 1):
        out.append(f'<path d="M{x(10**power):.0f} {top}V{height - 24}" stroke="#ddd"/>')
        out.append(f'<text x="{x(10**power):.0f}" y="{height - 10}" text-anchor="middle">{10**power:g} ms</text>')
    for at, row in enumerate(rows):
        y = top + line * at + 8
        out.append(f'<text x="8" y="{y + 4}">{row.kernel}, {row.shape}</text>')
        for name, colour in marks.items():
            if ms := getattr(row, name):
                out.append(f'<circle cx="{x(ms):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m visiontok.kernels.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table there, and FILE.svg beside it")
    parser.add_argument("--only", choices=GROUPS, help="one group of cases")
    given = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    machine = f"{name}, torch {torch.__version__}" + (
        "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    )
    speed = rates(device)
    print(f"{machine}; copies {speed.copy / 1e9:.0f} GB/s, products {speed.product / 1e12:.2f} TFLOP/s")
    columns = [field.name for field in fields(Row)]
    print(" | ".join(columns))
    rows = []
    with torch.inference_mode():
        for group in [given.only] if given.only else GROUPS:
            for case in GROUPS[group](device):
                rows.append(measure(case, device, speed))
                print(" | ".join(map(_text, asdict(rows[-1]).values())), flush=True)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, "machine"])
            writer.writerows([*(_text(value) for value in asdict(row).values()), machine] for row in rows)
        given.out.with_suffix(".svg").write_text(plot(rows, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
