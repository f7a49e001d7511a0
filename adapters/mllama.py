"""Llama 3.2 Vision (Mllama): decoder layers of their own attend to the tiles of all images of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Adapter, Record, raster


class MllamaAdapter(Adapter):
    """Mllama; in a grid, t counts the tiles of an image. Every tile begins with a CLS token, which has no place.

    The tower's class tokens, one per tile, each look at all tiles, so there is no attention of *the* CLS token.
    """

    model_types = ("mllama",)
    tower = "vision_model"
    cross_attention = True
    fixed_pictures = "its processor cuts pictures into tiles of a fixed size (let it cut fewer)"
    notes = (
        "Mllama: tiles that are padding go together with the first token that is dropped, and rows without an image "
        "then skip cross-attention, as they do in a batch without images; the stock model lets both have an influence"
    )

    def _tiles(self, record: Record) -> torch.Tensor:
        """(B, M, T) bool, tiles that show a part of a picture; aspect ratio 0 marks a missing image."""
        tiles, ratio = record.inputs["aspect_ratio_mask"], record.inputs["aspect_ratio_ids"]
        return tiles.bool() & (ratio > 0)[..., None]

    def columns(self, record: Record) -> torch.Tensor:
        return self._tiles(record).repeat_interleave(self.base.vision_model.num_patches, 2)

    def grids(self, record: Record) -> list[torch.Tensor]:
        side = round((self.base.vision_model.num_patches - 1) ** 0.5)
        nowhere = torch.full((1, 3), -1)
        tiles = self._tiles(record)
        return [
            torch.cat([torch.cat([nowhere, raster(1, side, side) + torch.tensor([t, 0, 0])]) for t in shown.tolist()])
            for shown in (torch.nonzero(image).flatten() for image in tiles.flatten(0, 1) if bool(image.any()))
        ]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tiles = self._tiles(record).flatten(0, 1)
        x = torch.cat([p.reshape(*tiles.shape, -1, p.shape[-1]) for p in patches])
        x = x[:, :, : self.base.vision_model.num_patches]  # the tower pads every tile to a multiple of 8
        return [item[image].flatten(0, 1)[:, None] for item, image in zip(x, tiles, strict=True) if bool(image.any())]

    def pixels(self, record: Record) -> list[torch.Tensor]:
        size, tiles = self.base.config.vision_config.patch_size, self._tiles(record).flatten(0, 1)
        x = torch.nn.functional.unfold(self.crops(record)[0], size, stride=size).mT  # (images · tiles, patches, …)
        x = torch.nn.functional.pad(x, (0, 0, 1, 0), value=torch.nan).unflatten(2, (3, -1))
        items = x.unflatten(0, tiles.shape)  # (images, tiles, CLS and patches, 3, pixels)
        return [item[shown].flatten(0, 1) for item, shown in zip(items, tiles, strict=True) if bool(shown.any())]
