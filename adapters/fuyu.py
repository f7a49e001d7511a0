"""Fuyu: linear projections of raw patches stand in the prompt; there is no vision tower."""

from __future__ import annotations

import torch

from .base import Adapter, Record


class FuyuAdapter(Adapter):
    """Fuyu; the rows of a picture end with newlines, which are text."""

    model_types = ("fuyu",)
    tower = "vision_embed_tokens"
    projector = None

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [torch.full((len(item), 3), -1) for item in record.output.last_hidden_state]
