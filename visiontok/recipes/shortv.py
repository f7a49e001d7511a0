"""ShortV: in layers that do little for them, visual tokens pass as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..method import Card, Contract, Layer, Method, Stage
from ._cuts import listed

_PUBLISHED = ((0.0, 1 / 32), (2 / 32, 4 / 32), (12 / 32, 13 / 32), (17 / 32, 1.0))


@dataclass(frozen=True)
class ShortV(Method):
    """Frozen visual tokens.

    Attributes:
        layers: decoder layers in which visual tokens are frozen, indices or fractions of the depth; None for the
            published ones, which are those of a model of 32 layers, at the same depth.
    """

    layers: tuple[Layer, ...] | None = None

    card: ClassVar[Card] = Card(
        name="shortv",
        title="let visual tokens pass as they are through the decoder layers that do least for them",
        paper="arXiv 2504.00502",
        venue="ICCV 2025",
        formula="h_i' = h_i for visual tokens i in the listed layers; text attends to their keys and values W_K h_i, "
        "W_V h_i",
        stage="decoder",
        needs="nothing",
        official="19 of 32 layers of LLaVA-1.5-7B, in the order in which they change the last token's distribution "
        "least: 31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19; for LLaVA-NeXT-7B: 31, 29, "
        "30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2. Batch 1, one image at a fixed place.",
        departures="Any number of rows and images. No token is dropped: caches are as long as ever, and it composes "
        "with methods that drop some. Other depths freeze the same parts of it; calibrate instead.",
        defaults="layers=None: 0, 2-3, 12 and 17-31 of 32, for every family.",
        cost="none; in a frozen layer a visual token costs its keys and values",
        budget=False,
        contract=Contract(),
    )

    def __post_init__(self) -> None:
        if self.layers is not None:
            listed(self, "layers")
            if not self.layers:
                raise ConfigError("layers=(): name at least one layer to freeze, or None for the published ones")

    def stages(self) -> tuple[Stage, ...]:
        if self.layers is None:
            return tuple(Stage(kind="freeze", layer=first, until=until) for first, until in _PUBLISHED)
        return tuple(Stage(kind="freeze", layer=layer) for layer in self.layers)
