"""A key-value cache with two lengths.

``generate()``, position code and multi-turn slicing count the *logical* tokens, as if nothing had been dropped; mask
builders count the *physical* ones, which are stored. Stock caches are adopted in place: the user's object stays the
same object, only its classes change.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedError


def _two_length(base: type[DynamicLayer]) -> type[Any]:
    # Built per base by single inheritance: in-place __class__ assignment needs an identical object layout.
    class Layer(base):  # type: ignore[misc, valid-type]
        dropped = 0  # logical minus physical tokens
        prompt = 0  # physical tokens stored by pruned prefills; these cannot be cropped
        valid: torch.Tensor | None = None  # (B, P) bool over the first P physical slots; None: all hold a token

        def physical_length(self) -> int:
            return super().get_seq_length()

        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.dropped

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self.is_sliding:
                return super().get_mask_sizes(query_length)  # reads the physical cumulative_length
            return self.physical_length() + query_length, 0

        def valid_slots(self, batch: int, device: torch.device) -> torch.Tensor:
            """(B, P) bool over all physical slots."""
            length = self.physical_length()
            if self.valid is None:
                return torch.ones(batch, length, dtype=torch.bool, device=device)
            known = self.valid.to(device)
            fresh = known.new_ones(known.shape[0], max(length - known.shape[1], 0))
            return torch.cat([known, fresh], 1)[:, :length]

        def note_prefill(self, logical: int, width: int, valid: torch.Tensor | None, batch: int, device: Any) -> None:
            """Announce, before ``update``, a chunk of ``width`` slots that stand for ``logical`` tokens."""
            past = self.physical_length()
            if valid is not None or self.valid is not None:
                new = valid if valid is not None else torch.ones(batch, width, dtype=torch.bool, device=device)
                self.valid = torch.cat([self.valid_slots(batch, device), new.to(device)], 1)
            self.dropped += logical - width
            self.prompt = past + width

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0:  # legacy: the absolute, hence logical, length to crop to
                tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
            if self.dropped and self.physical_length() + tokens_to_remove < self.prompt:
                raise UnsupportedError(
                    f"crop({tokens_to_remove}) reaches into a compressed prompt, whose dropped tokens are gone; "
                    "crop generated tokens only, or start again without the cache"
                )
            dropped, self.dropped = self.dropped, 0  # the stock code reads get_seq_length() as the physical length
            try:
                super().crop(tokens_to_remove)
            finally:
                self.dropped = dropped

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            if self.valid is not None:
                self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            if self.valid is not None:
                self.valid = self.valid.repeat_interleave(repeats, 0)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            if self.valid is not None:
                self.valid = self.valid[indices.to(self.valid.device), ...]

        def reset(self) -> None:
            super().reset()
            self.dropped, self.prompt, self.valid = 0, 0, None

    return Layer


TwoLengthLayer = _two_length(DynamicLayer)
TwoLengthSlidingLayer = _two_length(DynamicSlidingWindowLayer)
for _cls, _name in ((TwoLengthLayer, "TwoLengthLayer"), (TwoLengthSlidingLayer, "TwoLengthSlidingLayer")):
    _cls.__name__ = _cls.__qualname__ = _name  # picklable by reference

_REPLACEMENT: dict[type[Any], type[Any]] = {
    DynamicLayer: TwoLengthLayer,
    DynamicSlidingWindowLayer: TwoLengthSlidingLayer,
}


class TwoLengthCache(DynamicCache):
    """A ``DynamicCache`` whose layers know how many tokens they stand for and how many they store."""

    layers: list[Any]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """First query position in physical coordinates, in which masks are built."""
        logical = int(self.get_seq_length(layer_idx))
        return logical - self.layers[layer_idx].dropped if layer_idx < len(self.layers) else logical

    def is_uniform(self) -> bool:
        """Whether every layer stores the same number of tokens, so that one mask serves all."""
        return len({layer.physical_length() for layer in self.layers}) <= 1


def adopt(cache: Cache, depth: int) -> TwoLengthCache:
    """Turn ``cache`` into a two-length cache, in place.

    Raises:
        UnsupportedError: for caches whose layers cannot hold different lengths (static, quantised, linear attention).
    """
    if isinstance(cache, TwoLengthCache):
        return cache
    lazy = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layer) for layer in cache.layers} | ({lazy} if lazy is not None else set())
    if type(cache) is not DynamicCache or not kinds <= _REPLACEMENT.keys():
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
