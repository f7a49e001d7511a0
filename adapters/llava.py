"""LLaVA-1.5 and ViP-LLaVA: one fixed square crop per image, CLIP tower with a CLS token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Adapter, Record, square


class LlavaAdapter(Adapter):
    """LLaVA-1.5, ViP-LLaVA."""

    model_types = ("llava", "vipllava")

    @property
    def cls_token(self) -> bool:  # type: ignore[override]
        """CLIP towers begin with a CLS token, SigLIP towers (some LLaVA derivatives) have none."""
        return self.base.config.vision_config.model_type.startswith("clip")

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.cat(list(patches))[:, :, None])
