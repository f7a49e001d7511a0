"""CLIP and SigLIP towers of transformers, alone or in a vision-language model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .encoder import Block, Encoder, refusal

_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # with the number of their CLS tokens
_ALONE = ("clip", "siglip")


class TransformersEncoder(Encoder):
    """``CLIPEncoder`` and ``SiglipEncoder``."""

    def whole(self, output: Any, spread: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        changed = copy.copy(output)
        changed.last_hidden_state = spread(output.last_hidden_state)
        return changed

    def attention_width(self) -> int:
        attention: Any = self.blocks[0].attention
        return int(attention.num_heads * attention.head_dim)


def tower_encoder(tower: nn.Module) -> TransformersEncoder | None:
    """The parts of a CLIP or SigLIP tower; None if there is none in ``tower``.

    Raises:
        UnsupportedError: if its attention takes no mask of numbers.
    """
    for module in tower.modules():
        config: Any = getattr(module, "config", None)
        layers = getattr(module, "layers", None)
        if getattr(config, "model_type", None) not in _TOWERS or not isinstance(layers, nn.ModuleList):
            continue
        kernel = config._attn_implementation
        if kernel not in ("eager", "sdpa"):
            raise refusal(
                tower, f"attn_implementation={kernel!r} takes no bias per key; load the vision tower with 'sdpa'"
            )
        return TransformersEncoder(
            tower,
            [_block(layer) for layer in layers],
            prefix=_TOWERS[config.model_type],
            end=module,
            holder=layers[0],
        )
    return None


def plain_encoder(model: Any) -> TransformersEncoder | None:
    """The parts of the vision half of a CLIP or SigLIP model; None for another one."""
    kind = getattr(model.config, "model_type", "")
    return tower_encoder(model) if kind in _TOWERS or kind in _ALONE else None


def _block(layer: Any) -> Block:
    attention = layer.self_attn
    metric = functools.partial(_mean_heads, attention.num_heads)
    return Block(layer, attention, layer.mlp, layer.layer_norm2, attention.k_proj, metric)


def _mean_heads(heads: int, keys: torch.Tensor) -> torch.Tensor:
    """(B, N, H · d) → (B, N, d)."""
    return keys.unflatten(-1, (heads, -1)).mean(-2)
