"""PaliGemma: SigLIP tower, one square crop per image, prefix-LM mask built by the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Adapter, Record, square
from .encoder import Encoder
from .transformers_encoder import tower_encoder


class PaliGemmaAdapter(Adapter):
    """PaliGemma, PaliGemma 2."""

    model_types = ("paligemma",)
    own_mask = True
    fixed_pictures = ""
    inseparable = ""
    fixed_units = ""
    fixed_layers = ""

    def encoder(self) -> Encoder:
        found = tower_encoder(self.base.vision_tower)
        return super().encoder() if found is None else found

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.cat(list(patches))[:, :, None])
