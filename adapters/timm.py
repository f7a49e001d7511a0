"""timm's ``VisionTransformer``: ViT, DeiT, AugReg, SigLIP and others of its class."""

from __future__ import annotations

import functools
from typing import Any

import torch

from visiontok import _torchvision as _torchvision

from .encoder import Block, Encoder, refusal


class TimmEncoder(Encoder):
    """Any pooling: behind the last norm every patch has its token again, so means and attention weigh by size."""

    mask = "attn_mask"

    def attention_width(self) -> int:
        attention: Any = self.blocks[0].attention
        return int(attention.num_heads * attention.head_dim)


def timm_encoder(model: Any) -> TimmEncoder:
    """The parts of a model of timm.

    Raises:
        UnsupportedError: for another architecture than ``VisionTransformer``, or other blocks than plain ones.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block as TimmBlock
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise refusal(model, "it is no timm VisionTransformer")
    for block in model.blocks:
        if type(block) is not TimmBlock or type(block.attn) is not Attention:
            raise refusal(model, f"its blocks are {type(block).__name__} with {type(block.attn).__name__}")
        if not hasattr(block.attn, "k_norm"):
            raise refusal(model, "its attention does not show its keys; update timm")
    mean = functools.partial(torch.mean, dim=1)
    stack: Any = model.blocks
    blocks = [Block(b, b.attn, b.mlp, b.norm2, b.attn.k_norm, mean) for b in stack]
    return TimmEncoder(model, blocks, prefix=model.num_prefix_tokens, end=model.norm, holder=model)
