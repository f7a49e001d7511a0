"""A choice of the K best through which gradients reach the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.batching import budget, mask, rows, unrow
from .topk import rank


def soft_topk(
    scores: Tensor,
    k: int | Tensor,
    valid: Tensor | None = None,
    *,
    sharpness: float = 1.0,
    temperature: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best, and a mask between 0 and 1 that is above 1/2 exactly for these and has a gradient.

    The mask is sigmoid(sharpness · (r - (n - k))), r the place of the score from the lowest, 1, to the highest, n.
    Places are constant almost everywhere, so backwards they are r_i = Σ_j sigmoid((s_i - s_j) / τ), τ being
    ``temperature`` times the standard deviation of the row's scores. To train with it, multiply what is kept by
    ``keep + mask - mask.detach()``, which is 1.

    Args:
        scores: (N,) or (B, N); differentiable.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool; other tokens are not kept, and their mask is 0.
        sharpness: steepness of the mask, per place.
        temperature: width of a place, in standard deviations of the scores.

    Returns:
        bool keep mask, as :func:`~visiontok.functional.topk` makes it, and the float32 mask, both of the shape of
        ``scores``. Memory is O(N²) where gradients are wanted.

    Raises:
        ConfigError: if ``k`` < 1, ``sharpness`` <= 0 or ``temperature`` <= 0.

    Reference:
        HiDrop, ICLR 2026 (the mask); Qin, Liu and Li, Information Retrieval 2010 (places from pairs).
    """
    for name, value in (("sharpness", sharpness), ("temperature", temperature)):
        if not value > 0:
            raise ConfigError(f"{name}={value!r}: must be positive")
    s = rows(scores, 1, "scores").float()
    ok = mask(valid, s)
    counts, n = budget(k, ok), ok.sum(-1)
    order = rank(s.detach(), ok)
    kept = (order < counts[:, None]) & ok
    place = (n[:, None] - order).float()
    if s.requires_grad:
        pair = ok[:, None] & ok[:, :, None]
        known = torch.where(ok, s, 0.0)
        mean = known.sum(-1, keepdim=True) / n.clamp_min(1)[:, None]
        spread = (torch.where(ok, s - mean, 0.0).square().sum(-1) / n.clamp_min(1)).sqrt().detach()
        width = (temperature * spread).clamp_min(1e-12)[:, None, None]
        soft = torch.where(pair, ((known[:, :, None] - known[:, None]) / width).sigmoid(), 0.0).sum(-1)
        place = place + (soft - soft.detach())  # in this order nothing is rounded
    soft_mask = torch.where(ok, (sharpness * (place - (n - counts)[:, None])).sigmoid(), 0.0)
    return unrow(kept, scores, 1), unrow(soft_mask, scores, 1)
