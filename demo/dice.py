"""Random integers that are the same on every machine and device: the counter-based generator Philox 4x32-10."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_AHEAD = 64  # counters for which words are drawn at a time: many small calls would cost more than their numbers


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Four random words for every counter.

    Args:
        counter: four int64 tensors that broadcast to one shape S, values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        int64 (*S, 4), values in [0, 2^32).

    Reference:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox 4x32-10).
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _MASK) ^ b ^ left,
            second & _MASK,
            (first >> 32 & _MASK) ^ d ^ right,
            first & _MASK,
        )
        left, right = left + _WEYL[0] & _MASK, right + _WEYL[1] & _MASK
    return torch.stack(torch.broadcast_tensors(a, b, c, d), -1)


class Dice:
    """Random integers for B seeds at once.

    What a call returns for a seed depends on the seed, the stream and how much was drawn before, never on the batch.

    Args:
        seeds: int64 (B,), each in [0, 2^63).
        stream: which of 2^32 independent sequences of a seed to draw from.
    """

    def __init__(self, seeds: Tensor, stream: int):
        self.seeds, self.stream = seeds, stream
        self._spare = seeds.new_empty(len(seeds), 0)
        self._counter = 0

    def words(self, *shape: int) -> Tensor:
        """int64 (B, *shape), uniform in [0, 2^32)."""
        count = math.prod(shape)
        short = count - self._spare.shape[1]
        if short > 0:
            stop = self._counter + max(-(-short // 4), _AHEAD)
            counters = torch.arange(self._counter, stop, device=self.seeds.device)
            seeds, zero = self.seeds[:, None], torch.zeros_like(counters)
            drawn = philox((counters, zero, seeds & _MASK, seeds >> 32), (self.stream, 0))
            self._spare, self._counter = torch.cat([self._spare, drawn.flatten(1)], 1), stop
        drawn, self._spare = self._spare[:, :count], self._spare[:, count:]
        return drawn.reshape(len(self.seeds), *shape)

    def below(self, stop: int | Tensor, *shape: int) -> Tensor:
        """int64 (B, *shape), uniform in [0, stop); `stop` is at most 2^31 and may be a tensor (B, *shape)."""
        return self.words(*shape) * stop >> 32

    def between(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 (B, *shape), uniform in [low, high]."""
        return low + self.below(high - low + 1, *shape)

    def chance(self, percent: int, *shape: int) -> Tensor:
        """bool (B, *shape), true in so many cases of a hundred."""
        return self.below(100, *shape) < percent

    def choose(self, mask: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """Draw from what a mask allows, without replacement.

        Args:
            mask: bool (B, *S, M).
            count: how many to draw from the last dimension.

        Returns:
            int64 (B, *S, count), indices in [0, M), and bool of the same shape, false (and the index 0) where the mask
            allowed fewer.
        """
        # The index breaks ties, so that the order does not depend on the device's sort.
        keys = (self.words(*mask.shape[1:]) << 16) + torch.arange(mask.shape[-1], device=mask.device)
        ranked = torch.where(mask, keys, -1).topk(min(count, mask.shape[-1]), dim=-1)
        drawn = ranked.values >= 0
        short = (0, count - drawn.shape[-1])
        return pad(torch.where(drawn, ranked.indices, 0), short), pad(drawn, short)
