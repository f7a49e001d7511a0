"""Muon in float32, for training small transformers on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: five quintic Newton-Schulz steps.

    Args:
        update: (M, R, C), a stack of matrices.

    Returns:
        (M, R, C), singular values near one.

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    tall = update.shape[1] > update.shape[2]
    x = update.transpose(1, 2) if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Muon for hidden matrices, AdamW for everything else.

    `torch.optim.Muon` iterates in bfloat16, which CPUs without AMX multiply several times slower than float32; here
    matrices of one shape are also orthogonalised in one batched product.

    Args:
        matrices: 2-D weights of hidden layers.
        rest: embeddings, norms, biases, convolutions, heads.
        momentum: of the matrices' update.
        weight_decay: of everything that is not a vector.
        rest_ratio: AdamW's learning rate as a share of Muon's.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        rest_ratio: float = 0.5,
    ):
        self.momentum, self.weight_decay, self.rest_ratio = momentum, weight_decay, rest_ratio
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in matrices:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        others = list(rest)
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self.parameters = [p for group in self.groups for p in group] + others

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter at learning rate `rate`."""
        for settings in self.adam.param_groups:
            settings["lr"] = rate * self.rest_ratio
        self.adam.step()
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])  # (M, R, C)
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            # The factor gives an update the root mean square of AdamW's, so that one rate serves both.
            scale = 0.2 * max(gradient.shape[1:]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(direction, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for buffer, stored in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(stored)
        self.adam.load_state_dict(state["adam"])
