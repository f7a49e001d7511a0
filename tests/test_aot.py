"""The gate that looks at kernels compiled ahead of time. CI lets it look at all that are shipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PLANTED = Path(__file__).parent / "data" / "planted_kernels.py"


def python(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_the_gate_refuses_what_is_planted() -> None:
    run = python(str(PLANTED))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("fine") == []
    expected = {
        "spills": "bytes of stack",
        "no tensor cores": "no instruction like HGMMA",
        "shared memory": "102400 bytes of shared memory, more than 99 KB",
        "registers": "1024 registers in 128 threads, more than 65536",
    }
    assert found.keys() == expected.keys()
    for name, message in expected.items():
        assert len(found[name]) == 1, found[name]
        assert message in found[name][0]


def test_nothing_is_compiled_while_kernels_are_interpreted() -> None:
    run = python("-m", "visiontok.kernels.aot", interpret="1")
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set, so nothing is compiled: unset it" in run.stderr
