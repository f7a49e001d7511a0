"""A key-value cache with two lengths.

``generate()``, position code and multi-turn slicing count the *logical* tokens, as if nothing had been dropped; mask
builders count the *physical* ones, which are stored. Stock caches are adopted in place: the user's object stays the
same object, only its classes change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedError
from ..kernels import gather_rows

SHORT = "_visiontok_short"
"""Attribute of what belongs to a prompt that was made shorter before the model: encoder outputs, and its caches."""


def _two_length(base: type[DynamicLayer]) -> type[Any]:
    # Built per base by single inheritance: in-place __class__ assignment needs an identical object layout.
    class Layer(base):  # type: ignore[misc, valid-type]
        keys: Any
        values: Any
        dropped = 0  # logical minus physical tokens
        prompt = 0  # physical slots up to the end of the last prefill
        floor = 0  # physical slots up to its last visual token; with tokens dropped, these cannot be cropped
        valid: torch.Tensor | None = None  # (B, prompt) bool over the first physical slots; None: all hold a token
        bias: torch.Tensor | None = None  # (B, prompt) float over the same, added to the logits of these keys
        moved: torch.Tensor | None = None  # (B, 1) by how much counted positions lie below the original ones
        pattern: tuple[int, ...] = ()  # one number per prefill; equal in layers that store the same slots

        def physical_length(self) -> int:
            return super().get_seq_length()

        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.dropped

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self.is_sliding:
                return super().get_mask_sizes(query_length)  # reads the physical cumulative_length
            return self.physical_length() + query_length, 0

        def valid_slots(self, batch: int, device: torch.device, history: torch.Tensor | None) -> torch.Tensor | None:
            """(B, P) bool over all physical slots, None if all are; ``history``: 2-D mask of the stored tokens."""
            tail = self.physical_length() - self.prompt  # stored one to one: text behind (or before) the prefills
            if self.valid is None and (history is None or not tail):
                return None
            known = self.valid
            if known is None:
                known = torch.ones(batch, self.prompt, dtype=torch.bool, device=device)
            known = known.to(device)
            fresh = known.new_ones(batch, tail)
            if history is not None and tail:
                fresh = history[:, -tail:].bool().to(device)
            return torch.cat([known, fresh], 1)

        def valid_with(
            self, new: torch.Tensor | None, width: int, batch: int, device: Any, history: torch.Tensor | None
        ) -> torch.Tensor | None:
            """(B, P + width) bool: all physical slots, then ``new`` ones (None: all valid); None if all are valid."""
            return self.join(self.valid_slots(batch, device, history), new, width, batch, device)

        def valid_through(self, new: int, mask: torch.Tensor | None, batch: int, device: Any) -> torch.Tensor | None:
            """(B, P + new) bool for a chunk in which nothing is dropped; None if all are valid.

            ``mask`` is the caller's over all logical tokens, the chunk included. Called in every step, so it makes one
            tensor: behind the last prefill, what is stored and what is new stand side by side in ``mask``.
            """
            tail = self.physical_length() - self.prompt
            if self.valid is None and (mask is None or not tail):
                fresh = None if mask is None else mask[:, -new:].bool()
                if fresh is None or new == 1 or bool(fresh.all()):
                    return None
            known = self.valid
            if known is None:
                known = torch.ones(batch, self.prompt, dtype=torch.bool, device=device)
            if mask is None:
                return F.pad(known.to(device), (0, tail + new), value=True)
            return torch.cat([known.to(device), mask[:, mask.shape[1] - tail - new :].to(device, torch.bool)], 1)

        def join(
            self, stored: torch.Tensor | None, new: torch.Tensor | None, width: int, batch: int, device: Any
        ) -> torch.Tensor | None:
            """What :meth:`valid_slots` gave, then ``width`` new slots; None stands for all valid, on either side."""
            if stored is None and new is None:
                return None
            if stored is None:
                stored = torch.ones(batch, self.physical_length(), dtype=torch.bool, device=device)
            if new is None:
                new = torch.ones(batch, width, dtype=torch.bool, device=device)
            return torch.cat([stored, new.to(device)], 1)

        def bias_with(self, new: torch.Tensor | None, width: int) -> torch.Tensor | None:
            """(B, P + width) float: the bias of all physical slots, then ``width`` new ones; None if there is none."""
            if new is None:
                tail = self.physical_length() + width - self.prompt
                return None if self.bias is None else F.pad(self.bias, (0, tail))
            stored = new.new_zeros(len(new), self.physical_length())
            if self.bias is not None:
                stored[:, : self.prompt] = self.bias.to(new.device)
            return torch.cat([stored, new], 1)

        def note_prefill(
            self,
            logical: int,
            width: int,
            valid: torch.Tensor | None,
            bias: torch.Tensor | None,
            batch: int,
            device: Any,
            history: Any,
            text: int,
        ) -> None:
            """Announce, before ``update``, a chunk of ``width`` slots that stand for ``logical`` tokens."""
            past = self.physical_length()
            self.valid = self.valid_with(valid, width, batch, device, history)
            self.bias = self.bias_with(bias, width)
            # all masks of one prefill live at the same time
            self.pattern += (0 if valid is None else id(valid), 0 if bias is None else id(bias))
            self.dropped += logical - width
            self.prompt = past + width
            self.floor = self.prompt - text

        def thin(self, slots: torch.Tensor, new: int, valid: torch.Tensor | None) -> None:
            """Keep some of the slots that the present prefill has stored, and free the memory of the others.

            Args:
                slots: (B, G, K) long, for each key head the slots to keep, in order, counted from this prefill's first.
                new: slots that this prefill has stored.
                valid: (B, K) bool, which of those kept hold a token; None for all.
            """
            past = self.keys.shape[2] - new
            left = self.physical_length() - past - new  # before the window of a sliding layer, no longer stored
            before = torch.arange(past, device=slots.device).expand(*slots.shape[:2], -1)
            index = torch.cat([before, past + slots], 2).flatten(0, 1)  # a row of tokens for each head
            new_keys, new_values = gather_rows([x.flatten(0, 1) for x in (self.keys, self.values)], [1, 1], index)
            self.keys, self.values = (x.unflatten(0, slots.shape[:2]) for x in (new_keys, new_values))
            gone = left + new - slots.shape[2]
            self.dropped, self.prompt, self.floor = self.dropped + gone, self.prompt - gone, self.floor - gone
            if self.is_sliding:
                self.cumulative_length = past + slots.shape[2]
            if self.valid is not None or valid is not None:
                known = slots.new_ones(len(slots), past, dtype=torch.bool)
                if self.valid is not None:
                    known = self.valid[:, left : left + past]
                fresh = known.new_ones(len(slots), slots.shape[2]) if valid is None else valid
                self.valid = torch.cat([known, fresh], 1)
            self.pattern = (*self.pattern[:-2], 0 if valid is None else id(valid), 0)

        def check_crop(self, tokens_to_remove: int) -> int:
            """Tokens to remove, as a negative number; raises where tokens are gone."""
            if tokens_to_remove > 0:  # legacy: the absolute, hence logical, length to crop to
                tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
            if self.dropped and self.physical_length() + tokens_to_remove < self.floor:
                raise UnsupportedError(
                    f"crop({tokens_to_remove}) reaches into a compressed prompt, whose dropped tokens are gone; "
                    "crop generated tokens only, or start again without the cache"
                )
            return tokens_to_remove

        def crop(self, tokens_to_remove: int) -> None:
            tokens_to_remove = self.check_crop(tokens_to_remove)
            dropped, self.dropped = self.dropped, 0  # the stock code reads get_seq_length() as the physical length
            try:
                super().crop(tokens_to_remove)
            finally:
                self.dropped = dropped
            self.prompt = min(self.prompt, self.physical_length())
            self.valid = None if self.valid is None else self.valid[:, : self.prompt]
            self.bias = None if self.bias is None else self.bias[:, : self.prompt]

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._each(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._each(lambda rows: rows.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._each(lambda rows: rows[indices.to(rows.device), ...])

        def reset(self) -> None:
            super().reset()
            self.dropped, self.prompt, self.floor, self.pattern = 0, 0, 0, ()
            self.valid = self.bias = self.moved = None

        def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
            """Change the rows of what is known as those of the keys were changed."""
            self.valid = None if self.valid is None else change(self.valid)
            self.bias = None if self.bias is None else change(self.bias)
            self.moved = None if self.moved is None else change(self.moved)

    return Layer


TwoLengthLayer = _two_length(DynamicLayer)
TwoLengthSlidingLayer = _two_length(DynamicSlidingWindowLayer)
for _cls, _name in ((TwoLengthLayer, "TwoLengthLayer"), (TwoLengthSlidingLayer, "TwoLengthSlidingLayer")):
    _cls.__name__ = _cls.__qualname__ = _name  # picklable by reference

_REPLACEMENT: dict[type[Any], type[Any]] = {
    DynamicLayer: TwoLengthLayer,
    DynamicSlidingWindowLayer: TwoLengthSlidingLayer,
}
if hasattr(cache_utils, "DummyLayer"):  # decoder layers that use the keys and values of another store none
    _REPLACEMENT[cache_utils.DummyLayer] = cache_utils.DummyLayer


class TwoLengthCache(DynamicCache):
    """A ``DynamicCache`` whose layers know how many tokens they stand for and how many they store."""

    layers: list[Any]
    served = False  # whether an attachment has prepared the masks of the present forward
    counted = False  # whether layers have counted positions, and know by how much these have moved
    _alike: dict[int, int] | None = None

    @functools.cached_property
    def storing(self) -> dict[int, Any]:
        """Index → layer, of the layers that store keys and values of their own; all are there from the beginning."""
        own = TwoLengthLayer, TwoLengthSlidingLayer
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, own)}

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """First query position in physical coordinates, in which masks are built."""
        logical = int(self.get_seq_length(layer_idx))
        return logical - self.layers[layer_idx].dropped if layer_idx < len(self.layers) else logical

    def serve(self) -> None:
        """Allow the next forward: its masks are taken care of."""
        self.served = True

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == next(iter(self.storing), 0):  # before anything of this forward is stored
            if not self.served and any(x.dropped or x.bias is not None for x in self.storing.values()):
                raise UnsupportedError(
                    "past_key_values holds a compressed prompt, whose masks only the attached recipe can build; go on "
                    "inside the compress() block, or start again without the cache"
                )
            self.served = False
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """As in the base class; nothing is cropped if any layer cannot be."""
        for layer in self.storing.values():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def prefilling(self) -> None:
        """A prefill begins, after which layers may differ in another way."""
        self._alike = None

    def first_alike(self) -> dict[int, int]:
        """Per storing layer the first one that stores the same slots with the same bias.

        Found once per prefill: decoding, cropping and reordering do the same to all layers.
        """
        if self._alike is None:
            seen: dict[Any, int] = {}
            found = ((i, (layer.physical_length(), layer.pattern)) for i, layer in self.storing.items())
            self._alike = {i: seen.setdefault(stores, i) for i, stores in found}
        return self._alike

    def is_uniform(self) -> bool:
        """Whether every layer stores the same slots without a bias, so that the language model's mask serves all."""
        firsts = set(self.first_alike().values())
        return len(firsts) <= 1 and all(self.layers[first].bias is None for first in firsts)


def adoptable(cache: Any) -> bool:
    """Whether :func:`adopt` can turn ``cache`` into a two-length cache, or it is one."""
    lazy = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layer) for layer in cache.layers} | ({lazy} if lazy is not None else set())
    plain = type(cache) is DynamicCache and not cache.offloading and kinds <= _REPLACEMENT.keys()
    return plain or isinstance(cache, TwoLengthCache)


def adopt(cache: Cache, depth: int) -> TwoLengthCache:
    """Turn ``cache`` into a two-length cache, in place.

    Raises:
        UnsupportedError: for caches whose layers cannot hold different lengths (static, quantised, linear attention) or
            that are offloaded.
    """
    if isinstance(cache, TwoLengthCache):
        return cache
    lazy = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layer) for layer in cache.layers} | ({lazy} if lazy is not None else set())
    if not adoptable(cache):
        found = type(cache).__name__ + "[" + ", ".join(sorted(kind.__name__ for kind in kinds)) + "]"
        raise UnsupportedError(
            f"past_key_values={found}: pruning inside the model stores a different number of tokens per layer, which "
            "needs a DynamicCache of full or sliding-window layers; drop cache_implementation / past_key_values"
        )
    while lazy is not None and len(cache.layers) < depth:
        cache.layers.append(lazy())
    cache.__class__ = TwoLengthCache
    for layer in cache.layers:
        layer.__class__ = _REPLACEMENT[type(layer)]
    return cache  # type: ignore[return-value]
