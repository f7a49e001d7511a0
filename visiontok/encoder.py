"""Merging in a vision transformer without a language model: timm, open_clip, CLIP and SigLIP of transformers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from visiontok.adapters.encoder import Encoder

from .api import ENCODER_MARK as MARK
from .api import Compression
from .cost import encoder_flops
from .engine.merging import Merged, MergeHooks
from .errors import ConfigError, UnsupportedError
from .ledger import TokenLedger
from .method import Merging
from .recipe import Recipe


@dataclass(frozen=True)
class EncoderReport:
    """The latest run of an encoder; prints as a short text.

    Attributes:
        recipe: its label.
        recipe_hash: its canonical hash.
        requested: the budget as asked for.
        patches: of each picture.
        kept: tokens that are left of the patches of each picture behind the last layer.
        layer_tokens: slots of each picture on the input of each layer, and behind the last; CLS and registers included.
        flops_stock: of each layer of the stock model, all pictures.
        flops: the same as run, without matching.
        matching: FLOPs of the cosines.
        warnings: what a reader must know before trusting the numbers.
    """

    recipe: str
    recipe_hash: str | None
    requested: str
    patches: int
    kept: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    flops_stock: tuple[int, ...]
    flops: tuple[int, ...]
    matching: int
    warnings: tuple[str, ...]

    @property
    def layer_average(self) -> float:
        """Slots on the input of the layers, averaged."""
        return sum(self.layer_tokens[:-1]) / len(self.layer_tokens[:-1])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"layer_average": self.layer_average}

    def __str__(self) -> str:
        mean = sum(self.kept) / len(self.kept)
        stock, now = sum(self.flops_stock), sum(self.flops) + self.matching
        lines = [
            f"{self.recipe} (requested: {self.requested})",
            f"pictures       {len(self.kept)} of {self.patches} patches",
            f"left           {mean:.5g} per picture ({mean / self.patches:.1%})",
            f"per layer      {' '.join(map(str, self.layer_tokens))} (mean {self.layer_average:.1f})",
            f"blocks         {stock:.3g} -> {now:.3g} FLOPs ({stock / now:.2f}x), {self.matching:.3g} of them matching",
        ]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


class EncoderCompression(Compression):
    """A merge method on an encoder without a language model; a context manager, as :class:`~visiontok.Compression`.

    Every thread's calls are served. Behind the blocks each patch has the token of its group, so what stands there works
    as it is: means and attention pooling weigh by size, dense heads find their grid.

    Args:
        model: as in :func:`visiontok.compress`.
        encoder: where its parts are.
        recipe: one merge stage.

    Raises:
        ConfigError: for other stages, a budget that has no meaning here, or a model already compressed.
        UnsupportedError: for a compiled model.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, recipe: Recipe) -> None:
        [stage, *others] = recipe.stages
        method = stage.method
        if others or method is None or stage.kind != "merge":
            kinds = ", ".join(s.kind for s in recipe.stages)
            raise ConfigError(
                f"recipe={recipe.label!r} ({kinds}): {type(model).__name__} has no language model, so tokens can only "
                "merge inside it; use one merge stage, such as 'tome'"
            )
        if stage.mass is not None:
            raise ConfigError(f"mass={stage.mass}: there is no language model whose attention could be weighed")
        if recipe.average is not None or (stage.keep is not None and stage.keep.kind not in ("tokens", "ratio")):
            raise ConfigError(
                f"keep={recipe.average or stage.keep}: for an encoder alone, give tokens or a ratio of its patches"
            )
        if hasattr(model, "_orig_mod"):
            raise UnsupportedError(
                f"{type(model).__name__}: a compiled model does not see hooks that come later; compress, then compile"
            )
        if (other := encoder.model.__dict__.get(MARK)) is not None:
            raise ConfigError(
                f"model={type(model).__name__}: it is already compressed with {other.recipe.label}; call .remove() on "
                "that Compression, which is visiontok.attached(model) (or leave its with-block) first"
            )
        method.check()
        self.model, self.recipe, self._encoder, self._label = model, recipe, encoder, recipe.label
        self._latest: dict[int, Merged] = {}  # by thread; 0 is whichever was last
        self._hooks: MergeHooks | None = None
        if stage.keep is None or stage.keep.kind == "tokens" or stage.keep.value < 1:  # else nothing can merge
            self._hooks = MergeHooks(encoder, self._plan, depth=len(encoder.blocks), done=self._done, whole=True)
        encoder.model.__dict__[MARK] = self

    def _plan(self, pictures: int, patches: int) -> Sequence[Merging]:
        [stage] = self.recipe.stages
        count = None if stage.keep is None else int(stage.keep.counts(torch.tensor([patches]))[0])
        depth = len(self._encoder.blocks)
        official = self.recipe.fidelity == "official"
        plan = stage.method.merging(patches, count, depth=depth, layers=depth, official=official)  # type: ignore[union-attr]
        return [plan] * pictures

    def _done(self, run: Merged) -> None:
        self._latest[0] = self._latest[threading.get_ident()] = run

    def remove(self) -> None:
        """Detach; the model is stock again, bit for bit. A second call does nothing."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        if self._encoder.model.__dict__.get(MARK) is self:
            del self._encoder.model.__dict__[MARK]

    def __repr__(self) -> str:
        return f"EncoderCompression({self._label!r} on {type(self.model).__name__})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle starts without the runs of the past."""
        return self.__dict__ | {"_latest": {}}

    @property
    def _run(self) -> Merged:
        run = self._latest.get(threading.get_ident(), self._latest.get(0))
        if run is None:
            raise ConfigError(
                "report: no picture has gone through this model since compress(), or keep leaves every token; run the "
                "model first"
            )
        return run

    @property
    def ledger(self) -> TokenLedger:
        """An encoder has none.

        Raises:
            ConfigError: always; see ``groups``.
        """
        raise ConfigError("ledger: there is no prompt whose tokens it could follow; see .groups")

    @property
    def groups(self) -> torch.Tensor:
        """(B, N) long: the group of each patch in the latest run, in raster order; patches of one number have merged.

        Raises:
            ConfigError: before any run.
        """
        return self._run.without_prefix(self._run.source)

    @property
    def report(self) -> EncoderReport:  # type: ignore[override]
        """Tokens per layer, and FLOPs, of the latest run.

        Raises:
            ConfigError: before any run.
        """
        run = self._run
        pictures, costs = len(run.source), self._encoder.costs()
        kept = [n - run.prefix for n in run.lengths]
        [stage] = self.recipe.stages
        return EncoderReport(
            recipe=self._label,
            recipe_hash=self.recipe.hash(),
            requested="no budget" if stage.keep is None else str(stage.keep),
            patches=run.tokens - run.prefix,
            kept=tuple(kept),
            layer_tokens=tuple(run.widths),
            flops_stock=tuple(encoder_flops(costs, [run.tokens] * len(run.widths), pictures)),
            flops=tuple(encoder_flops(costs, run.widths, pictures)),
            matching=run.flops,
            warnings=() if run.anything else ("nothing has merged",),
        )
