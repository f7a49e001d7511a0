"""What visiontok must know about a stack of transformer blocks to merge tokens between their attention and their MLP.

Vision towers of Hugging Face models, timm's and open_clip's vision transformers have the same parts under other names.
Only pre-norm blocks with global self-attention and absolute positions will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from visiontok.errors import UnsupportedError


@dataclass(frozen=True)
class Block:
    """The parts of one block; x is (B, N, D).

    Attributes:
        layer: the whole block, called with x and returning x.
        attention: the module that takes the mask of its keys.
        mlp: the module behind the second norm; each token for itself.
        norm: the second norm, called once, with all that has passed the attention.
        keys: a module on the way to the attention.
        metric: what ``keys`` returned → (B, N, d), the mean over heads of the keys.
    """

    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module
    norm: nn.Module
    keys: nn.Module
    metric: Callable[[torch.Tensor], torch.Tensor]


class Encoder:
    """A stack of blocks, and what stands around it.

    Args:
        model: the module that holds the stack.
        blocks: in the order in which they run.
        prefix: tokens in front of the patches: CLS, registers.
        end: the module behind the blocks whose output is to have every token again.
        holder: the module that says whether gradients are checkpointed.

    Attributes:
        mask: name of the keyword under which an attention module takes a bias per key.
        per_key: whether that is (B, N); otherwise (B, 1, 1, N).
    """

    mask: ClassVar[str] = "attention_mask"
    per_key: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], *, prefix: int, end: nn.Module, holder: nn.Module
    ) -> None:
        self.model, self.blocks, self.prefix, self.end, self.holder = model, list(blocks), prefix, end, holder

    def checkpoints(self) -> bool:
        """Whether blocks run again in the backward pass."""
        names = ("grad_checkpointing", "gradient_checkpointing")
        return self.holder.training and any(getattr(self.holder, name, False) for name in names)

    def whole(self, output: Any, spread: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """What ``end`` returned, with ``spread`` applied to its tokens."""
        return spread(output)

    def costs(self) -> tuple[int, int, int]:
        """FLOPs of one block: per token in the attention, per pair of tokens, and per token in the MLP."""
        block = self.blocks[0]
        projected = sum(p.numel() for p in block.attention.parameters() if p.ndim == 2)
        inner = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
        return 2 * projected, 4 * self.attention_width(), 2 * inner

    def attention_width(self) -> int:
        """Heads times their width."""
        raise NotImplementedError


def refusal(model: nn.Module, why: str) -> UnsupportedError:
    """The error for an encoder in which no tokens can be merged."""
    return UnsupportedError(
        f"{type(model).__name__}: its tokens cannot be merged, because {why}; vision transformers of pre-norm blocks "
        "with global attention and absolute positions can be compressed"
    )
