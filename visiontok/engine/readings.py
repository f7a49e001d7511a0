"""What methods read of the language model: which layers are tapped for it, and what the taps saw.

Everything is noted on the call, and lives as long as it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..method import Needs, Stage, resolve_layer
from .ahead import stop
from .call import Prefill
from .observe import HEADS, heads, turned, visual, watch_modules
from .probe import Tap, attention_modules, visible_keys
from .relevance import note
from .rotary import rotary_tables
from .statistics import STATISTICS, UNTURNED, Seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from visiontok.adapters.base import Adapter

_BEFOREHAND = frozenset(STATISTICS) - {UNTURNED}  # what the layer behind a cut can be asked, too
_NOTED = ("decoder_states", *HEADS)


class Host(Protocol):
    """What owns the taps of a policy.

    Attributes:
        adapter: where the parts of the model are.
        layers: the decoder layers.
        serves: whether the calls of the present thread are the host's.
    """

    adapter: Adapter
    layers: list[nn.Module]
    serves: Callable[[], bool]

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to the host's."""
        ...


def needs_of(stage: Stage) -> Needs:
    """What the method of a stage reads; nothing if it has none."""
    return stage.method.needs() if stage.method is not None else Needs()


def earliest_cut(stage: Stage) -> int:
    """The first layer at which the method of ``stage`` can have read what it needs."""
    needs = needs_of(stage)
    offsets = [offset for found in _offsets(needs).values() for offset in found]
    return max((-offset for offset in offsets), default=1 if needs.decoder_transition else 0)


def attention_of(host: Host, layer: int) -> nn.Module:
    """The attention module of a decoder layer.

    Raises:
        UnsupportedError: if there is not one.
    """
    modules = attention_modules(host.layers[layer])
    if len(modules) != 1:
        model = host.adapter.base.config.model_type
        raise UnsupportedError(f"{model}: decoder layer {layer} has no single attention module to tap")
    return modules[0]


class DecoderReadings:
    """What the methods of a recipe read of the decoder layers.

    Args:
        prompt: stages before the language model.
        inside: stages inside it, and the layer of each.
        hidden: per layer, whether it sees no visual token.
        frozen: layers that visual tokens pass as they are.
        routes: layers that some of them pass by.
        official: whether published flaws are wanted.

    Raises:
        ConfigError: if a method reads layers that come later, that see no visual token, or that do not compute them.
    """

    def __init__(
        self,
        prompt: Sequence[Stage],
        inside: Sequence[tuple[int, Stage]],
        hidden: list[bool],
        frozen: Set[int],
        routes: Set[int],
        *,
        official: bool,
    ) -> None:
        self.depth, self._hidden, self._official = len(hidden), hidden, official
        self._ahead = {self._look(layer) for stage in prompt for layer in needs_of(stage).decoder_ahead}
        self._explains = any(needs_of(stage).relevance for stage in prompt)
        self._taps: dict[int, set[str]] = {}
        self._beforehand: dict[int, set[str]] = {}
        self._unturned: set[int] = set()
        for layer, stage in inside:
            for stat, read in self._declared(stage, layer):
                if read < 0 or hidden[read] or read in routes:
                    raise ConfigError(
                        f"layer={layer}: {stage.label} reads what layer {read} computes, where no visual token is, or "
                        "not every one; cut later"
                    )
                if read in frozen and read < layer and stat != UNTURNED:
                    raise ConfigError(
                        f"layer={layer}: {stage.label} reads what layer {read} computes, which visual tokens pass as "
                        "they are; cut elsewhere, or leave that layer out of those that freeze"
                    )
                if stat == UNTURNED:
                    self._unturned.add(read)
                else:
                    (self._beforehand if read == layer else self._taps).setdefault(read, set()).add(stat)

    def _declared(self, stage: Stage, cut: int) -> list[tuple[str, int]]:
        """What the method of a cut reads, and in which layers."""
        needs, found = needs_of(stage), []
        for stat, offsets in _offsets(needs).items():
            for offset in offsets:
                if offset > 0 or (not offset and (stat not in _BEFOREHAND or stage.kind == "cache")):
                    raise ConfigError(f"{stat}({offset}): {stage.label} may read earlier layers only")
                found.append((stat, cut + offset))
        return found + [
            ("transition", layer) for first in needs.decoder_transition for layer in self._since(first, cut)
        ]

    def _since(self, first: int | float, cut: int) -> list[int]:
        """The layers before ``cut``, from ``first`` on, that hold visual tokens; the last one at least."""
        start = min(resolve_layer(first, self.depth, name="decoder_transition"), cut - 1)
        return [layer for layer in range(start, cut) if not self._hidden[layer] or layer == cut - 1]

    def _look(self, layer: int | float) -> int:
        return resolve_layer(layer, self.depth, name="decoder_ahead")

    def tap(self, host: Host) -> None:
        """Add what the methods asked for to a model.

        Raises:
            UnsupportedError: if the model's attention cannot be tapped.
        """
        self.adapter = host.adapter
        glanced = self._beforehand.keys() | self._unturned
        for layer in sorted(self._taps.keys() | glanced):
            stats = self._taps.get(layer, set())
            if "transition" in stats:
                for handle in watch_modules(host.layers[layer], layer, self):
                    host.add(handle)
            shown = stats.intersection((*STATISTICS, *HEADS))
            if shown or layer in glanced:
                sink = functools.partial(self._sink, layer, frozenset(shown)) if shown else None
                host.add(Tap(attention_of(host, layer), sink))
        for layer in sorted(self._ahead):
            host.add(Tap(attention_of(host, layer), functools.partial(stop, layer)))
        if self._explains:
            for index in range(self.depth):
                host.add(Tap(attention_of(host, index), None, functools.partial(note, index)))

    @property
    def _model(self) -> str:
        return self.adapter.base.config.model_type

    # ---- what the attachment shows

    def wants_state(self, layer: int) -> bool:
        """Whether a tap of this decoder layer must see the call."""
        return layer in self._taps

    def note_state(self, call: Prefill, layer: int, x: torch.Tensor) -> None:
        """``x`` (B, M, D) enters ``layer``, whose slots it fills."""
        if "decoder_states" in self._taps.get(layer, ()):
            call.notes["decoder_states", layer] = visual(call, layer, x.detach())

    @torch.no_grad()
    def note_module(self, call: Prefill, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """A module of ``layer`` that is watched has made ``y`` of ``x``, both (B, M, D)."""
        moved = turned(call, layer, x, y, official=self._official)
        call.notes["transition", layer] = call.notes.get(("transition", layer), 0) + moved  # attention, then MLP

    def asks_beforehand(self, layer: int) -> bool:
        """Whether a cut on the input of this layer is decided by what the layer itself would attend to."""
        return layer in self._beforehand

    def asks_unturned(self, layer: int) -> bool:
        """Whether queries and keys of this layer without rotary positions are wanted."""
        return layer in self._unturned

    def note_beforehand(
        self,
        call: Prefill,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: Any,
        scale: float | None,
        bias: torch.Tensor | None,
    ) -> None:
        """Take queries (B, H, M, d) and keys (B, G, K, d) that ``layer`` would compute before its cut."""
        self._score(call, layer, self._beforehand[layer], q, k, mask, scale, bias)

    def note_unturned(self, call: Prefill, layer: int, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> None:
        """Take queries and keys (B, H or G, M, d) that ``layer`` computes, without rotary positions."""
        self._score(call, layer, {UNTURNED}, q, k, None, scale, None)

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
        if not isinstance(call, Prefill) or call.policy.decoder is not self:
            return
        for name, x in zip(HEADS, (q, k, v), strict=True):
            if name in stats:
                call.notes[name, layer] = heads(call, layer, x)
        wanted = stats.intersection(STATISTICS)
        if wanted:
            window, bias = kwargs.get("sliding_window"), self._bias(call, layer, k)
            self._score(call, layer, wanted, q, k, mask, kwargs.get("scaling"), bias, window)

    @staticmethod
    def _bias(call: Prefill, layer: int, k: torch.Tensor) -> torch.Tensor | None:
        """(B, K) float: what is added to the logits of the keys of ``layer``."""
        # the cache already counts the keys of this call; without one they are all there is
        bias = call.slot_bias(layer) if call.cache is None else call.cache.layers[layer].bias
        return None if bias is None else bias[:, -k.shape[2] :]

    def _score(
        self,
        call: Prefill,
        layer: int,
        stats: frozenset[str] | set[str],
        q: torch.Tensor,
        k: torch.Tensor,
        mask: Any,
        scale: float | None,
        bias: torch.Tensor | None,
        window: int | None = None,
    ) -> None:
        """Note the statistics of the queries and keys of the slots of ``layer``."""
        layout = call.layouts[layer]
        visible = visible_keys(mask, q, k, call.entry_valid if layout is None else layout.valid, window)
        seen = Seen(call, layer, q, k, visible, scale, bias, self.adapter.special_ids)
        for stat in stats:
            by_slot = STATISTICS[stat](seen)[:, -q.shape[2] :]  # cached tokens are not candidates
            call.attention[stat, layer] = call.to_prompt(layer, by_slot)

    # ---- what a method may ask

    def read(self, call: Prefill, cut: int | None, stat: str, layer: int | float) -> torch.Tensor | None:
        """(U, N, …) what ``stat`` of :class:`visiontok.context.Attention` is; None if it is not of the language model.

        Raises:
            ConfigError: if the method did not declare it.
            UnsupportedError: if the model cannot tell.
        """
        if stat == "rotary_pull":
            return self._pull(call)
        if stat.startswith("cache_"):
            raise ConfigError(f"attention.{stat}({layer}): only a cache stage has it; at a cut, read text_rows")
        if stat == "ahead":
            return self._looked(call, cut, self._look(layer))
        if stat == "relevance":
            return self._rests(call, cut)
        if stat in STATISTICS:
            found = None if cut is None else call.attention.get((stat, cut + int(layer)))
            if found is None:
                raise ConfigError(
                    f"attention.{stat}({layer}): declare it in needs() of the method, as a decoder offset"
                )
            rows = call.units.gather(found.flatten(2) if found.ndim > 2 else found[..., None])
            return rows.unflatten(-1, found.shape[2:]) if found.ndim > 2 else rows[..., 0]
        if stat in _NOTED or stat == "transition":
            layers = [] if cut is None else self._since(layer, cut) if stat == "transition" else [cut + int(layer)]
            notes = [call.notes[stat, i] for i in layers if (stat, i) in call.notes]
            if not notes or len(notes) < len(layers):
                raise ConfigError(f"attention.{stat}({layer}): declare it in needs() of the method, at a cut")
            return functools.reduce(torch.add, notes)
        return None

    def _looked(self, call: Prefill, cut: int | None, layer: int) -> torch.Tensor:
        """(U, N) what the last prompt token looks for in ``layer`` of the stock model."""
        if cut is not None:
            raise ConfigError(f"attention.ahead({layer}): at a cut, read the layers before it instead")
        if call.ahead is None:
            raise UnsupportedError(
                f"{self._model}: looking ahead needs the hooks of compress(), a DynamicCache and visual tokens in the "
                "prompt; leave out cache_implementation and prefill_chunk_size, and call generate() within compress()"
            )
        if ("ahead", layer) not in call.notes:
            call.trace.ahead.append(layer)
            call.notes["ahead", layer] = call.units.gather(call.ahead(layer, call)[..., None])[..., 0]
        return call.notes["ahead", layer]

    def _rests(self, call: Prefill, cut: int | None) -> torch.Tensor:
        """(U, N) how much the stock model's next token rests on each visual token."""
        if cut is not None or not self._explains:
            raise ConfigError(
                "attention.relevance(): declare relevance=True in needs() of the method, in a prompt stage"
            )
        if call.rests is None:
            raise UnsupportedError(
                f"{self._model}: relevance needs the hooks of compress(), a DynamicCache and visual tokens in the "
                "prompt; leave out cache_implementation and prefill_chunk_size, call generate() within compress(), or "
                "give the method scores of visiontok.explain()"
            )
        if ("relevance", 0) not in call.notes:
            call.trace.explained = True
            call.notes["relevance", 0] = call.units.gather(call.rests(call)[..., None])[..., 0]
        return call.notes["relevance", 0]

    def _pull(self, call: Prefill) -> torch.Tensor:
        """(U, N, Q) mean cosine between the rotary angles of visual tokens and words."""
        if call.positions is None:
            raise UnsupportedError(f"{self._model}: its visual tokens have no positions in the prompt")
        text, units = getattr(self.adapter.base, self.adapter.text), call.units
        at = call.question(self.adapter.special_ids())[0][units.row]
        pull: Any = 0.0
        for table in rotary_tables(text, call.positions(), call.batch):
            words = table[units.row[:, None], at]
            pull = pull + units.gather(table) @ words.mT / table.shape[-1]
        return pull

    @torch.no_grad()
    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) → (..., D): the norm behind the last decoder layer."""
        norm = getattr(getattr(self.adapter.base, self.adapter.text), "norm", None)
        if not isinstance(norm, nn.Module):
            raise UnsupportedError(f"{self._model}: its language model has no module named 'norm' behind its layers")
        out: torch.Tensor = norm(x)
        return out


def _offsets(needs: Needs) -> dict[str, tuple[int, ...]]:
    """Decoder layers that are read, relative to the cut, per statistic and note."""
    return {stat: getattr(needs, f"decoder_{stat.removeprefix('decoder_')}") for stat in (*STATISTICS, *_NOTED)}
