"""How much the projector's output moves when its input is pushed: the token's sensitivity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import TILE


def sensitivity(
    project: Callable[[Tensor], Tensor], inputs: Tensor, directions: Tensor, *, step: float | None = None
) -> Tensor:
    """Mean length of the derivative of ``project`` at each token, along directions that all tokens share.

    Args:
        project: (M, E) → (M, D), every row for itself; computes in float32 or better.
        inputs: (…, N, E), tokens before the projector.
        directions: (J, E), of length 1.
        step: half the distance of a central difference; by default the derivative is exact (forward mode).

    Returns:
        (…, N) float32; NaN where the input holds NaN or infinity.

    Reference:
        ZOO-Prune, arXiv 2509.24837, zeroth-order sensitivity (step=0.01).
    """
    x = inputs.detach().flatten(0, -2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    finite = x.isfinite().all(-1)
    with torch.inference_mode(False), torch.no_grad():  # forward mode refuses tensors of inference mode
        x = torch.where(finite[:, None], x, 0.0).clone()
        total = x.new_zeros(len(x))
        width = max(1, TILE // max(1, x.numel()))
        for u in directions.to(x).clone().split(width):  # (j, E)
            at = x.repeat(len(u), 1)
            along = u.repeat_interleave(len(x), 0)
            if step is None:
                moved = torch.func.jvp(project, (at,), (along,))[1]
            else:
                moved = (project(at + step * along) - project(at - step * along)) / (2 * step)
            total = total + moved.norm(dim=-1).view(len(u), -1).sum(0)
    mean = torch.where(finite, total / len(directions), torch.nan)
    return mean.float().view(inputs.shape[:-1])
