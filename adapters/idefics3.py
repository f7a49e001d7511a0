"""Idefics3 and SmolVLM: an image is cut into tiles whose tokens are separated by text; pixel shuffle merges patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import Adapter, Record, in_squares, square


class Idefics3Adapter(Adapter):
    """Idefics3, SmolVLM, SmolVLM 2."""

    model_types = ("idefics3", "smolvlm")
    fixed_pictures = "its processor cuts pictures into tiles of a fixed size (let it cut fewer)"
    inseparable = ""
    unmergeable = "its pixel shuffle makes one token of several patches"
    text = "text_model"
    tower = "vision_model"
    projector = "connector"
    notes = "a tile counts as an image: the model's inputs do not say which tiles belong together"

    def grids(self, record: Record) -> list[torch.Tensor]:
        # up to 5.17 one entry per tile, later one per prompt row
        total = sum(item.shape[:-1].numel() for item in record.output.pooler_output)
        per_tile = self._tokens_per_tile()
        return [square(per_tile) for _ in range(total // per_tile)]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x, connector = torch.cat(list(patches)), self.base.connector
        channels = x.shape[2]
        return list(connector.pixel_shuffle(x, connector.scale_factor).unflatten(-1, (-1, channels)))

    def alone(self, record: Record) -> list[dict[str, Any]]:
        """By prompt rows: what a run makes has an entry for each of them."""
        rows = super().alone(record)
        shown = [row["pixel_values"][0].flatten(1).any(1) for row in rows]  # the model leaves out empty tiles too
        return [
            {name: x[:, real] if torch.is_tensor(x) else x for name, x in row.items()}
            for row, real in zip(rows, shown, strict=True)
            if bool(real.any())
        ]

    def crops(self, record: Record) -> list[torch.Tensor]:
        tiles = record.inputs["pixel_values"].flatten(0, 1)
        return [tiles[tiles.flatten(1).any(1)]]  # the model leaves out empty tiles too

    def project(self, projector: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        side = math.ceil(len(tokens) ** 0.5)
        return projector(in_squares(tokens, side))[0, : len(tokens)]

    def _tokens_per_tile(self) -> int:
        config = self.base.config
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2


class Idefics2Adapter(Adapter):
    """Idefics2: a resampler gives every picture the same number of latents, which have no place in it."""

    model_types = ("idefics2",)
    text = "text_model"
    tower = "vision_model"
    projector = "connector"

    def grids(self, record: Record) -> list[torch.Tensor]:
        # up to 5.17 the latents of all pictures in one row
        pooled = record.output.pooler_output
        total = sum(item.shape[:-1].numel() for item in pooled)
        latents = self.base.config.perceiver_config.resampler_n_latents
        return [torch.full((latents, 3), -1) for _ in range(total // latents)]


class GraniteDoclingAdapter(Adapter):
    """Granite-Docling: tiles with fine or coarse tokens; features of tower levels are added as in DeepStack."""

    model_types = ("granite_docling",)
    text = "text_model"
    tower = "vision_model"
    projector = "vision_model.connector"
    deepstack = ("visual_pos_masks", "deepstack_visual_embeds")
    notes = "a tile counts as an image: the model's inputs do not say which tiles belong together"

    def grids(self, record: Record) -> list[torch.Tensor]:
        n = self.base.image_seq_len * (4 if record.inputs.get("tile_fine_mask") is not None else 1)
        return [torch.full((n, 3), -1) for item in record.output.pooler_output for _ in range(len(item) // n)]


class Emu3Adapter(Adapter):
    """Emu3: pictures become ids of a vector quantiser, embedded by the language model."""

    model_types = ("emu3",)
    text = "text_model"
    tower = "vqmodel"
    projector = None
