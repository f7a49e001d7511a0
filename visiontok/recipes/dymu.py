"""DyMU: merge every pair that is similar enough, so that simple pictures become fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Merging
from .tome import MergeMethod


@dataclass(frozen=True)
class DyMU(MergeMethod):
    """Merging by thresholds.

    Attributes:
        thresholds: the cosine above which a pair merges, one for each layer of the tower that makes features, as
            ``visiontok calibrate dymu`` finds them, or one for all.
    """

    thresholds: float | tuple[float, ...] = 0.9

    card: ClassVar[Card] = Card(
        name="dymu",
        title="in every layer of the vision tower, all pairs merge whose similarity exceeds a calibrated threshold",
        paper="arXiv 2504.17040",
        venue="NeurIPS 2025",
        formula="tome, of every layer all pairs (even, odd) with cosine > θ_l",
        stage="merge",
        needs="as tome; thresholds from `visiontok calibrate dymu`",
        official="θ_l is the running mean over batches of 64 pictures of the similarity of the first pair of a batch "
        "that a rate would not merge; 250 thousand pictures. In the language model, virtual unmerging: keys and values "
        "of all tokens are made of the merged ones, so that the cache is no smaller.",
        bugs="Without a fused kernel, log(size) is added behind the softmax. Pictures of a batch are padded, and means "
        "are then taken by size + 1e-4.",
        departures="θ_l is that similarity over all calibrated pictures at once, layer by layer. No virtual unmerging: "
        "one token of each group stays in the prompt, at its own position, as for tome; mass=True adds log(size) to "
        "its keys in the language model.",
        defaults="0.9 in all layers, a guess; calibrate.",
        cost="as tome; the host reads how many tokens are left, once per layer",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if isinstance(self.thresholds, list):  # from JSON
            object.__setattr__(self, "thresholds", tuple(self.thresholds))
        each = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        if not each:
            raise ConfigError("thresholds=(): give one cosine, or one for each layer")

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        if not isinstance(self.thresholds, tuple):
            return Merging(thresholds=(self.thresholds,) * depth)
        if len(self.thresholds) != depth:
            raise ConfigError(
                f"thresholds={list(self.thresholds)}: {len(self.thresholds)} for a tower of which {depth} layers make "
                "features; run `visiontok calibrate dymu` on this model"
            )
        return Merging(thresholds=self.thresholds)
