"""Attach to a stock model with public hooks only: base model, language model, decoder layers.

A forward that carries pictures becomes a *prefill*: the policy says which visual tokens are alive in which layer, and
for every change the hidden states are put back into a buffer of every token's latest state, from which the next layer's
tokens are taken (:class:`~visiontok.engine.layout.Layout`). The cache stores per layer what that layer saw.
Any later forward on such a cache is a *decode*: nothing is selected, but the masks must count stored tokens.

Per-call state travels in the keyword arguments of the decoder layers, so two threads, or a replay by gradient
checkpointing, never see each other's; only the step from the base model to its language model uses a thread-local slot.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..errors import UnsupportedError
from .cache import TwoLengthCache, adopt, adoptable
from .call import Call
from .layout import Layout
from .masks import UNCHANGED, LayerMasks
from .probe import CALL
from .prompt import run_prompt_stages
from .trace import Trace, Traces
from .vision import Encoded, begin_forward, record_features, take_records

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter


class Policy(Protocol):
    """Who decides what is dropped; see :class:`visiontok.engine.policy.StagePolicy`."""

    changes: frozenset[int]
    """Decoder layers on whose input the set of visible visual tokens may change."""

    def prompt(self, call: Call, embeds: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(B, N) keep mask over the visual positions (None: all), and the embeddings (B, N, D), merged or not."""
        ...

    def visible(self, call: Call, layer: int, states: torch.Tensor) -> torch.Tensor:
        """(B, N) bool: visual tokens that ``layer`` sees; ``states`` (B, E, D) is every entry token's latest state."""
        ...

    def wants_state(self, layer: int) -> bool:
        """Whether an attention tap of ``layer`` must see the call."""
        ...


class _Thread(threading.local):
    def __init__(self) -> None:
        self.handover: dict[int, dict[str, Any]] = {}  # base model hook → language model hook
        self.running: dict[int, Call] = {}  # language model pre-hook → post-hook
        self.bypassed = False  # whether this thread's forwards run stock


_thread = _Thread()


@contextlib.contextmanager
def bypass() -> Iterator[None]:
    """Within it, this thread's forwards run stock, whatever is attached."""
    _thread.bypassed = True
    try:
        yield
    finally:
        _thread.bypassed = False


def is_bypassed() -> bool:
    """Whether this thread runs under :func:`bypass`."""
    return _thread.bypassed


class Attachment:
    """The hooks on one model.

    Args:
        adapter: where the parts of the model are.
        policy: who decides.
        force: run the whole machinery even where nothing is dropped (for tests of its exactness).
    """

    def __init__(self, adapter: Adapter, policy: Policy, *, force: bool = False) -> None:
        self.adapter, self.policy, self.force = adapter, policy, force
        self.base = adapter.base
        self.text: Any = getattr(self.base, adapter.text)
        self.layers: list[nn.Module] = list(self.text.layers)
        self.config = self.text.config
        self.masks = LayerMasks(self.config, own_mask=adapter.own_mask)
        self.traces = Traces()
        self._removables: list[Any] = [
            self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True),
            self.text.register_forward_pre_hook(self._text_pre, with_kwargs=True),
            self.text.register_forward_hook(self._text_post, with_kwargs=True),
        ]
        for index, layer in enumerate(self.layers):
            pre = functools.partial(self._layer_pre, index)
            self._removables.append(layer.register_forward_pre_hook(pre, with_kwargs=True))
            if adapter.deepstack:
                post = functools.partial(self._layer_post, index)
                self._removables.append(layer.register_forward_hook(post, with_kwargs=True))
        self._removables += record_features(self.base)

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to this attachment."""
        self._removables.append(removable)

    def remove(self) -> None:
        """Take every hook away; the model is stock again."""
        for removable in self._removables:
            removable.remove()
        self._removables = []
        _thread.handover.pop(id(self), None)
        _thread.running.pop(id(self), None)
        begin_forward()

    # ---- base model: where are the visual tokens, and does this call carry pictures at all?

    def _base_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _thread.bypassed:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        cache, encoded = kwargs.get("past_key_values"), kwargs.get("mm_encoder_outputs")
        begin_forward()
        handover: dict[str, Any] = {"ids": ids, "encoded": encoded, "mask": mask}
        _thread.handover[id(self)] = handover
        masks = self._placeholders(module, ids, embeds, modalities(kwargs))
        if any(bool(m.any()) for m in masks.values()):
            handover["masks"] = masks
            return args, kwargs
        if (cache is None or not cache.get_seq_length()) and self._may_hold_pictures(ids):
            warnings.warn(
                f"visiontok: a call of {self.base.config.model_type} has image placeholders or embeddings but no "
                "pixels or features whose tokens could be found; nothing is pruned in it",
                stacklevel=2,
            )
        if self.adapter.own_mask and isinstance(cache, TwoLengthCache) and (mask is None or _is_2d(mask)):
            x = ids if ids is not None else embeds
            kwargs["attention_mask"] = self.masks.stored(cache, 0, mask, x) if cache.is_uniform() else None
        return args, kwargs

    def _may_hold_pictures(self, ids: Any) -> bool:
        """Whether a first call in which no visual token was found may hold pictures all the same."""
        return ids is None or any(bool((ids == token).any()) for token in self.adapter.placeholders().values())

    def _placeholders(self, base: Any, ids: Any, embeds: Any, present: set[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for modality, token in self.adapter.placeholders().items():
            # a placeholder id without a picture is text; embeddings without ids may hold features already
            if ids is not None and modality in present:
                found[modality] = ids == token
            elif ids is None:  # as stock does: a placeholder is recognised by its embedding
                row = base.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                found[modality] = (embeds == row).all(-1)
        return found

    # ---- language model

    def _text_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handover = _thread.handover.pop(id(self), {})
        _thread.running.pop(id(self), None)
        cache, masks = kwargs.get("past_key_values"), handover.get("masks")
        if masks is None or next(iter(masks.values())).shape != kwargs["inputs_embeds"].shape[:2]:
            if isinstance(cache, TwoLengthCache):
                self._begin_decode(kwargs, handover, cache)
            return args, kwargs
        x, mask_2d = kwargs["inputs_embeds"], self._mask_2d(kwargs, handover)
        batch, length = x.shape[:2]
        attended = (
            torch.ones(batch, length, dtype=torch.bool, device=x.device)
            if mask_2d is None
            else mask_2d[:, -length:].bool()
        )
        records = take_records(handover["encoded"])
        self._refuse_chunks(handover["encoded"], records, masks, cache)
        call, keep, embeds = run_prompt_stages(
            self.adapter,
            self.policy,
            masks=masks,
            records=records,
            ids=handover["ids"],
            embeds=x,
            attended=attended,
            depth=len(self.layers),
        )
        drops = not bool(call.kept[call.visual].all())
        nothing = not drops and not self.policy.changes and embeds is x
        if nothing and not self.force and not isinstance(cache, TwoLengthCache):
            call.trace.nothing_dropped()
            call.mode = "stock"
            _thread.running[id(self)] = call
            return args, kwargs
        self._enter(module, kwargs, call, embeds, mask_2d, repack=drops or (self.force and keep is not None))
        kwargs[CALL] = _thread.running[id(self)] = call
        return args, kwargs

    def _refuse_chunks(
        self, encoded: Any, records: list[Encoded], masks: Mapping[str, torch.Tensor], cache: Any
    ) -> None:
        """A chunk of a prompt may hold a part of an image only, of which no budget can be kept.

        Raises:
            UnsupportedError: if features that were encoded elsewhere fill a chunk border or follow other tokens.
        """
        if not encoded or len(records) >= len([v for v in encoded.values() if v is not None]):
            return
        touches = any(bool(m[:, -1].any()) for m in masks.values())
        if touches or (cache is not None and cache.get_seq_length()):
            raise UnsupportedError(
                f"{self.base.config.model_type}: this prefill comes in chunks, which may split an image between calls; "
                "drop prefill_chunk_size"
            )

    def _enter(
        self, module: Any, kwargs: dict[str, Any], call: Call, embeds: torch.Tensor, mask_2d: Any, *, repack: bool
    ) -> None:
        """Drop tokens before the first layer, adopt the cache, and hand the language model consistent inputs."""
        batch, length = call.batch, call.length
        self._refuse_masks(kwargs)
        cache, past = self._cache(module, kwargs), 0
        if cache is not None:
            past = cache.get_seq_length()
            call.first_key = self.masks.key(cache, 0)
            call.history = None if mask_2d is None or not past else mask_2d[:, :-length]
            kwargs["past_key_values"] = call.cache = cache
            cache.serve()
        position_ids = kwargs.get("position_ids")
        kwargs["inputs_embeds"] = embeds
        if repack:
            entry = call.entry = Layout(torch.where(call.visual, call.kept, call.attended))
            if position_ids is None:  # what the stock language model would have numbered
                position_ids = (torch.arange(length, device=embeds.device) + past)[None]
            kwargs["inputs_embeds"] = entry.gather(embeds)
            kwargs["position_ids"] = entry.gather(position_ids, position_ids.ndim - 1)
            call.width, call.entry_valid = entry.width, entry.valid
        elif mask_2d is not None and not bool(call.attended.all()):
            call.entry_valid = call.attended
        mask = kwargs.get("attention_mask")
        if self.adapter.own_mask and isinstance(mask, dict):
            call.full_mask = mask.get("full_attention")
            if call.entry is not None:
                full = call.full_mask = None if call.full_mask is None else call.entry.gather_mask(call.full_mask)
                window = None if full is None else self.masks.windowed(full)
                kwargs["attention_mask"] = mask | {"full_attention": full, "sliding_attention": window}
        elif self.adapter.own_mask and torch.is_tensor(mask) and mask.ndim == 4:
            if call.entry is not None:
                kwargs["attention_mask"] = call.entry.gather_mask(mask)
        elif call.entry is not None or cache is not None:
            kwargs["attention_mask"] = self.masks.entering(call, past)
        if self.adapter.deepstack and kwargs.get(self.adapter.deepstack[0]) is not None:
            where, levels = (kwargs.pop(name) for name in self.adapter.deepstack)
            for level in levels:  # one dense (B, E, D) plane per level
                dense = embeds.new_zeros(batch, length, level.shape[-1])
                dense[where] = level.to(dense.dtype)
                dense = call.enter(dense)
                if call.entry is not None and call.entry.valid is not None:
                    dense = dense * call.entry.valid[..., None]
                call.levels.append(dense)
        if not self.policy.changes and cache is not None:
            for layer in cache.layers:
                layer.note_prefill(length, call.width, call.entry_valid, batch, embeds.device, call.history, call.tail)
        if not self.policy.changes:
            alive = torch.where(call.visual, call.kept, call.attended)
            call.alive = dict.fromkeys(range(len(self.layers)), alive)

    def _refuse_masks(self, kwargs: dict[str, Any]) -> None:
        """Masks that cannot follow dropped tokens, before the caller's cache is touched.

        Raises:
            UnsupportedError: for a mask of the caller's that is not 2-D, and where the family's own mask spans a cache.
        """
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if self.adapter.own_mask and cache is not None and cache.get_seq_length():
            raise UnsupportedError(
                f"{self.base.config.model_type}: a new image on a used cache is not supported on this family, whose "
                "masks are built over the whole prompt; start again without past_key_values"
            )
        usable = cache is None or adoptable(cache)  # adopt() says why not; generate() builds 4-D masks for static ones
        if mask is not None and not self.adapter.own_mask and not _is_2d(mask) and usable:
            raise UnsupportedError(
                f"{self.base.config.model_type}: attention_mask of {type(mask).__name__} {tuple(mask.shape)} cannot "
                "follow dropped tokens; give the 2-D padding mask (batch, length)"
            )

    def _cache(self, module: Any, kwargs: dict[str, Any]) -> TwoLengthCache | None:
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
        if cache is None and use_cache and not checkpointing:
            cache = DynamicCache(config=self.config)
        return None if cache is None else adopt(cache, len(self.layers))

    def _begin_decode(self, kwargs: dict[str, Any], handover: dict[str, Any], cache: TwoLengthCache) -> None:
        x, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        trace = self.traces.latest
        call = Call("uniform" if cache.is_uniform() else "decode", trace if trace is not None else Trace(0))
        call.cache = cache
        cache.serve()
        call.mask_2d = self._mask_2d(kwargs, handover)
        if not self.adapter.own_mask and (mask is None or _is_2d(mask)):
            kwargs["attention_mask"] = self.masks.stored(cache, 0, mask, x)
            if call.mode == "decode":
                call.masks[self.masks.key(cache, 0)] = None  # the language model builds this one itself
        kwargs[CALL] = _thread.running[id(self)] = call

    def _mask_2d(self, kwargs: dict[str, Any], handover: dict[str, Any]) -> torch.Tensor | None:
        mask = handover.get("mask") if self.adapter.own_mask else kwargs.get("attention_mask")
        return mask if _is_2d(mask) else None

    def _text_post(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = _thread.running.pop(id(self), None)
        if call is None:
            return None
        if call.mode in ("decode", "uniform"):
            call.trace.note_step()
            return None
        call.trace.clock.mark("prefilled")
        if call.mode == "prefill":
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            hidden = call.to_prompt(len(self.layers) - 1, hidden)
            if isinstance(output, tuple):
                output = (hidden, *output[1:])
            else:
                output.last_hidden_state = hidden
            depth = range(len(self.layers))
            call.trace.finish([call.alive[i] for i in depth], [call.slots(i) for i in depth])
        self.traces.publish(call.trace)
        return output

    # ---- decoder layers

    def _layer_pre(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(CALL)
        if call is None:
            return None
        # It stays in the keywords only for those who read it further down: a tap in this layer, the DeepStack hook.
        if call.mode != "prefill" or not (self.policy.wants_state(index) or self.adapter.deepstack):
            kwargs.pop(CALL)
        if call.mode == "uniform":
            return args, kwargs
        x = args[0] if args else kwargs["hidden_states"]
        if call.mode == "decode":
            mask = self.masks.decode(call, index, x)
            if mask is not UNCHANGED:
                kwargs["attention_mask"] = mask
            return args, kwargs
        if self.policy.changes:
            x = self._relayout(call, index, x, kwargs)
        if "flash" in str(self.config._attn_implementation) and torch.is_tensor(kwargs.get("position_ids")):
            # With one row, flash attention takes any gap in the position ids for the border of a packed sequence;
            # rotary embeddings are already computed, so attention may get consecutive numbers.
            kwargs["position_ids"] = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        if args:
            return (x, *args[1:]), kwargs
        kwargs["hidden_states"] = x
        return args, kwargs

    def _relayout(self, call: Call, index: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Give layer ``index`` the tokens it is to see; returns its hidden states and rewrites masks and positions."""
        before = call.layouts[index - 1]
        states = call.states.get(index - 1)
        if index in self.policy.changes and index not in call.layouts:
            latest = x if before is None else before.scatter(states, x)  # type: ignore[arg-type]
            visible = self.policy.visible(call, index, latest) & call.kept
            call.alive[index] = torch.where(call.visual, visible, call.attended)
            call.check_last(call.alive[index])
            wanted = call.enter(call.alive[index]) & call.entry_valid_or_ones()
            unchanged = bool((wanted | ~call.entry_valid_or_ones()).all())
            call.layouts[index] = None if unchanged and not self.force else Layout(wanted)
        elif index not in call.layouts:
            call.layouts[index] = before
            call.alive[index] = call.alive[index - 1] if index else torch.where(call.visual, call.kept, call.attended)
        layout = call.layouts[index]
        if layout is not before:
            states = x if before is None else before.scatter(states, x)  # type: ignore[arg-type]
            x = states if layout is None else layout.gather(states)
        call.states[index] = states
        valid = call.entry_valid if layout is None else layout.valid
        # the language model built its mask for what layer 0 stores
        stale = call.cache is not None and self.masks.key(call.cache, index)[1:] != call.first_key[1:]
        if layout is not None or (stale and not self.adapter.own_mask):
            kwargs["attention_mask"] = self.masks.prefill(call, index, x, layout, kwargs.get("attention_mask"))
        if layout is not None:
            embeddings = kwargs.get("position_embeddings")
            if embeddings is not None:
                kwargs["position_embeddings"] = self._gathered(call, layout, embeddings)
            position_ids = kwargs.get("position_ids")
            if torch.is_tensor(position_ids) and position_ids.shape[-1] == layout.length:
                kwargs["position_ids"] = layout.gather(position_ids, position_ids.ndim - 1)
        if call.cache is not None:
            call.cache.layers[index].note_prefill(
                call.length, call.slots(index), valid, call.batch, x.device, call.history, call.tail
            )
        return x

    @staticmethod
    def _gathered(call: Call, layout: Layout, embeddings: Any) -> Any:
        key = ("rope", id(layout), id(embeddings[0]))
        if key not in call.masks:  # the value keeps both objects alive, so their ids stay theirs
            call.masks[key] = (layout, embeddings, tuple(layout.gather(e) for e in embeddings))
        return call.masks[key][2]

    def _layer_post(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """DeepStack: add the level's features behind this layer, also to tokens that it did not see."""
        call: Call | None = kwargs.get(CALL)
        if call is None or call.mode != "prefill" or index >= len(call.levels):
            return None
        level, layout = call.levels[index], call.layouts.get(index)
        added = level
        if layout is not None:
            added = layout.gather(level)
            if layout.valid is not None:
                added = added * layout.valid[..., None]
            absent = call.enter(call.kept) & ~layout.keep
            states = call.states[index]
            call.states[index] = states + level * absent[..., None]  # type: ignore[operator]
        return output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])


def modalities(kwargs: Mapping[str, Any]) -> set[str]:
    """Which modalities a forward carries, as pixels or as features."""
    given = {name for name, value in kwargs.items() if value is not None}
    found = {name for name, value in (kwargs.get("mm_encoder_outputs") or {}).items() if value is not None}
    if given & {"pixel_values", "pixel_values_images", "image_hidden_states"}:
        found.add("image")
    if "pixel_values_videos" in given:
        found.add("video")
    return found


def _is_2d(mask: Any) -> bool:
    return torch.is_tensor(mask) and mask.ndim == 2
