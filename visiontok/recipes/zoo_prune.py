"""ZOO-Prune: tokens that the projector is sensitive to, and that are new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, minmax, norm, product, sensitivity
from ..method import Card, Contract, Method, Needs

if TYPE_CHECKING:
    from ..context import Context


def zoo_prune(features: Tensor, scores: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """Greedily the largest min-max normalised score · (1 - largest cosine to those kept).

    Where all scores are equal up to rounding, as behind a projector that is one linear map, novelty decides alone, and
    the longest token begins.

    Args:
        features: (N, D) or (B, N, D), behind the projector.
        scores: (N,) or (B, N), sensitivity; NaN comes last.
        k: tokens to keep, int or (B,) long.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    ok = ~scores.isnan() if valid is None else valid & ~scores.isnan()
    low = torch.where(ok, scores, torch.inf).amin(-1, keepdim=True)
    high = torch.where(ok, scores, -torch.inf).amax(-1, keepdim=True)
    alike = torch.where(scores.isnan(), scores, 1 + 1e-6 * minmax(norm(features), valid))
    return product(features, torch.where(high - low > 1e-4 * high, minmax(scores, valid), alike), k, valid)


@dataclass(frozen=True)
class ZooPrune(Method):
    """Sensitivity of the projector times novelty.

    Attributes:
        derivative: ``difference`` (central, as published) or ``exact`` (forward mode, no step).
        step: half the distance of the difference.
        directions: random directions, the same for all tokens.
        draw: which draw of the directions, which depend on nothing else; a recipe's seed is not read.
    """

    derivative: Literal["difference", "exact"] = "difference"
    step: float = 0.01
    directions: int = 64
    draw: int = 0

    card: ClassVar[Card] = Card(
        name="zoo_prune",
        title="sensitivity of the projector times novelty",
        paper="arXiv 2509.24837",
        venue="CVPR 2026",
        formula="S_i = mean_u ‖M(x_i + hu) - M(x_i - hu)‖/2h; first argmax S, then argmax_i minmax(S)_i·(1 - "
        "max_{j∈S} cos(z_i, z_j))",
        stage="prompt",
        needs="features, projector inputs, the projector itself",
        official="No code is published. The paper pushes every token along 64 random directions of length 1 by "
        "±0.01; in bfloat16 most of such a step is lost to rounding.",
        departures="The projector runs in float32. Directions come from a fixed seed and are shared by all tokens "
        "and images. derivative='exact' is the limit of a vanishing step at one and a half times the cost of a "
        "forward instead of two. Where a merger joins patches, a direction moves all of them.",
        defaults="derivative=difference, step=0.01, directions=64.",
        cost="128 projector rows per token, O(N²D) once, O(N) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.derivative not in ("difference", "exact"):
            raise ConfigError(f"derivative={self.derivative!r}: use 'difference' or 'exact'")
        if self.step <= 0:
            raise ConfigError(f"step={self.step!r}: must be positive")
        if self.directions < 1:
            raise ConfigError(f"directions={self.directions!r}: at least 1")

    def needs(self) -> Needs:
        return Needs(projector=True)

    def select(self, ctx: Context) -> Tensor:
        inputs, project = ctx.need_projector()
        drawn = torch.randn(self.directions, inputs.shape[-1], generator=torch.Generator().manual_seed(self.draw))
        directions = torch.nn.functional.normalize(drawn, dim=-1).to(inputs.device)
        step = None if self.derivative == "exact" else self.step
        scores = sensitivity(project, inputs, directions, step=step)
        scores = torch.where((inputs != 0).any(-1), scores, torch.nan)  # what has no patch has no sensitivity
        return zoo_prune(ctx.features, ctx.scored(scores), ctx.count, valid=ctx.valid).keep
