"""Greedy selection: pick the candidate of largest gain, update the gains, repeat."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .reference import Picks, State, bounds, pick, picks


def greedy(
    state: State, k: Tensor, most: int, valid: Tensor, usable: Tensor | None = None, per_round: int = 1
) -> Picks:
    """Greedy selection by any state.

    Args:
        state: gains and how a pick changes them; used up by the call.
        k: (B,) long, picks of each row, at most its number of valid candidates.
        most: steps of the loop, at least the largest ``k``.
        valid: (B, N) bool, what may be picked.
        usable: (B, N) bool; valid candidates that are not usable come last.
        per_round: picks made on the same gains; 1 is the exact greedy selection.
    """
    order, gain = pick(state, bounds(valid, usable), k, most, per_round)
    return picks(order, gain, valid.shape[1])


@torch.no_grad()
def running_max(
    similarity: Tensor,
    offset: Tensor,
    slope: Tensor,
    start: Tensor,
    k: Tensor,
    most: int,
    valid: Tensor,
    usable: Tensor | None = None,
) -> Picks:
    """:func:`greedy` by :class:`visiontok.kernels.RunningMax`, with a Triton twin; ``slope`` is not negative."""
    order, gain = ops.running_max(similarity, offset, slope, start, bounds(valid, usable), k, most)
    return picks(order, gain, valid.shape[1])


@torch.no_grad()
def running_sum(
    similarity: Tensor, start: Tensor, k: Tensor, most: int, valid: Tensor, usable: Tensor | None = None
) -> Picks:
    """:func:`greedy` by :class:`visiontok.kernels.RunningSum`, with a Triton twin; ``similarity`` holds cosines."""
    order, gain = ops.running_sum(similarity, start, bounds(valid, usable), k, most)
    return picks(order, gain, valid.shape[1])


@torch.no_grad()
def determinant(
    kernel: Tensor, relevance: Tensor, k: Tensor, most: int, valid: Tensor, usable: Tensor | None = None
) -> Picks:
    """:func:`greedy` by :class:`visiontok.kernels.Determinant`, with a Triton twin."""
    order, gain = ops.determinant(kernel, relevance, bounds(valid, usable), k, most)
    return picks(order, gain, valid.shape[1])


@torch.no_grad()
def coverage(
    table: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bonus: Tensor | None,
    start: float,
    k: Tensor,
    most: int,
    valid: Tensor,
    usable: Tensor | None = None,
) -> Picks:
    """:func:`greedy` by :class:`visiontok.kernels.Coverage`, with a Triton twin."""
    order, gain = ops.coverage(table, weight, scale, bonus, start, bounds(valid, usable), k, most)
    return picks(order, gain, valid.shape[1])
