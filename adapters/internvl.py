"""InternVL: tiles of one image stand side by side in the prompt; 2 × 2 patches become one token by pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import IMAGENET_STATISTICS, Adapter, Record, square


class InternVLAdapter(Adapter):
    """InternVL 2.5, 3, 3.5; in a grid, t counts the tiles of an image."""

    model_types = ("internvl",)
    fixed_pictures = "its processor cuts pictures into tiles of a fixed size (let it cut fewer)"
    inseparable = ""
    unmergeable = "its pixel shuffle makes one token of several patches"
    cls_token = True
    join_adjacent = True
    pixel_statistics = IMAGENET_STATISTICS

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.cat(list(patches))
        n = round(x.shape[1] * self.base.config.downsample_ratio**2)
        if x.shape[1] != len(record.output.pooler_output[0]):  # before the pixel shuffle
            side = round(x.shape[1] ** 0.5)
            x = self.base.pixel_shuffle(x.view(-1, side, side, x.shape[2]), self.base.config.downsample_ratio)
            return list(x.reshape(len(x), n, -1, x.shape[-1] // round(self.base.config.downsample_ratio**-2)))
        return list(x[:, :, None])
