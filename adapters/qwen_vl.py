"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4V and their kin: native resolution, 2 × 2 patch merger, M-RoPE."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from .base import HALF_STATISTICS, Adapter, Record, Shape, downsampled, raster
from .parts import Layers, Part, hooked, packed

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class QwenVLAdapter(Adapter):
    """Qwen2-VL: full attention in every tower block; Qwen3.5, whose language model has linear attention too."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen3_5", "qwen3_5_moe")
    tower = "visual"
    projector = "visual.merger"
    fixed_pictures = ""
    inseparable = ""
    fixed_units = ""
    fixed_layers = ""
    no_rebuild = ""
    unmergeable = "its patch merger makes one token of several patches"

    def _thw(self, record: Record) -> Any:
        return record.inputs[f"{record.modality}_grid_thw"]

    def grids(self, record: Record) -> list[torch.Tensor]:
        merge = self.base.visual.spatial_merge_size
        return [raster(t, h // merge, w // merge) for t, h, w in self._thw(record).tolist()]

    def shapes(self, record: Record) -> list[Shape]:
        merge = self.base.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in self._thw(record).tolist()]

    def smaller(self, record: Record, shapes: Sequence[Shape]) -> dict[str, Any]:
        grid, pixels = f"{record.modality}_grid_thw", _PIXELS[record.modality]
        merge, before = self.base.visual.spatial_merge_size, self.shapes(record)
        patches = record.inputs[pixels].split([t * h * w * merge**2 for t, h, w in before])
        resized = [
            x if old == new else self._resized(x, old, new) for x, old, new in zip(patches, before, shapes, strict=True)
        ]
        thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in shapes])
        return {pixels: torch.cat(resized), grid: thw}

    def _resized(self, patches: torch.Tensor, old: Shape, new: Shape) -> torch.Tensor:
        """Patches as the processor lays them out → those of the picture with ``new`` tokens."""
        vision = self.base.config.vision_config
        merge, side, frames = self.base.visual.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        t, h, w = old
        # (t, rows, columns, rows and columns in a token, channels, frames, rows and columns in a patch)
        x = patches.reshape(t, h, w, merge, merge, -1, frames, side, side)
        x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).flatten(6).flatten(3, 5).flatten(0, 1)  # (t · frames, C, H, W)
        unit = merge * side
        x = downsampled(x, new[1] * unit, new[2] * unit)
        x = x.view(t, frames, -1, new[1], merge, side, new[2], merge, side)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, patches.shape[1])

    def alone(self, record: Record) -> list[dict[str, Any]]:
        thw = self._thw(record)
        patches = record.inputs["pixel_values"].split(thw.prod(1).tolist())
        return [{**record.inputs, "pixel_values": x, "image_grid_thw": thw[i : i + 1]} for i, x in enumerate(patches)]

    def units(self, record: Record) -> list[torch.Tensor]:
        vision, merge, shapes = self.base.config.vision_config, self.base.visual.spatial_merge_size, self.shapes(record)
        patches = record.inputs[_PIXELS[record.modality]]
        frames = patches.view(-1, merge**2, 3, vision.temporal_patch_size, vision.patch_size**2)
        frames = frames if record.modality == "video" else frames[:, :, :, :1]
        pixels = frames.flatten(3).transpose(1, 2).split([t * h * w for t, h, w in shapes])
        return [x.unflatten(0, shape) for x, shape in zip(pixels, shapes, strict=True)]

    def parts(self, record: Record, kept: Sequence[torch.Tensor]) -> list[Part]:
        visual, pixels = self.base.visual, record.inputs[_PIXELS[record.modality]]
        merge = visual.spatial_merge_size
        told, lengths = packed(visual, self._thw(record).cpu(), kept)
        rows = torch.cat(list(kept)).repeat_interleave(merge**2).nonzero()[:, 0]
        # With positions and borders told, the grid only says how many tokens each item has.
        grid = torch.tensor([(1, merge, merge * int(mask.sum())) for mask in kept])
        changes = {_PIXELS[record.modality]: pixels[rows.to(pixels.device)], f"{record.modality}_grid_thw": grid}
        within = functools.partial(self._within, record, kept)
        return [Part(list(range(len(kept))), changes | told, lengths, within)]

    def layers(self, record: Record) -> Layers:
        visual = self.base.visual
        readers = [*getattr(visual, "deepstack_merger_list", ()), visual.merger]
        sizes = [t * h * w for t, h, w in self.shapes(record)]
        return Layers(
            visual.blocks, readers, ("norm2", "mlp"), visual.spatial_merge_size**2, 0, sizes, self._unit_order
        )

    def _within(self, record: Record, kept: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """The hooks that the tower needs beside its keyword arguments."""
        return contextlib.nullcontext()

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [len(g) for g in self.grids(record)]
        x = torch.cat([p.flatten(0, 1) for p in patches])
        x = x.view(sum(sizes), -1, x.shape[-1])  # patches of one merge unit are neighbours
        order = self._unit_order(record)
        if order is not None:
            x = torch.empty_like(x).index_copy_(0, order.to(x.device), x)
        return list(x.split(sizes))

    def pixels(self, record: Record) -> list[torch.Tensor]:
        sizes = [len(g) for g in self.grids(record)]
        patches = record.inputs[_PIXELS[record.modality]]
        vision, merge = self.base.config.vision_config, self.base.visual.spatial_merge_size**2
        frames = patches.view(sum(sizes), merge, 3, vision.temporal_patch_size, -1)
        return list(frames[:, :, :, 0].transpose(1, 2).flatten(2).split(sizes))  # units in order: windows come later

    def project(self, projector: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return projector(tokens.flatten(0, 1))

    def _unit_order(self, record: Record) -> torch.Tensor | None:
        """(units,) long: raster index of each merge unit in the order the tower processes them; None if in order."""
        return None


class Glm4vAdapter(QwenVLAdapter):
    """GLM-4V, GLM-4.5V, GLM-4.6V, GLM-OCR: the frames of a video stand at image placeholders."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr")
    fixed_layers = "a convolution reads its last layer, before which units that left would have to come back"

    def placeholders(self) -> dict[str, int]:
        return dict.fromkeys(("image", "video"), self.base.config.image_token_id)

    def _within(self, record: Record, kept: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Learned positions are interpolated by coordinates in the true size of the picture that a patch belongs to."""
        embeddings = getattr(self.base.visual, "embeddings", None)
        if embeddings is None:  # GLM-OCR has rotary positions alone
            return contextlib.nullcontext()
        merge, thw = self.base.visual.spatial_merge_size, self._thw(record)
        lengths = torch.tensor([int(mask.sum()) * merge**2 for mask in kept])

        thread = threading.get_ident()

        def tell(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != thread:
                return None
            states, _, _, *coordinates = args
            return states, lengths.to(states.device), thw.to(states.device), *coordinates

        return hooked(embeddings.register_forward_pre_hook(tell))


class Qwen25VLAdapter(QwenVLAdapter):
    """Qwen2.5-VL, Qwen2.5-Omni, EXAONE 4.5: the tower works window by window, permuted until after the merger."""

    model_types = ("qwen2_5_vl", "qwen2_5_omni_thinker", "exaone4_5")

    def full_attention(self, depth: int) -> tuple[int, ...]:
        return tuple(self.base.config.vision_config.fullatt_block_indexes)

    def _unit_order(self, record: Record) -> torch.Tensor:
        from transformers.vision_utils import get_vision_window_index

        if "window_index" in record.inputs:  # some units alone
            told: torch.Tensor = record.inputs["window_index"]
            return told
        visual = self.base.visual
        order, _ = get_vision_window_index(
            self._thw(record),
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return order


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL, Qwen3-Omni, Cohere Compass, Cosmos 3 Omni: tower levels join the first decoder layers (DeepStack)."""

    model_types = ("qwen3_vl", "qwen3_vl_moe", "cohere_compass", "cosmos3_omni", "qwen3_omni_moe_thinker")
    deepstack = ("visual_pos_masks", "deepstack_visual_embeds")
    pixel_statistics = HALF_STATISTICS
