"""Molmo 2: tiles pooled by an index table; every visual token of the prompt sees every other."""

from __future__ import annotations

from .base import Adapter


class Molmo2Adapter(Adapter):
    """Molmo 2."""

    model_types = ("molmo2",)
    own_mask = True

    def placeholders(self) -> dict[str, int]:
        return dict.fromkeys(("image", "video"), self.base.config.image_patch_id)
