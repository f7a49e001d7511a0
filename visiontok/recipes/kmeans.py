"""k-means: clusters of tokens, each one token (the training-free core of VQToken)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import absorb, clusters
from ..method import Card, Contract, Method, Selection

if TYPE_CHECKING:
    from ..context import Context


def kmeans(
    features: Tensor,
    k: int | Tensor,
    draws: Sequence[Tensor],
    *,
    rounds: int = 10,
    valid: Tensor | None = None,
    official: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The means of ``k`` spherical clusters.

    Args:
        features: (N, D) or (B, N, D).
        k: tokens to keep, int or (B,) long.
        draws: for each row the random numbers in [0, 1) that choose its first centres, one per cluster.
        rounds: of assignment and new means.
        valid: (N,) or (B, N) bool.
        official: means of tokens scaled to length 1, so that their lengths are lost.

    Returns:
        bool keep mask (N,) or (B, N), true at the member nearest to the mean; features of the shape given: means there;
        and long (N,) or (B, N), the place of that member for each token, -1 for invalid ones.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    group = clusters(features, k, draws, valid, rounds=rounds)
    known = torch.where((group >= 0)[..., None], features, 0.0)
    source = torch.nn.functional.normalize(known, dim=-1) if official else known
    merged, size = absorb(source, group, torch.ones(group.shape, device=features.device), 1.0)
    return size > 0, merged, group


@dataclass(frozen=True)
class KMeans(Method):
    """Spherical k-means++ over all tokens of an image or video.

    Attributes:
        rounds: of assignment and new means.
    """

    rounds: int = 10

    card: ClassVar[Card] = Card(
        name="kmeans",
        title="the means of spherical k-means clusters",
        paper="arXiv 2503.16980 (VQToken)",
        venue="preprint",
        formula="z_c = mean of z over {i: c = argmax_c cos(z_i, μ_c)}, μ of k-means++ seeds and 10 rounds",
        stage="prompt",
        needs="features",
        official="32 clusters of all tokens of a video; their means are taken of normalised tokens, so that lengths "
        "are lost; a trained encoder of the cluster numbers, read as real numbers, follows.",
        bugs="With a fixed number of clusters the published call raises a TypeError; random first centres without a "
        "seed.",
        trained="VQToken's attention over cluster numbers and the language model tuned with it.",
        departures="The clusters alone, without the trained encoder. Means of the tokens themselves "
        "(fidelity='official': of normalised ones); k-means++ from the seed of the recipe; exactly K clusters: one "
        "that has run empty becomes the token that its own resembles least. A mean stands at the place of the "
        "nearest member.",
        defaults="10 rounds; the paper keeps 32 tokens of a video.",
        cost="O(NKD) per round",
        stochastic=True,
        contract=Contract(question_independent=False, sync_free=False),  # draws are seeded by the prompt
    )

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds={self.rounds!r}: give a number of at least 0")

    def select(self, ctx: Context) -> Selection:
        draws = [torch.rand(n, generator=ctx.generator(u)) for u, n in enumerate(ctx.count.tolist())]
        official = ctx.fidelity == "official"
        keep, features, into = kmeans(
            ctx.features, ctx.count, draws, rounds=self.rounds, valid=ctx.valid, official=official
        )
        return Selection(keep=keep, features=features, into=into)
