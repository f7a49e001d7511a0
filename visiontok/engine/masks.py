"""Attention masks that count stored tokens: per layer, in prefill and decode, from the stock mask builders."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from visiontok.kernels.bias import KeyBias

from .cache import TwoLengthCache
from .call import Prefill
from .probe import is_flash, takes_columns

UNCHANGED = object()
"""The mask that the language model made is right."""
_KINDS = ("full_attention", "sliding_attention")


class Biased(NamedTuple):
    """A kernel's own mask (None: causal), and a bias per key that goes beside it."""

    mask: torch.Tensor | None
    bias: KeyBias


class LayerMasks:
    """Builds the masks of one language model.

    Args:
        config: its config.
        own_mask: the base model builds non-causal masks itself; they are gathered instead of rebuilt.
    """

    def __init__(self, config: Any, *, own_mask: bool) -> None:
        self.config, self.own_mask = config, own_mask
        windowed = getattr(config, "sliding_window", None) is not None
        # read once: a config's attributes are slow
        self._kinds = list(getattr(config, "layer_types", None) or [_KINDS[windowed]] * config.num_hidden_layers)
        # A bias per key needs a mask of numbers, which only the builder for sdpa leads to.
        self._dense = copy.copy(config)
        self._dense.__dict__["_attn_implementation_internal"] = "sdpa"

    def entering(self, call: Prefill, past: int) -> torch.Tensor | None:
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
        return cache.layers[layer].valid_through(new, mask, batch, x.device)

    def decode(self, cache: TwoLengthCache, mask_2d: Any, x: torch.Tensor, *, skip: bool) -> list[Any] | None:
        """The mask of each layer, or :class:`Biased`, for a chunk in which nothing is dropped; None if the language
        model's serves all.

        Args:
            cache: what is stored.
            mask_2d: the caller's mask over all logical tokens, or None.
            x: (B, new, D), what enters.
            skip: whether the language model builds the mask of the first layer, and of those like it, itself; these
                are ``UNCHANGED``.
        """
        built: dict[Any, Any] = {(self._kinds[0], 0): UNCHANGED} if skip else {}
        out: list[Any] = [UNCHANGED] * len(cache.layers)
        for index, first in cache.first_alike().items():
            key = self._kinds[index], first
            if key not in built:
                bias = cache.layers[index].bias_with(None, x.shape[1])
                built[key] = self._with_bias(bias, index, x, self.stored(cache, index, mask_2d, x), cache)
            out[index] = built[key]
        # without a mask, one token sees all that is stored, however much that is
        unmasked = all(mask is None or mask is UNCHANGED for mask in built.values())
        if unmasked and skip and self._is_lone(x) and self.stored(cache, 0, mask_2d, x) is None:
            return None
        return out

    def makes_own(self) -> bool:
        """Whether the base model's masks are more than causal; flash attention knows no others, for any family."""
        return self.own_mask and not is_flash(self.config)

    def _is_lone(self, x: torch.Tensor) -> bool:
        """Whether one token enters, and kernels take None for seeing all that is stored."""
        return x.shape[1] == 1 and self.config._attn_implementation == "sdpa" and _KINDS[1] not in self._kinds

    def prefill(self, call: Prefill, index: int, x: torch.Tensor, layout: Any) -> Any:
        """Mask of one layer that holds ``layout`` (None: every entry slot), or :class:`Biased`."""
        cache, bias = call.cache, call.slot_bias(index)
        stored = None if cache is None else cache.layers[index]
        kind = self.kind(index)
        key = ("mask", id(layout), id(bias), kind, None if cache is None else self.key(cache, index))
        if key not in call.masks:
            past = 0 if stored is None else stored.physical_length()
            biases = bias if stored is None or not past else stored.bias_with(bias, x.shape[1])
            if self.makes_own():
                mask = self._biased(self._own(call, layout, kind, stored), biases, index, x, cache)
            else:
                mask_2d = layout.valid if layout is not None else call.entry_valid
                if stored is not None:
                    mask_2d = stored.valid_with(mask_2d, call.slots(index), call.batch, x.device, call.history)
                mask = self._with_bias(biases, index, x, mask_2d, cache)
            call.masks[key] = (layout, bias, mask)
        return call.masks[key][2]

    def rows(self, call: Prefill, index: int, x: torch.Tensor, layout: Any, slots: torch.Tensor) -> torch.Tensor:
        """Mask (B, 1, T, keys) of one layer that holds ``layout``, for its ``slots`` (B, T) alone.

        Args:
            call: the prefill.
            index: of the layer.
            x: (B, M, D), what fills all its slots.
            layout: as in :meth:`prefill`.
            slots: which of them ask.
        """
        cache, bias = call.cache, call.slot_bias(index)
        stored = None if cache is None else cache.layers[index]
        kind, width = self.kind(index), x.shape[1]
        key = ("rows", id(layout), id(bias), id(slots), kind, None if cache is None else self.key(cache, index))
        if key in call.masks:
            return call.masks[key][3]
        past = 0 if stored is None else stored.physical_length()
        length, offset = (width, 0) if stored is None else stored.get_mask_sizes(width)
        place = slots + past - offset  # of the slots among the keys
        if self.makes_own():
            mask = self._own(call, layout, kind, stored).expand(call.batch, -1, -1, -1)
            mask = mask.gather(2, slots[:, None, :, None].expand(-1, mask.shape[1], -1, length))
        else:
            column = torch.arange(length, device=x.device)
            mask = column <= place[..., None]
            if kind == "sliding_attention":
                mask = mask & (place[..., None] - column < self.config.sliding_window)
            seen = layout.valid if layout is not None else call.entry_valid
            if stored is not None:
                seen = stored.valid_with(seen, width, call.batch, x.device, call.history)
            if seen is not None:
                mask = mask & seen[:, None, offset : offset + length]
            mask = mask[:, None]
        shown = True if mask.dtype == torch.bool else 0.0
        mask = mask.scatter(3, place[:, None, :, None].expand(-1, mask.shape[1], -1, -1), shown)  # no row is empty
        biases = bias if stored is None or not past else stored.bias_with(bias, width)
        if mask.dtype == torch.bool and self.config._attn_implementation == "eager":
            mask = torch.where(mask, torch.zeros((), dtype=x.dtype, device=x.device), torch.finfo(x.dtype).min)
        mask = self._biased(mask, biases, index, x, cache)
        call.masks[key] = (layout, bias, slots, mask)  # alive, so that their ids stay theirs
        return mask

    def _own(self, call: Prefill, layout: Any, kind: str, stored: Any) -> torch.Tensor:
        """The family's own mask of what is new, for the slots of ``layout``, behind what is stored."""
        mask = call.own.get(kind)
        if mask is None:
            width = call.width
            mask = torch.ones(width, width, dtype=torch.bool, device=call.visual.device).tril()[None, None]
        if layout is not None:
            mask = layout.gather_mask(mask)
        past = 0 if stored is None else stored.physical_length()
        if past:
            rows = mask.shape[2]
            seen = stored.valid_slots(call.batch, mask.device, call.history)
            before = mask.new_zeros(call.batch, 1, rows, past)  # nothing added: seen
            if mask.dtype == torch.bool:
                before = ~before
            if seen is not None:
                before = before.masked_fill(~seen[:, None, None], _hidden(mask))
            mask = torch.cat([before, mask.expand(call.batch, -1, -1, -1)], 3)
        return self.windowed(mask, stored) if kind == "sliding_attention" else mask

    @staticmethod
    def unwindowed(masks: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The base model's masks by kind of layer, that of sliding layers without its window.

        Gemma 3 sees images whole in every layer, Gemma 4 in sliding ones only; the union with the mask of full layers,
        which is at least causal, takes the window away and keeps the images.
        """
        full, sliding = masks.get("full_attention"), masks.get("sliding_attention")
        found = {} if full is None else {"full_attention": full}
        if not torch.is_tensor(sliding):
            return found if full is None else found | {"sliding_attention": full}
        if full is None:
            full = torch.ones(sliding.shape[-2:], dtype=torch.bool, device=sliding.device).tril()[None, None]
            if sliding.dtype != torch.bool:
                full = torch.zeros_like(full, dtype=sliding.dtype).masked_fill(~full, _hidden(sliding))
        union = full | sliding if sliding.dtype == torch.bool else torch.maximum(full, sliding)
        return found | {"sliding_attention": union}

    def windowed(self, mask: torch.Tensor, stored: Any = None) -> torch.Tensor:
        """A sliding layer's mask from that of a full layer; the window counts slots, as the cache does."""
        rows, columns = mask.shape[-2:]
        slot = torch.arange(columns, device=mask.device)
        outside = slot[columns - rows :, None] - slot >= self.config.sliding_window
        mask = mask.masked_fill(outside, _hidden(mask))
        # what has left the window is no longer stored
        return mask if stored is None else mask[..., stored.get_mask_sizes(rows)[1] :]

    def key(self, cache: TwoLengthCache, index: int) -> tuple[Any, ...]:
        """Equal for layers that one mask serves."""
        layer = cache.layers[index]
        return self.kind(index), layer.physical_length(), layer.pattern

    def kind(self, index: int) -> str:
        return self._kinds[index]

    def _with_bias(self, bias: torch.Tensor | None, index: int, x: torch.Tensor, mask_2d: Any, cache: Any) -> Any:
        """The stock builder's mask, with ``bias`` (B, stored + new) on the keys or beside it."""
        beside = bias is not None and takes_columns(self.config)
        mask = self._build(index, x, mask_2d, cache, dense=bias is not None and not beside)
        if bias is None or not beside:
            return self._biased(mask, bias, index, x, cache)
        return Biased(mask, KeyBias(bias[:, self._keys(index, x.shape[1], cache)]))

    @staticmethod
    def _keys(index: int, rows: int, cache: Any) -> slice:
        """The keys that a layer's kernel is given, among all that are stored and new."""
        length, offset = (rows, 0) if cache is None else cache.layers[index].get_mask_sizes(rows)
        return slice(offset, offset + length)

    def _biased(self, mask: Any, bias: torch.Tensor | None, index: int, x: torch.Tensor, cache: Any) -> Any:
        """``mask`` (None: causal) plus ``bias`` (B, stored + new) on the keys, as numbers (B, 1, new, keys)."""
        if bias is None:
            return mask
        rows = x.shape[1]
        bias = bias[:, None, None, self._keys(index, rows, cache)]
        length = bias.shape[-1]
        if mask is None and rows == 1:  # decoding: the bias is the mask
            return bias.to(x.dtype)
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool, device=x.device).tril(length - rows)[None, None]
        if mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=x.dtype, device=x.device)
            mask = torch.where(mask, zero, torch.finfo(x.dtype).min)
        return mask + bias.to(mask.dtype)

    def _build(self, index: int, x: torch.Tensor, mask_2d: Any, cache: TwoLengthCache | None, *, dense: bool) -> Any:
        full = self.kind(index) == "full_attention"
        if full and x.shape[1] == 1 and (dense or self.config._attn_implementation == "sdpa"):
            # decoding: what one token sees is what is stored, which is worth no builder in every step
            return None if mask_2d is None else mask_2d[:, None, None]
        build = create_sliding_window_causal_mask if self.kind(index) == "sliding_attention" else create_causal_mask
        return build(
            config=self._dense if dense else self.config,
            inputs_embeds=x,
            attention_mask=mask_2d,
            past_key_values=cache,
            position_ids=None,
            layer_idx=index,
        )


def _hidden(mask: torch.Tensor) -> Any:
    """What an entry of ``mask`` holds where nothing is seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
