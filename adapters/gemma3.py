"""Gemma 3: SigLIP tower, average-pooled to a square of ``mm_tokens_per_image``; masks built by the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Adapter, Record, square


class Gemma3Adapter(Adapter):
    """Gemma 3."""

    model_types = ("gemma3",)
    own_mask = True

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.cat(list(patches))
        pooled = round(self.base.config.mm_tokens_per_image**0.5)
        block = round(x.shape[1] ** 0.5) // pooled
        x = x.view(len(x), pooled, block, pooled, block, -1).transpose(2, 3)
        return list(x.flatten(3, 4).flatten(1, 2))
