"""Set before anything else is imported: offline, one thread a worker, interpreted kernels, torchvision's stand-in."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with a thread pool each would fight over the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when it is imported. Where there is a GPU, set it to 0 to run the kernels themselves.
os.environ.setdefault("TRITON_INTERPRET", "1")

import visiontok._torchvision  # noqa: F401

pytest_plugins = ("support",)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the golden cases at the end of the run, so that nobody takes skipped for checked."""
    found = {
        outcome: [r for r in terminalreporter.stats.get(outcome, ()) if "::test_golden[" in r.nodeid]
        for outcome in ("passed", "failed", "skipped")
    }
    if any(found.values()):
        counts = ", ".join(
            f"{len(found[k])} {word}" for k, word in zip(found, ("checked", "failed", "skipped"), strict=True)
        )
        missing = sorted({str(r.longrepr[2]).split("'")[1] for r in found["skipped"]})
        terminalreporter.write_line(f"golden cases: {counts} (no code yet: {', '.join(missing) or 'none'})")
