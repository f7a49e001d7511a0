"""What a compression asked for and what really happened, in numbers."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .cost import Account, VisionInputs, account, attention_lengths
from .engine.probe import TAKE_BIAS, takes_columns
from .method import Stage
from .recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from visiontok.adapters.base import Adapter

    from .engine.trace import Trace
    from .ledger import TokenLedger


REMEMBERED = (
    "a vision memory is on: its features may be from earlier calls, and how long the vision tower takes is not known"
)


@dataclass(frozen=True)
class ImageReport:
    """One image (or video) of the call.

    Attributes:
        row: prompt row.
        image: which image of its row.
        modality: ``image`` or ``video``.
        tokens: visual tokens of the stock model.
        kept: visual tokens alive in each decoder layer.
        cached: visual tokens in the cache of each decoder layer behind the prefill, per key head; fewer than ``kept``
            with a cache stage.
    """

    row: int
    image: int
    modality: str
    tokens: int
    kept: tuple[int, ...]
    cached: tuple[int, ...]

    @property
    def average(self) -> float:
        """Tokens alive, averaged over all decoder layers."""
        return sum(self.kept) / len(self.kept)

    @property
    def cache_average(self) -> float:
        """Tokens in the cache, averaged over all decoder layers."""
        return sum(self.cached) / len(self.cached)


@dataclass(frozen=True)
class Report:
    """The latest call with an image; prints as a short text.

    Attributes:
        recipe: its label.
        recipe_hash: its canonical hash; None if it holds a plain function.
        requested: the budget as asked for.
        images: per image what was kept where.
        layer_tokens: slots that each decoder layer holds per prompt row, text included.
        layer_computed: those of them that are not frozen.
        layer_channels: inner channels of each decoder layer's MLP that visual tokens use; None for all.
        account: FLOPs of vision tower and language model and KV bytes, stock and compressed; the bytes are of this
            prefill's own tokens, what earlier turns left on the same cache is not counted.
        seconds: measured parts: vision, selection, prefill, decode (all ``steps`` so far).
        steps: forwards on a compressed cache between this prefill and the next one; None (not counted) if the model
            ran stock, on shorter inputs or because nothing was dropped.
        plane: ``hooks`` if tokens were dropped inside the forward, ``inputs`` if the stock model got shorter inputs.
        warnings: what a reader must know before trusting the numbers.
    """

    recipe: str
    recipe_hash: str | None
    requested: str
    images: tuple[ImageReport, ...]
    layer_tokens: tuple[int, ...]
    layer_computed: tuple[int, ...]
    layer_channels: tuple[int | None, ...]
    account: Account
    seconds: dict[str, float | None]
    steps: int | None
    plane: str
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls, recipe: Recipe, label: str, base: nn.Module, adapter: Adapter, ledger: TokenLedger, trace: Trace
    ) -> Report:
        """Read the books of a call; ``label`` names what ran, with every default filled in."""
        units = ledger.units
        kept, cached = (list(zip(*layers, strict=True)) for layers in (ledger.kept(), ledger.cached_counts()))
        images = tuple(
            ImageReport(row, units.ordinal[u], units.modality[u], units.sizes[u], kept[u], cached[u])
            for u, row in enumerate(units.rows)
        )
        batch = len(ledger.visual)
        text = int((ledger.attended & ~ledger.visual).sum(1).max())
        config: Any = base.config
        dtype = next(getattr(base, adapter.text).parameters()).dtype
        known = [inputs for inputs in trace.inputs if inputs is not None]
        costs = account(
            config,
            _joined(config, [given for given, _ in known]),
            ran=_joined(config, [ran for _, ran in known]),
            **_merged_lengths(config, trace),
            stock=ledger.stock,
            kept=ledger.tokens(),
            computed=ledger.computed(),
            cached=ledger.cached_tokens(),
            narrow=ledger.narrow(),
            ahead=trace.ahead,
            text=text,
            batch=batch,
            dtype_bytes=torch.finfo(dtype).bits // 8,
        )
        try:
            digest: str | None = recipe.hash()
        except ValueError:
            digest = None
        warnings = [adapter.notes] if adapter.notes else []
        overdrawn = list(filter(None, (_overdrawn(stage, images) for stage in recipe.stages)))
        warnings += overdrawn
        if not trace.stores and any(s.kind == "cache" for s in recipe.stages):
            warnings.append("this call kept no cache, so that the cache stage had nothing to thin")
        elif not (ledger.dropped or ledger.computed() != ledger.tokens() or ledger.narrow() or overdrawn):
            budget = recipe.average is not None or any(s.keep is not None for s in recipe.stages)
            reason = (
                "the budget is at least the number of visual tokens"
                if budget
                else "the stages hide no visual token from any layer"
            )
            warnings.append(f"nothing was dropped: {reason}")
        text_config = getattr(base, adapter.text).config
        kernel = str(text_config._attn_implementation)
        weighs = any(s.mass is not None and s.mass.beta for s in recipe.stages)
        if weighs and kernel not in TAKE_BIAS and not takes_columns(text_config):
            warnings.append(f"layers whose keys have a bias (mass attention) run sdpa instead of {kernel}")
        if kernel not in TAKE_BIAS and ledger.computed() != ledger.tokens():
            warnings.append(f"layers that visual tokens pass frozen run sdpa instead of {kernel}")
        if trace.explained:
            warnings.append(
                "the language model ran forward and backward once more before tokens were chosen, which is not "
                "counted: an oracle to compare with, which saves nothing"
            )
        if trace.chunk:
            warnings.append("the prefill came in chunks: this is the report of the last one with an image")
        if not trace.encoders:
            warnings.append("the vision tower did not run in this call: its time and FLOPs are not counted")
        if trace.remembered:
            warnings.append(REMEMBERED)
        return cls(
            recipe=label,
            recipe_hash=digest,
            requested=_requested(recipe),
            images=images,
            layer_tokens=tuple(ledger.tokens()),
            layer_computed=tuple(ledger.computed()),
            layer_channels=tuple(ledger.narrow().get(layer, (0, None))[1] for layer in range(ledger.depth)),
            account=costs,
            seconds=trace.seconds(),
            steps=trace.steps,
            plane=trace.plane,
            warnings=tuple(warnings),
        )

    @property
    def layer_average(self) -> float:
        """Visual tokens per image, averaged over images and all decoder layers."""
        return sum(i.average for i in self.images) / max(len(self.images), 1)

    @property
    def cache_average(self) -> float:
        """Visual tokens per image in the cache behind the prefill, averaged over images and all decoder layers."""
        return sum(i.cache_average for i in self.images) / max(len(self.images), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        out = asdict(self)
        for image, entry in zip(self.images, out["images"], strict=True):
            entry["average"], entry["cache_average"] = image.average, image.cache_average
        out["account"] = self.account.to_dict()
        out["layer_average"], out["cache_average"] = self.layer_average, self.cache_average
        return out

    def __str__(self) -> str:
        tokens = sum(i.tokens for i in self.images)
        first, last = (sum(i.kept[k] for i in self.images) for k in (0, -1))
        share = self.layer_average * len(self.images) / max(tokens, 1)
        lines = [
            f"{self.recipe} (requested: {self.requested})",
            f"visual tokens  {tokens} in {len(self.images)} image(s)",
            f"kept           {first} in the first layer, {last} in the last",
            f"layer average  {self.layer_average:.1f} per image ({share:.1%})",
        ]
        if frozen := sum(a != b for a, b in zip(self.layer_tokens, self.layer_computed, strict=True)):
            lines.append(f"frozen         in {frozen} of {len(self.layer_tokens)} layers")
        if narrow := [n for n in self.layer_channels if n is not None]:
            channels = " or ".join(map(str, sorted(set(narrow))))
            lines.append(f"narrow MLP     {channels} channels in {len(narrow)} of {len(self.layer_tokens)} layers")
        costs = self.account
        if self.cache_average != self.layer_average:
            share = self.cache_average * len(self.images) / max(tokens, 1)
            lines.append(f"in the cache   {self.cache_average:.1f} per image and head on layer average ({share:.1%})")
        if costs.kv_stock is not None and costs.kv is not None and costs.kv_peak is not None:
            peak = f", {_bytes(costs.kv_peak)} for a moment" if costs.kv_peak > costs.kv else ""
            lines.append(f"KV cache       {_bytes(costs.kv_stock)} -> {_bytes(costs.kv)}{peak}")
        if costs.decoder_stock is not None and costs.decoder is not None:
            lines.append(f"LM prefill     {sum(costs.decoder_stock):.3g} -> {sum(costs.decoder):.3g} FLOPs")
        if costs.vision is not None and costs.vision_stock is not None:
            before, after = (part.tower + part.projector for part in (costs.vision_stock, costs.vision))
            change = f"-> {after:.3g} FLOPs ({costs.patches_stock} -> {costs.patches} patches)"
            lines.append(f"vision tower   {before:.3g} {'FLOPs, unchanged' if before == after else change}")
        if self.plane == "inputs":
            lines.append("ran as         stock generate() on shorter inputs")
        ratio = costs.speed_up()
        if ratio is not None:
            lines.append(
                f"FLOPs ratio    {ratio.time_to_first_token:.2f}x to the first token, tower included "
                f"({ratio.language_model:.2f}x in the language model, cap {ratio.cap:.2f}x)"
            )
        times = [f"{name} {value * 1e3:.1f} ms" for name, value in self.seconds.items() if value is not None]
        if self.steps is None:
            times.append("decode not counted")
        lines.append("measured       " + ", ".join(times))
        return "\n".join(lines + [f"warning: {w}" for w in (*self.warnings, *costs.not_counted)])


def _requested(recipe: Recipe) -> str:
    if recipe.average is not None:
        return f"{recipe.average} on layer average"
    budgets = [str(s.keep) if s.keep is not None else "no budget" for s in recipe.stages if s.method is not None]
    return ", ".join(budgets) or "no budget"


def _overdrawn(stage: Stage, images: tuple[ImageReport, ...]) -> str:
    """What to say where pages stay whole and a single one is more than the budget of its prompt; empty otherwise."""
    if stage.method is None or not stage.method.card.contract.whole_groups:
        return ""
    if stage.keep is None or stage.keep.kind not in ("tokens", "ratio"):
        return ""
    for row in {image.row for image in images}:
        mine = [image for image in images if image.row == row]
        wanted, kept = int(stage.keep.counts([i.tokens for i in mine]).sum()), sum(i.kept[-1] for i in mine)
        if kept > wanted:
            return f"prompt {row} keeps {kept} visual tokens instead of {wanted}: the best image, or frame, stays whole"
    return ""


def _joined(config: Any, runs: list[VisionInputs]) -> VisionInputs:
    """All runs of the tower together."""
    grids = tuple(grid for run in runs for grid in run.grids)
    embedded = sum(run.computed for run in runs) if runs else None
    if all(run.lengths is None for run in runs):
        return VisionInputs(grids, embedded)
    lengths = [attention_lengths(config, run) for run in runs]
    return VisionInputs(
        grids,
        embedded,
        lengths=tuple(tuple(itertools.chain(*layer)) for layer in zip(*lengths, strict=True)),
        mlp=tuple(
            map(sum, zip(*(run.mlp or map(sum, mine) for run, mine in zip(runs, lengths, strict=True)), strict=True))
        ),
        projected=tuple(itertools.chain(*(run.projected or mine[-1] for run, mine in zip(runs, lengths, strict=True)))),
    )


def _merged_lengths(config: Any, trace: Trace) -> dict[str, list[list[int]]]:
    """Tokens of each picture in the attention and in the MLP of each tower layer; nothing if none merged."""
    if all(inputs is None for inputs in trace.inputs) or not any(run is not None for run in trace.merged):
        return {}
    lengths: dict[str, list[list[int]]] = {}
    for inputs, run in zip(trace.inputs, trace.merged, strict=True):
        if inputs is None:
            continue
        for name, first in (("lengths", 0), ("behind", 1)):
            stock = attention_lengths(config, inputs[1])
            mine = stock if run is None else [[n] * len(run.source) for n in run.widths[first:][: len(stock)]]
            known = lengths.setdefault(name, [[] for _ in stock])
            lengths[name] = [a + b for a, b in zip(known, mine, strict=True)]
    return lengths


def _bytes(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
