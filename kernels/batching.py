"""Arguments of the operators brought to (B, N, …), and results brought back."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontok.errors import ConfigError

from .reference import Picks


def rows(x: Tensor, dims: int, name: str) -> Tensor:
    """``x`` with a batch dimension in front, where one unbatched row has ``dims`` dimensions.

    Raises:
        ConfigError: if ``x`` has neither ``dims`` nor ``dims + 1`` dimensions.
    """
    if x.dim() == dims:
        return x[None]
    if x.dim() != dims + 1:
        raise ConfigError(
            f"{name} has shape {tuple(x.shape)}: give {dims} dimensions, or {dims + 1} with the batch first"
        )
    return x


def mask(valid: Tensor | None, like: Tensor) -> Tensor:
    """``valid`` as (B, N) bool; all true if it is None. ``like`` is (B, N, …)."""
    if valid is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return rows(valid, 1, "valid").bool().expand(like.shape[:2])


def budget(k: int | Tensor, valid: Tensor) -> Tensor:
    """``k`` as (B,) long, at most the number of valid candidates of each row.

    Raises:
        ConfigError: if a budget on the host is below 1. One on a device is raised to 1: looking would synchronise.
    """
    counts = torch.as_tensor(k)
    if counts.device.type == "cpu" and bool((counts < 1).any()):
        raise ConfigError(f"k={counts.tolist()}: keep at least one token; give k >= 1")
    counts = counts.to(valid.device, torch.long).clamp_min(1)
    return torch.minimum(counts.expand(valid.shape[0]), valid.sum(-1))


def largest(k: int | Tensor, n: int) -> int:
    """Largest budget of any row, at most ``n``; costs a synchronisation only where ``k`` is on a device."""
    if isinstance(k, Tensor):
        return min(int(k.max()), n) if k.numel() else 0
    return min(k, n)


def unrow(result: Tensor, like: Tensor, dims: int) -> Tensor:
    """``result`` without its batch dimension if ``like`` had none."""
    return result[0] if like.dim() == dims else result


def unrow_picks(picks: Picks, like: Tensor, dims: int) -> Picks:
    """``picks`` without their batch dimension if ``like`` had none."""
    return Picks(*(unrow(part, like, dims) for part in picks))
