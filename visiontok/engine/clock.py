"""Wall-clock marks that do not make an accelerator wait."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Named instants: CUDA events in a process that uses CUDA, the performance counter elsewhere.

    Events are only recorded while the work runs; the device is waited for when a duration is read. For a model on the
    CPU of a process that uses CUDA elsewhere, they are reached when the device's own work before them is done.
    """

    def __init__(self) -> None:
        self._marks: dict[str, float | torch.cuda.Event] = {}

    @torch.compiler.disable
    def mark(self, name: str, *, again: bool = False) -> None:
        """Remember this instant; the first mark of a name counts, or with ``again`` the last."""
        if name in self._marks and not again:
            return
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has no events, which belong to one process."""
        return {"_marks": {name: at for name, at in self._marks.items() if isinstance(at, float)}}

    def seconds(self, start: str, end: str) -> float | None:
        """Seconds between two marks; None if either was not reached."""
        a, b = self._marks.get(start), self._marks.get(end)
        if a is None or b is None:
            return None
        if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
            b.synchronize()
            return a.elapsed_time(b) / 1e3
        if isinstance(a, float) and isinstance(b, float):
            return b - a
        return None
