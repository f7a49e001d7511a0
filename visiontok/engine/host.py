"""Between host and device: what the host may know without making it wait.

Reading a value from an accelerator stops the host until the device has done all that was asked of it. The engine
therefore reads token ids and sizes once, before the vision tower starts, and counts on the host from then on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def stops_host(device: torch.device) -> bool:
    """Whether reading a value from ``device`` stops the host until its work is done."""
    return device.type != "cpu"


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device``; the host does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Promises:
    """Conditions on device tensors that the host took for granted; read when that costs no waiting.

    On the CPU a condition is checked at once. On an accelerator it is checked when the device has come that far and
    somebody asks, which is at the next forward or when ledger or report are read.
    """

    def __init__(self) -> None:
        self._open: list[tuple[torch.Tensor, torch.cuda.Event | None, Exception]] = []

    def expect(self, condition: torch.Tensor, error: Callable[[], Exception]) -> None:
        """Raise ``error()`` now or later if ``condition``, one bool, does not hold."""
        if not stops_host(condition.device):
            if not bool(condition):
                raise error()
            return
        event = None
        if condition.device.type == "cuda":
            condition = condition.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._open.append((condition, event, error()))

    def settle(self, *, wait: bool) -> None:
        """Check what can be checked; with ``wait`` everything.

        Raises:
            the error of the first condition that does not hold.
        """
        while self._open:
            condition, event, error = self._open[0]
            if event is None and not wait:
                return
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._open.pop(0)
            if not bool(condition):
                raise error

    def __getstate__(self) -> dict[str, object]:
        """A copy or a pickle has nothing to wait for: events belong to one process."""
        return {"_open": []}
