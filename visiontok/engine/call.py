"""The state of one forward, from the base model's hook to the last decoder layer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .cache import TwoLengthCache
from .host import Promises, stops_host, upload
from .layout import Layout, Parted
from .split import Rows
from .trace import Trace
from .vision import Encoded, Units

if TYPE_CHECKING:
    from ..context import Context
    from .attach import Policy


class Decode:
    """A forward on a compressed cache in which nothing is dropped.

    Attributes:
        policy: whose call it is; several may be attached to one model, and each attachment knows its calls by this.
        masks: per decoder layer the mask it gets, or ``UNCHANGED`` for the language model's own; None if all layers
            take the language model's.
        tables: per decoder layer the rotary tables it gets, None for the language model's; likewise.
    """

    def __init__(
        self, policy: Policy, trace: Trace | None, masks: list[Any] | None, tables: list[Any] | None = None
    ) -> None:
        self.policy, self.trace, self.masks, self.tables = policy, trace, masks, tables


class Prefill:
    """A forward that carries images; B rows, N prompt positions of this forward, E of them entering.

    Attributes:
        policy: who decides.
        trains: whether gradients were wanted when the language model was entered.
        visual: (B, N) bool, visual positions.
        attended: (B, N) bool, positions that are not padding.
        units: the images of the call.
        records: the tower runs that made their features.
        ids: (B, N) token ids, or None if the caller gave embeddings; ``prompts`` are the same on the host, per row and
            without padding.
        embeds: (B, N, D) inputs of the language model before any pruning.
        counts: visual tokens of each unit that are alive, on the host.
        kept: (B, N) bool, visual positions that are alive.
        positions: makes the positions that the language model gives to the whole prompt, (…, B, N) long; None where
            visual tokens have none.
        numbers: (B or 1, N) long, the positions that the stock language model would turn queries and keys by.
        ahead: looks ahead to a decoder layer of the stock model, (B, N) products of the last prompt token's query with
            the keys; None where that cannot be done.
        rests: (B, N) what the stock model's next token rests on; None where that cannot be asked.
        mass: (U, N) float, how many original tokens each token stands for; None while each stands for itself.
        bias: (B, N) float, what mass adds to the attention logits of each key; None for nothing.
        alive: per decoder layer the (B, N) bool mask of tokens it holds, filled as layers run.
        biases: per decoder layer the ``bias`` it runs with; ``masses`` the ``mass``.
        rows: which slots are computed, of the decoder layers that do not compute all of theirs.
        first: (B, M, D), what enters layer 0, if that is one of them.
        routed: visual tokens of each unit that go through a decoder layer which others pass by.
        scales: per such layer (B, E, 1), the factor of what the MLP adds to each state.
        parted: how the slots of a decoder layer are divided whose MLP is narrow for visual tokens.
        edits: per decoder layer a function that rewrites the states (B, E, D) on its input.
        attention: (statistic, layer) → (B, N) scores from decoder taps, in prompt coordinates.
        notes: (what, decoder layer) → (U, N, …), what else was seen of its visual tokens.
        cached: per decoder layer whose cache was thinned the (B, N, G) bool mask of the tokens that each key head has
            left, and the slots of a row.
        asked_of_cache: what does not change from layer to layer in the question to a cache method.
        stock: nothing is dropped, and the language model runs untouched.
    """

    def __init__(
        self,
        policy: Policy,
        trace: Trace,
        units: Units,
        records: list[Encoded],
        visual: torch.Tensor,
        attended: torch.Tensor,
        ids: torch.Tensor | None,
        ids_host: torch.Tensor | None,
        embeds: torch.Tensor,
    ) -> None:
        """``visual`` and ``attended`` are given on the host."""
        self.policy, self.trains = policy, torch.is_grad_enabled()
        self.trace, self.units, self.records = trace, units.to(embeds.device), records
        self.ids, self.embeds = ids, embeds
        self.batch, self.length = visual.shape
        self.prompts = None if ids_host is None else [r[a].tolist() for r, a in zip(ids_host, attended, strict=True)]
        self._text = attended & ~visual, torch.where(visual, torch.arange(self.length), -1).amax(1, keepdim=True)
        self._ids_host = ids_host
        self.padded = not bool(attended.all())
        self.texts: list[int] = (attended & ~visual).sum(1).tolist()  # text tokens of each row
        self.tail = int(visual.any(0).flip(0).long().cumsum(0).eq(0).sum())  # text behind every row's last visual token
        place = torch.where(attended, torch.arange(self.length), 0).amax(1, keepdim=True)
        self._ends = bool(visual.gather(1, place).any())
        self._last = upload(place, embeds.device)
        self.visual, self.attended = upload(visual, embeds.device), upload(attended, embeds.device)
        self.kept = self.visual
        self.counts: list[int] = units.sizes
        self.positions: Callable[[], torch.Tensor] | None = None
        self.numbers: torch.Tensor
        self.ahead: Callable[[int, Prefill], torch.Tensor] | None = None
        self.rests: Callable[[Prefill], torch.Tensor] | None = None
        self.mass: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.promises: Promises = trace.promises
        self.stock = False
        self.cache: TwoLengthCache | None = None
        self.history: torch.Tensor | None = None  # (B, P) mask of the tokens stored before this prefill
        self.first_key: tuple[Any, ...] = ()
        self.masks: dict[Any, Any] = {}
        self.own: dict[str, torch.Tensor] = {}  # masks of families that make their own, without what is stored
        self.entry: Layout | None = None
        self.entry_valid: torch.Tensor | None = None
        self.width = self.length
        self.entered: list[int] = []  # tokens of each row that enter
        self.layouts: dict[int, Layout | None] = {-1: None}
        self.states: dict[int, torch.Tensor | None] = {}
        self.alive: dict[int, torch.Tensor] = {}
        self.biases: dict[int, torch.Tensor | None] = {}
        self.masses: dict[int, torch.Tensor | None] = {}
        self.rows: dict[int, Rows] = {}
        self.first: torch.Tensor | None = None
        self.routed: dict[int, list[int]] = {}
        self.scales: dict[int, torch.Tensor] = {}
        self.parted: dict[int, Parted] = {}
        self.edits: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.levels: list[torch.Tensor] = []
        self.attention: dict[tuple[str, int], torch.Tensor] = {}
        self.notes: dict[tuple[str, int], torch.Tensor] = {}
        self.cached: dict[int, tuple[torch.Tensor, int]] = {}
        self.asked_of_cache: Context | None = None

    def row_counts(self, counts: Sequence[int]) -> list[int]:
        """Tokens of each row, text included, if so many of each unit are alive."""
        rows = list(self.texts)
        for row, n in zip(self.units.rows, counts, strict=True):
            rows[row] += n
        return rows

    def question(self, special: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the question of each row stands: the text behind its last visual token, or all its text.

        Args:
            special: token ids that are no words.

        Returns:
            (B, Q) long, prompt positions, and (B, Q) bool, which of them count; Q is at least 1.
        """
        text, last = self._text
        if self._ids_host is not None:
            text = text & ~torch.isin(self._ids_host, torch.tensor(sorted(special), dtype=torch.long))
        behind = text & (torch.arange(self.length) > last)
        asks = torch.where(behind.any(1, keepdim=True), behind, text)
        count = asks.sum(1, keepdim=True)
        width = max(int(count.max()), 1) if len(count) else 1
        index = asks.long().sort(dim=1, descending=True, stable=True).indices[:, :width]
        device = self.embeds.device
        return upload(index, device), upload(torch.arange(width) < count, device)

    def enter(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Prompt coordinates → entry coordinates."""
        return x if self.entry is None else self.entry.gather(x, dim)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """(B, E, …) in entry coordinates → (B, N, …) in prompt coordinates; what did not enter repeats a neighbour."""
        return x if self.entry is None else self.entry.fill(x)

    def entry_valid_or_ones(self) -> torch.Tensor:
        """(B, E) bool: entry slots that hold a token."""
        if self.entry_valid is not None:
            return self.entry_valid
        return torch.ones(self.batch, self.width, dtype=torch.bool, device=self.visual.device)

    def slots_in_use(self, layer: int) -> torch.Tensor:
        """(B, M) bool: slots of ``layer`` that hold a token."""
        layout = self.layouts[layer]
        if layout is None:
            return self.entry_valid_or_ones()
        return torch.ones_like(layout.slots, dtype=torch.bool) if layout.valid is None else layout.valid

    def held(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(B, N, …) in prompt positions → (B, M, …) in the slots of ``layer``; those not in use hold anything."""
        x, layout = self.enter(x), self.layouts[layer]
        return x if layout is None else layout.gather(x)

    def check_last(self, alive: torch.Tensor) -> None:
        """The token that predicts the next one must stay.

        Raises:
            UnsupportedError: if a row ends with a visual token that is not in ``alive`` (B, N).
        """
        if not self._ends or self.trace.chunk:  # a later chunk predicts
            return
        lost = (self.visual & ~alive).gather(1, self._last)[:, 0].tolist()
        if any(lost):
            raise UnsupportedError(
                f"prompt row {lost.index(True)} ends with a visual token that would be dropped, and with it the "
                "prediction of the next token; put text behind the image"
            )

    def slots(self, layer: int) -> int:
        """Slots per row in a layer."""
        layout = self.layouts.get(layer)
        return self.width if layout is None else layout.width

    def slot_bias(self, layer: int) -> torch.Tensor | None:
        """(B, M) float: the bias of the slots of ``layer``; None for nothing."""
        bias, layout = self.biases.get(layer), self.layouts.get(layer)
        if bias is None:
            return None
        key = ("bias", id(bias), id(layout))
        if key not in self.masks:  # the value keeps both objects alive, so their ids stay theirs
            entered = self.enter(bias)
            self.masks[key] = (bias, layout, entered if layout is None else layout.gather(entered))
        return self.masks[key][2]

    def to_prompt(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(B, M, …) in the slots of ``layer`` → (B, N, …) in prompt positions; dropped positions repeat a neighbour."""
        for layout in (self.layouts.get(layer), self.entry):
            if layout is not None:
                x = layout.fill(x)
        return x


def counted(keep: torch.Tensor, known: Sequence[int] | None) -> list[int]:
    """True entries per row of ``keep`` (B, N); ``known`` spares an accelerator's answer, the CPU's costs nothing."""
    if known is not None and stops_host(keep.device):
        return list(known)
    return keep.sum(1).tolist()
