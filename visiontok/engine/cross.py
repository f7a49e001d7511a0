"""Attach to a cross-attention model (Mllama), whose visual tokens are no part of the prompt.

The projected states of all tiles of a row are the keys and values of some decoder layers. Dropping a token means to
drop its row of ``cross_attention_states`` and its column of ``cross_attention_mask`` before the language model, so that
every cross-attention layer computes, caches and reads the kept tokens only. No position is involved, and the text is
as long as before. Only the cache outlives a call: it remembers which columns it holds, because later masks still come
with one column for each token there ever was.

For the methods, and in the ledger, a row is its V columns followed by its L text tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cost import VisionInputs
from ..errors import ConfigError, UnsupportedError
from ..functional import attention_columns
from ..ledger import TokenLedger
from ..method import Stage
from .call import Decode, Prefill
from .layout import Layout
from .policy import StagePolicy
from .tower import TowerReadings
from .trace import Trace, Traces
from .vision import Encoded, TowerRecorder, Units, begin_forward, take_records

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter


class CrossTower(TowerReadings):
    """What the methods read of a tower whose every tile has its own CLS token."""

    def read(self, call: Prefill, stat: str, layer: int | float) -> torch.Tensor:
        if stat.startswith("cls"):
            raise UnsupportedError(
                f"{self._model}: its vision tower has a CLS token in every tile, each of which looks at all tiles, and "
                "none that stands for the image; use attention.received, or a method without CLS"
            )
        return super().read(call, stat, layer)

    def _sink(
        self,
        layer: int,
        stats: frozenset[str],
        call: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        kwargs: Any,
    ) -> None:
        """What each place of the tower receives from the tokens of real tiles, which see padding too."""
        record = self.record()
        if record is None:
            return
        if "keys" in stats:
            record.attention[("keys", layer)] = [k.transpose(1, 2).float()]
        if "received" not in stats:
            return
        visible = mask[:, 0] > torch.finfo(mask.dtype).min / 2  # (images, n, n): only padding is hidden from padding
        weight = visible.diagonal(dim1=1, dim2=2).float()
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        total = attention_columns(q, k, scale=kwargs.get("scaling"), visible=visible, weight=weight, normalise=None)
        record.attention[("received", layer)] = [total]


class CrossPolicy(StagePolicy):
    """The prompt stages of a recipe.

    Raises:
        UnsupportedError: for stages and budgets that have no meaning here.
    """

    tower_readings = CrossTower

    def __init__(self, stages: Sequence[Stage], depth: int, **shared: Any) -> None:
        """As :class:`~visiontok.engine.policy.StagePolicy`, which also takes what is ``shared`` by the stages."""
        for stage in stages:
            if stage.kind not in ("pixel", "prompt"):
                where = "" if stage.layer is None else f" at layer {stage.layer}"
                raise UnsupportedError(
                    f"{stage.kind} stage{where}: a cross-attention model has no visual tokens in the "
                    "sequence of its decoder layers, and what its cross-attention layers see is fixed before the "
                    "first of them; use a recipe of prompt stages"
                )
            if stage.keep is not None and stage.keep.kind == "flops":
                raise UnsupportedError(
                    f"keep={stage.keep}: a share of FLOPs is solved for visual tokens in the prompt only; give tokens "
                    "or a ratio"
                )
        super().__init__(stages, depth, **shared)


class CrossCache(DynamicCache):
    """A ``DynamicCache`` whose cross-attention layers hold some of the columns that the masks have.

    Attributes:
        cross: the cross-attention layers.
        columns: columns that the stock model would hold, C.
        slots: (B, W) long, the column of each stored token.
        valid: (B, W) bool, which of them hold a token; None if all do.
        bias: (B, W) float, added to the attention logits of their keys; None for nothing.
    """

    cross: frozenset[int] = frozenset()
    columns = 0
    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    served: frozenset[int] = frozenset()  # layers for whose next update an attachment has prepared the masks

    def extend(self, slots: torch.Tensor, valid: torch.Tensor | None, bias: torch.Tensor | None, columns: int) -> None:
        """Announce, before ``update``, tokens at ``slots`` of ``columns`` new columns."""
        if self.slots is not None:
            if self.bias is not None or bias is not None:
                like: torch.Tensor = self.bias if bias is None else bias  # type: ignore[assignment]
                parts = ((self.bias, self.slots), (bias, slots))
                bias = torch.cat([like.new_zeros(at.shape) if b is None else b for b, at in parts], 1)
            if self.valid is not None or valid is not None:
                old, new = (
                    known if known is not None else torch.ones_like(at, dtype=torch.bool)
                    for known, at in ((self.valid, self.slots), (valid, slots))
                )
                valid = torch.cat([old, new], 1)
            slots = torch.cat([self.slots, slots + self.columns], 1)
        self.slots, self.valid, self.bias, self.columns = slots, valid, bias, self.columns + columns

    def serve(self, depth: int) -> None:
        """Allow the next update of each of ``depth`` layers: the masks are taken care of."""
        self.served = frozenset(range(depth))

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx not in self.served:
            raise UnsupportedError(
                "past_key_values holds a compressed image, whose masks only the attached recipe can build; go on "
                "inside the compress() block, or start again without the cache"
            )
        self.served -= {layer_idx}
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.slots is not None:
            self._select(torch.arange(len(self.slots)).repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor) -> None:
        if self.slots is not None:
            self.slots = self.slots[rows.to(self.slots.device)]
        if self.valid is not None:
            self.valid = self.valid[rows.to(self.valid.device)]
        if self.bias is not None:
            self.bias = self.bias[rows.to(self.bias.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """As in the base class, of the text; the stock cache would take visual tokens away as well."""
        for index, layer in enumerate(self.layers):
            if index not in self.cross:
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # every layer is a DynamicLayer

    def reset(self) -> None:
        super().reset()
        self.columns, self.slots, self.valid, self.bias = 0, None, None, None


def adopt(cache: Any, cross: frozenset[int], batch: int, device: torch.device) -> CrossCache:
    """Turn ``cache`` into a :class:`CrossCache`, in place.

    Raises:
        UnsupportedError: for caches whose layers have a fixed size or another format.
    """
    if isinstance(cache, CrossCache):
        return cache
    kinds = {type(layer) for layer in cache.layers}
    if type(cache) is not DynamicCache or not kinds <= {DynamicLayer}:
        found = type(cache).__name__ + "[" + ", ".join(sorted(kind.__name__ for kind in kinds)) + "]"
        raise UnsupportedError(
            f"past_key_values={found}: the cross-attention layers are to store fewer visual tokens than the stock "
            "model, which needs a DynamicCache; drop cache_implementation / past_key_values"
        )
    stored = int(cache.get_seq_length(min(cross)))
    cache.__class__ = CrossCache
    adopted: Any = cache
    adopted.cross = cross
    if stored:  # an image of an earlier, uncompressed turn
        adopted.extend(torch.arange(stored, device=device).expand(batch, -1), None, None, stored)
    return adopted


class _Thread(threading.local):
    def __init__(self) -> None:
        self.masks: dict[int, Any] = {}  # base model hook → language model hook
        self.running: dict[int, Prefill | Decode] = {}  # language model pre-hook → post-hook


_thread = _Thread()


class CrossAttachment:
    """The hooks on one cross-attention model; see :class:`visiontok.engine.attach.Attachment`.

    Args:
        adapter: where the parts of the model are.
        policy: who decides.
        serves: whether the calls of the present thread are this attachment's; others may stand beside it.
        force: run the whole machinery even where nothing is dropped (for tests of its exactness).
    """

    def __init__(
        self, adapter: Adapter, policy: StagePolicy, *, serves: Callable[[], bool], force: bool = False
    ) -> None:
        self.adapter, self.policy, self.serves, self.force = adapter, policy, serves, force
        self.base = adapter.base
        self.text: Any = getattr(self.base, adapter.text)
        self.layers = list(self.text.layers)
        self.cross = frozenset(self.text.config.cross_attention_layers)
        self.traces = Traces()
        self._removables: list[Any] = [
            self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True),
            self.text.register_forward_pre_hook(self._text_pre, with_kwargs=True),
            self.text.register_forward_hook(self._text_post, with_kwargs=True),
            TowerRecorder(getattr(self.base, adapter.tower), self.base.get_submodule(adapter.projector), serves),
        ]

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to this attachment."""
        self._removables.append(removable)

    def remove(self) -> None:
        """Take every hook away; the model is stock again."""
        for removable in self._removables:
            removable.remove()
        self._removables = []
        _thread.masks.pop(id(self), None)
        _thread.running.pop(id(self), None)
        begin_forward()

    def _base_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None or not self.serves():
            return
        begin_forward()
        _thread.masks[id(self)] = kwargs.get("cross_attention_mask")

    def _text_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.serves():
            return None
        given = _thread.masks.pop(id(self), None)
        _thread.running.pop(id(self), None)
        cache = kwargs.get("past_key_values")
        if kwargs.get("cross_attention_states") is not None:
            self._prefill(module, kwargs, given)
        elif isinstance(cache, CrossCache):
            _thread.running[id(self)] = Decode(self.policy, self.traces.latest, None)
            if cache.slots is not None:
                _check_columns(kwargs.get("cross_attention_mask"), cache.columns)
                kwargs |= self._masks(kwargs, cache.slots, cache.valid, cache.bias)
            cache.serve(len(self.layers))
        return args, kwargs

    def _prefill(self, module: Any, kwargs: dict[str, Any], given: Any) -> None:
        """Select, and leave only the kept tokens in the keyword arguments of the language model."""
        trace = Trace(len(self.layers))
        trace.clock.mark("prefill")
        ids, text, states = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs["cross_attention_states"]
        if text is None:
            text = module.get_input_embeddings()(ids)
        device = states.device
        text = text.to(device)
        batch, length = text.shape[:2]
        states = states.reshape(batch, -1, text.shape[-1])  # (B, V, D)
        width = states.shape[1]
        records = take_records(None)
        columns = self._columns(records, given, batch, width).cpu()  # (B, M, C)
        cache = kwargs.get("past_key_values")
        if not bool(columns.any()) and not isinstance(cache, CrossCache):  # places for images, but no image
            return
        units = self._units(columns, records, width + length)
        columns = columns.flatten(1)
        attended = _attended(kwargs.get("attention_mask"), batch, length)
        stock = [width if layer in self.cross else length for layer in range(len(self.layers))]

        visual = torch.cat([columns, torch.zeros_like(attended)], 1)
        x, prompt, written = torch.cat([states, text], 1), None, attended
        if ids is not None:  # as in other models: the image token stands for each visual token, and is no text
            ids, token = ids.to(device), self.adapter.placeholders()["image"]
            prompt = torch.cat([ids.new_full((batch, width), token), ids], 1)
            written = attended & (ids != token).cpu()
        present = torch.cat([columns, written], 1)
        host = None if prompt is None else prompt.cpu()
        call = _thread.running[id(self)] = Prefill(self.policy, trace, units, records, visual, present, prompt, host, x)
        attended = attended.to(device)
        everything = torch.cat([call.visual[:, :width], attended], 1)
        trace.ledger = TokenLedger(call.visual, everything, call.units, len(self.layers), stock)
        trace.encoders = [record.clock for record in records]
        given = [VisionInputs.from_call(self.base.config, record.inputs) for record in records]
        trace.inputs = [(inputs, inputs) for inputs in given]
        trace.clock.mark("selection")
        alive, embeds = self.policy.prompt(call, x)
        trace.clock.mark("selected")

        keep, columns = alive[:, :width], call.visual[:, :width]  # type: ignore[index]  # there is a prompt stage
        drops = list(call.counts) != units.sizes
        if not drops and embeds is x and not self.force and not isinstance(cache, CrossCache):
            trace.ran_stock()
            call.stock = True
            return
        if not drops:
            keep = torch.ones_like(columns)  # padding too: what is left is the stock model
        layout = Layout(keep, keep.sum(1).tolist())
        kept = layout.gather(embeds[:, :width])
        if layout.valid is not None:  # keys and values of 0: a row without any token gets 0 from its attention
            kept = kept.masked_fill(~layout.valid[..., None], 0)
        kwargs["cross_attention_states"] = kept
        slots: Any = layout.slots
        valid = layout.valid
        bias = None if call.bias is None else layout.gather(call.bias[:, :width])
        cache = self._cache(module, cache, kwargs.get("use_cache"))
        if cache is not None:
            _check_columns(kwargs.get("cross_attention_mask"), _columns_in(cache, min(self.cross)) + width)
            cache = kwargs["past_key_values"] = adopt(cache, self.cross, batch, device)
            cache.extend(slots, valid, bias, width)
            cache.serve(len(self.layers))
            slots, valid, bias = cache.slots, cache.valid, cache.bias
        kwargs |= self._masks(kwargs, slots, valid, bias)
        call.kept = torch.cat([keep & columns, attended], 1)
        call.width = layout.width

    def _columns(self, records: list[Encoded], given: Any, batch: int, width: int) -> torch.Tensor:
        """(B, M, C) bool, which columns show a picture; M image places of C columns are the ``width`` columns.

        Features that were encoded elsewhere do not say; what some text may see counts then.
        """
        if records:
            return self.adapter.columns(records[0])
        if given is None:
            return torch.ones(batch, 1, width, dtype=torch.bool)
        tiles = given.bool().any(1)  # (B, M, T), images of earlier turns first
        per_tile = getattr(self.base, self.adapter.tower).num_patches
        return tiles[:, -(width // per_tile // tiles.shape[2]) :].repeat_interleave(per_tile, 2)

    def _units(self, columns: torch.Tensor, records: list[Encoded], length: int) -> Units:
        grids = self.adapter.grids(records[0]) if records else []
        places = columns.any(2).nonzero()  # (U, 2): row, image place
        size = columns.shape[2]
        shown = columns[places[:, 0], places[:, 1]]  # (U, C)
        most = max(shown.sum(1).tolist(), default=0)
        order = torch.argsort((~shown).to(torch.int8), dim=1, stable=True)[:, :most]  # the picture's columns, in order
        valid = shown.gather(1, order)
        grid = torch.full((*valid.shape, 3), -1)
        for u, where in enumerate(grids):
            grid[u, : len(where)] = where.cpu()
        rows = places[:, 0].tolist()
        return Units(
            places[:, 0],
            [u - rows.index(row) for u, row in enumerate(rows)],
            ["image"] * len(rows),
            torch.where(valid, order + places[:, 1:] * size, 0),
            valid,
            grid,
            [(0, u, 1) if records else None for u in range(len(rows))],
            len(columns),
            length,
        )

    def _cache(self, module: Any, cache: Any, use_cache: bool | None) -> Any:
        """The cache that the language model will fill, if any."""
        if use_cache is None:
            use_cache = self.text.config.use_cache
        checkpointing = module.training and module.gradient_checkpointing
        if cache is None and use_cache and not checkpointing:
            return DynamicCache(config=self.text.config)
        return cache

    def _masks(
        self, kwargs: dict[str, Any], slots: torch.Tensor, valid: torch.Tensor | None, bias: torch.Tensor | None
    ) -> dict[str, Any]:
        """The mask over the stored tokens, (B, 1, Q, W), and which text sees any of them, (B, 1, Q, 1).

        Text that sees no image attends to everything and has no feed-forward part: so the stock model does it, and so
        it is done for text of whose images nothing is left, as a mask made for the kept tokens alone would be.
        """
        mask, sees = kwargs.get("cross_attention_mask"), kwargs["full_text_row_masked_out_mask"]
        if mask is None and valid is None and bias is None:
            return {}
        batch, width = slots.shape
        if mask is None:
            text = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            mask = torch.zeros(batch, 1, text.shape[1], width, dtype=self.base.dtype, device=slots.device)
            sees = torch.ones_like(mask[..., :1])
        else:
            slots, valid = slots.to(mask.device), None if valid is None else valid.to(mask.device)
            mask = mask.gather(3, slots[:, None, None].expand(-1, 1, mask.shape[2], -1))
        hidden = torch.finfo(mask.dtype).min
        held = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid
        held = held[:, None, None]  # (B, 1, 1, W)
        left = ((mask > hidden) & held).any(-1, keepdim=True)
        mask = mask.masked_fill(~left, 0).masked_fill(~held & held.any(-1, keepdim=True), hidden)
        if bias is not None:
            mask = mask + bias[:, None, None].to(mask)
        return {"cross_attention_mask": mask, "full_text_row_masked_out_mask": sees * left}

    def _text_post(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if output is None:
            return
        call = _thread.running.pop(id(self), None)
        if call is None:
            return
        if isinstance(call, Decode):
            if call.trace is not None:
                call.trace.note_step()
            return
        call.trace.clock.mark("prefilled")
        if not call.stock:
            depth = range(len(self.layers))
            stock = call.trace.ledger.stock  # type: ignore[union-attr]  # a prefill has one
            # what cross-attention layers hold of this call's images
            widths = [call.width if layer in self.cross else stock[layer] for layer in depth]
            call.trace.finish([call.kept] * len(self.layers), widths, [call.mass] * len(self.layers))
        self.traces.publish(call.trace)


def _columns_in(cache: Any, layer: int) -> int:
    """Columns that the stock model would hold in a cross-attention layer."""
    return cache.columns if isinstance(cache, CrossCache) else int(cache.get_seq_length(layer))


def _check_columns(mask: Any, columns: int) -> None:
    """Before a cache is touched.

    Raises:
        ConfigError: if the mask is for other images.
    """
    if mask is not None and mask.shape[-1] != columns:
        raise ConfigError(
            f"cross_attention_mask has {mask.shape[-1]} columns, but the images of this call and of its cache have "
            f"{columns} tokens; give it for all images of the conversation"
        )


def _attended(mask: Any, batch: int, length: int) -> torch.Tensor:
    """(B, L) bool on the host, text that is not padding."""
    if torch.is_tensor(mask) and mask.ndim == 2:
        return mask[:, -length:].bool().cpu()
    return torch.ones(batch, length, dtype=torch.bool)
