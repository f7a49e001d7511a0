"""Mistral 3: Pixtral tower over all images packed in one sequence, then a spatial merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from visiontok.errors import UnsupportedError

from .base import Adapter, Record, Shape, downsampled, raster, unpadded


class Mistral3Adapter(Adapter):
    """Mistral Small 3.1 and later, native resolution; image rows are separated by break tokens, which are text."""

    model_types = ("mistral3",)
    fixed_pictures = ""
    inseparable = ""
    unmergeable = "its patch merger makes one token of several patches"

    def _sizes(self, record: Record) -> list[tuple[int, int]]:
        """Rows and columns of language-model tokens per image."""
        config = self.base.config
        unit = config.vision_config.patch_size * config.spatial_merge_size
        return [(int(h) // unit, int(w) // unit) for h, w in record.inputs["image_sizes"]]

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [raster(1, h, w) for h, w in self._sizes(record)]

    def shapes(self, record: Record) -> list[Shape]:
        return [(1, h, w) for h, w in self._sizes(record)]

    def smaller(self, record: Record, shapes: Sequence[Shape]) -> dict[str, Any]:
        if shapes == [(1, 1, 1)]:
            raise UnsupportedError(
                f"{self.base.config.model_type}: it cannot encode one picture of one token; raise keep, or take "
                "'m3_pool', which pools tokens behind the tower"
            )
        unit = self.base.config.vision_config.patch_size * self.base.config.spatial_merge_size
        sizes = [(h * unit, w * unit) for _, h, w in shapes]
        pictures = record.inputs["pixel_values"]
        smaller = pictures.new_zeros(*pictures.shape[:2], *(max(side) for side in zip(*sizes, strict=True)))
        for place, picture, (h, w) in zip(smaller, self.crops(record), sizes, strict=True):
            place[:, :h, :w] = picture[0] if picture.shape[-2:] == (h, w) else downsampled(picture, h, w)[0]
        return {"pixel_values": smaller, "image_sizes": torch.tensor(sizes)}

    def alone(self, record: Record) -> list[dict[str, Any]]:
        return [unpadded(one) for one in super().alone(record)]

    def crops(self, record: Record) -> list[torch.Tensor]:
        merged = self.base.config.vision_config.patch_size * self.base.config.spatial_merge_size
        sizes = [(h * merged, w * merged) for h, w in self._sizes(record)]
        pictures = record.inputs["pixel_values"]
        return [x[None, :, :h, :w] for x, (h, w) in zip(pictures, sizes, strict=True)]

    def project(self, projector: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        config = self.base.config
        unit = config.vision_config.patch_size * config.spatial_merge_size
        return projector(tokens.flatten(0, 1), [(len(tokens) * unit, unit)])  # one picture, one token wide

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        merge = self.base.config.spatial_merge_size
        x = torch.cat([p.flatten(0, 1) for p in patches])
        sizes = self._sizes(record)
        images = x.split([h * w * merge * merge for h, w in sizes])
        return [
            image.view(h, merge, w, merge, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            for image, (h, w) in zip(images, sizes, strict=True)
        ]
