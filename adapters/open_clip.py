"""open_clip's models: the vision half of a CLIP, its own transformer or one of timm."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from visiontok import _torchvision as _torchvision

from .encoder import Block, Encoder, refusal
from .timm import timm_encoder


class OpenClipEncoder(Encoder):
    """open_clip's ``VisionTransformer``, whose attention is torch's ``MultiheadAttention``."""

    mask = "key_padding_mask"
    per_key = True

    def attention_width(self) -> int:
        attention: Any = self.blocks[0].attention
        return int(attention.embed_dim)


def open_clip_encoder(model: Any) -> Encoder:
    """The parts of the vision half of a model of open_clip, or of that half alone.

    Raises:
        UnsupportedError: if it is a convolutional network, a timm model that is refused, or has other blocks.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    visual = getattr(model, "visual", model)
    if isinstance(visual, TimmModel):
        return timm_encoder(visual.trunk)
    if not isinstance(visual, VisionTransformer):
        raise refusal(model, f"its vision half is {type(visual).__name__}")
    for block in visual.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or not block.attn.batch_first or hasattr(block, "ln_1_kv"):
            raise refusal(model, f"its blocks are {type(block).__name__} with {type(block.attn).__name__}")
    blocks = [
        Block(b, b.attn, b.mlp, b.ln_2, b.ln_1, functools.partial(_mean_keys, b.attn))
        for b in visual.transformer.resblocks
    ]
    return OpenClipEncoder(visual, blocks, prefix=1, end=visual.transformer, holder=visual.transformer)


def _mean_keys(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """The mean over heads of the keys of x (B, N, D); it is linear in x, so no key need be known.

    ``MultiheadAttention`` makes queries, keys and values in one step that no hook sees.
    """
    heads, width = attention.num_heads, attention.embed_dim
    weight = attention.in_proj_weight[width : 2 * width].unflatten(0, (heads, -1)).mean(0)
    bias = attention.in_proj_bias
    bias = None if bias is None else bias[width : 2 * width].unflatten(0, (heads, -1)).mean(0)
    return nn.functional.linear(x, weight, bias)
