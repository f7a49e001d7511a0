"""What one prefill, and the decoding steps behind it, did and how long it took."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..cost import VisionInputs
from ..ledger import TokenLedger
from .clock import Clock
from .host import Promises
from .merging import Merged


class Trace:
    """The light remains of a call: masks and times, no hidden states.

    Attributes:
        ledger: which token is alive where; None before the first prefill.
        clock: marks ``prefill``, ``selection``, ``selected``, ``prefilled``, ``finished``, ``step`` (the last one).
        encoders: clocks of the tower runs.
        remembered: whether a vision memory answered in the tower's place; how long the tower takes is not known then.
        inputs: what the caller gave the tower in each run, and what it got of that at a pixel stage; None for a family
            outside the cost model.
        merged: what a merge stage did inside the tower in each run; None where there was none.
        plane: ``hooks`` if tokens were dropped inside the forward, ``inputs`` if the model was given shorter inputs.
        ahead: decoder layers that were looked ahead at.
        explained: whether the language model ran forward and backward before, for what its next token rests on.
        chunk: whether this was a part of a prompt only.
        stores: whether the language model has a cache.
        promises: what was taken for granted and is checked later.
        steps: forwards on a compressed cache between this prefill and the next one; None if this call ran stock, whose
            cache is stock too and is not watched.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.ledger: TokenLedger | None = None
        self.clock = Clock()
        self.encoders: list[Clock] = []
        self.remembered = False
        self.inputs: list[tuple[VisionInputs, VisionInputs] | None] = []
        self.merged: list[Merged | None] = []
        self.plane: Literal["hooks", "inputs"] = "hooks"
        self.ahead: list[int] = []
        self.explained = False
        self.chunk = False
        self.stores = True
        self.promises = Promises()
        self.steps: int | None = 0

    def ran_stock(self) -> None:
        """The recipe kept every token, and the call ran untouched."""
        self.steps = None

    def finish(
        self,
        alive: list[torch.Tensor],
        widths: list[int],
        masses: list[torch.Tensor | None],
        frozen: Mapping[int, int] | None = None,
        cached: Mapping[int, tuple[torch.Tensor, int]] | None = None,
        narrow: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        """The prefill is through; see :meth:`visiontok.ledger.TokenLedger.fill`."""
        if self.ledger is not None:
            self.ledger.fill(alive, widths, masses, frozen or {}, cached or {}, narrow or {})
        self.clock.mark("finished")

    def note_step(self) -> None:
        """One more forward on the cache of this prefill."""
        if self.steps is not None:
            self.steps += 1
            self.clock.mark("step", again=True)

    def seconds(self) -> dict[str, float | None]:
        """Measured parts: choice of a pixel stage, vision tower (projector included), selection before the language
        model, prefill without it, decode."""
        chosen = [c.seconds("start", "chosen") for c in self.encoders]
        tower = [
            c.seconds("start" if t is None else "chosen", "end") for c, t in zip(self.encoders, chosen, strict=True)
        ]
        prefill, selection = self.clock.seconds("prefill", "prefilled"), self.clock.seconds("selection", "selected")
        known = prefill is not None and selection is not None
        pixels = [t for t in chosen if t is not None]
        return {
            "pixels": sum(pixels) if pixels else None,
            "vision": sum(t for t in tower if t is not None) if tower and not self.remembered else None,
            "selection": selection,
            "prefill": prefill - selection if known else None,  # type: ignore[operator]
            "decode": self.clock.seconds("finished", "step"),
        }


class Traces:
    """The latest trace of each thread."""

    def __init__(self) -> None:
        self._latest: dict[int, Trace] = {}  # by thread; 0 is whichever was last

    @property
    def latest(self) -> Trace | None:
        """This thread's, or else any thread's."""
        return self._latest.get(threading.get_ident(), self._latest.get(0))

    def publish(self, trace: Trace) -> None:
        """Make ``trace`` the latest one."""
        self._latest[0] = self._latest[threading.get_ident()] = trace

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle starts without the traces of past calls."""
        return {"_latest": {}}
