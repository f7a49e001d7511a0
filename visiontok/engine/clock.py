"""Wall-clock marks that do not make an accelerator wait."""

from __future__ import annotations

import time

import torch


class Clock:
    """Named instants: CUDA events where there is a CUDA device, the performance counter elsewhere.

    Events are only recorded while the work runs; the device is waited for when a duration is read.
    """

    def __init__(self) -> None:
        self._marks: dict[str, float | torch.cuda.Event] = {}

    def mark(self, name: str) -> None:
        """Remember this instant; the first mark of a name counts."""
        if name in self._marks:
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

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
