"""Greedy selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from visiontok.kernels import cosines, ops
from visiontok.kernels.reference import bounds

from . import DEVICE, Samples, normal, uniform

Args = tuple[Any, ...]


def features(kind: str) -> torch.Tensor:
    """(B, N, D) by the name of what is special about it."""
    x = normal(2, 70, 12)
    if kind == "all equal":
        return torch.ones_like(x)
    if kind == "duplicates":
        return x[:, torch.arange(70, device=x.device) % 9]
    if kind == "zero vectors":
        return x * (torch.arange(70, device=x.device) % 3 > 0)[:, None]
    if kind == "not finite":
        x[0, 5], x[1, 7, 0] = torch.nan, torch.inf
        return x
    if kind == "one token":
        return x[:, :1]
    if kind == "whole block":
        return normal(1, 128, 12)
    if kind == "block and one":
        return normal(1, 129, 12)
    if kind == "no rows":
        return x[:0]
    return x


KINDS = (
    "plain", "all equal", "duplicates", "zero vectors", "not finite", "one token", "whole block", "block and one",
    "no rows",
)  # fmt: skip


def budget(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(B, N) bool what may be picked, (B,) how many, and room for how many."""
    b, n, _ = x.shape
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device)
    if kind == "plain":  # rows of different lengths, the shorter with less to pick
        valid[0, 11:13], valid[1, 40:] = False, False
        return valid, torch.tensor([30, 7], device=x.device), 30
    if kind == "zero vectors":  # nothing to pick in one of the rows
        return valid, torch.tensor([0, 5], device=x.device), 5
    most = n if kind in ("all equal", "not finite") else min(n, 25)
    return valid, torch.full((b,), most, device=x.device), most


def table(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines, scores that are not all different, and bounds of what may be picked."""
    x = features(kind)
    similarity, usable = cosines(x)
    valid = budget(x, kind)[0]
    score = uniform(*valid.shape, seed=1).round(decimals=1)
    if kind == "not finite":
        score[..., 3] = torch.nan
    if kind == "plain":  # rows that go on behind their end
        wide = similarity.new_full((*similarity.shape[:2], 96), torch.nan)
        wide[..., : similarity.shape[2]] = similarity
        similarity = wide[..., : similarity.shape[2]]
    return similarity, score, bounds(valid, usable)


def running_max(kind: str, family: str) -> Callable[[], Args]:
    def make() -> Args:
        similarity, score, bound = table(kind)
        one = torch.ones(1, device=DEVICE)
        offset, slope = {"max-min": (one, one), "mmr": (0.3 * score, 0.7 * one), "product": (score, score)}[family]
        return similarity, offset, slope, score, bound, *budget(features(kind), kind)[1:]

    return make


def running_sum(kind: str) -> Callable[[], Args]:
    return lambda: (*table(kind), *budget(features(kind), kind)[1:])


def few(kind: str) -> tuple[torch.Tensor, int]:
    """A budget beyond the rank of the features, and no more: each pick takes the interpreter long."""
    _, count, most = budget(features(kind), kind)
    return count.clamp_max(16), min(most, 16)


def determinant(kind: str) -> Callable[[], Args]:
    def make() -> Args:
        similarity, score, bound = table(kind)
        relevance = 0.1 + score.nan_to_num(nan=0.5)
        kernel = similarity.mul_(relevance[:, None]).mul_(relevance[..., None])  # what is behind the rows stays there
        return kernel, relevance, bound, *few(kind)

    return make


def facility(kind: str) -> Callable[[], Args]:
    def make() -> Args:
        similarity, score, bound = table(kind)
        if kind == "plain":  # each token stands for itself alike
            return similarity, None, None, None, -1.0, bound, *few(kind)
        bonus = uniform(*score.shape, seed=2)
        known = (bound == torch.inf).float()
        return similarity, score.nan_to_num(nan=1.0) * known, score, bonus, 0.1, bound, *few(kind)

    return make


def words(columns: int) -> Callable[[], Args]:
    """A table that is not square, and lies in memory column by column."""

    def make() -> Args:
        covers = normal(2, columns, 37, seed=3).mT
        bound = bounds(torch.ones(2, columns, dtype=torch.bool, device=DEVICE))
        return covers, None, None, None, 0.0, bound, torch.tensor([min(16, columns), 3], device=DEVICE), 16

    return make


def coverage(args: Args, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """No candidate covered more than the one picked."""
    sequence(args, result)
    covers, weight, scale, bonus, start, bound = args[:6]
    for row, (order, gain) in enumerate(zip(*result, strict=True)):
        best = torch.full_like(covers[row, :, 0], start).double()
        free = bound[row] == torch.inf
        for pick, told in zip(order.tolist(), gain.double(), strict=True):
            if pick < 0 or not free.any():
                break
            gains = (covers[row].double() - best[:, None]).clamp_min(0)
            gains = gains.sum(0) if weight is None else weight[row].double() @ gains
            gains = gains if scale is None else gains * scale[row]
            gains = (gains if bonus is None else gains + bonus[row]).nan_to_num(nan=-1e30)
            assert gains[pick] > gains[free].max() - 1e-6
            assert told == -torch.inf or gains[pick] == -1e30 or (told - gains[pick]).abs() < 1e-4
            best = torch.maximum(best, covers[row, :, pick])
            free[pick] = False


def variances(args: Args, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """No candidate had a larger conditional variance than the one picked; what is behind all others had none."""
    sequence(args, result)
    for kernel, relevance, bound, order, gain in zip(*args[:3], *result, strict=True):
        left, free = kernel.double().clone(), bound == torch.inf
        level = relevance.double().square()
        for pick, told in zip(order.tolist(), gain.double(), strict=True):
            if pick < 0 or not free.any():
                break
            variance = left.diagonal()
            if told > 0:
                assert variance[pick] > (variance[free] - 1e-5 * level.max()).max()
                assert (told - variance[pick]).abs() < 1e-5 * level.max()
                left = left - left[:, pick, None] * left[pick] / variance[pick]
            else:
                assert (variance[free] < 2e-5 * level[free]).all()
                assert relevance[pick] == relevance[free].max()
            free[pick] = False
        chosen = order[gain > 0]
        exact = torch.linalg.slogdet(kernel[chosen][:, chosen].double()).logabsdet
        torch.testing.assert_close(gain[gain > 0].double().log().sum(), exact, rtol=1e-3, atol=1e-3)


def sequence(args: Args, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What is picked may be picked, once; as many as asked for; and -1 behind."""
    order, gain = result
    *_, bound, count, most = args
    assert order.shape == gain.shape == (len(bound), most)
    for row, limit, k in zip(order.tolist(), bound, count.tolist(), strict=True):
        assert row[k:] == [-1] * (most - k)
        assert len(set(row[:k])) == k
        assert all(limit[i] > -torch.inf for i in row[:k])


SAMPLES = [
    Samples(
        ops.running_max,
        {f"{family}, {kind}": running_max(kind, family) for family in ("max-min", "mmr", "product") for kind in KINDS},
        check=sequence,
    ),
    Samples(ops.running_sum, {kind: running_sum(kind) for kind in KINDS}, check=sequence),
    Samples(ops.determinant, {kind: determinant(kind) for kind in KINDS}, tolerance=(1e-4, 1e-6), check=variances),
    Samples(
        ops.coverage,
        {"words": words(50), "fewer tokens than a step takes": words(5)}
        | {f"facility, {kind}": facility(kind) for kind in KINDS},
        tolerance=(1e-6, 1e-6),
        check=coverage,
    ),
]
