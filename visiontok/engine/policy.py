"""Run the stages of a recipe: ask each method at its place, keep the books of who is alive."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from visiontok.adapters.parts import Part

from ..allocators import layer_average
from ..budget import Budget
from ..context import Attention, Context
from ..cost import Load, decoder_flops, load_flops, narrow_flops
from ..errors import ConfigError, UnsupportedError
from ..functional import absorb, coordinates, middles, nearest_kept
from ..ledger import Choice
from ..method import Kept, Mass, Picture, Selection, Stage, resolve_layer
from .answer import answered
from .call import Prefill, counted
from .evict import thin
from .host import stops_host, upload
from .inside import Inside
from .narrow import first_channels, narrow_mlp
from .pixels import Smaller
from .probe import Tap
from .readings import DecoderReadings, Host, attention_of, earliest_cut, needs_of
from .rotary import rotary_tables
from .route import scale_branch
from .tower import TowerReadings, describe_tower
from .tower_merge import TowerMerge
from .vision import BeforeTower

if TYPE_CHECKING:
    from visiontok.adapters.base import Record, Shape


class StagePolicy:
    """The stages of a recipe on a model of known depth.

    Args:
        stages: in any order; layers may be fractions.
        depth: decoder layers of the model.
        average: budget per image as an average over all decoder layers, or None if each stage has its own.
        seed: of the stochastic methods.
        fidelity: handed to the methods.
        compact: whether positions are counted through in every layer.

    Raises:
        ConfigError: if a layer lies outside the model or stages contradict each other.
    """

    tower_readings: type[TowerReadings] = TowerReadings

    def __init__(
        self,
        stages: Sequence[Stage],
        depth: int,
        *,
        average: Budget | None = None,
        seed: int = 0,
        fidelity: Literal["fixed", "official"] = "fixed",
        compact: bool = False,
    ) -> None:
        self.depth, self.seed, self.fidelity, self.compact = depth, seed, fidelity, compact
        pixels = [s for s in stages if s.kind == "pixel"]
        if len(pixels) > 1:
            raise ConfigError(f"stages: {' and '.join(s.label for s in pixels)} both act on the pixels; keep one")
        self.pixel = next(iter(pixels), None)
        for stage in stages:
            if stage.kind in ("pixel", "encoder", "merge") and stage.keep is not None and stage.keep.kind == "flops":
                raise ConfigError(
                    f"keep={stage.keep}: {stage.label} acts before the prompt is read, on whose length FLOPs depend; "
                    "give tokens or a ratio"
                )
        inside = [s for s in stages if s.kind in ("encoder", "merge")]
        if len(inside) > 1:
            raise ConfigError(f"stages: {' and '.join(s.label for s in inside)} both act in the tower; keep one")
        self.encoder = next((s for s in inside if s.kind == "encoder"), None)
        self.merging = next((s for s in inside if s.kind == "merge"), None)
        if self.merging is not None and self._gives_units:
            raise ConfigError(
                f"stages: {self.pixel.label} gives the tower some units of a picture, in which {self.merging.label} "  # type: ignore[union-attr]
                "cannot merge; keep one, or resize"
            )
        caches = [s for s in stages if s.kind == "cache"]
        if len(caches) > 1:
            raise ConfigError(f"stages: {' and '.join(s.label for s in caches)} both act on the cache; keep one")
        self.cache_stage = next(iter(caches), None)
        self.prompt_stages = pixels + inside + [s for s in stages if s.kind == "prompt"]
        self.cuts: dict[int, Stage] = {}
        hidden = [False] * depth
        for stage in stages:
            if stage.kind == "cut":
                layer = resolve_layer(_layer(stage), depth, name="layer", lowest=earliest_cut(stage))
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
        self.narrowed = _narrowed(stages, hidden, self.frozen)
        self.channels: dict[int, int] = {}
        self.hidden = hidden
        self.average = average
        self._selecting = [*self.prompt_stages, *(self.cuts[layer] for layer in sorted(self.cuts))]
        flips = {i for i in range(depth) if hidden[i] != (hidden[i - 1] if i else False)}
        behind = {layer + 1 for layer in self.routes if layer + 1 < depth}  # who passed one by is back
        self.changes: frozenset[int] = frozenset(flips | set(self.cuts) | self.routes.keys() | behind)
        # what stays of a picture that its pixels decide about is no part of a budget
        self._sharing = [s for s in self._selecting if not self._in_tower(s) or _takes_budget(s)]
        self.selects = bool(self._selecting or self.routes or caches)
        places = [(0, s) for s in self.prompt_stages] + list(self.cuts.items())
        weighing = [layer for layer, stage in places if stage.mass is not None and stage.mass.beta]
        self.biased = min(weighing, default=None)
        if self.cache_stage is not None and self.biased is not None:
            raise ConfigError(
                f"mass: {self.cache_stage.label} leaves each head other tokens in the cache, and mass attention gives "
                "all heads one bias; use mass=False, or a recipe without a cache stage"
            )
        readers = list(self.cuts.items())
        self.thinned: frozenset[int] = frozenset()
        self.thins_from: int | None = None
        if self.cache_stage is not None:
            start = 0
            if self.cache_stage.layer is not None:
                lowest = earliest_cut(self.cache_stage)
                start = self.thins_from = resolve_layer(self.cache_stage.layer, depth, name="layer", lowest=lowest)
                readers.append((start, self.cache_stage))
            self.thinned = frozenset(i for i in range(start, depth) if not hidden[i])
            for layer in sorted(self.thinned & self.frozen):
                raise ConfigError(
                    f"layer={layer}: {self.cache_stage.label} chooses by what a layer computes, which visual tokens "
                    "pass frozen; leave the freeze or the cache stage out"
                )
        self.decoder = DecoderReadings(
            self.prompt_stages, readers, hidden, self.frozen, self.routes.keys(), official=fidelity == "official"
        )

    def attach(self, attachment: Host) -> None:
        """Add the taps for what the methods read.

        Raises:
            UnsupportedError: if the model's attention cannot be tapped.
            ConfigError: if a tower layer lies outside the tower, or a method cannot run as it is.
        """
        self.adapter, self._serves = attachment.adapter, attachment.serves
        for stage in (*self._selecting, *self.routes.values()):
            stage.method.check()  # type: ignore[union-attr]
        if self.pixel is not None:
            if self._gives_units and self.adapter.fixed_units:
                raise UnsupportedError(
                    f"{self._model}: {self.pixel.label} needs a vision tower that takes some units of a picture, but "
                    f"{self.adapter.fixed_units}; drop tokens behind the tower"
                )
            if not self._gives_units and self.adapter.fixed_pictures:
                raise UnsupportedError(
                    f"{self._model}: {self.pixel.label} needs a vision tower that takes smaller pictures, but "
                    f"{self.adapter.fixed_pictures}; use 'm3_pool', which pools tokens behind the tower"
                )
        if self.encoder is not None:
            self._layer_in_tower = self._find_layer(self.encoder)
        if self.pixel is not None or self.alters_tower:
            attachment.add(BeforeTower(self.adapter.base, self))
        if self.merging is not None:
            allowed = functools.partial(self._allowed, self.merging) if self._budgeted(self.merging) else None
            TowerMerge(attachment, self.merging, allowed, official=self.fidelity == "official")
        self.decoder.tap(attachment)
        for layer in sorted(self.thinned):
            attachment.add(Tap(attention_of(attachment, layer), functools.partial(thin, self, layer)))
        for layer, shrink in self.narrowed.items():
            self.channels[layer] = first_channels(attachment, layer, shrink)
            for removable in narrow_mlp(attachment.layers[layer], layer, self):
                attachment.add(removable)
        for layer in sorted(self.routes):
            for removable in scale_branch(attachment.layers[layer], layer, self):
                attachment.add(removable)
        self.tower = self.tower_readings(attachment, self.tower_readers)

    @property
    def tower_readers(self) -> list[Stage]:
        """Stages whose methods may read the vision tower."""
        return [*self._selecting, *self.routes.values()]

    @property
    def _model(self) -> str:
        return self.adapter.base.config.model_type

    def _in_tower(self, stage: Stage) -> bool:
        """Whether a stage acts before the tower or inside it."""
        return stage.kind in ("pixel", "encoder")

    def _find_layer(self, stage: Stage) -> int:
        """The tower layer of an encoder stage.

        Raises:
            UnsupportedError: if no unit can leave this tower.
            ConfigError: if the layer lies outside, or behind the one that the features are read from.
        """
        if self.adapter.fixed_layers:
            raise UnsupportedError(
                f"{self._model}: {stage.label} needs a vision tower that units can leave, but "
                f"{self.adapter.fixed_layers}; drop tokens behind the tower"
            )
        if stage.method.rebuild is not None and self.adapter.no_rebuild:  # type: ignore[union-attr]
            raise UnsupportedError(
                f"{self._model}: {stage.label} brings back what left the tower, but {self.adapter.no_rebuild}; use "
                "'tower_cut'"
            )
        tower = describe_tower(self.adapter)
        found = resolve_layer(_layer(stage), tower.depth, name="tower layer", lowest=1)
        if found > tower.feature_layer:
            raise ConfigError(
                f"layer={stage.layer}: the visual features of {self._model} are what tower layer {tower.feature_layer} "
                "makes, so units that leave behind it save nothing; cut earlier"
            )
        return found

    @property
    def _gives_units(self) -> bool:
        method = None if self.pixel is None else self.pixel.method
        return method is not None and method.card.gives == "units"

    def shows_state(self, layer: int) -> bool:
        """Whether a tap of ``layer`` must see the call; see :class:`visiontok.engine.attach.Policy`."""
        mine = layer in self.thinned or layer in self.routes or layer in self.narrowed
        return mine or self.decoder.wants_state(layer)

    def thins(self, call: Prefill) -> bool:
        """Whether any layer stores more visual tokens than are to stay; see :class:`visiontok.engine.attach.Policy`."""
        return self.cache_stage is not None and any(map(int.__lt__, self.to_cache(call), call.counts))

    def to_cache(self, call: Prefill) -> list[int]:
        """Visual tokens of each unit that are to stay in the cache of a layer, as far as it has so many."""
        return call.units.sizes if self.cache_stage is None else self._counts(self.cache_stage, call)

    def prompt(self, call: Prefill, embeds: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run the prompt stages; see :class:`visiontok.engine.attach.Policy`."""
        if not self.prompt_stages:
            return None, embeds
        alive = call.visual
        for stage in self.prompt_stages:
            into = None
            if stage is self.merging:
                into = self._homes(call, stage, alive)
                if into is None:
                    continue
                stand = into == torch.arange(into.shape[1], device=into.device)
                there = alive & call.units.scatter(stand)
                answer = self._ask(call, stage, None, embeds, there, self._counts(stage, call))
                if call.trace.ledger is not None:
                    call.trace.ledger.merged = into
            elif self._in_tower(stage):
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
                homes = answer.into if into is None else into
                embeds = self._weigh(call, stage.mass, embeds, before, alive, homes)(embeds)
        return alive, embeds

    def visible(self, call: Prefill, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Run the cut at this layer, if any; see :class:`visiontok.engine.attach.Policy`."""
        stage = self.cuts.get(layer)
        if layer in self.routes:
            return self._route(call, self.routes[layer], layer, states)
        if stage is not None:
            full = call.leave(states)
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
        answer = self._ask(call, stage, layer, call.leave(states), call.kept, known)
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
        call.trace.ledger.note_heirs(group)  # type: ignore[union-attr]  # a prefill has one
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
        it is everything there ever was. One that drops images whole may do so within any budget, and is always asked.
        """
        units = call.units
        valid = units.gather(alive[..., None])[..., 0] & units.valid
        budgeted = self._budgeted(stage)
        contract = stage.method.card.contract  # type: ignore[union-attr]
        most = call.counts if contract.count_from_grid else units.sizes
        enough = all(n >= known for n, known in zip(counts, most, strict=True))
        if (budgeted and enough and not contract.whole_groups) or not any(call.counts):
            return None
        ctx = self._context(call, stage, layer, states, valid, counts)
        reserved = self._reserved(call, stage, ctx)
        scores: list[torch.Tensor] = []
        whole, ctx = (
            ctx,
            replace(ctx, valid=ctx.valid & ~reserved, count=ctx.count - reserved.sum(1), note=scores.append),
        )
        selection = answered(stage, ctx, call.counts)
        keep, name = selection.keep, stage.label
        keep = keep.to(ctx.valid.device) & ctx.valid | reserved
        wanted = [min(n, known) for n, known in zip(counts, call.counts, strict=True)]
        fixed = budgeted and self.fidelity == "fixed" and contract.count_from_grid
        found_counts = counted(keep, wanted if fixed else None)
        empty = any(known and not n for n, known in zip(found_counts, call.counts, strict=True))
        if empty and contract.keeps_some:
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
        features, into = selection.features, selection.into
        if into is not None:
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
        if stage.kind != "route":
            heirs = None if into is None else torch.where(keep, torch.arange(keep.shape[1], device=keep.device), into)
            choice = Choice(name, layer, valid, keep, scores[-1] if scores else None, heirs)
            call.trace.ledger.choices.append(choice)  # type: ignore[union-attr]  # a prefill has one
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
        units, device, needs = call.units, states.device, needs_of(stage)
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
            patches = self.tower.encoder_features(call)  # (U, N, m, C)
            encoder_features = patches.flatten(2)
            project = functools.partial(self.tower.project, patches.shape[2]) if needs.projector else None
        if needs.question:
            at, asks = call.question(self.adapter.special_ids())
            asked_ids = None if call.ids is None else call.ids.gather(1, at)
            asked = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        return Context(
            stage=_place(stage, layer),
            layer=layer,
            depth=self.depth,
            features=features,
            valid=valid,
            count=upload(torch.tensor([min(n, m) for n, m in zip(counts, call.counts, strict=True)]), device),
            budgeted=self._budgeted(stage),
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
            final_norm=self.decoder.final_norm if needs.final_norm else None,
            pixels=self.tower.pixels(call) if needs.pixels else None,
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

    def _read(self, call: Prefill, cut: int | None, stat: str, layer: int | float) -> torch.Tensor:
        found = self.decoder.read(call, cut, stat, layer)
        return self.tower.read(call, stat, layer) if found is None else found

    def _budgeted(self, stage: Stage) -> bool:
        return stage.keep is not None or (
            self.average is not None and (not self._in_tower(stage) or _takes_budget(stage))
        )

    def _counts(self, stage: Stage, call: Prefill) -> list[int]:
        """Tokens the stage is to leave of each image."""
        if self.average is None and stage.keep is not None and stage.keep.kind == "flops":
            return self._affordable(stage.keep, stage, call)
        return self._allowed(stage, call.units.sizes, call.units.tiles)

    def _allowed(self, stage: Stage, sizes: list[int], tiles: list[int]) -> list[int]:
        """The same, where the budget follows from the tokens and the tiles of each image alone."""
        keep = stage.keep
        if self.average is not None and self._budgeted(stage):
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
            left = counts(step)
            most, text = max(call.row_counts(left)), max(call.texts)
            ahead = [
                self._load(call, layer, text if self.hidden[layer] else most) for layer in range(first, self.depth)
            ]
            tokens = {k: len(parted.visual) for k, parted in call.parted.items()}  # of those before
            narrow = {k: (tokens.get(k, sum(left)), n) for k, n in self.channels.items()}
            return call.batch * sum(load_flops(config, spent + ahead)) - sum(narrow_flops(config, narrow))

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
        cuts = [start] * (len(self._sharing) - len(self.cuts)) + sorted(self.cuts)
        own = [s.keep.value if s.keep is not None and s.keep.kind == "ratio" else 1.0 for s in self._sharing]
        first, *others = (s.method for s in self._sharing)
        spread = layer_average if any(type(m) is not type(first) for m in others) else first.shared_out  # type: ignore[union-attr]
        counts = spread(n, average, depth=self.depth, cuts=cuts, shape=own, start=start, stop=stop)
        return counts[self._sharing.index(stage)]

    def _generator(self, call: Prefill, unit: int) -> torch.Generator:
        ids = b"" if call.prompts is None else repr(call.prompts[call.units.rows[unit]]).encode()
        text = f"{self.seed}/{call.units.ordinal[unit]}/".encode() + ids
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    # ---- merge stage

    def _homes(self, call: Prefill, stage: Stage, alive: torch.Tensor) -> torch.Tensor | None:
        """(U, N) long: the place of the token that stands for each of those ``alive`` (B, N) behind the tower, -1 for
        none; None if nothing has merged."""
        runs = [None if source is None else call.records[source[0]].merged for source in call.units.source]
        whole = self._budgeted(stage) and self._counts(stage, call) == call.units.sizes
        if any(run is None for run in runs) and not whole:
            raise UnsupportedError(
                f"{self._model}: {stage.label} merges inside the vision tower, but the features of this call were made "
                "without it; pass pixels"
            )
        if not any(run is not None and run.anything for run in runs):
            return None
        units, (group, count) = call.units, self.tower.groups(call)
        valid = units.gather(alive[..., None])[..., 0] & units.valid
        here = torch.arange(group.shape[1], device=group.device)[:, None].expand(*group.shape, 1)
        return middles(group, units.grid if units.has_grid else here, count, valid)

    # ---- pixel stage

    def serves(self) -> bool:
        """Whether the calls of the present thread are this policy's."""
        return self._serves()

    @property
    def alters_tower(self) -> bool:
        """Whether units are missing in the tower's run, or its tokens merge."""
        return self._gives_units or self.encoder is not None or self.merging is not None

    def smaller(self, record: Record) -> Smaller | None:
        """The pictures that the tower gets instead; see :class:`visiontok.engine.pixels.PixelStage`."""
        stage: Any = self.pixel
        if stage is None:
            return None
        shapes = self.adapter.shapes(record)
        allowed = self._allowed(stage, [t * h * w for t, h, w in shapes], [t for t, _, _ in shapes])
        if self._gives_units:
            return self._some_units(stage, record, allowed)
        resized = [self._resized(stage, shape, k) for shape, k in zip(shapes, allowed, strict=True)]
        if resized == shapes:
            return None
        changes = self.adapter.smaller(record, resized)
        return Smaller.resized(record, changes, list(zip(shapes, resized, strict=True)))

    @contextlib.contextmanager
    def inside(self, record: Any) -> Iterator[None]:
        """The hooks by which units leave the tower; see :class:`visiontok.engine.inside.Inside`."""
        if self.encoder is None:
            yield
            return
        shapes = self.adapter.shapes(record)
        allowed = self._allowed(self.encoder, [t * h * w for t, h, w in shapes], [t for t, _, _ in shapes])
        layers = self.adapter.layers(record)
        budgeted = self._budgeted(self.encoder)
        record.inside = Inside(record, layers, self.encoder, self._layer_in_tower, allowed, budgeted=budgeted)
        with record.inside.hooks():
            yield

    def _some_units(self, stage: Any, record: Record, allowed: list[int]) -> Smaller:
        """The units of each picture that the tower gets; a whole picture is one of all its units."""
        mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in self.adapter.pixel_statistics)
        kept, sources = [], []
        with torch.no_grad():
            for pixels, count in zip(self.adapter.units(record), allowed, strict=True):
                shown = pixels.float() * std.to(pixels.device) + mean.to(pixels.device)
                if not bool(torch.stack(shown.aminmax()).isfinite().all()):  # both ends are NaN if any value is
                    raise ConfigError(
                        f"pixels contain NaN or infinity, so {stage.label} has nothing to decide by; check the pictures"
                    )
                picture = Picture(pixels=shown, count=count, budgeted=self._budgeted(stage))
                answer = _answer(stage, picture)
                kept.append(answer.keep.flatten().cpu())
                sources.append(None if answer.source is None else answer.source.flatten().cpu())
        if all(bool(mask.all()) for mask in kept):  # the stock call
            return Smaller.units(record, [Part(list(range(len(kept))), {})], kept, [None] * len(kept))
        return Smaller.units(record, self.adapter.parts(record, kept), kept, sources)

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
        """(U, N) bool on the host, tokens of which the tower made features of their own, as far as a stage and those
        before it decide; None if of all."""
        units = call.units
        made = torch.zeros(units.valid.shape, dtype=torch.bool)
        allowed = self._allowed(stage, units.sizes, units.tiles)
        for u, (source, size, count) in enumerate(zip(units.source, units.sizes, allowed, strict=True)):
            record = None if source is None else call.records[source[0]]
            smaller, inside = (None, None) if record is None else (record.smaller, record.inside)
            asked: Any = inside if stage is self.encoder else smaller
            if asked is None and (count < size or self._gives_units or stage is self.encoder):
                raise UnsupportedError(
                    f"{self._model}: {stage.label} acts on pixels, but the features of this call were made without "
                    "it; pass pixels"
                )
            here = torch.ones(size, dtype=torch.bool)
            if source is not None and smaller is not None:
                here = smaller.kept[source[1]].clone()
            if source is not None and stage is self.encoder and inside is not None and inside.dropped:
                here[here.clone()] = inside.kept[source[1]]
            made[u, :size] = here
        return None if made.sum(1).tolist() == units.sizes else made


def _takes_budget(stage: Stage) -> bool:
    return stage.method is not None and stage.method.card.budget


def _answer(stage: Stage, picture: Picture) -> Kept:
    """Which units of a picture stay, checked."""
    answer, name = stage.method.units(picture), stage.label  # type: ignore[union-attr]
    keep, source = answer.keep, answer.source
    if keep.dtype != torch.bool or keep.shape != picture.shape:
        raise ConfigError(
            f"{name}: units() returned {tuple(keep.shape)} {keep.dtype}; it must return a bool mask {picture.shape}"
        )
    number = int(keep.sum())
    if not number:
        raise ConfigError(f"{name}: units() kept no unit of a picture; keep at least one")
    fixed = picture.budgeted and stage.method.card.contract.count_from_grid  # type: ignore[union-attr]
    if (fixed and number != picture.count) or number > picture.count:
        raise ConfigError(
            f"{name}: units() kept {number} units, against a budget of {picture.count}; keep "
            + ("as many, or set count_from_grid=False" if fixed else "no more")
        )
    if source is not None and (source.shape != keep.shape or not bool(keep.flatten()[source].all())):
        raise ConfigError(f"{name}: Kept.source names a unit that is not kept; give the places of kept units")
    return answer


def _place(stage: Stage, layer: int | None) -> Literal["pixel", "encoder", "merge", "prompt", "decoder"]:
    """Where a method that is asked at ``layer`` acts, in the words of its context."""
    if stage.kind == "pixel" or stage.kind == "encoder" or stage.kind == "merge":
        return stage.kind
    return "prompt" if layer is None else "decoder"


def _in_entry(
    call: Prefill, edits: Sequence[Callable[[torch.Tensor], torch.Tensor]], states: torch.Tensor
) -> torch.Tensor:
    """Apply ``edits``, which work on the whole prompt, to the states of the tokens that entered."""
    whole = call.leave(states)
    for edit in edits:
        whole = edit(whole)
    return call.enter(whole)


def _meet(one: Stage, next_: Stage) -> bool:
    """Whether two cuts of one method, at fractions of the depth, are one in a model this shallow: the later."""
    fractions = isinstance(one.layer, float) and isinstance(next_.layer, float)
    return fractions and one.method.card is next_.method.card  # type: ignore[union-attr]


def _narrowed(stages: Sequence[Stage], hidden: Sequence[bool], frozen: Set[int]) -> dict[int, float]:
    """Decoder layers whose MLP computes less of visual tokens, and by what the number of its channels is divided.

    Raises:
        ConfigError: for two such stages in one layer, and for one in whose layers no visual token goes through an MLP.
    """
    found: dict[int, float] = {}
    for stage in stages:
        if stage.kind != "narrow" or stage.shrink is None:
            continue
        layers = range(*_range(stage, len(hidden)))
        twice = next((layer for layer in layers if layer in found), None)
        if twice is not None:
            raise ConfigError(f"layer={twice}: two narrow stages in one layer; leave one out")
        there = [layer for layer in layers if not hidden[layer] and layer not in frozen]
        if layers and not there:
            raise ConfigError(
                f"layer={stage.layer}: a narrow stage where the visual tokens are absent or frozen in every layer has "
                "no MLP to narrow; leave it out"
            )
        found |= dict.fromkeys(there, stage.shrink)
    return {layer: shrink for layer, shrink in found.items() if shrink > 1}


def _layer(stage: Stage) -> int | float:
    return stage.layer if stage.layer is not None else 0


def _range(stage: Stage, depth: int) -> tuple[int, int]:
    """First layer of a stage of several, and the first behind it; the same if fractions of so few layers are none."""
    start, until = resolve_layer(_layer(stage), depth, name=f"{stage.kind} layer"), stage.until
    if until is None:
        return start, start + 1
    end = until == depth or (isinstance(until, float) and until == 1.0)
    stop = depth if end else resolve_layer(until, depth, name="until")
    fractions = isinstance(stage.layer, float) and isinstance(until, float)
    vanishes = stage.kind in ("freeze", "narrow") and stop == start and fractions
    if stop <= start and not vanishes:
        raise ConfigError(f"until={until}: a {stage.kind} must end behind its layer {start}")
    return start, stop
