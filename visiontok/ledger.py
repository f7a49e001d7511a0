"""Which original token is alive in which decoder layer, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from .engine.vision import Units


@dataclass(frozen=True)
class Choice:
    """What one selection did; U images, N visual tokens of the largest.

    Attributes:
        label: of the stage.
        layer: decoder layer on whose input it was; None before the language model.
        candidates: (U, N) bool, who was still there.
        kept: (U, N) bool, who stayed.
        scores: (U, N) how important the method found each token, larger is more important; None if it does not say.
        into: (U, N) long, the kept token that took over each candidate, itself if it stayed; -1 for those that nobody
            took over, and for all others. None where the method only drops.
    """

    label: str
    layer: int | None
    candidates: torch.Tensor
    kept: torch.Tensor
    scores: torch.Tensor | None
    into: torch.Tensor | None


class TokenLedger:
    """The record of one prefill; B prompt rows, N prompt positions, U images.

    Args:
        visual: (B, N) bool, positions of visual tokens.
        attended: (B, N) bool, positions that are not padding.
        units: the images of the call.
        depth: number of decoder layers.
        stock: slots per row that each layer of the stock model computes and caches, if these are not the N positions.

    Attributes:
        choices: the selections before and inside the language model, in order; nothing is noted where all was kept.

    In a cross-attention model visual tokens have no place in the prompt: the N positions are the columns of the
    cross-attention states, then the text. A token is alive in all layers or in none, and the slots of a
    cross-attention layer hold visual tokens only, those of the others text only.
    """

    def __init__(
        self, visual: torch.Tensor, attended: torch.Tensor, units: Units, depth: int, stock: list[int] | None = None
    ) -> None:
        self.visual, self.attended, self.units, self.depth = visual, attended, units, depth
        self.stock = [visual.shape[1]] * depth if stock is None else stock
        self.choices: list[Choice] = []
        self._alive: list[torch.Tensor] | None = None
        self._widths = self.stock
        self._masses: list[torch.Tensor | None] = [None] * depth
        self._frozen: Mapping[int, int] = {}
        self._cached: Mapping[int, tuple[torch.Tensor, int]] = {}
        self._narrow: Mapping[int, tuple[int, int]] = {}
        self.merged: torch.Tensor | None = None  # (U, N) long, by a merge stage

    def fill(
        self,
        alive: list[torch.Tensor],
        widths: list[int],
        masses: list[torch.Tensor | None],
        frozen: Mapping[int, int],
        cached: Mapping[int, tuple[torch.Tensor, int]],
        narrow: Mapping[int, tuple[int, int]],
    ) -> None:
        """Set per layer the (B, N) mask, how many slots per row it held, and the (U, N) masses (None: all 1).

        ``frozen``: the slots per row that a layer computed which visual tokens passed as they were. ``cached``: of a
        layer whose cache was thinned, the (B, N, G) mask of what it holds, and slots per row. ``narrow``: of a layer
        whose MLP gave visual tokens a part of its channels, how many tokens of all rows, and how many channels.
        """
        self._alive, self._widths, self._masses = alive, widths, masses
        self._frozen, self._cached, self._narrow = frozen, cached, narrow

    def note_heirs(self, into: torch.Tensor) -> None:
        """(U, N) long: who took over those that the last choice dropped and that no method has merged."""
        last = self.choices[-1]
        merged = into if last.into is None else torch.where(last.into >= 0, last.into, into)
        self.choices[-1] = replace(last, into=torch.where(last.candidates, merged, -1))

    def alive(self, layer: int) -> torch.Tensor:
        """(B, N) bool: prompt positions that are alive in decoder layer ``layer``; padding never is.

        Raises:
            ConfigError: for a layer outside the model.
        """
        if not 0 <= layer < self.depth:
            raise ConfigError(f"layer={layer}: this model has decoder layers 0 … {self.depth - 1}")
        return self.visual | self.attended if self._alive is None else self._alive[layer]

    def cached(self, layer: int) -> torch.Tensor:
        """(B, N, G) bool: prompt positions whose keys and values decoder layer ``layer`` holds behind the prefill, in
        each of its G key heads; G is 1 where all hold what was alive.

        Raises:
            ConfigError: for a layer outside the model.
        """
        alive = self.alive(layer)[..., None]
        return self._cached[layer][0] if layer in self._cached else alive

    def frozen(self, layer: int) -> torch.Tensor:
        """(B, N) bool: tokens that are alive in ``layer`` but leave it as they entered; others attend to them there.

        Raises:
            ConfigError: for a layer outside the model.
        """
        alive = self.alive(layer)
        return alive & self.visual if layer in self._frozen else torch.zeros_like(alive)

    def mass(self, layer: int) -> torch.Tensor:
        """(B, N) float: how many original tokens each living token stands for in ``layer``; 0 where none is alive.

        Raises:
            ConfigError: for a layer outside the model.
        """
        alive, mass = self.alive(layer).float(), self._masses[layer]
        return alive if mass is None else torch.where(self.visual, self.units.scatter(mass) * alive, alive)

    def sources(self) -> torch.Tensor:
        """(B, N) long: the prompt position of the token that each visual token merged into inside the vision tower; its
        own where it stands for itself, -1 for text and for tokens without a patch, which are left out."""
        here = torch.arange(self.visual.shape[1], device=self.visual.device).expand_as(self.visual)
        if self.merged is None:
            return torch.where(self.visual, here, -1)
        units = self.units
        places = units.slots.gather(1, self.merged.clamp_min(0).to(units.slots.device)).to(self.merged.device)
        return units.scatter(torch.where(self.merged >= 0, places, -1) + 1) - 1

    @property
    def dropped(self) -> bool:
        """Whether any visual token is missing in any layer, or in its cache."""
        return any(bool((self.visual[..., None] & ~self.cached(layer)).any()) for layer in range(self.depth))

    def grid(self) -> torch.Tensor:
        """(B, N, 4) long: (image of the row, t, row, col) of each visual token; -1 for text and where unknown."""
        out = torch.full((*self.visual.shape, 4), -1, device=self.visual.device)
        units = self.units
        for u, image in enumerate(units.ordinal):
            slots = units.slots[u][units.valid[u]]
            out[units.row[u], slots, 0] = image
            out[units.row[u], slots, 1:] = units.grid[u][units.valid[u]]
        return out

    def kept(self) -> list[list[int]]:
        """Tokens alive per decoder layer (outer) and image (inner)."""
        masks = [self.units.gather(self.alive(layer)[..., None])[..., 0] for layer in range(self.depth)]
        return [mask.sum(1).tolist() for mask in masks]

    def tokens(self) -> list[int]:
        """Slots each decoder layer held per row, and cached unless a cache stage thinned them: text, visual tokens and
        padding."""
        return list(self._widths)

    def computed(self) -> list[int]:
        """Slots each decoder layer made queries, outputs and MLP of, per row; the same but for frozen tokens."""
        return [self._frozen.get(layer, width) for layer, width in enumerate(self._widths)]

    def narrow(self) -> dict[int, tuple[int, int]]:
        """By decoder layer whose MLP gave visual tokens a part of its channels: tokens of all rows, and channels."""
        return dict(self._narrow)

    def cached_tokens(self) -> list[int]:
        """Slots each decoder layer has in its cache per row behind the prefill: text, visual tokens and padding."""
        return [self._cached[i][1] if i in self._cached else width for i, width in enumerate(self._widths)]

    def cached_counts(self) -> list[list[int]]:
        """Visual tokens in the cache behind the prefill, per decoder layer (outer) and image (inner), in each head."""
        masks = [self.units.gather(self.cached(layer)[..., 0][..., None])[..., 0] for layer in range(self.depth)]
        return [mask.sum(1).tolist() for mask in masks]
