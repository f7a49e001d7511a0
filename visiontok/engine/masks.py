"""Attention masks that count stored tokens: per layer, in prefill and decode, from the stock mask builders."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .cache import TwoLengthCache
from .call import Call

UNCHANGED = object()
"""The mask that the language model made is right."""


class LayerMasks:
    """Builds the masks of one language model.

    Args:
        config: its config.
        own_mask: the base model builds non-causal masks itself; they are gathered instead of rebuilt.
    """

    def __init__(self, config: Any, *, own_mask: bool) -> None:
        self.config, self.own_mask = config, own_mask

    def entering(self, call: Call, past: int) -> torch.Tensor | None:
        """2-D mask over stored and entering tokens; None if nothing is masked.

        Without a cache it is always given: a mask builder that gets neither mask nor cache takes gaps in the position
        ids for the borders of packed sequences.
        """
        first = None if call.cache is None else call.cache.layers[0]
        if first is not None and past:
            return first.valid_with(call.entry_valid, call.width, call.batch, call.visual.device, call.history)
        if call.entry_valid is None and first is not None:
            return None
        return call.entry_valid_or_ones()

    @staticmethod
    def stored(cache: TwoLengthCache, layer: int, mask: Any, x: Any) -> torch.Tensor | None:
        """2-D mask (B, stored + new) for a chunk in which nothing is dropped; None if nothing is masked."""
        batch, new = x.shape[:2]
        stored = cache.layers[layer]
        known = stored.valid_slots(batch, x.device, None if mask is None else mask[:, :-new])
        fresh = None if mask is None else mask[:, -new:].bool()
        if known is None and (fresh is None or new == 1 or bool(fresh.all())):
            return None
        return stored.join(known, fresh, new, batch, x.device)

    def decode(self, call: Call, index: int, x: torch.Tensor) -> Any:
        """Mask of one layer for a chunk in which nothing is dropped, or ``UNCHANGED``."""
        cache: TwoLengthCache = call.cache  # type: ignore[assignment]  # a decode runs on one
        key = self.key(cache, index)
        if key not in call.masks:
            mask_2d = self.stored(cache, index, call.mask_2d, x)
            call.masks[key] = (self._build(index, x, mask_2d, cache),)
        built = call.masks[key]
        return UNCHANGED if built is None else built[0]

    def prefill(self, call: Call, index: int, x: torch.Tensor, layout: Any, given: Any) -> Any:
        """Mask of one layer that holds ``layout`` (None: every entry slot); ``given`` is the language model's."""
        if self.own_mask:
            sliding = self._kind(index) == "sliding_attention"
            if sliding:
                given = call.full_mask
            if given is None:
                ones = torch.ones(layout.length, layout.length, dtype=torch.bool, device=x.device)
                given = ones.tril()[None, None]
            key: Any = ("mask", id(layout), sliding)
            if key not in call.masks:
                gathered = layout.gather_mask(given)
                call.masks[key] = (layout, given, self.windowed(gathered) if sliding else gathered)
            return call.masks[key][2]
        cache = call.cache
        stored = None if cache is None else cache.layers[index]
        key = ("mask", id(layout), self.key(cache, index))
        if key not in call.masks:
            mask_2d = layout.valid if layout is not None else call.entry_valid
            if stored is not None:
                mask_2d = stored.valid_with(mask_2d, call.slots(index), call.batch, x.device, call.history)
            call.masks[key] = (layout, None, self._build(index, x, mask_2d, cache))
        return call.masks[key][2]

    @staticmethod
    def unwindowed(masks: dict[str, Any]) -> torch.Tensor | None:
        """A sliding layer's mask without its window, from the base model's masks by kind of layer.

        Gemma 3 sees images whole in every layer, Gemma 4 in sliding ones only; the union with the mask of full layers,
        which is at least causal, takes the window away and keeps the images.
        """
        full, sliding = masks.get("full_attention"), masks.get("sliding_attention")
        if sliding is None or not torch.is_tensor(sliding):
            return full
        if full is None:
            full = torch.ones(sliding.shape[-2:], dtype=torch.bool, device=sliding.device).tril()[None, None]
            if sliding.dtype != torch.bool:
                full = torch.zeros_like(full, dtype=sliding.dtype).masked_fill(~full, torch.finfo(sliding.dtype).min)
        return full | sliding if sliding.dtype == torch.bool else torch.maximum(full, sliding)

    def windowed(self, mask: torch.Tensor) -> torch.Tensor:
        """A sliding layer's mask from that of a full layer; the window counts slots, as the cache does."""
        slot = torch.arange(mask.shape[-1], device=mask.device)
        outside = slot[:, None] - slot >= self.config.sliding_window
        return mask.masked_fill(outside, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def key(self, cache: TwoLengthCache | None, index: int) -> tuple[Any, ...]:
        """Equal for layers that one mask serves."""
        kind = self._kind(index)
        if cache is None:
            return (kind,)
        return kind, cache.layers[index].physical_length(), cache.layers[index].pattern

    def _kind(self, index: int) -> str:
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return kinds[index]
        return "full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"

    def _build(self, index: int, x: torch.Tensor, mask_2d: Any, cache: TwoLengthCache | None) -> Any:
        build = create_sliding_window_causal_mask if self._kind(index) == "sliding_attention" else create_causal_mask
        return build(
            config=self.config,
            inputs_embeds=x,
            attention_mask=mask_2d,
            past_key_values=cache,
            position_ids=None,
            layer_idx=index,
        )
