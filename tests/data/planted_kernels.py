"""Kernels that the ahead-of-time gate must refuse, one for every reason; prints what it has against each."""

import json
from dataclasses import replace

import triton
import triton.language as tl
from visiontok.kernels import aot
from visiontok.kernels.build import Build, Config


@triton.jit
def _copy(X, Y, N, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    o_n = tl.arange(0, SIZE)
    tl.store(Y + o_n, tl.load(X + o_n, mask=o_n < N), mask=o_n < N)


@triton.jit
def _many_live(X, Y, N, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Twelve vectors of 16 registers a thread at once, where a thread has 64."""
    o_n = tl.arange(0, SIZE)
    a, b, c, d = (tl.load(X + o_n), tl.load(X + SIZE + o_n), tl.load(X + 2 * SIZE + o_n), tl.load(X + 3 * SIZE + o_n))
    e, f, g, h = a * b, b * c, c * d, d * a
    for _ in range(N):
        total = tl.sum(a * e + b * f + c * g + d * h, 0)
        a, b, c, d = a + total, b * total, c - total, d * d
        e, f, g, h = e + a, f * b, g + c, h * total
    tl.store(Y + o_n, a + b + c + d + e + f + g + h)


TYPES = {"X": "*fp32", "Y": "*fp32", "N": "i32"}


def build(name, kernel, size, warps, wanted=None):  # type: ignore[no-untyped-def]
    instructions = {} if wanted is None else {90: wanted}
    return Build(name, kernel, TYPES, Config({"SIZE": size}, warps), aligned=("N",), instructions=instructions)


PLANTED = [
    build("fine", _copy, 1024, 4, r"LDG\.E\.128"),
    build("spills", _many_live, 16384, 32),
    build("no tensor cores", _copy, 1024, 4, "HGMMA"),
]

if __name__ == "__main__":
    found = {one.name: aot.problems(one, 90, aot.compile_for(one, 90)) for one in PLANTED}
    fine = aot.compile_for(PLANTED[0], 90)
    found["shared memory"] = aot.problems(PLANTED[0], 90, replace(fine, shared=100 * 1024))
    found["registers"] = aot.problems(PLANTED[0], 90, replace(fine, registers=1024))
    print(json.dumps(found))
