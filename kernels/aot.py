"""Compile every shipped kernel for every architecture, without a GPU, and look at the machine code.

    python -m visiontok.kernels.aot            # exit code 1 and a line for every problem
    python -m visiontok.kernels.aot --write    # and keep registers and shared memory in compiled.json

No kernel may spill, take more shared memory than the architecture has, or miss the instructions it was written for.
With the Triton release of the table, registers and shared memory must be those of the table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    columns_triton,
    compact_triton,
    coverage_triton,
    determinant_triton,
    greedy_triton,
    matching_triton,
    segments_triton,
)
from .build import Build
from .runtime import interpreted

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("compiled.json")
_SHARED = {80: 163, 90: 227, 100: 227}  # KB that one block may have
_SHARED_SMALL = 99  # the same of sm_86 and sm_89
_REGISTERS = 65536  # of a multiprocessor
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What became of one configuration on one architecture."""

    registers: int
    stack: int
    shared: int
    code: str

    def row(self) -> dict[str, int]:
        """Its entry in the table."""
        return {"registers": self.registers, "shared": self.shared}


def shipped() -> list[Build]:
    """Every configuration that is launched."""
    greedy = (greedy_triton, determinant_triton, coverage_triton)
    others = (columns_triton, matching_triton, segments_triton, compact_triton)
    return [build for module in (*greedy, *others) for build in module.builds()]


def compile_for(build: Build, architecture: int) -> Compiled:
    """Compile as a launch would."""
    names = build.kernel.arg_names
    constants = dict(build.config.constants)
    types = {name: "constexpr" if name in constants else build.types[name] for name in names}
    # A launch specialises pointers and multiples of 16 as such; without, another kernel would be looked at.
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in build.aligned]
    source = ASTSource(
        fn=build.kernel,
        signature=types,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    out = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=build.config.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        # Not out.asm["sass"]: it lets the warnings of nvdisasm through.
        usage, code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(used["REG"], used["STACK"], out.metadata.shared, code)


def _tool(name: str, *arguments: str) -> str:
    """What a program that comes with Triton prints."""
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def problems(build: Build, architecture: int, compiled: Compiled) -> list[str]:
    """What the gate has against it."""
    found = []
    local = re.findall(r"\b(?:STL|LDL)\b", compiled.code)
    if compiled.stack or local:
        found.append(f"spills: {compiled.stack} bytes of stack, {len(local)} local loads and stores")
    limit = _SHARED_SMALL if build.small else _SHARED[architecture]
    if compiled.shared > limit * 1024:
        found.append(f"{compiled.shared} bytes of shared memory, more than {limit} KB")
    threads = 32 * build.config.warps
    if compiled.registers * threads > _REGISTERS:
        found.append(f"{compiled.registers} registers in {threads} threads, more than {_REGISTERS}")
    wanted = build.instructions.get(architecture)
    if wanted is not None and not re.search(wanted, compiled.code):
        found.append(f"no instruction like {wanted}")
    return found


def _look(wanted: tuple[str, int]) -> tuple[Compiled, list[str]]:
    """Compile a configuration, by name, and look at it; runs in a process of its own."""
    name, architecture = wanted
    build = next(build for build in shipped() if build.name == name)
    compiled = compile_for(build, architecture)
    return compiled, problems(build, architecture, compiled)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a line for each, and return 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m visiontok.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations whose name holds TEXT")
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHITECTURES, help="only for these; all by default"
    )
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} anew")
    given = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET is set, so nothing is compiled: unset it")
    if given.write and (given.only or given.arch):
        parser.error("--write keeps all configurations: leave --only and --arch out")

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "kernels": {}}
    comparable = table["triton"] == triton.__version__ and not given.write
    rows: dict[str, dict[str, dict[str, int]]] = {}
    failed = 0
    wanted = [
        (build.name, architecture)
        for build in shipped()
        if given.only in build.name
        for architecture in (given.arch or ARCHITECTURES[: 3 if build.everywhere else 2])
    ]
    with ProcessPoolExecutor() as pool:
        for (kernel, architecture), (compiled, found) in zip(wanted, pool.map(_look, wanted), strict=True):
            name = f"sm_{architecture}"
            row = rows.setdefault(kernel, {})[name] = compiled.row()
            before = table["kernels"].get(kernel, {}).get(name)
            if comparable and row != before:
                found.append(f"{TABLE.name} says {before}: run with --write and look at the difference")
            failed += len(found)
            print(f"{kernel:40} {name:6} {compiled.registers:4} registers {compiled.shared:7} B", flush=True)
            for problem in found:
                print(f"  {problem}")
    if given.write:
        TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    elif comparable and not given.only and not given.arch and (gone := table["kernels"].keys() - rows.keys()):
        failed += 1
        print(f"{TABLE.name} has kernels that are shipped no longer: {', '.join(sorted(gone))}; run with --write")
    print(f"{sum(map(len, rows.values()))} compiled with Triton {triton.__version__}, {failed} problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
