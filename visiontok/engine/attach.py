"""Attach to a stock model with public hooks only: base model, language model, decoder layers.

A forward that carries pictures becomes a *prefill*: the policy says which visual tokens are alive in which layer, and
for every change the hidden states are put back into a buffer of every token's latest state, from which the next layer's
tokens are taken (:class:`~visiontok.engine.layout.Layout`). The cache stores per layer what that layer saw.
Any later forward on such a cache is a *decode*: nothing is selected, but the masks must count stored tokens.

Per-call state travels in the keyword arguments of the decoder layers, so two threads, or a replay by gradient
checkpointing, never see each other's; only the step from the base model to its language model uses a thread-local slot.
Decoder layers have hooks only where a recipe changes something inside the language model.

Hooks may be called without keywords: torch does so if another thread takes hooks off, or adds some, at that moment.
Such a call is not theirs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..errors import UnsupportedError
from .ahead import look_ahead
from .cache import SHORT, TwoLengthCache, adopt, adoptable
from .call import Decode, Prefill, counted
from .layout import Layout, Parted
from .masks import UNCHANGED, Biased, LayerMasks
from .probe import BIAS, CALL, SPLIT, Tap, attention_modules, glance, is_flash, keys_values, skip_queries
from .prompt import run_prompt_stages
from .readings import DecoderReadings, attention_of
from .relevance import next_token
from .renumber import Renumber
from .split import Rows, Split
from .trace import Trace, Traces
from .vision import Encoded, begin_forward, record_features, take_records

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

IGNORED = -100
"""The label that Transformers' losses leave out."""
_OTHER_RECIPE = (
    "past_key_values: its layers hold different tokens, as another recipe left them; go on with that recipe, or start "
    "again without the cache"
)


class Policy(Protocol):
    """Who decides what is dropped; see :class:`visiontok.engine.policy.StagePolicy`."""

    changes: frozenset[int]
    """Decoder layers on whose input the set of visible visual tokens may change."""
    frozen: frozenset[int]
    """Decoder layers that visual tokens pass as they are."""
    narrowed: dict[int, float]
    """Decoder layers whose MLP gives visual tokens a part of its channels, and by what their number is divided."""
    channels: dict[int, int]
    """Their number, once it is known."""
    selects: bool
    """Whether tokens are chosen among those of an image, which must then be there as a whole."""
    biased: int | None
    """First decoder layer whose keys may get a bias; None for none."""
    thinned: frozenset[int]
    """Decoder layers of whose cache a part may go as soon as it is stored."""
    compact: bool
    """Whether positions are counted through in every layer."""
    decoder: DecoderReadings
    """What the methods read of the decoder layers, which this module shows it."""

    def prompt(self, call: Prefill, embeds: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(B, N) keep mask over the visual positions (None: all), and the embeddings (B, N, D), merged or not."""
        ...

    def visible(self, call: Prefill, layer: int, states: torch.Tensor) -> torch.Tensor:
        """(B, N) bool: visual tokens that ``layer`` sees; ``states`` (B, E, D) is every entry token's latest state."""
        ...

    def counts(self, call: Prefill, layer: int) -> Sequence[int]:
        """Visual tokens of each unit that ``layer`` sees."""
        ...

    def shows_state(self, layer: int) -> bool:
        """Whether a tap of ``layer`` must see the call."""
        ...

    def thins(self, call: Prefill) -> bool:
        """Whether any layer stores more visual tokens than are to stay in its cache."""
        ...


class _Thread(threading.local):
    def __init__(self) -> None:
        self.handover: dict[int, dict[str, Any]] = {}  # base model hook → language model hook
        self.running: dict[int, Prefill | Decode] = {}  # language model pre-hook → post-hook
        self.labels: dict[int, dict[str, torch.Tensor]] = {}  # model hook → language model post-hook
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
        serves: whether the calls of the present thread are this attachment's; others may stand beside it.
        outer: the modules around the base model whose forward may be given labels.
        force: run the whole machinery even where nothing is dropped (for tests of its exactness).
    """

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        *,
        serves: Callable[[], bool],
        outer: Sequence[nn.Module],
        force: bool = False,
    ) -> None:
        self.adapter, self.policy, self.serves, self.force = adapter, policy, serves, force
        self.base, self.outer = adapter.base, outer
        self.text: Any = getattr(self.base, adapter.text)
        self.layers: list[nn.Module] = list(self.text.layers)
        touched = [*policy.changes, *policy.frozen, *policy.narrowed, *policy.thinned]
        touched += [] if policy.biased is None else [policy.biased]
        if touched and adapter.prompt_only:
            raise UnsupportedError(
                f"{self.base.config.model_type}: {adapter.prompt_only}, so tokens can only be dropped before the first "
                f"decoder layer; this recipe acts in layer {min(touched)}, use prompt stages without mass"
            )
        self.config = self.text.config
        self.masks = LayerMasks(self.config, own_mask=adapter.own_mask)
        self.traces = Traces()
        self._renumber = Renumber(adapter) if policy.compact else None
        # whether layers are rewritten one by one, or get what the language model was given
        self._layered = force or bool(touched) or policy.compact
        self._removables: list[Any] = [
            self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True),
            self.text.register_forward_pre_hook(self._text_pre, with_kwargs=True),
            self.text.register_forward_hook(self._text_post, with_kwargs=True),
        ]
        self._removables += [m.register_forward_pre_hook(self._outer_pre, with_kwargs=True) for m in outer]
        self._in_layers = self._layered or self._is_flash()
        if self._in_layers:
            for index, layer in enumerate(self.layers):
                pre = functools.partial(self._layer_pre, index)
                self._removables.append(layer.register_forward_pre_hook(pre, with_kwargs=True))
        self._removables += record_features(self.base)
        if policy.biased is not None:  # these layers choose a kernel that can take a bias
            biased = [module for layer in self.layers[policy.biased :] for module in attention_modules(layer)]
            self._removables += [Tap(module, None) for module in biased]
        for index in sorted(policy.frozen):
            self._freeze(index)

    def _freeze(self, index: int) -> None:
        layer, attention = self.layers[index], attention_of(self, index)
        # before the hook by which hidden states are collected
        self._removables.append(layer.register_forward_hook(_layer_post, prepend=True, with_kwargs=True))
        self._removables += [Tap(attention, None), *skip_queries(attention, self.base.config.model_type)]

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to this attachment."""
        self._removables.append(removable)

    def remove(self) -> None:
        """Take every hook away; the model is stock again."""
        for removable in self._removables:
            removable.remove()
        self._removables = []
        for slot in (_thread.handover, _thread.running, _thread.labels):
            slot.pop(id(self), None)
        begin_forward()

    def _is_flash(self) -> bool:
        return is_flash(self.config)

    # ---- the model around: labels

    def _outer_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Take copies of the labels: what a dropped position would have predicted is left out of the loss.

        The innermost module's copy is the one that the loss reads.
        """
        if kwargs is None or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None):
            return None
        return args, kwargs | self._copy_labels(kwargs)

    @torch.compiler.disable
    def _copy_labels(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        given = {name: kwargs.get(name) for name in ("labels", "shift_labels")}
        copies = {name: labels.clone() for name, labels in given.items() if torch.is_tensor(labels)}
        _thread.labels[id(self)] = copies
        return copies

    def _ignore_labels(self, call: Prefill) -> None:
        copies = _thread.labels.pop(id(self), {})
        labels, shifted = copies.get("labels"), copies.get("shift_labels")
        gone = ~call.alive[len(self.layers) - 1]  # padding too, whose states are not what they were
        if labels is not None and labels.shape == gone.shape:
            labels[:, 1:].masked_fill_(gone[:, :-1].to(labels.device), IGNORED)
        if shifted is not None and shifted.shape == gone.shape:
            shifted.masked_fill_(gone.to(shifted.device), IGNORED)

    # ---- base model: where are the visual tokens, and does this call carry pictures at all?

    @torch.compiler.disable
    def _base_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.serves():
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        cache, encoded = kwargs.get("past_key_values"), kwargs.get("mm_encoder_outputs")
        if any(SHORT in vars(output) for output in (encoded or {}).values() if output is not None):
            return None  # inputs that are already shorter
        if SHORT in getattr(cache, "__dict__", {}):
            raise UnsupportedError(
                "past_key_values: it holds a prompt that was compressed before the model; go on with generate(), or "
                "with the inputs that extend() of the compressed inputs gives"
            )
        begin_forward()
        if (trace := self.traces.latest) is not None:
            trace.promises.settle(wait=False)
        handover: dict[str, Any] = {"ids": ids, "encoded": encoded, "mask": mask}
        _thread.handover[id(self)] = handover
        present = modalities(kwargs)
        first = cache is None or not cache.get_seq_length()
        if ids is None or present or first:
            # read before the vision tower starts: later, the host would wait for it
            ids_host = None if ids is None else ids.cpu()
            masks = self._placeholders(module, ids_host, embeds, present)
            if any(bool(m.any()) for m in masks.values()):
                length = next(iter(masks.values())).shape[1]
                attended = mask[:, -length:].bool().cpu() if mask is not None and _is_2d(mask) else None
                handover |= {"masks": masks, "ids_host": ids_host, "attended": attended}
                if self.adapter.own_mask and not first:
                    self._hide_past(kwargs, handover, length)
                return args, kwargs
            if first and self._may_hold_pictures(ids_host):
                warnings.warn(
                    f"visiontok: a call of {self.base.config.model_type} has image placeholders or embeddings but no "
                    "pixels or features whose tokens could be found; nothing is pruned in it",
                    stacklevel=2,
                )
        if self.adapter.own_mask and isinstance(cache, TwoLengthCache) and (mask is None or _is_2d(mask)):
            x = ids if ids is not None else embeds
            uniform = cache.is_uniform()
            kwargs["attention_mask"] = self.masks.stored(cache, 0, mask, x) if uniform else None
            types: Any = kwargs.get("token_type_ids")
            if _is_2d(types) and x is not None:  # of the whole text, which would be read at the places of stored tokens
                # the mask made of them fits no layer of many lengths, and is made anew for each
                kwargs["token_type_ids"] = types[:, -x.shape[1] :] if uniform else None
        return args, kwargs

    @staticmethod
    def _hide_past(kwargs: dict[str, Any], handover: dict[str, Any], length: int) -> None:
        """Let a family that makes its own masks make those of the new tokens; what is stored is put before them."""
        handover["cache"] = kwargs.pop("past_key_values")
        handover["numbered"] = kwargs.get("position_ids") is None
        for name in ("attention_mask", "token_type_ids"):
            if _is_2d(kwargs.get(name)):
                kwargs[name] = kwargs[name][:, -length:]

    def _may_hold_pictures(self, ids: torch.Tensor | None) -> bool:
        """Whether a first call in which no visual token was found may hold pictures all the same."""
        return ids is None or any(bool((ids == token).any()) for token in self.adapter.placeholders().values())

    def _placeholders(
        self, base: Any, ids: torch.Tensor | None, embeds: Any, present: set[str]
    ) -> dict[str, torch.Tensor]:
        """Per modality (B, N) bool on the host."""
        found: dict[str, torch.Tensor] = {}
        for modality, token in self.adapter.placeholders().items():
            # a placeholder id without a picture is text; embeddings without ids may hold features already
            if ids is not None and modality in present:
                found[modality] = ids == token
            elif ids is None:  # as stock does: a placeholder is recognised by its embedding
                row = base.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                found[modality] = (embeds == row).all(-1).cpu()
        return found

    # ---- language model

    @torch.compiler.disable
    def _text_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.serves():
            return None
        handover = _thread.handover.pop(id(self), {})
        _thread.running.pop(id(self), None)
        if "cache" in handover:
            kwargs["past_key_values"] = handover["cache"]
            if handover["numbered"] and kwargs.get("position_ids") is not None:  # by the base model, from the beginning
                kwargs["position_ids"] = kwargs["position_ids"] + handover["cache"].get_seq_length()
        cache, masks = kwargs.get("past_key_values"), handover.get("masks")
        if masks is None or next(iter(masks.values())).shape != kwargs["inputs_embeds"].shape[:2]:
            if isinstance(cache, TwoLengthCache):
                self._begin_decode(kwargs, handover, cache)
            return args, kwargs
        trace = Trace(len(self.layers))
        trace.clock.mark("prefill")
        x, mask_2d, attended = kwargs["inputs_embeds"], self._mask_2d(kwargs, handover), handover["attended"]
        if attended is None:
            attended = torch.ones(x.shape[:2], dtype=torch.bool)
        past = 0 if cache is None else cache.get_seq_length()  # before the layers fill it
        records = take_records(handover["encoded"])
        trace.chunk = self._is_chunk(handover["encoded"], records)
        if trace.chunk and self.policy.thinned:
            raise UnsupportedError(
                f"{self.base.config.model_type}: this prefill comes in chunks, and what a cache keeps is chosen by the "
                "whole prompt; leave prefill_chunk_size out, or use a recipe without a cache stage"
            )
        if trace.chunk and self.policy.selects:
            self._refuse_split_images(masks, cache)
        call, keep, embeds = run_prompt_stages(
            self.adapter,
            self.policy,
            trace,
            masks=masks,
            records=records,
            ids=handover["ids"],
            ids_host=handover["ids_host"],
            embeds=x,
            attended=attended,
            positions=functools.partial(self._positions, kwargs.get("position_ids"), mask_2d, x, past),
            ahead=functools.partial(self._look_ahead, module, dict(kwargs)),
            rests=functools.partial(self._explain, module, dict(kwargs)),
        )
        drops = list(call.counts) != call.units.sizes
        nothing = not drops and not self.policy.changes and not self.policy.frozen and embeds is x
        nothing = nothing and not self.policy.narrowed and not self.policy.thins(call)
        _thread.running[id(self)] = call
        stock_masks = "cache" not in handover and not isinstance(cache, TwoLengthCache)
        if nothing and not self.force and stock_masks:
            trace.ran_stock()
            call.stock = True
            return args, kwargs
        self._enter(module, kwargs, call, embeds, mask_2d, repack=drops or (self.force and keep is not None))
        if self._in_layers:
            kwargs[CALL] = call
        return args, kwargs

    @staticmethod
    def _look_ahead(module: nn.Module, kwargs: dict[str, Any], layer: int, call: Prefill) -> torch.Tensor:
        with bypass():
            return look_ahead(module, layer, kwargs, call)

    def _explain(self, module: nn.Module, kwargs: dict[str, Any], call: Prefill) -> torch.Tensor:
        outer: list[Any] = [m for m in self.outer if hasattr(m, "get_output_embeddings")]
        head = outer[0].get_output_embeddings() if outer else None
        with bypass():
            return next_token(module, head, kwargs, call)

    @staticmethod
    def _is_chunk(encoded: Any, records: list[Encoded]) -> bool:
        """Whether this is a part of a prompt, for which ``generate()`` hands over features without their record."""
        return len(records) < len([output for output in (encoded or {}).values() if output is not None])

    def _refuse_split_images(self, masks: Mapping[str, torch.Tensor], cache: Any) -> None:
        """A chunk of a prompt may hold a part of an image only, of which no budget can be kept.

        Raises:
            UnsupportedError: if a border of the chunk may lie in an image.
        """
        behind = cache is not None and cache.get_seq_length()
        if any(bool(m[:, -1].any()) or (behind and bool(m[:, 0].any())) for m in masks.values()):
            raise UnsupportedError(
                f"{self.base.config.model_type}: this prefill comes in chunks, one of which begins or ends within an "
                "image, of which no budget can be kept; choose prefill_chunk_size so that images stay whole, or drop it"
            )

    def _enter(
        self, module: Any, kwargs: dict[str, Any], call: Prefill, embeds: torch.Tensor, mask_2d: Any, *, repack: bool
    ) -> None:
        """Drop tokens before the first layer, adopt the cache, and hand the language model consistent inputs."""
        length = call.length
        self._refuse_masks(kwargs)
        cache, past = self._cache(module, kwargs), 0
        call.trace.stores = cache is not None
        if cache is not None:
            past = cache.get_seq_length()
            call.first_key = self.masks.key(cache, 0)
            call.history = None if mask_2d is None or not past else mask_2d[:, :-length]
            kwargs["past_key_values"] = call.cache = cache
            cache.prefilling()
        position_ids = kwargs.get("position_ids")
        if position_ids is None:  # what the stock language model would have numbered
            call.numbers = (torch.arange(length, device=embeds.device) + past)[None]
        else:
            call.numbers = position_ids
        kwargs["inputs_embeds"] = embeds
        kwargs.pop("logits_to_keep", None)  # Gemma 4 cuts its last layers to these; they are counted in the full prompt
        if repack:
            keep = torch.where(call.visual, call.kept, call.attended)
            entry = call.entry = Layout(keep, counted(keep, call.row_counts(call.counts)))
            kwargs["position_ids"] = call.numbers
            self._gather_inputs(entry, kwargs, inputs_embeds=1, position_ids=call.numbers.ndim - 1)
            call.width, call.entry_valid = entry.width, entry.valid
        elif mask_2d is not None and call.padded:
            call.entry_valid = call.attended
        if cache is not None:
            if not self._layered and not cache.is_uniform():
                raise UnsupportedError(_OTHER_RECIPE)
            cache.serve()
        call.entered = call.row_counts(call.counts if repack else call.units.sizes)
        self._enter_mask(kwargs, call, past)
        if self.adapter.deepstack and kwargs.get(self.adapter.deepstack[0]) is not None:
            self._enter_deepstack(kwargs, call, embeds)
        if self._layered:
            return
        depth = range(len(self.layers))
        call.alive = dict.fromkeys(depth, torch.where(call.visual, call.kept, call.attended))
        call.masses = dict.fromkeys(depth, call.mass)
        if cache is not None:
            for layer in cache.storing.values():
                layer.note_prefill(
                    length, call.width, call.entry_valid, None, call.batch, embeds.device, call.history, call.tail
                )

    @staticmethod
    def _positions(
        given: torch.Tensor | None, mask_2d: torch.Tensor | None, x: torch.Tensor, past: int
    ) -> torch.Tensor:
        """The positions of ``x`` (B, N, D) that the model was given, or those that ``generate()`` would give.

        A forward may number the padding in front of a row, too; it is taken out, so that a row alone has the same.
        """
        batch, length = x.shape[:2]
        if given is None and mask_2d is not None:
            return (mask_2d.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        if given is None:
            return (torch.arange(length, device=x.device) + past)[None]
        if given.ndim == 3 or mask_2d is None:
            return given
        given = given.reshape(-1, length).expand(batch, length)
        ahead = (mask_2d[:, -length:].cumsum(1) == 0).sum(1, keepdim=True)
        numbered = given.gather(1, ahead.clamp_max(length - 1)) - given[:, :1] == ahead
        return given - ahead * numbered

    def _gather_inputs(self, layout: Layout, kwargs: dict[str, Any], **dims: int) -> None:
        """Give the family's own per-token keywords, and those of ``dims``, the tokens of ``layout``."""
        dims |= {name: 1 for name in self.adapter.token_inputs if torch.is_tensor(kwargs.get(name))}
        gathered = layout.gather_each([kwargs[name] for name in dims], list(dims.values()))
        kwargs |= zip(dims, gathered, strict=True)

    def _enter_mask(self, kwargs: dict[str, Any], call: Prefill, past: int) -> None:
        mask = kwargs.get("attention_mask")
        if self.adapter.own_mask and mask is not None and not _is_2d(mask):
            if self.masks.makes_own():
                self._enter_own(kwargs, call, mask)
            if not self.masks.makes_own() or (past and not self._layered):
                first = {self.masks.kind(i): i for i in reversed(range(len(self.layers)))}
                x = kwargs["inputs_embeds"]
                made = {kind: self.masks.prefill(call, i, x, None) for kind, i in first.items()}
                kwargs["attention_mask"] = made if isinstance(mask, dict) else made["full_attention"]
        elif call.entry is not None or call.cache is not None:
            kwargs["attention_mask"] = self.masks.entering(call, past)

    def _enter_own(self, kwargs: dict[str, Any], call: Prefill, mask: Any) -> None:
        """Give what enters its part of the base model's own masks, by kind of layer or one."""
        own = self.masks.unwindowed(mask) if isinstance(mask, dict) else {"full_attention": mask}
        if call.entry is not None:
            own = {kind: call.entry.gather_mask(m) for kind, m in own.items()}
        call.own = own
        if not isinstance(mask, dict):
            kwargs["attention_mask"] = own["full_attention"]
        elif call.entry is not None:
            sliding = own.get("sliding_attention")
            kwargs["attention_mask"] = mask | {
                "full_attention": own.get("full_attention"),
                "sliding_attention": None if sliding is None else self.masks.windowed(sliding),
            }

    def _enter_deepstack(self, kwargs: dict[str, Any], call: Prefill, embeds: torch.Tensor) -> None:
        """Give the features of intermediate tower levels to the tokens that enter."""
        mask_name, levels_name = self.adapter.deepstack  # type: ignore[misc]
        where, levels = kwargs[mask_name], kwargs[levels_name]
        if not self._layered:
            if call.entry is not None:
                kept = call.kept[where]
                kwargs[levels_name] = [level[kept.to(level.device)] for level in levels]
                kwargs[mask_name] = call.entry.gather(where & call.kept) & call.entry_valid_or_ones()
            return
        if len(levels) >= len(self.layers):
            raise UnsupportedError(
                f"{self.base.config.model_type}: {len(levels)} DeepStack levels for {len(self.layers)} decoder layers; "
                "the last layer must come behind the last level"
            )
        del kwargs[mask_name], kwargs[levels_name]
        for level in levels:  # one dense (B, E, D) plane per level, added layer by layer
            dense = embeds.new_zeros(call.batch, call.length, level.shape[-1])
            dense = call.enter(dense.masked_scatter(where[..., None], level.to(dense.dtype)))
            if call.entry is not None and call.entry.valid is not None:
                dense = dense * call.entry.valid[..., None]
            call.levels.append(dense)

    def _refuse_masks(self, kwargs: dict[str, Any]) -> None:
        """Masks that cannot follow dropped tokens, before the caller's cache is touched.

        Raises:
            UnsupportedError: for a mask of the caller's that is not 2-D, and for a kernel that got no layer hooks.
        """
        mask = kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        usable = cache is None or adoptable(cache)  # adopt() says why not; generate() builds 4-D masks for static ones
        if mask is not None and not self.adapter.own_mask and not _is_2d(mask) and usable:
            raise UnsupportedError(
                f"{self.base.config.model_type}: attention_mask of {type(mask).__name__} {tuple(mask.shape)} cannot "
                "follow dropped tokens; give the 2-D padding mask (batch, length)"
            )
        if self._is_flash() and not self._in_layers:
            raise UnsupportedError(
                f"attn_implementation={self.config._attn_implementation}: it was chosen after compress(), which "
                "prepares flash attention differently; choose it first"
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
        masks = tables = None
        mask_2d = self._mask_2d(kwargs, handover)
        skip = False
        if not self.adapter.own_mask and (mask is None or _is_2d(mask)):
            kwargs["attention_mask"] = self.masks.stored(cache, 0, mask, x)
            skip = cache.layers[0].bias is None  # the language model builds this one itself
        if not cache.is_uniform():
            if not self._in_layers:
                raise UnsupportedError(_OTHER_RECIPE)
            masks = self.masks.decode(cache, mask_2d, x, skip=skip)
        if cache.counted:
            if self._renumber is None:
                raise UnsupportedError(_OTHER_RECIPE)
            tables = self._renumber.decode(cache, kwargs.get("position_ids"), x)
        if masks is not None or tables is not None:
            kwargs[CALL] = Decode(self.policy, self.traces.latest, masks, tables)
        cache.serve()
        _thread.running[id(self)] = kwargs.get(CALL) or Decode(self.policy, self.traces.latest, None)

    def _mask_2d(self, kwargs: dict[str, Any], handover: dict[str, Any]) -> torch.Tensor | None:
        mask = handover.get("mask") if self.adapter.own_mask else kwargs.get("attention_mask")
        return mask if _is_2d(mask) else None

    @torch.compiler.disable
    def _text_post(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        if output is None:
            return None
        call = _thread.running.pop(id(self), None)
        if call is None:
            return None
        if isinstance(call, Decode):
            if call.trace is not None:
                call.trace.note_step()
            return None
        call.trace.clock.mark("prefilled")
        if not call.stock:
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            hidden = call.to_prompt(len(self.layers) - 1, hidden)
            if isinstance(output, tuple):
                output = (hidden, *output[1:])
            else:
                output.last_hidden_state = hidden
                self._complete_states(call, output)
            depth = range(len(self.layers))
            call.trace.finish(
                [call.alive[i] for i in depth],
                [call.slots(i) for i in depth],
                [call.masses.get(i) for i in depth],
                {index: rows.computed.width for index, rows in call.rows.items()},
                call.cached,
                {index: (len(parted.visual), self.policy.channels[index]) for index, parted in call.parted.items()},
            )
            self._ignore_labels(call)
        self.traces.publish(call.trace)
        return output

    @staticmethod
    def _complete_states(call: Prefill, output: Any) -> None:
        """Transformers takes what enters layer 0 from the layer's arguments, in which frozen rows are missing."""
        collected = getattr(output, "hidden_states", None)
        if call.first is not None and collected is not None and collected[0] is not None:
            output.hidden_states = (call.first, *collected[1:])

    # ---- decoder layers

    def _layer_pre(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        call = None if kwargs is None else kwargs.get(CALL)
        if kwargs is None or call is None or call.policy is not self.policy:
            return None
        return self._in_layer(index, call, args, kwargs)

    @torch.compiler.disable
    def _in_layer(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(call, Decode):
            del kwargs[CALL]
            mask = UNCHANGED if call.masks is None else call.masks[index]
            if mask is not UNCHANGED:
                self._mask(index, kwargs, mask)
            tables = None if call.tables is None else call.tables[index]
            if tables is not None:
                kwargs["position_embeddings"] = tables
            return args, kwargs
        if not self.policy.shows_state(index):  # a tap in this layer reads it further down
            del kwargs[CALL]
        x = args[0] if args else kwargs["hidden_states"]
        if self._layered:
            self._refuse_reentrant(call)
            x = self._relayout(call, index, x, kwargs)
            self.policy.decoder.note_state(call, index, x)
            if index in call.rows:
                x = self._split(call, index, x, kwargs)
        if self._is_flash() and torch.is_tensor(kwargs.get("position_ids")):
            # With one row, flash attention takes any gap in the position ids for the border of a packed sequence;
            # rotary embeddings are already computed, so attention may get consecutive numbers.
            kwargs["position_ids"] = torch.arange(x.shape[-2], device=x.device)[None].expand(x.shape[-3], -1)
        if args:
            return (x, *args[1:]), kwargs
        kwargs["hidden_states"] = x
        return args, kwargs

    def _refuse_reentrant(self, call: Prefill) -> None:
        """Reentrant checkpoints run the layer without gradients; up to transformers 5.17 these hooks are inside.

        Raises:
            UnsupportedError: since gradients of what layers hand on beside their inputs would be lost.
        """
        if call.trains and not torch.is_grad_enabled():
            raise UnsupportedError(
                f"{self.base.config.model_type}: reentrant gradient checkpointing loses gradients of a recipe that "
                'works inside the language model; use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )

    def _relayout(self, call: Prefill, index: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Give layer ``index`` the tokens it is to see; returns its hidden states and rewrites masks and positions."""
        before = call.layouts[index - 1]
        x, states = self._add_level(call, index - 1, x, call.states.get(index - 1))
        replay = index in call.layouts  # by gradient checkpointing
        if not replay:
            if self.policy.decoder.asks_beforehand(index):
                self._ask_beforehand(call, index, x, states, kwargs)
            self._decide(call, index, x, states)
        layout, edit = call.layouts[index], call.edits.get(index)
        if layout is not before or edit is not None:
            states = x if before is None else before.scatter(states, x)  # type: ignore[arg-type]
            if edit is not None:
                states = edit(states)
            x = states if layout is None else layout.gather(states)
        call.states[index] = states
        cache, bias = call.cache, call.slot_bias(index)
        # the language model built its mask for what layer 0 stores, or a family's own one for nothing stored
        stale = cache is not None and (
            bool(cache.layers[index].physical_length())
            if self.adapter.own_mask
            else self.masks.key(cache, index)[1:] != call.first_key[1:]
        )
        biased = bias is not None or (cache is not None and cache.layers[index].bias is not None)
        rows = self._rows(call, layout) if index in self.policy.frozen else None
        if rows is not None:
            call.rows[index] = rows
            kwargs["attention_mask"] = self.masks.rows(call, index, x, layout, rows.computed.slots)
        elif layout is not None or stale or biased:
            self._mask(index, kwargs, self.masks.prefill(call, index, x, layout))
        if layout is not None:
            self._gather_tokens(call, layout, kwargs)
        if self._renumber is not None:
            kwargs["position_embeddings"] = self._renumber.prefill(call, index, x, layout, self._rotary(index, kwargs))
        if cache is not None:
            valid = call.entry_valid if layout is None else layout.valid
            cache.layers[index].note_prefill(
                call.length, call.slots(index), valid, bias, call.batch, x.device, call.history, call.tail
            )
        if not replay and self.policy.decoder.asks_unturned(index):
            cos, sin = self._rotary(index, kwargs)
            still = torch.ones_like(cos), torch.zeros_like(sin)
            self.policy.decoder.note_unturned(
                call, index, *glance(self.layers[index], x, kwargs | {"position_embeddings": still})
            )
        return x

    def _mask(self, index: int, kwargs: dict[str, Any], mask: Any) -> None:
        """Give layer ``index`` its mask."""
        if isinstance(mask, Biased):
            if self.policy.biased is None or index < self.policy.biased:  # its attention is not tapped
                raise UnsupportedError(_OTHER_RECIPE)
            mask, kwargs[BIAS] = mask
        kwargs["attention_mask"] = mask

    @staticmethod
    def _rows(call: Prefill, layout: Layout | None) -> Rows | None:
        """How a layer that holds ``layout`` is divided if visual tokens are frozen; None if it holds none."""
        slots = call.width if layout is None else layout.width
        if max(call.texts) == slots:
            return None
        key = ("rows", id(layout))
        if key not in call.masks:  # the value keeps the layout alive, so its id stays its
            text = call.enter(call.attended & ~call.visual) & call.entry_valid_or_ones()
            if layout is not None:
                text = layout.gather(text) if layout.valid is None else layout.gather(text) & layout.valid
            call.masks[key] = (layout, Rows(text, call.texts))
        return call.masks[key][1]

    def _split(self, call: Prefill, index: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Give layer ``index`` the rows that it computes, of ``x`` (B, M, D), and the keys and values of the others."""
        rows, layer = call.rows[index], self.layers[index]
        if index == 0:
            call.first = x
        frozen = {**kwargs, "attention_mask": None}
        self._gather_tokens(call, rows.frozen, frozen)
        self._gather_tokens(call, rows.computed, kwargs)
        known = keys_values(layer, rows.frozen.gather(x), frozen)
        checkpointing = layer.training and getattr(layer, "gradient_checkpointing", False)
        cache = None if checkpointing else call.cache
        kwargs["past_key_values"] = None  # what is computed joins what is frozen before it is stored
        kwargs[SPLIT] = Split(rows, x, known, cache, index, trains=call.trains)
        return rows.computed.gather(x)

    def _rotary(self, index: int, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines that decoder layer ``index`` is given.

        Raises:
            UnsupportedError: if it is given none.
        """
        tables = kwargs.get("position_embeddings")
        if not isinstance(tables, tuple | list) or len(tables) != 2:
            raise UnsupportedError(
                f"{self.base.config.model_type}: decoder layer {index} is given no rotary tables, so what it would "
                "attend to cannot be asked beforehand; use a method that reads the layer before the cut, as fastv does"
            )
        return tables[0], tables[1]

    @torch.no_grad()
    def _ask_beforehand(
        self, call: Prefill, index: int, x: torch.Tensor, states: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Show the policy what layer ``index`` would compute of the tokens that stand before its cut."""
        layout = before = call.layouts[index - 1]
        if index and not any(self.policy.counts(call, index - 1)) and any(call.counts):  # injected on this very input
            keep = call.enter(torch.where(call.visual, call.kept, call.attended)) & call.entry_valid_or_ones()
            layout = Layout(keep, counted(keep, call.row_counts(call.counts)))
            x = layout.gather(x if before is None else before.scatter(states, x))  # type: ignore[arg-type]
        tables = self._rotary(index, kwargs)
        mine = dict(kwargs)
        if layout is not None:
            self._gather_inputs(layout, mine)
            mine["position_embeddings"] = self._gathered(call, layout, tables)
            mine.pop("position_ids", None)
        if self._renumber is not None:
            tables = mine["position_embeddings"]
            mine["position_embeddings"] = self._renumber.beforehand(call, index, x, layout, tables)
        q, k, scale = glance(self.layers[index], x, mine)
        call.layouts[index], call.biases[index] = layout, call.bias  # until the cut is decided
        mask, bias = self.masks.prefill(call, index, x, layout), call.slot_bias(index)
        stored = None if call.cache is None else call.cache.layers[index]
        if stored is not None and stored.physical_length():
            k = torch.cat([stored.keys, k], 2)
            bias = stored.bias_with(bias, x.shape[1])
            bias = None if bias is None else bias[:, -k.shape[2] :]
        mask = mask.mask if isinstance(mask, Biased) else mask
        self.policy.decoder.note_beforehand(call, index, q, k, mask, scale, bias)
        del call.layouts[index], call.biases[index]

    # A choice of tokens has no gradient; and a replay by gradient checkpointing, which up to transformers 5.17 runs
    # these hooks again, must save the same tensors although it chooses no more.
    @torch.no_grad()
    def _decide(self, call: Prefill, index: int, x: torch.Tensor, states: torch.Tensor | None) -> None:
        """Which tokens layer ``index`` holds, and with which bias."""
        before = call.layouts[index - 1]
        if index in self.policy.changes:
            latest = x if before is None else before.scatter(states, x)  # type: ignore[arg-type]
            visible = self.policy.visible(call, index, latest) & call.kept
            call.alive[index] = torch.where(call.visual, visible, call.attended)
            call.check_last(call.alive[index])
            wanted = call.enter(call.alive[index]) & call.entry_valid_or_ones()
            counts = counted(wanted, call.row_counts(self.policy.counts(call, index)))
            unchanged = counts == call.entered
            call.layouts[index] = None if unchanged and not self.force else Layout(wanted, counts)
        else:
            call.layouts[index] = before
            call.alive[index] = call.alive[index - 1] if index else torch.where(call.visual, call.kept, call.attended)
        hidden = not any(self.policy.counts(call, index))
        call.biases[index] = None if hidden else call.bias
        call.masses[index] = call.mass
        if index in self.policy.narrowed and not hidden:
            call.parted[index] = self._parted(call, index)

    def _parted(self, call: Prefill, index: int) -> Parted:
        """Which slots of layer ``index`` hold visual tokens."""
        layout = call.layouts[index]
        key = ("parted", id(layout))
        if key not in call.masks:  # the value keeps the layout alive, so its id stays its
            visual = call.held(index, call.visual & call.alive[index]) & call.slots_in_use(index)
            rows = call.row_counts(self.policy.counts(call, index))
            known = [n - text for n, text in zip(rows, call.texts, strict=True)]
            call.masks[key] = (layout, Parted(visual, sum(counted(visual, known))))
        return call.masks[key][1]

    def _gather_tokens(self, call: Prefill, layout: Layout, kwargs: dict[str, Any]) -> None:
        """Give what a layer gets beside its states the tokens of ``layout``."""
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            kwargs["position_embeddings"] = self._gathered(call, layout, embeddings)
        position_ids = kwargs.get("position_ids")
        if torch.is_tensor(position_ids) and position_ids.shape[-1] == layout.length:
            self._gather_inputs(layout, kwargs, position_ids=position_ids.ndim - 1)
        else:
            self._gather_inputs(layout, kwargs)

    @staticmethod
    def _gathered(call: Prefill, layout: Layout, embeddings: Any) -> Any:
        key = ("rope", id(layout), id(embeddings[0]))
        if key not in call.masks:  # the value keeps both objects alive, so their ids stay theirs
            tables = layout.gather_each(embeddings, [e.ndim - 2 for e in embeddings])
            call.masks[key] = (layout, embeddings, tuple(tables))
        return call.masks[key][2]

    @staticmethod
    def _add_level(
        call: Prefill, index: int, x: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """DeepStack: add the level's features behind layer ``index``, also to tokens that it did not see.

        On the way into the next layer, for what leaves this one is recorded by ``output_hidden_states``.
        """
        if not 0 <= index < len(call.levels):
            return x, states
        level, layout = call.levels[index], call.layouts[index]
        if layout is None:
            return x + level, states
        added = layout.gather(level)
        if layout.valid is not None:
            added = added * layout.valid[..., None]
        return x + added, states + level * ~layout.keep[..., None]  # type: ignore[operator]


def _layer_post(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
    """Frozen rows leave a layer as they entered it."""
    split = None if output is None else kwargs.get(SPLIT)
    return None if split is None else split.leave(output)


def modalities(kwargs: Mapping[str, Any]) -> set[str]:
    """Which modalities a forward carries, as pixels or as features."""
    found = {name for name, value in (kwargs.get("mm_encoder_outputs") or {}).items() if value is not None}
    if any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_images", "image_hidden_states")):
        found.add("image")
    if kwargs.get("pixel_values_videos") is not None:
        found.add("video")
    return found


def _is_2d(mask: Any) -> bool:
    return torch.is_tensor(mask) and mask.ndim == 2
