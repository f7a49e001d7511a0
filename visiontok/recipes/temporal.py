"""Run lengths along time: what stands still in a video enters the vision tower once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..functional import runs
from ..method import Card, Contract, Kept, Picture, UnitMethod
from ._tau import check_tau


@dataclass(frozen=True)
class Temporal(UnitMethod):
    """Of units that do not change from frame to frame the first is kept.

    Attributes:
        tau: largest mean difference of pixel values, in 0 … 1.
        anchored: compare with the unit that began the run, not with the frame before.
    """

    tau: float = 0.02
    anchored: bool = True

    card: ClassVar[Card] = Card(
        name="temporal",
        title="units of a video that stay as they were are dropped before the tower",
        paper="arXiv 2411.05222",
        venue="NeurIPS 2024",
        formula="drop i in frame t if mean|P_t,i - P_r,i| ≤ τ, r the frame that began the run of i",
        stage="pixel",
        needs="a vision tower that takes some units of each frame",
        official="RLT adds a learned embedding of the length of a run and fine-tunes; it compares with the frame "
        "before. VideoLLaMA3's processor does so, too, and cuts behind the tower; a frame of which nothing is left "
        "keeps its first unit.",
        trained="an embedding of the length of a run, learned in fine-tuning (RLT)",
        bugs="Without anchors a slow change is never seen.",
        departures="Training-free, without the embedding of lengths. Anchored, unless anchored=False: then, with "
        "tau=0.1/510 and frames that the tower does not merge, what stays is VideoLLaMA3's mask. Frames that the tower "
        "merges are compared as one. Images stay whole.",
        defaults="tau=0.02, about RLT's 0.1 on normalised pixels.",
        cost="saves work: O(THW) to compare, and only kept units go through the vision tower",
        gives="units",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def units(self, picture: Picture) -> Kept:
        frames, rows, columns = picture.shape
        keep, begins = runs(picture.pixels.flatten(3).flatten(1, 2), self.tau, anchored=self.anchored)
        keep[:, 0] |= ~keep.any(1)
        place = torch.arange(rows * columns, device=keep.device)
        source = torch.where(keep, torch.arange(frames, device=keep.device)[:, None], begins) * rows * columns + place
        return Kept(keep=keep.view(picture.shape), source=source.view(picture.shape))
