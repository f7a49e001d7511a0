"""Units of a video that stay as they are from frame to frame: of a run of equal ones the first is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError


def runs(x: Tensor, tau: float, *, anchored: bool = True) -> tuple[Tensor, Tensor]:
    """Drop each unit whose values are on average within ``tau`` of those at its place before.

    Args:
        x: (t, N, D), the units of each frame.
        tau: largest mean absolute difference, at least 0.
        anchored: compare with the unit that began the run, so that a run never drifts from it by more than ``tau``;
            else with the one in the frame before.

    Returns:
        (t, N) bool, units that stay, all of the first frame; and (t, N) long, the frame in which the run of each unit
        began.

    Raises:
        ConfigError: if ``tau`` is negative or NaN.

    Reference:
        RLT, arXiv 2411.05222; without anchors, the compression mask of VideoLLaMA3's processor, arXiv 2501.13106.
    """
    if not tau >= 0:
        raise ConfigError(f"tau={tau}: the largest mean difference must be at least 0")
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    begins = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    reference = x[0]
    for frame in range(1, len(x)):
        keep[frame] = ~((x[frame] - reference).abs().mean(-1) <= tau)
        begins[frame] = torch.where(keep[frame], frame, begins[frame - 1])
        reference = torch.where(keep[frame, :, None], x[frame], reference) if anchored else x[frame]
    return keep, begins
