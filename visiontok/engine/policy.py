"""Run the stages of a recipe: ask each method at its place, keep the books of who is alive."""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from ..allocators import layer_average
from ..budget import Budget
from ..context import Attention, Context
from ..cost import Load, decoder_flops, load_flops
from ..errors import ConfigError, UnsupportedError
from ..functional import (
    absorb,
    attention_columns,
    attention_flow,
    attention_heads,
    attention_logits,
    attention_peaks,
    attention_rows,
    coordinates,
    nearest_kept,
)
from ..method import Layer, Mass, Needs, Selection, Stage, Tower, resolve_layer
from .ahead import stop
from .call import Prefill, counted
from .host import stops_host, upload
from .observe import HEADS, heads, turned, visual, watch_modules
from .pixels import Smaller
from .probe import Tap, attention_modules
from .rotary import rotary_tables
from .route import scale_branch
from .vision import BeforeTower, Encoded, current_record

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter, Record, Shape

_BEFOREHAND = ("last_row", "text_rows", "text_heads", "decoder_received", "flow", "to_text", "own_peaks", "text_peaks")
_DECODER = (*_BEFOREHAND, "unturned_row")
_NOTED = ("decoder_states", *HEADS)
_OF_CLS = ("cls", "cls_joined", "cls_logits")
_VISION = (*_OF_CLS, "keys", "received")
_TILE = 256  # query rows whose attention is held at a time


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


def describe_tower(adapter: Adapter) -> Tower:
    """What methods may know of the vision tower of a model."""
    depth = len(attention_modules(getattr(adapter.base, adapter.tower, nn.Module())))
    layer = adapter.feature_layer
    return Tower(
        depth=depth,
        has_cls=adapter.cls_token,
        feature_layer=max(layer + depth if layer < 0 else layer, 0),
        full_attention=adapter.full_attention(depth),
        thumbnail=adapter.thumbnail,
    )


class StagePolicy:
    """The stages of a recipe on a model of known depth.

    Args:
        stages: in any order; layers may be fractions.
        depth: decoder layers of the model.
        average: budget per image as an average over all decoder layers, or None if each stage has its own.
        seed: of the stochastic methods.
        fidelity: handed to the methods.

    Raises:
        ConfigError: if a layer lies outside the model or stages contradict each other.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        depth: int,
        *,
        average: Budget | None = None,
        seed: int = 0,
        fidelity: Literal["fixed", "official"] = "fixed",
    ) -> None:
        self.depth, self.seed, self.fidelity = depth, seed, fidelity
        pixels = [s for s in stages if s.kind == "pixel"]
        if len(pixels) > 1:
            raise ConfigError(f"stages: {' and '.join(s.label for s in pixels)} both act on the pixels; keep one")
        self.pixel = next(iter(pixels), None)
        if self.pixel is not None and self.pixel.keep is not None and self.pixel.keep.kind == "flops":
            raise ConfigError(
                f"keep={self.pixel.keep}: {self.pixel.label} acts before the prompt is read, on whose length FLOPs "
                "depend; give tokens or a ratio"
            )
        self.prompt_stages = pixels + [s for s in stages if s.kind == "prompt"]
        self.cuts: dict[int, Stage] = {}
        hidden = [False] * depth
        for stage in stages:
            if stage.kind == "cut":
                layer = resolve_layer(_layer(stage), depth, name="layer", lowest=_earliest_cut(stage))
                if layer in self.cuts and not _meet(self.cuts[layer], stage):
                    raise ConfigError(f"layer={layer}: two cuts at one layer; merge them or move one")
                self.cuts[layer] = stage
            elif stage.kind == "inject":
                start = resolve_layer(_layer(stage), depth, name="inject layer")
                hidden[:start] = [True] * start
            elif stage.kind == "exit":
                stop = resolve_layer(_layer(stage), depth, name="exit layer")
                hidden[stop:] = [True] * (depth - stop)
            elif stage.kind == "skip":
                start, until = _range(stage, depth)
                hidden[start:until] = [True] * (until - start)
        gone = [s.layer for s in stages if s.kind == "exit" and isinstance(s.layer, float)]
        for layer, stage in list(self.cuts.items()):
            if hidden[layer] and isinstance(stage.layer, float) and any(stage.layer < last for last in gone):
                del self.cuts[layer]  # both are in one layer of a model this shallow
            elif hidden[layer]:
                raise ConfigError(
                    f"layer={layer}: a cut where the visual tokens are absent (injected later, skipped or gone) has "
                    "nothing to score; move the cut"
                )
        frozen = {layer for s in stages if s.kind == "freeze" for layer in range(*_range(s, depth))}
        for layer in sorted(frozen):
            if hidden[layer]:
                raise ConfigError(
                    f"layer={layer}: a freeze where the visual tokens are absent (injected later, skipped or gone) has "
                    "nothing to freeze; leave this layer out"
                )
        self.frozen = frozenset(frozen)
        self.routes: dict[int, Stage] = {}
        for stage in stages:
            for layer in range(*_range(stage, depth)) if stage.kind == "route" else ():
                if hidden[layer] or layer in self.cuts or layer in frozen or layer in self.routes:
                    raise ConfigError(
                        f"layer={layer}: {stage.label} routes tokens around a layer where there are none, or where a "
                        "cut, a freeze or another route decides; keep these apart"
                    )
                self.routes[layer] = stage
        if all(hidden):
            raise ConfigError("these stages hide the visual tokens from every layer; drop the image instead")
        self.hidden = hidden
        self.average = average
        self._selecting = [*self.prompt_stages, *(self.cuts[layer] for layer in sorted(self.cuts))]
        flips = {i for i in range(depth) if hidden[i] != (hidden[i - 1] if i else False)}
        behind = {layer + 1 for layer in self.routes if layer + 1 < depth}  # who passed one by is back
        self.changes: frozenset[int] = frozenset(flips | set(self.cuts) | self.routes.keys() | behind)
        self.selects = bool(self._selecting or self.routes)
        places = [(0, s) for s in self.prompt_stages] + list(self.cuts.items())
        weighing = [layer for layer, stage in places if stage.mass is not None and stage.mass.beta]
        self.biased = min(weighing, default=None)
        self._taps: dict[int, set[str]] = {}
        self._beforehand: dict[int, set[str]] = {}
        self._unturned: set[int] = set()
        for layer, stage in self.cuts.items():
            needs = _needs(stage)
            tapped = []
            for stat, offsets in zip((*_DECODER, *_NOTED), _offsets(needs), strict=True):
                for offset in offsets:
                    if offset > 0 or (not offset and stat not in _BEFOREHAND):
                        raise ConfigError(f"{stat}({offset}): {stage.label} may read earlier layers only")
                    tapped.append((stat, layer + offset))
            for first in needs.decoder_transition:
                tapped += [("transition", earlier) for earlier in self._since(first, layer)]
            for stat, read in tapped:
                if read < 0 or hidden[read] or read in self.routes:
                    raise ConfigError(
                        f"layer={layer}: {stage.label} reads what layer {read} computes, where no visual token is, or "
                        "not every one; cut later"
                    )
                if read in frozen and read < layer and stat != "unturned_row":
                    raise ConfigError(
                        f"layer={layer}: {stage.label} reads what layer {read} computes, which visual tokens pass as "
                        "they are; cut elsewhere, or leave that layer out of those that freeze"
                    )
                if stat == "unturned_row":
                    self._unturned.add(read)
                else:
                    (self._beforehand if read == layer else self._taps).setdefault(read, set()).add(stat)

    def attach(self, attachment: Host) -> None:
        """Add the attention taps the methods asked for.

        Raises:
            UnsupportedError: if the model's attention cannot be tapped.
            ConfigError: if a tower layer lies outside the tower, or a method cannot run as it is.
        """
        self.adapter, self._serves = attachment.adapter, attachment.serves
        for stage in (*self._selecting, *self.routes.values()):
            stage.method.check()  # type: ignore[union-attr]
        if self.pixel is not None:
            if self.adapter.fixed_pictures:
                raise UnsupportedError(
                    f"{self._model}: {self.pixel.label} needs a vision tower that takes smaller pictures, but "
                    f"{self.adapter.fixed_pictures}; use 'm3_pool', which pools tokens behind the tower"
                )
            attachment.add(BeforeTower(self.adapter.base, self))
        glanced = self._beforehand.keys() | self._unturned
        for layer in sorted(self._taps.keys() | glanced):
            stats = self._taps.get(layer, set())
            if "transition" in stats:
                for handle in watch_modules(attachment.layers[layer], layer, self):
                    attachment.add(handle)
            shown = stats.intersection((*_DECODER, *HEADS))
            if shown or layer in glanced:
                sink = functools.partial(self._decoder_sink, layer, frozenset(shown)) if shown else None
                attachment.add(Tap(self._attention(attachment, layer), sink))
        for layer in sorted(self.routes):
            for removable in scale_branch(attachment.layers[layer], layer, self):
                attachment.add(removable)
        for layer in sorted({self._ahead(x) for stage in self.prompt_stages for x in _needs(stage).decoder_ahead}):
            attachment.add(Tap(self._attention(attachment, layer), functools.partial(stop, layer)))
        wanted: dict[int, set[str]] = {}
        tower = attention_modules(getattr(self.adapter.base, self.adapter.tower, nn.Module()))
        for stage in (*self.prompt_stages, *self.cuts.values(), *self.routes.values()):
            needs = _needs(stage)
            for stat in _VISION:
                for name in getattr(needs, f"vision_{stat}"):
                    if stat in _OF_CLS and not self.adapter.cls_token:
                        continue  # the context says so when the method asks
                    index = resolve_layer(name, len(tower), name=_vision_option(stage, name))
                    wanted.setdefault(index, set()).add(stat)
            if needs.encoder_features or needs.projector:
                self._tap_projector(attachment)
        for index, stats in wanted.items():
            attachment.add(Tap(tower[index], functools.partial(self._vision_sink, index, frozenset(stats))))
        self.tower_depth = len(tower)

    def _attention(self, attachment: Host, layer: int) -> nn.Module:
        modules = attention_modules(attachment.layers[layer])
        if len(modules) != 1:
            raise UnsupportedError(f"{self._model}: decoder layer {layer} has no single attention module to tap")
        return modules[0]

    def _ahead(self, layer: int | float) -> int:
        return resolve_layer(layer, self.depth, name="decoder_ahead")

    @property
    def _model(self) -> str:
        return self.adapter.base.config.model_type

    def wants_state(self, layer: int) -> bool:
        """Whether a tap of this decoder layer must see the call."""
        return layer in self._taps or layer in self.routes

    def note_state(self, call: Prefill, layer: int, x: torch.Tensor) -> None:
        """``x`` (B, M, D) enters ``layer``; see :class:`visiontok.engine.attach.Policy`."""
        if "decoder_states" in self._taps.get(layer, ()):
            call.notes["decoder_states", layer] = visual(call, layer, x.detach())

    @torch.no_grad()
    def note_module(self, call: Prefill, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """A module of ``layer`` has made ``y`` of ``x``, both (B, M, D)."""
        official = self.fidelity == "official"
        moved = turned(call, layer, x, y, official=official)
        call.notes["transition", layer] = call.notes.get(("transition", layer), 0) + moved  # attention, then MLP

    def _since(self, first: int | float, cut: int) -> list[int]:
        """The layers before ``cut``, from ``first`` on, that hold visual tokens; the last one at least."""
        start = min(resolve_layer(first, self.depth, name="decoder_transition"), cut - 1)
        return [layer for layer in range(start, cut) if not self.hidden[layer] or layer == cut - 1]

    def asks_beforehand(self, layer: int) -> bool:
        """Whether a cut on the input of this layer is decided by what the layer itself would attend to."""
        return layer in self._beforehand

    def asks_unturned(self, layer: int) -> bool:
        """Whether queries and keys of this layer without rotary positions are wanted."""
        return layer in self._unturned

    def prompt(self, call: Prefill, embeds: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run the prompt stages; see :class:`visiontok.engine.attach.Policy`."""
        if not self.prompt_stages:
            return None, embeds
        alive = call.visual
        for stage in self.prompt_stages:
            if stage is self.pixel:
                encoded = self._encoded(call, stage)
                if encoded is None:
                    continue
                there = alive & call.units.scatter(upload(encoded, alive.device))
                answer = self._ask(call, stage, None, embeds, there, encoded.sum(1).tolist())
            else:
                answer = self._ask(call, stage, None, embeds, alive, self._counts(stage, call))
            if answer is None:
                continue
            before, alive = alive, alive & call.units.scatter(answer.keep)
            if answer.features is not None:
                embeds = call.units.put(embeds, answer.features, answer.keep)
            if stage.mass is not None:
                embeds = self._weigh(call, stage.mass, embeds, before, alive, answer.into)(embeds)
        return alive, embeds

    def visible(self, call: Prefill, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Run the cut at this layer, if any; see :class:`visiontok.engine.attach.Policy`."""
        stage = self.cuts.get(layer)
        if layer in self.routes:
            return self._route(call, self.routes[layer], layer, states)
        if stage is not None:
            full = states if call.entry is None else call.entry.fill(states)
            answer = self._ask(call, stage, layer, full, call.kept, self._counts(stage, call))
            if answer is not None:
                if answer.features is not None:
                    raise UnsupportedError(
                        f"{stage.label}: returned features at decoder layer {layer}; only prompt stages may. What a "
                        "cut merges, Selection.into says"
                    )
                before, call.kept = call.kept, call.kept & call.units.scatter(answer.keep)
                edits = []
                if answer.into is not None:
                    edits.append(self._merge(call, answer.keep, answer.into))
                    full = edits[0](full)
                if stage.mass is not None:
                    edits.append(self._weigh(call, stage.mass, full, before, call.kept, answer.into))
                if edits:
                    call.edits[layer] = functools.partial(_in_entry, call, edits)
        return torch.zeros_like(call.kept) if self.hidden[layer] else call.kept

    def counts(self, call: Prefill, layer: int) -> Sequence[int]:
        """Visual tokens of each unit that ``layer`` sees; see :class:`visiontok.engine.attach.Policy`."""
        return [0] * len(call.counts) if self.hidden[layer] else call.routed.get(layer, call.counts)

    def _route(self, call: Prefill, stage: Stage, layer: int, states: torch.Tensor) -> torch.Tensor:
        """(B, N) bool: who goes through ``layer``; the others stay alive and pass it by."""
        known = call.counts
        answer = self._ask(
            call, stage, layer, states if call.entry is None else call.entry.fill(states), call.kept, known
        )
        call.routed[layer], call.counts = call.counts, known
        if answer is None:
            return call.kept
        keep = call.kept & call.units.scatter(answer.keep)
        if answer.weights is not None:
            weight = torch.where(call.kept, call.units.scatter(answer.weights), 1.0).to(states.dtype)[..., None]
            passing = (call.kept & ~keep)[..., None]
            call.edits[layer] = functools.partial(_in_entry, call, [lambda x: torch.where(passing, weight * x, x)])
            call.scales[layer] = call.enter(weight)
        return keep

    @staticmethod
    def _merge(call: Prefill, keep: torch.Tensor, into: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """What gives the tokens ``keep`` (U, N) the mean of those that went ``into`` (U, N) them; can be repeated."""
        units = call.units
        here = torch.arange(keep.shape[1], device=keep.device)
        group = torch.where(into >= 0, into, torch.where(keep, here, -1))
        arrives = ((group >= 0) & (group != here)).long()
        joined = keep & (torch.zeros_like(group).scatter_add(1, group.clamp_min(0), arrives) > 0)
        one = torch.ones_like(group)
        return lambda x: units.put(x, absorb(units.gather(x), group, one, 1.0)[0], joined)

    @staticmethod
    def _weigh(
        call: Prefill,
        mass: Mass,
        states: torch.Tensor,
        before: torch.Tensor,
        alive: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Let the tokens ``alive`` (B, N) speak for those of ``before`` that have just gone.

        Those that a method has already put ``into`` (U, N) a kept token count there; the others go to the nearest.

        The assignment is made here, on ``states`` (B, N, D); what is returned moves the values of such states, and can
        be repeated when gradient checkpointing runs the layer again.
        """
        units = call.units
        keep = units.gather(alive[..., None])[..., 0]
        present = units.gather(before[..., None])[..., 0] & units.valid
        size = present.float() if call.mass is None else call.mass * present
        features = units.gather(states)
        if into is not None:
            merged = present & ~keep & (into >= 0)
            here = torch.arange(into.shape[1], device=into.device)
            size = torch.zeros_like(size).scatter_add(1, torch.where(merged, into, here), size)
            present = present & ~merged
        group = nearest_kept(features.detach(), keep, present, most=max([1, *call.counts]))
        call.mass = absorb(features[..., :1].detach(), group, size, 0.0)[1]
        joined = keep & (call.mass > size)  # a token that nobody joins keeps its value to the last bit
        if mass.beta:
            exact = torch.promote_types(states.dtype, torch.float32)
            call.bias = units.scatter(mass.beta * call.mass.to(exact).clamp_min(1).log())

        def edit(x: torch.Tensor) -> torch.Tensor:
            if not mass.merge:
                return x
            return units.put(x, absorb(units.gather(x), group, size, mass.merge)[0], joined)

        return edit

    def _ask(
        self,
        call: Prefill,
        stage: Stage,
        layer: int | None,
        states: torch.Tensor,
        alive: torch.Tensor,
        counts: list[int],
    ) -> Selection | None:
        """The method's answer, checked; None where nothing is to be dropped, so that it is not asked.

        ``counts`` is how many of the tokens ``alive`` (B, N) of each image are to stay.
        That is where the budget is at least what is alive; for a method that may keep less than its budget, only where
        it is everything there ever was.
        """
        units = call.units
        valid = units.gather(alive[..., None])[..., 0] & units.valid
        budgeted = stage.keep is not None or self.average is not None
        most = call.counts if stage.method.card.contract.count_from_grid else units.sizes  # type: ignore[union-attr]
        if budgeted and all(n >= known for n, known in zip(counts, most, strict=True)):
            return None
        ctx = self._context(call, stage, layer, states, valid, counts)
        reserved = self._reserved(call, stage, ctx)
        whole, ctx = ctx, replace(ctx, valid=ctx.valid & ~reserved, count=ctx.count - reserved.sum(1))
        answer = stage.method.select(ctx)  # type: ignore[union-attr]
        selection = answer if isinstance(answer, Selection) else Selection(keep=answer)
        keep, name = selection.keep, stage.label
        if not torch.is_tensor(keep) or keep.dtype != torch.bool or keep.shape != ctx.valid.shape:
            found = f"{tuple(keep.shape)} {keep.dtype}" if torch.is_tensor(keep) else type(keep).__name__
            raise ConfigError(f"{name}: select() returned {found}; it must return a bool mask {tuple(ctx.valid.shape)}")
        keep = keep.to(ctx.valid.device) & ctx.valid | reserved
        wanted = [min(n, known) for n, known in zip(counts, call.counts, strict=True)]
        fixed = budgeted and self.fidelity == "fixed" and stage.method.card.contract.count_from_grid  # type: ignore[union-attr]
        found_counts = counted(keep, wanted if fixed else None)
        empty = any(known and not n for n, known in zip(found_counts, call.counts, strict=True))
        if empty and stage.method.card.contract.keeps_some:  # type: ignore[union-attr]
            raise ConfigError(f"{name}: select() kept no token of an image; keep at least one, or use an exit stage")
        if fixed and stops_host(keep.device):
            call.promises.expect(
                (keep.sum(1) == upload(torch.tensor(wanted), keep.device)).all(),
                lambda: ConfigError(
                    f"{name}: select() kept another number of tokens than the budget {wanted}, against its card's "
                    "contract count_from_grid; keep as many, or set count_from_grid=False"
                ),
            )
        call.counts = found_counts
        features = selection.features
        if features is not None and features.shape != ctx.features.shape:
            raise ConfigError(
                f"{name}: Selection.features has shape {tuple(features.shape)}, expected {tuple(ctx.features.shape)}"
            )
        into = selection.into
        if into is not None:
            if into.dtype != torch.long or into.shape != ctx.valid.shape:
                raise ConfigError(
                    f"{name}: Selection.into is {tuple(into.shape)} {into.dtype}; it must be long, "
                    f"{tuple(ctx.valid.shape)}"
                )
            into = torch.where(ctx.valid, into.to(keep.device), -1)
            lost = (into >= 0) & ~keep.gather(1, into.clamp(0, keep.shape[1] - 1))
            call.promises.expect(
                ~lost.any() & (into < keep.shape[1]).all(),
                lambda: ConfigError(
                    f"{name}: Selection.into names a token that select() did not keep; give the places of kept tokens, "
                    "-1 for tokens that went nowhere"
                ),
            )
        if selection.weights is not None and (stage.kind != "route" or selection.weights.shape != ctx.valid.shape):
            raise ConfigError(
                f"{name}: Selection.weights are {tuple(selection.weights.shape)} at a {stage.kind} stage; only a route "
                f"has some, {tuple(ctx.valid.shape)}"
            )
        if features is not None and stage.reserve:  # what is reserved was no part of any merging
            features = torch.where(reserved[..., None], whole.features, features)
        return Selection(keep=keep, features=features, into=into, weights=selection.weights)

    def _reserved(self, call: Prefill, stage: Stage, ctx: Context) -> torch.Tensor:
        """(U, N) bool: the coordinate tokens that stay whatever the method says, less than its budget."""
        if not stage.reserve:
            return torch.zeros_like(ctx.valid)
        if call.positions is None:
            raise UnsupportedError(
                f"{self._model}: its visual tokens have no positions in the prompt, so there are no coordinate tokens "
                "to reserve; leave reserve out"
            )
        text = getattr(self.adapter.base, self.adapter.text)
        cos, sin = rotary_tables(text, call.positions(), call.batch)
        k = (ctx.count.double() * stage.reserve).long()
        return coordinates(call.units.gather(cos), call.units.gather(sin), k, ctx.valid)

    def _context(
        self,
        call: Prefill,
        stage: Stage,
        layer: int | None,
        states: torch.Tensor,
        valid: torch.Tensor,
        counts: Sequence[int],
    ) -> Context:
        units, device, needs = call.units, states.device, _needs(stage)
        features = units.gather(states)
        where = "before the language model" if layer is None else f"on the input of decoder layer {layer}"
        call.promises.expect(
            torch.stack(features.detach().aminmax()).isfinite().all(),  # both ends are NaN if any value is
            lambda: ConfigError(
                f"visual features {where} contain NaN or infinity, so no score means anything; check the pixels, or "
                "load the model in bfloat16 or float32 if it overflows in float16"
            ),
        )
        encoder_features = project = asked = asked_ids = asks = at = None
        if needs.encoder_features or needs.projector:
            patches = self._encoder_features(call)  # (U, N, m, C)
            encoder_features = patches.flatten(2)
            project = functools.partial(self._project, patches.shape[2]) if needs.projector else None
        if needs.question:
            at, asks = call.question(self.adapter.special_ids())
            asked_ids = None if call.ids is None else call.ids.gather(1, at)
            asked = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        return Context(
            stage="pixel" if stage is self.pixel else "prompt" if layer is None else "decoder",
            layer=layer,
            depth=self.depth,
            features=features,
            valid=valid,
            count=upload(torch.tensor([min(n, m) for n, m in zip(counts, call.counts, strict=True)]), device),
            size=upload(torch.tensor(units.sizes), device),
            grid=units.grid,
            has_grid=units.has_grid,
            place=units.slots,
            row=units.row,
            image=upload(torch.tensor(units.ordinal), device),
            attention=Attention(functools.partial(self._read, call, layer)),
            has_cls=self.adapter.cls_token,
            model_type=self._model,
            encoder_features=encoder_features,
            project=project,
            pixels=self._pixels(call) if needs.pixels else None,
            text_ids=call.ids,
            text_features=call.embeds,
            text_valid=call.attended & ~call.visual,
            question_features=asked,
            question_ids=asked_ids,
            question_valid=asks,
            question_place=at,
            fidelity=self.fidelity,
            generator=functools.partial(self._generator, call),
        )

    def _counts(self, stage: Stage, call: Prefill) -> list[int]:
        """Tokens the stage is to leave of each image."""
        if self.average is None and stage.keep is not None and stage.keep.kind == "flops":
            return self._affordable(stage.keep, stage, call)
        return self._allowed(stage, call.units.sizes, call.units.tiles)

    def _allowed(self, stage: Stage, sizes: list[int], tiles: list[int]) -> list[int]:
        """The same, where the budget follows from the tokens and the tiles of each image alone."""
        keep = stage.keep
        if self.average is not None:
            return [self._share(stage, n) for n in sizes]
        if keep is None:
            return sizes
        if keep.kind == "per_tile":
            return [min(t * int(keep.value), n) for t, n in zip(tiles, sizes, strict=True)]
        return keep.counts(torch.tensor(sizes)).tolist()

    def _affordable(self, keep: Budget, stage: Stage, call: Prefill) -> list[int]:
        """The largest counts, in one proportion of the candidates of each image, that stay within a share of the stock
        FLOPs; layers below the stage cost what they did."""
        first = next((layer for layer, cut in self.cuts.items() if cut is stage), 0)
        spent = [self._load(call, layer, call.slots(layer)) for layer in range(first)]
        sizes = call.counts
        config, steps = self.adapter.base.config, max(sizes)

        def counts(step: int) -> list[int]:
            return [max((2 * step * n + steps) // (2 * steps), min(n, 1)) for n in sizes]

        def prefill(step: int) -> int:
            most, text = max(call.row_counts(counts(step))), max(call.texts)
            ahead = [
                self._load(call, layer, text if self.hidden[layer] else most) for layer in range(first, self.depth)
            ]
            return call.batch * sum(load_flops(config, spent + ahead))

        limit = keep.value * sum(decoder_flops(config, [call.length] * self.depth, batch=call.batch))
        if prefill(1) > limit:
            raise ConfigError(f"keep={keep}: even one token per image costs more; raise the share or cut earlier")
        return counts(bisect.bisect_right(range(1, steps + 1), limit, key=prefill))

    def _load(self, call: Prefill, layer: int, slots: int) -> Load:
        """What ``layer`` computes if it holds so many slots per row."""
        return Load.frozen(slots, max(call.texts)) if layer in self.frozen else Load.all(slots)

    def _share(self, stage: Stage, n: int) -> int:
        """Tokens that ``stage`` leaves of an image of ``n``, so that the average over all layers is the wanted one."""
        budget = self.average
        if budget is None or n == 0:
            return n
        average = budget.value * n if budget.kind == "ratio" else min(float(budget.value), n)
        start, stop = self.hidden.index(False), self.depth - self.hidden[::-1].index(False)
        cuts = [start] * len(self.prompt_stages) + sorted(self.cuts)
        own = [s.keep.value if s.keep is not None and s.keep.kind == "ratio" else 1.0 for s in self._selecting]
        counts = layer_average(n, average, depth=self.depth, cuts=cuts, shape=own, start=start, stop=stop)
        return counts[self._selecting.index(stage)]

    def _generator(self, call: Prefill, unit: int) -> torch.Generator:
        ids = b"" if call.prompts is None else repr(call.prompts[call.units.rows[unit]]).encode()
        text = f"{self.seed}/{call.units.ordinal[unit]}/".encode() + ids
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    # ---- pixel stage

    def serves(self) -> bool:
        """Whether the calls of the present thread are this policy's."""
        return self._serves()

    def smaller(self, record: Record) -> Smaller | None:
        """The pictures that the tower gets instead; see :class:`visiontok.engine.pixels.PixelStage`."""
        stage: Any = self.pixel
        shapes = self.adapter.shapes(record)
        allowed = self._allowed(stage, [t * h * w for t, h, w in shapes], [t for t, _, _ in shapes])
        resized = [self._resized(stage, shape, k) for shape, k in zip(shapes, allowed, strict=True)]
        if resized == shapes:
            return None
        changes = self.adapter.smaller(record, resized)
        return Smaller(record.modality, record.inputs | changes, changes, list(zip(shapes, resized, strict=True)))

    def _resized(self, stage: Stage, shape: Shape, count: int) -> Shape:
        frames, *size = shape
        if count >= frames * size[0] * size[1]:
            return shape
        if count < frames:
            raise UnsupportedError(
                f"{self._model}: {stage.label} keeps every frame, and a video of {frames} has no {count} tokens; "
                "raise keep, or take a method that drops tokens behind the tower"
            )
        rows, columns = stage.method.picture((size[0], size[1]), count // frames)  # type: ignore[union-attr]
        if not (1 <= rows <= size[0] and 1 <= columns <= size[1] and rows * columns <= count // frames):
            raise ConfigError(
                f"{stage.label}: picture() made {rows} x {columns} tokens of {size[0]} x {size[1]}; at most "
                f"{count // frames} are allowed, and no side may grow"
            )
        return frames, rows, columns

    def _encoded(self, call: Prefill, stage: Stage) -> torch.Tensor | None:
        """(U, N) bool on the host, tokens that the tower made; None if it was given every picture whole."""
        units = call.units
        made = torch.zeros(units.valid.shape, dtype=torch.bool)
        allowed = self._allowed(stage, units.sizes, units.tiles)
        for u, (source, size, count) in enumerate(zip(units.source, units.sizes, allowed, strict=True)):
            smaller = None if source is None else call.records[source[0]].smaller
            if smaller is None and count < size:
                raise UnsupportedError(
                    f"{self._model}: {stage.label} acts on pixels, but the features of this call were made without "
                    "it; pass pixels"
                )
            made[u, :size] = True if smaller is None or source is None else smaller.kept[source[1]]
        return None if made.sum(1).tolist() == units.sizes else made

    @staticmethod
    def _placed(record: Encoded, read: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Per item (n, …) values of its tokens, which ``read`` takes from what the tower was really given."""
        return read(record) if record.smaller is None else record.smaller.place(read(record.smaller))

    # ---- taps

    def _read(self, call: Prefill, cut: int | None, stat: str, layer: int | float) -> torch.Tensor:
        if stat == "rotary_pull":
            return self._pull(call)
        if stat in _DECODER:
            found = None if cut is None else call.attention.get((stat, cut + int(layer)))
            if found is None:
                raise ConfigError(
                    f"attention.{stat}({layer}): declare it in needs() of the method, as a decoder offset"
                )
            rows = call.units.gather(found.flatten(2) if found.ndim > 2 else found[..., None])
            return rows.unflatten(-1, found.shape[2:]) if found.ndim > 2 else rows[..., 0]
        if stat == "ahead":
            return self._looked(call, cut, self._ahead(layer))
        if stat in _NOTED or stat == "transition":
            layers = [] if cut is None else self._since(layer, cut) if stat == "transition" else [cut + int(layer)]
            notes = [call.notes[stat, i] for i in layers if (stat, i) in call.notes]
            if not notes or len(notes) < len(layers):
                raise ConfigError(f"attention.{stat}({layer}): declare it in needs() of the method, at a cut")
            return functools.reduce(torch.add, notes)
        if stat in _OF_CLS and not self.adapter.cls_token:
            raise UnsupportedError(
                f"{self._model}: its vision tower has no CLS token; use attention.received, or a method without CLS"
            )
        index = resolve_layer(layer, self.tower_depth, name="vision layer")
        values: list[list[torch.Tensor]] = []
        for record in call.records:
            calls = record.attention.get((stat, index))
            if calls is None:
                raise ConfigError(f"attention.{stat}({layer}): declare it in needs() of the method")
            patches = [c.reshape(*c.shape[:2], -1) for c in calls]
            groups = self._placed(record, functools.partial(self.adapter.group, patches=patches))
            values.append([g.mean(1).unflatten(-1, calls[0].shape[2:] or (1,)) for g in groups])
        found = self._by_unit(call, values, missing=0.0 if stat in ("keys", "cls_logits") else -1.0)
        return found if stat == "keys" else found[..., 0]

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

    def _encoder_features(self, call: Prefill) -> torch.Tensor:
        values = []
        for record in call.records:
            x = record.encoder_features
            if x is None:
                raise UnsupportedError(f"{self._model}: the projector's input was not seen; pass pixels, not features")
            patches = [x if x.ndim == 3 else x[None]]
            values.append(self._placed(record, functools.partial(self.adapter.group, patches=patches)))
        return self._by_unit(call, values, missing=0.0)

    def _pixels(self, call: Prefill) -> torch.Tensor:
        mean, std = (torch.tensor(x, dtype=torch.float32)[:, None] for x in self.adapter.pixel_statistics)
        values = [
            [x.float() * std.to(x.device) + mean.to(x.device) for x in self._placed(record, self.adapter.pixels)]
            for record in call.records
        ]
        return self._by_unit(call, values, missing=0.0)

    def _project(self, patches: int, x: torch.Tensor) -> torch.Tensor:
        """(..., patches · C) → (..., D): the projector, in float32 at least, every token for itself.

        Packed weights, which are no floating-point numbers, stay as they are: their layers know what to do.
        """
        module = self.adapter.base.get_submodule(self.adapter.projector or "")
        exact = {
            n: p.to(torch.promote_types(p.dtype, torch.float32))
            for n, p in module.named_parameters()
            if p.is_floating_point()
        }
        dtype = max((p.dtype for p in exact.values()), key=lambda d: d.itemsize, default=torch.float32)
        run = functools.partial(torch.func.functional_call, module, exact)
        rows = x.to(dtype).flatten(0, -2).unflatten(-1, (patches, -1))
        with torch.autocast(x.device.type, enabled=False):
            out = self.adapter.project(lambda *args, **kwargs: run(args, kwargs), rows)
        return out.unflatten(0, x.shape[:-1])

    def _by_unit(self, call: Prefill, values: list[list[torch.Tensor]], *, missing: float) -> torch.Tensor:
        """Per record and item (n, …) values → (U, N, …), NaN (no patch) replaced by ``missing``."""
        units = call.units
        out: torch.Tensor | None = None
        for u, source in enumerate(units.source):
            if source is None:
                raise UnsupportedError(
                    f"{self._model}: this call carries features instead of pixels, so nothing is known of the vision "
                    "tower; pass pixels, or use a method that reads features only"
                )
            record, item, number = source
            value = torch.cat(values[record][item : item + number])
            if len(value) != units.sizes[u]:
                raise UnsupportedError(
                    f"{self._model}: {len(value)} values of the vision tower stand against an image of "
                    f"{units.sizes[u]} tokens; use a method that reads features only"
                )
            if out is None:
                out = value.new_full((*units.valid.shape, *value.shape[1:]), missing)
            out[u, : len(value)] = torch.nan_to_num(value, nan=missing)
        if out is None:
            raise UnsupportedError(f"{self._model}: this call has no image")
        return out.to(units.row.device)

    def _tap_projector(self, attachment: Host) -> None:
        if self.adapter.projector is None:
            raise UnsupportedError(f"{self._model}: no projector is known whose input could be read")
        module = self.adapter.base.get_submodule(self.adapter.projector)
        attachment.add(module.register_forward_pre_hook(_projector_hook, with_kwargs=True))

    def _vision_sink(
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
        record = current_record()
        if record is None or not self._serves():
            return
        skip, scale = int(self.adapter.cls_token), kwargs.get("scaling")
        for a, b, valid in _segments(q, k, mask, kwargs.get("cu_seq_lens_q")):
            seen = None if valid is None else valid[:, None]
            for stat in stats:
                if stat == "cls":
                    found = attention_rows(a[:, :, :1], b, scale=scale, visible=seen)[:, 0]
                elif stat == "cls_joined":
                    found = attention_rows(_joined(a[:, :, :1]), _joined(b), visible=seen)[:, 0]
                elif stat == "cls_logits":
                    found = attention_logits(a[:, :, :1], b, scale=scale)[:, 0]
                elif stat == "keys":
                    found = b.transpose(1, 2).float()
                else:
                    found = attention_columns(a, b, scale=scale, valid=valid)
                record.attention.setdefault((stat, layer), []).append(found[:, skip:])

    def _decoder_sink(
        self,
        layer: int,
        stats: frozenset[str],
        call: Prefill | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        kwargs: Any,
    ) -> None:
        if not isinstance(call, Prefill) or call.policy is not self:
            return
        for name, x in zip(HEADS, (q, k, v), strict=True):
            if name in stats:
                call.notes[name, layer] = heads(call, layer, x)
        wanted = stats.intersection(_DECODER)
        if wanted:
            self._score(call, layer, wanted, q, k, mask, kwargs.get("scaling"), self._bias(call, layer, k))

    def attended(
        self,
        call: Prefill,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: Any,
        scale: float | None,
        bias: torch.Tensor | None,
    ) -> None:
        """Score the tokens before the cut of this layer; see :class:`visiontok.engine.attach.Policy`."""
        self._score(call, layer, frozenset(self._beforehand[layer]), q, k, mask, scale, bias)

    def unturned(self, call: Prefill, layer: int, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> None:
        """Score them by their meaning alone; see :class:`visiontok.engine.attach.Policy`."""
        layout = call.layouts[layer]
        shown = call.enter(call.visual)
        shown = (shown if layout is None else layout.gather(shown)) & self._slots_in_use(call, layer, q)
        found = attention_rows(
            self._last(q, self._slots_in_use(call, layer, q)), k, scale=scale, visible=shown[:, None]
        )
        call.attention[("unturned_row", layer)] = call.to_prompt(layer, found[:, 0])

    def _score(
        self,
        call: Prefill,
        layer: int,
        stats: frozenset[str],
        q: torch.Tensor,
        k: torch.Tensor,
        mask: Any,
        scale: float | None,
        bias: torch.Tensor | None,
    ) -> None:
        """Note the statistics of the queries (B, H, M, d) and keys (B, G, K, d) of the slots of ``layer``."""
        layout = call.layouts[layer]
        used = self._slots_in_use(call, layer, q)
        visible = _visible(mask, q, k, call.entry_valid if layout is None else layout.valid)
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        for stat in stats:
            if stat == "last_row":
                seen = visible[row, _last(used)]
                total = attention_rows(self._last(q, used), k, scale=scale, visible=seen, bias=bias)[:, 0]
            elif stat == "text_heads":
                at = self._question_slots(call, layer)
                words = q.transpose(1, 2)[row, at].transpose(1, 2)
                each = attention_heads(words, k, scale=scale, visible=visible[row, at], bias=bias)
                total = each.permute(0, 3, 1, 2)  # (B, K, H, Q)
            elif stat == "flow":
                new = q.shape[2]  # cached tokens have no rows of their own
                total = attention_flow(q, k[:, :, -new:], scale=scale, visible=visible[..., -new:], valid=used)
            elif stat == "to_text":
                layout, past = call.layouts[layer], k.shape[2] - q.shape[2]
                shown = call.enter(call.visual)
                shown = (shown if layout is None else layout.gather(shown)) & used
                total = torch.zeros(q.shape[0], k.shape[2], device=q.device)
                for rows in shown.any(0).nonzero().flatten().split(_TILE):
                    scores = attention_rows(q[:, :, rows], k, scale=scale, visible=visible[:, rows], bias=bias)
                    total[:, past + rows] = (scores[..., past:] * (used & ~shown)[:, None]).sum(-1)
            else:
                image = self._image(call, layer) if stat == "own_peaks" else None
                if image is not None:
                    ones = torch.ones_like(image, dtype=torch.float32)
                    size = ones.new_zeros(len(image), len(call.units) + 1).scatter_add(1, image, ones)
                    weight = (image > 0) / size.gather(1, image)
                else:
                    asks = used.float() if stat == "decoder_received" else self._asking(call, layer)
                    weight = asks / asks.sum(1, keepdim=True).clamp_min(1)
                reduce = attention_peaks if stat.endswith("peaks") else attention_rows
                total = weight.new_zeros(q.shape[0], k.shape[2])
                for rows in (weight > 0).any(0).nonzero().flatten().split(_TILE):
                    scores = reduce(q[:, :, rows], k, scale=scale, visible=visible[:, rows], bias=bias)
                    if image is not None:  # what is behind these rows' own image is not theirs
                        mine = scores[..., -image.shape[1] :]
                        scores = mine * (image[:, rows, None] == image[:, None])
                        scores = torch.nn.functional.pad(scores, (total.shape[1] - image.shape[1], 0))
                    total += (scores * weight[:, rows, None]).sum(1)
            by_slot = total[:, -q.shape[2] :]  # cached tokens are not candidates
            call.attention[(stat, layer)] = call.to_prompt(layer, by_slot)

    @staticmethod
    def _last(q: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """(B, H, 1, d): the query of each row's last token; right padding lies behind it."""
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        return q.transpose(1, 2)[row, _last(used)].transpose(1, 2)

    def _question_slots(self, call: Prefill, layer: int) -> torch.Tensor:
        """(B, Q) long: slots of ``layer`` in which the words of the question stand."""
        at, _ = call.question(self.adapter.special_ids())
        for layout in (call.entry, call.layouts[layer]):
            if layout is not None:
                at = layout.slot_of().gather(1, at)
        return at

    @staticmethod
    def _bias(call: Prefill, layer: int, k: torch.Tensor) -> torch.Tensor | None:
        """(B, K) float: what is added to the logits of the keys of ``layer``."""
        # the cache already counts the keys of this call; without one they are all there is
        bias = call.slot_bias(layer) if call.cache is None else call.cache.layers[layer].bias
        return None if bias is None else bias[:, -k.shape[2] :]

    @staticmethod
    def _image(call: Prefill, layer: int) -> torch.Tensor:
        """(B, M) long: which image the token in each slot of ``layer`` is of, from 1 on; 0 for text and padding."""
        units = call.units
        number = torch.arange(1, len(units) + 1, device=units.row.device)[:, None].expand_as(units.valid)
        here = call.enter(units.scatter(number * units.valid)) * call.entry_valid_or_ones()
        layout = call.layouts[layer]
        if layout is None:
            return here
        here = layout.gather(here)
        return here if layout.valid is None else here * layout.valid

    @staticmethod
    def _slots_in_use(call: Prefill, layer: int, q: torch.Tensor) -> torch.Tensor:
        """(B, M) bool: slots of ``layer`` that hold a token."""
        layout = call.layouts[layer]
        valid = call.entry_valid if layout is None else layout.valid
        return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if valid is None else valid

    @staticmethod
    def _asking(call: Prefill, layer: int) -> torch.Tensor:
        """(B, M) float: slots of ``layer`` that hold text behind the row's last visual token."""
        position = torch.arange(call.length, device=call.visual.device)
        last = torch.where(call.visual, position, -1).amax(1, keepdim=True)
        asks = call.enter(call.attended & ~call.visual & (position > last)) & call.entry_valid_or_ones()
        layout = call.layouts[layer]
        if layout is not None:
            asks = layout.gather(asks)
            if layout.valid is not None:
                asks = asks & layout.valid
        return asks.float()


def _in_entry(
    call: Prefill, edits: Sequence[Callable[[torch.Tensor], torch.Tensor]], states: torch.Tensor
) -> torch.Tensor:
    """Apply ``edits``, which work on the whole prompt, to the states of the tokens that entered."""
    whole = states if call.entry is None else call.entry.fill(states)
    for edit in edits:
        whole = edit(whole)
    return whole if call.entry is None else call.entry.gather(whole)


def _projector_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    record = current_record()
    if record is not None and kwargs is not None:
        record.encoder_features = args[0] if args else next(iter(kwargs.values()))


def _joined(x: torch.Tensor) -> torch.Tensor:
    """(B, H, n, d) → (B, 1, n, H·d)."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _segments(
    q: torch.Tensor, k: torch.Tensor, mask: Any, lengths: Any
) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Independent pieces (q, k, (B, n) valid keys or None) of one vision attention call."""
    n = q.shape[2]
    valid: torch.Tensor | None = None
    borders = [0, n]
    if lengths is not None:  # flash attention takes all images in one call
        borders = lengths.tolist()
    elif torch.is_tensor(mask) and mask.ndim == 2:  # flash attention with key padding
        valid = mask.bool()
    elif torch.is_tensor(mask) and mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed[:, 0].expand(q.shape[0], n, n)
        valid = allowed.any(1)
        if len(allowed) == 1:  # padding is seen by nobody and separates nothing: compare neighbours without it
            shown = torch.nonzero(valid[0]).flatten()
            apart = ~allowed[0, shown[1:], shown[:-1]]
            borders = [0, *shown[1:][apart].tolist(), n]
    if valid is not None and bool(valid.all()):
        valid = None
    return [(q[:, :, a:b], k[:, :, a:b], None if valid is None else valid[:, a:b]) for a, b in pairwise(borders)]


def _visible(mask: Any, q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, Q, K) bool: what each query slot sees, from whatever mask the kernel was given."""
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    if torch.is_tensor(mask) and mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed[:, 0, :, :columns].expand(batch, rows, columns)
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)[None]
    if torch.is_tensor(mask) and mask.ndim == 2:
        return allowed & mask[:, None, :columns].bool()
    if valid is not None:
        seen = torch.cat([valid.new_ones(batch, columns - rows), valid], 1)
        return allowed & seen[:, None]
    return allowed.expand(batch, rows, columns)


def _last(used: torch.Tensor) -> torch.Tensor:
    """(B, 1) long: the last slot of each row that is ``used`` (B, M)."""
    return (used * torch.arange(used.shape[1], device=used.device)).argmax(1, keepdim=True)


def _meet(one: Stage, next_: Stage) -> bool:
    """Whether two cuts of one method, at fractions of the depth, are one in a model this shallow: the later."""
    fractions = isinstance(one.layer, float) and isinstance(next_.layer, float)
    return fractions and one.method.card is next_.method.card  # type: ignore[union-attr]


def _layer(stage: Stage) -> int | float:
    return stage.layer if stage.layer is not None else 0


def _range(stage: Stage, depth: int) -> tuple[int, int]:
    """First layer of a skip or a freeze, and the first behind it; the same if fractions of so few layers are none."""
    start, until = resolve_layer(_layer(stage), depth, name=f"{stage.kind} layer"), stage.until
    if until is None:
        return start, start + 1
    end = until == depth or (isinstance(until, float) and until == 1.0)
    stop = depth if end else resolve_layer(until, depth, name="until")
    vanishes = stage.kind == "freeze" and stop == start and isinstance(stage.layer, float) and isinstance(until, float)
    if stop <= start and not vanishes:
        raise ConfigError(f"until={until}: a {stage.kind} must end behind its layer {start}")
    return start, stop


def _vision_option(stage: Stage, layer: Layer) -> str:
    """How an error names a layer of the vision tower: by the option that asks for it, where there is one."""
    method: Any = stage.method
    names = (field.name for field in fields(method) if "layer" in field.name)
    option = next((name for name in names if getattr(method, name) == layer), "layer")
    return f"{stage.label}: vision {option}"


def _needs(stage: Stage) -> Needs:
    return stage.method.needs() if stage.method is not None else Needs()


def _earliest_cut(stage: Stage) -> int:
    needs = _needs(stage)
    offsets = [offset for offsets in _offsets(needs) for offset in offsets]
    return max((-offset for offset in offsets), default=1 if needs.decoder_transition else 0)


def _offsets(needs: Needs) -> tuple[tuple[int, ...], ...]:
    """Decoder layers a method reads, per statistic of ``_DECODER`` and ``_NOTED``."""
    return (
        needs.decoder_last_row,
        needs.decoder_text_rows,
        needs.decoder_text_heads,
        needs.decoder_received,
        needs.decoder_flow,
        needs.decoder_to_text,
        needs.decoder_own_peaks,
        needs.decoder_text_peaks,
        needs.decoder_unturned_row,
        needs.decoder_states,
        needs.decoder_queries,
        needs.decoder_keys,
        needs.decoder_values,
    )
