"""Gemma 3: SigLIP tower, average-pooled to a square of ``mm_tokens_per_image``; masks built by the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .base import Adapter, Record, in_squares, square


class Gemma3Adapter(Adapter):
    """Gemma 3, ShieldGemma 2."""

    model_types = ("gemma3", "shieldgemma2")
    own_mask = True
    fixed_pictures = "its patches are pooled to a fixed number of tokens, however many they are"
    inseparable = ""
    unmergeable = "its patches are pooled to a fixed number of tokens"

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.cat(list(patches))
        pooled = round(self.base.config.mm_tokens_per_image**0.5)
        block = round(x.shape[1] ** 0.5) // pooled
        x = x.view(len(x), pooled, block, pooled, block, -1).transpose(2, 3)
        return list(x.flatten(3, 4).flatten(1, 2))

    def project(self, projector: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        side = round(self.base.config.mm_tokens_per_image**0.5)
        return projector(in_squares(tokens, side)).flatten(0, 1)[: len(tokens)]


class Gemma3nAdapter(Adapter):
    """Gemma 3n: a convolutional tower, pooled to a square of tokens."""

    model_types = ("gemma3n",)
    projector = "embed_vision"
    token_inputs = ("per_layer_inputs",)

    @property
    def prompt_only(self) -> str:
        """The last layers share keys, and all work on four stacked states."""
        return "its decoder layers work on stacked states (AltUp)"

    def grids(self, record: Record) -> list[torch.Tensor]:
        return [square(len(item)) for item in record.output.pooler_output]


class Gemma4Adapter(Adapter):
    """Gemma 4: native resolution, patches are pooled in squares; masks built by the base model.

    The small models share keys across layers and feed each layer embeddings of its own; the large ones do neither.
    """

    model_types = ("gemma4",)
    projector = "embed_vision"
    own_mask = True
    token_inputs = ("per_layer_inputs",)

    @property
    def prompt_only(self) -> str:
        """Layers that are fed embeddings of their own get them as a slice the engine does not see."""
        if getattr(self.base.config.get_text_config(), "hidden_size_per_layer_input", 0):
            return "each of its decoder layers is fed token embeddings of its own"
        return super().prompt_only


class Gemma4UnifiedAdapter(Gemma4Adapter):
    """Gemma 4 without a vision tower: patches are embedded by a few linear maps."""

    model_types = ("gemma4_unified",)
    tower = "embed_vision"
