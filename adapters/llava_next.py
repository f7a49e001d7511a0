"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail plus crops that the model re-tiles, unpads and ends with newlines.

Where a token ends up is the business of the model's own packing code; it is asked by packing scores instead of
features, with NaN for the newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from visiontok.errors import UnsupportedError

from .base import Adapter, Record, raster, square
from .encoder import Encoder
from .transformers_encoder import tower_encoder


class LlavaNextAdapter(Adapter):
    """LLaVA-NeXT (1.6); in a grid, t = 0 is the thumbnail, t = 1 the tiled picture without padding."""

    model_types = ("llava_next",)
    fixed_pictures = "its processor cuts pictures into tiles of a fixed size (let it cut fewer)"
    inseparable = ""
    thumbnail = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        if self.cls_token and self.base.config.vision_feature_select_strategy == "full":
            raise UnsupportedError(
                f"{self.base.config.model_type}: vision_feature_select_strategy='full' keeps the CLS token of every "
                "crop, which the model itself cannot tile; set it to 'default'"
            )

    @property
    def cls_token(self) -> bool:  # type: ignore[override]
        """CLIP towers begin with a CLS token, SigLIP towers have none."""
        return self.base.config.vision_config.model_type.startswith("clip")

    def encoder(self) -> Encoder:
        found = None
        if isinstance(self.base.config.vision_feature_layer, int):
            found = tower_encoder(self.base.vision_tower)
        return super().encoder() if found is None else found

    def tiles(self, record: Record) -> list[tuple[int, int]]:
        if record.modality == "video":
            raise UnsupportedError(
                f"{self.base.config.model_type}: the patches of a video frame are pooled behind the vision tower, so "
                "that all of them are needed; use a method that merges or drops tokens behind it, such as 'aim_merge'"
            )
        return [(len(grid), n) for grid, n in zip(self.grids(record), self._crops(record), strict=True)]

    def _per_crop(self) -> int:
        vision = self.base.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def _crops(self, record: Record) -> list[int]:
        """Crops of each image, thumbnail included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.base.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in record.inputs["image_sizes"]
        ]

    def grids(self, record: Record) -> list[torch.Tensor]:
        crops = [torch.zeros(n, self._per_crop(), 1) for n in self._crops(record)]
        return [self._grid(packed[:, 0].isnan()) for packed in self._pack(record, crops)]

    def _grid(self, newline: torch.Tensor) -> torch.Tensor:
        """(n, 3) grid from the positions of the newlines: they end the rows of everything after the thumbnail."""
        thumbnail, rest = square(self._per_crop()), newline[self._per_crop() :]
        row = rest.long().cumsum(0) - rest.long()
        start = torch.zeros_like(row)
        ends = torch.nonzero(rest).flatten()
        for r, end in enumerate(ends[:-1].tolist(), 1):
            start[row == r] = end + 1
        column = torch.arange(len(rest)) - start
        tiled = torch.stack([torch.ones_like(row), row, column], 1).masked_fill(rest[:, None], -1)
        return torch.cat([thumbnail, tiled])

    def alone(self, record: Record) -> list[dict[str, Any]]:
        inputs, counts = record.inputs, self._crops(record)
        pictures = inputs["pixel_values"]
        if pictures.ndim == 4:  # crops behind one another
            crops = list(pictures.split(counts))
        else:
            crops = [x[None, :n] for x, n in zip(pictures, counts, strict=True)]
        return [
            {**inputs, "pixel_values": x, "image_sizes": inputs["image_sizes"][i : i + 1]} for i, x in enumerate(crops)
        ]

    def crops(self, record: Record) -> list[torch.Tensor]:
        pictures = record.inputs["pixel_values"]
        if pictures.ndim == 4:  # not tiled, or already without the padding
            return [pictures]
        return [torch.cat([x[:n] for x, n in zip(pictures, self._crops(record), strict=True)])]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        crops = torch.cat(list(patches)).split(self._crops(record))
        return [item[:, None] for item in self._pack(record, list(crops))]

    def _pack(self, record: Record, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        packed, _ = self.base.pack_image_features(
            crops,
            record.inputs["image_sizes"],
            vision_feature_select_strategy=self.base.config.vision_feature_select_strategy,
            image_newline=crops[0].new_full(crops[0].shape[2:], torch.nan),
        )
        return packed


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """LLaVA-OneVision; a picture among several of one prompt is not tiled, a video frame is pooled 2 × 2."""

    model_types = ("llava_onevision",)

    def _crops(self, record: Record) -> list[int]:
        sizes = record.inputs["image_sizes"]
        batch = record.inputs.get("batch_num_images")
        alone = [True] * len(sizes) if batch is None else [n == 1 for n in batch for _ in range(int(n))]
        return [n if tiled else 1 for n, tiled in zip(super()._crops(record), alone, strict=True)]

    def alone(self, record: Record) -> list[dict[str, Any]]:
        found, together = super().alone(record), record.inputs.get("batch_num_images")
        if together is None:
            return found
        # how many stand in its prompt says whether a picture is tiled
        numbers = [torch.as_tensor([n]) for n in torch.as_tensor(together).tolist() for _ in range(n)]
        return [{**one, "batch_num_images": n} for one, n in zip(found, numbers, strict=True)]

    def grids(self, record: Record) -> list[torch.Tensor]:
        if record.modality == "image":
            return super().grids(record)
        frames = record.inputs["pixel_values_videos"].shape[1]
        return [self._video_grid(len(item), frames) for item in record.output.pooler_output]

    def _video_grid(self, n: int, frames: int) -> torch.Tensor:
        side = round(((n - 1) / frames) ** 0.5)
        return torch.cat([raster(frames, side, side), torch.full((1, 3), -1)])

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if record.modality == "image":
            return super().group(record, patches)
        x = torch.cat(list(patches))
        pooled = self.base.apply_pooling(x).reshape(len(record.output.pooler_output), -1, x.shape[-1])
        newline = pooled.new_full((len(pooled), 1, x.shape[-1]), torch.nan)
        return list(torch.cat([pooled, newline], 1)[:, :, None])

    def _pack(self, record: Record, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        aspect: dict[str, Any] = {}
        if record.inputs.get("vision_aspect_ratio") is not None:
            aspect["vision_aspect_ratio"] = record.inputs["vision_aspect_ratio"]
        packed, _ = self.base.pack_image_features(
            crops,
            record.inputs["image_sizes"],
            image_newline=crops[0].new_full(crops[0].shape[2:], torch.nan),
            **aspect,
        )
        return packed
