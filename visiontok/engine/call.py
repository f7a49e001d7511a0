"""The state of one forward, from the base model's hook to the last decoder layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .cache import TwoLengthCache
from .layout import Layout
from .trace import Trace
from .vision import Encoded, Units

if TYPE_CHECKING:
    from .attach import Policy


class Call:
    """Everything the hooks know about one forward; B rows, N prompt positions of this forward, E of them entering.

    Attributes:
        mode: ``prefill``, or ``stock`` where nothing is dropped in one; ``decode`` where layers store different slots,
            ``uniform`` where all store the same.
        policy: who decides; several may be attached to one model, and each attachment knows its calls by this.
        visual: (B, N) bool, visual positions.
        attended: (B, N) bool, positions that are not padding.
        units: the images of the call.
        records: the tower runs that made their features.
        ids: (B, N) token ids, or None if the caller gave embeddings.
        embeds: (B, N, D) inputs of the language model before any pruning.
        alive: per decoder layer the (B, N) bool mask of tokens it holds, filled as layers run.
        trains: whether gradients were wanted when the language model was entered.
        attention: (statistic, layer) → (B, N) scores from decoder taps, in prompt coordinates.
    """

    def __init__(self, mode: str, policy: Policy, trace: Trace) -> None:
        self.mode = mode
        self.policy = policy
        self.trace = trace
        self.cache: TwoLengthCache | None = None
        self.mask_2d: torch.Tensor | None = None
        self.masks: dict[Any, Any] = {}
        self.history: torch.Tensor | None = None  # (B, P) mask of the tokens stored before this prefill
        self.first_key: tuple[Any, ...] = ()

    def begin_prefill(
        self, visual: torch.Tensor, attended: torch.Tensor, units: Units, records: list[Encoded], ids: Any, embeds: Any
    ) -> None:
        """Fill in what only a prefill has."""
        self.visual, self.attended, self.units, self.records = visual, attended, units, records
        self.ids, self.embeds = ids, embeds
        self.batch, self.length = visual.shape
        self.trains = torch.is_grad_enabled()
        self.entry: Layout | None = None
        self.entry_valid: torch.Tensor | None = None
        self.width = self.length
        self.kept = visual
        self.tail = int(visual.any(0).flip(0).long().cumsum(0).eq(0).sum())  # text behind every row's last visual token
        self.layouts: dict[int, Layout | None] = {-1: None}
        self.states: dict[int, torch.Tensor | None] = {}
        self.alive: dict[int, torch.Tensor] = {}
        self.levels: list[torch.Tensor] = []
        self.full_mask: torch.Tensor | None = None
        self.attention: dict[tuple[str, int], torch.Tensor] = {}

    def enter(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Prompt coordinates → entry coordinates."""
        return x if self.entry is None else self.entry.gather(x, dim)

    def entry_valid_or_ones(self) -> torch.Tensor:
        """(B, E) bool: entry slots that hold a token."""
        if self.entry_valid is not None:
            return self.entry_valid
        return torch.ones(self.batch, self.width, dtype=torch.bool, device=self.visual.device)

    def check_last(self, alive: torch.Tensor) -> None:
        """The token that predicts the next one must stay.

        Raises:
            UnsupportedError: if a row ends with a visual token that is not in ``alive`` (B, N).
        """
        position = torch.arange(self.length, device=alive.device)
        last = torch.where(self.attended, position, 0).amax(1, keepdim=True)
        lost = (self.visual & ~alive).gather(1, last)[:, 0]
        if bool(lost.any()):
            raise UnsupportedError(
                f"prompt row {int(lost.nonzero()[0])} ends with a visual token that would be dropped, and with it the "
                "prediction of the next token; put text behind the image"
            )

    def slots(self, layer: int) -> int:
        """Slots per row in a layer."""
        layout = self.layouts.get(layer)
        return self.width if layout is None else layout.width

    def to_prompt(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(B, M, …) in the slots of ``layer`` → (B, N, …) in prompt positions; dropped positions repeat a neighbour."""
        for layout in (self.layouts.get(layer), self.entry):
            if layout is not None:
                x = layout.fill(x)
        return x
