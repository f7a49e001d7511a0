"""ERASE: as many tokens as the picture is complex, then two cuts by what the question looks at."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..functional import pixel_entropy, topk
from ..method import Card, Contract, Layer, Method, Needs, Stage

if TYPE_CHECKING:
    from ..context import Context

Setting = tuple[tuple[float, ...], tuple[float, ...]]
# Median entropies, in nats, between the levels, and the share that each level keeps; from the most complex down.
QWEN2_5: Setting = (1.690, 1.347, 1.172), (0.827, 0.751, 0.495, 0.403)
QWEN3: Setting = (1.610, 0.227, 0.056), (0.845, 0.776, 0.757, 0.194)


def median(scores: Tensor, valid: Tensor) -> Tensor:
    """(B,) median of the valid scores (B, N) of each row, the mean of the middle two of an even number; 0 of none."""
    ordered = torch.where(valid, scores, torch.inf).sort(dim=1).values
    count = valid.sum(1, keepdim=True)
    middle = torch.cat([(count - 1).clamp_min(0) // 2, count // 2], 1).clamp_max(scores.shape[1] - 1)
    return torch.where(count[:, 0] > 0, ordered.gather(1, middle).mean(1), 0.0)


def level(entropy: Tensor, valid: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """(B,) long: 0 for pictures whose median entropy lies above the first threshold, and so on down.

    Args:
        entropy: (B, N), of each patch.
        valid: (B, N) bool.
        thresholds: descending.
    """
    return (median(entropy, valid)[:, None] <= torch.tensor(thresholds, device=entropy.device)).sum(1)


@dataclass(frozen=True)
class Erase(Method):
    """Entropy of the pixels before the language model, attention of the question inside.

    The budgets of the first two stages are those of the most complex pictures: simpler ones keep less before the model,
    in the proportion of ``shares``, and those of the last two levels are brought to the share ``final`` at ``shallow``.
    Complex ones keep what they have until ``deep``.

    Attributes:
        part: ``prompt``, ``shallow`` or ``deep``: which of the three stages this one is.
        thresholds: three median entropies, descending; by default those of the model family.
        shares: what the four levels keep, from the most complex down; by default those of the model family.
        final: what is left in the end; no level keeps less before that.
        shallow: decoder layer of the first cut.
        deep: decoder layer of the second cut.
    """

    part: Literal["prompt", "shallow", "deep"] = "prompt"
    thresholds: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None
    final: float = 0.25
    shallow: Layer = 1 / 28
    deep: Layer = 16 / 28

    card: ClassVar[Card] = Card(
        name="erase",
        title="as many tokens as the pixels are complex, then two cuts by the question's attention",
        paper="arXiv 2605.09982",
        venue="preprint",
        formula="share p_l by the level l of median_i h_i, h_i = -Σ_g p_ig·ln p_ig over grey levels g: the top of h; "
        "at two layers the top of mean_{text t} softmax(q_t·k/√d)_i",
        stage="prompt",
        needs="pixels, grid; attention of the text rows in the layers before the cuts",
        official="One cut, at layer 1 for simple and 16 of 28 (21 of more than 30) for complex pictures, the deepest "
        "of several images; one budget for all images; text rows from index 15 (Qwen3: 4). Thresholds and shares "
        "were searched on items of the benchmarks.",
        bugs="Queries are made without the layer's input norm.",
        departures="Calibrated, as published. Budget and depth per image, hence two cuts. Attention of the layer "
        "before the cut, as the model computes it; the query without norm is not brought back. Entropy is read "
        "before the language model but behind the tower. A budget is the average over all decoder layers.",
        defaults="Without keep: the published setting, a quarter in the end. Qwen3-VL has thresholds of its own, all "
        "others those of Qwen2.5-VL. Pixels are brought back by the statistics of the family's stock processor.",
        cost="O(NP) for the histograms of P pixels, one attention row per text token",
        contract=Contract(count_from_grid=False, question_independent=False, per_image=False, sync_free=False),
    )

    def __post_init__(self) -> None:
        if self.part not in ("prompt", "shallow", "deep"):
            raise ConfigError(f"part={self.part!r}: use 'prompt', 'shallow' or 'deep'")
        for name, values, number in (("thresholds", self.thresholds, 3), ("shares", self.shares, 4)):
            if values is None:
                continue
            object.__setattr__(self, name, tuple(values))  # a list, from JSON
            if len(values) != number or any(a < b for a, b in itertools.pairwise(values)):
                raise ConfigError(f"{name}={values!r}: give {number} numbers in descending order")
        if self.shares is not None and not 0 < self.shares[-1] <= self.shares[0] <= 1:
            raise ConfigError(f"shares={self.shares!r}: shares lie in (0, 1]")
        if not 0 < self.final <= 1:
            raise ConfigError(f"final={self.final!r}: a share lies in (0, 1]")

    def needs(self) -> Needs:
        return Needs(pixels=True, decoder_text_rows=() if self.part == "prompt" else (-1,))

    def stages(self) -> tuple[Stage, ...]:
        first, final = Budget.ratio(max((self.shares or QWEN2_5[1])[0], self.final)), Budget.ratio(self.final)
        return (
            Stage(kind="prompt", method=replace(self, part="prompt"), keep=first),
            Stage(kind="cut", method=replace(self, part="shallow"), layer=self.shallow, keep=first),
            Stage(kind="cut", method=replace(self, part="deep"), layer=self.deep, keep=final),
        )

    def select(self, ctx: Context) -> Tensor:
        if ctx.pixels is None:
            raise ConfigError("erase: the context has no pixels; declare them in needs()")
        thresholds, shares = QWEN3 if ctx.model_type.startswith("qwen3") else QWEN2_5
        thresholds, shares = self.thresholds or thresholds, self.shares or shares
        entropy = pixel_entropy(ctx.pixels)
        original = torch.arange(entropy.shape[1], device=entropy.device) < ctx.size[:, None]
        patches = original & (ctx.grid >= 0).all(-1) if ctx.has_grid else original
        complexity = level(entropy, patches, thresholds)
        kept = torch.tensor([max(s, self.final) for s in shares], device=entropy.device, dtype=torch.float64)
        if self.part == "prompt":
            count = (ctx.count * kept[complexity] / kept[0] + 1e-9).floor().long().clamp_min(1)
            return topk(ctx.scored(torch.where(patches, entropy, -1.0)), count, ctx.valid)
        if self.part == "shallow":
            simple = (ctx.valid.sum(1) * self.final / kept[complexity] - 1e-9).ceil().long()
            count = torch.where(complexity >= 2, simple, ctx.valid.sum(1)).clamp_min(1)
        else:
            count = ctx.count
        return topk(ctx.scored(ctx.attention.text_rows(-1)), count, ctx.valid)
