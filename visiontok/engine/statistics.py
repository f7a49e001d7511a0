"""Statistics of the attention in one decoder layer, one number or row for each of its keys.

None of them holds a map of all queries and keys of a layer: see :func:`visiontok.functional.attention_columns`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..functional import attention_columns, attention_flow, attention_heads, attention_rows, attention_share
from .call import Prefill
from .probe import Visible


@dataclass(frozen=True)
class Seen:
    """What a decoder layer computes of the slots it holds.

    Attributes:
        call: the prefill.
        layer: the layer.
        q: (B, H, M, d) queries.
        k: (B, G, P + M, d) keys, those of P cached tokens first.
        visible: what each query sees.
        scale: factor on the logits; None for 1/√d.
        bias: (B, P + M) float, what is added to the logits of each key, or None.
        special: tells the token ids that are no words.
    """

    call: Prefill
    layer: int
    q: torch.Tensor
    k: torch.Tensor
    visible: Visible
    scale: float | None
    bias: torch.Tensor | None
    special: Callable[[], set[int]]

    @cached_property
    def used(self) -> torch.Tensor:
        """(B, M) bool: slots that hold a token."""
        return self.call.slots_in_use(self.layer)

    @property
    def last(self) -> torch.Tensor:
        """(B, 1) long: the slot of each row's last token; right padding lies behind it."""
        used = self.used
        return (used * torch.arange(used.shape[1], device=used.device)).argmax(1, keepdim=True)

    @property
    def words(self) -> torch.Tensor:
        """(B, Q) long: slots in which the words of the question stand."""
        at, _ = self.call.question(self.special())
        for layout in (self.call.entry, self.call.layouts[self.layer]):
            if layout is not None:
                at = layout.slot_of().gather(1, at)
        return at

    def held(self, prompt: torch.Tensor) -> torch.Tensor:
        """(B, N) in prompt positions → (B, M) in the slots of the layer, False or 0 where there is no token."""
        return self.call.held(self.layer, prompt * self.call.attended) * self.used

    @property
    def shown(self) -> torch.Tensor:
        """(B, M) bool: slots that hold visual tokens."""
        return self.held(self.call.visual)

    @property
    def asking(self) -> torch.Tensor:
        """(B, M) bool: slots that hold text behind the row's last visual token."""
        call = self.call
        position = torch.arange(call.length, device=call.visual.device)
        last = torch.where(call.visual, position, -1).amax(1, keepdim=True)
        return self.held(call.attended & ~call.visual & (position > last))

    @property
    def image(self) -> torch.Tensor:
        """(B, M) long: which image the token in each slot is of, from 1 on; 0 for text and padding."""
        units = self.call.units
        number = torch.arange(1, len(units) + 1, device=units.row.device)[:, None].expand_as(units.valid)
        return self.held(units.scatter(number * units.valid))

    def rows(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, H, Q, d) of the slots ``at`` (B, Q), and what they see, (B, Q, K)."""
        row = torch.arange(len(at), device=at.device)[:, None]
        return self.q.transpose(1, 2)[row, at].transpose(1, 2), self.visible.of(at)

    def any(self, wanted: torch.Tensor) -> torch.Tensor | None:
        """(R,) long: query slots that any row of ``wanted`` (B, M) names; None if these are all."""
        found = wanted.any(0).nonzero().flatten()
        return None if len(found) == wanted.shape[1] else found

    def mean(self, who: torch.Tensor, heads: Literal["mean", "max"] = "mean") -> torch.Tensor:
        """(B, K): mean over the query slots ``who`` (B, M) of their attention, of all heads or the largest of them."""
        return attention_columns(
            self.q, self.k, scale=self.scale, bias=self.bias, **self.visible.options(), rows=self.any(who), weight=who,
            heads=heads,
        )  # fmt: skip


def _last_row(seen: Seen) -> torch.Tensor:
    q, visible = seen.rows(seen.last)
    return attention_rows(q, seen.k, scale=seen.scale, visible=visible, bias=seen.bias)[:, 0]


def _text_heads(seen: Seen) -> torch.Tensor:
    q, visible = seen.rows(seen.words)
    each = attention_heads(q, seen.k, scale=seen.scale, visible=visible, bias=seen.bias)
    return each.permute(0, 3, 1, 2)  # (B, K, H, Q)


def _flow(seen: Seen) -> torch.Tensor:
    new = seen.q.shape[2]  # cached tokens have no rows of their own
    options = seen.visible.options(own=True)
    return attention_flow(seen.q, seen.k[:, :, -new:], scale=seen.scale, start=seen.used, **options)


def _to_text(seen: Seen) -> torch.Tensor:
    past, shown = seen.k.shape[2] - seen.q.shape[2], seen.shown
    text = torch.cat([shown.new_zeros(len(shown), past), seen.used & ~shown], 1)
    total = torch.zeros(len(seen.k), seen.k.shape[2], device=seen.q.device)
    at = shown.any(0).nonzero().flatten()
    total[:, past + at] = attention_share(
        seen.q, seen.k, text, scale=seen.scale, bias=seen.bias, **seen.visible.options(), rows=at
    )
    return total


def _own_peaks(seen: Seen) -> torch.Tensor:
    image = seen.image
    ones = torch.ones_like(image, dtype=torch.float32)
    size = ones.new_zeros(len(image), len(seen.call.units) + 1).scatter_add(1, image, ones)
    nobody = image.new_full((len(image), seen.k.shape[2] - image.shape[1]), -1)  # has cached tokens
    return attention_columns(
        seen.q, seen.k, scale=seen.scale, bias=seen.bias, **seen.visible.options(), rows=seen.any(image > 0),
        weight=(image > 0) / size.gather(1, image), heads="max", group=(image, torch.cat([nobody, image], 1)),
        normalise=None,
    )  # fmt: skip


def _unturned_row(seen: Seen) -> torch.Tensor:
    q, _ = seen.rows(seen.last)
    return attention_rows(q, seen.k, scale=seen.scale, visible=seen.shown[:, None])[:, 0]


STATISTICS: dict[str, Callable[[Seen], torch.Tensor]] = {
    "last_row": _last_row,
    "text_rows": lambda seen: seen.mean(seen.asking),
    "text_heads": _text_heads,
    "decoder_received": lambda seen: seen.mean(seen.used),
    "flow": _flow,
    "to_text": _to_text,
    "own_peaks": _own_peaks,
    "text_peaks": lambda seen: seen.mean(seen.asking, "max"),
    "unturned_row": _unturned_row,
}
"""By the name at :class:`visiontok.context.Attention`: (B, K, …) float of the last K keys, the layer's own at least."""

UNTURNED = "unturned_row"
"""The one that wants queries and keys without rotary positions."""
