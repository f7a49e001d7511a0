"""Who gets how much: exact apportionment of one budget over groups, and of an average over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from .errors import ConfigError


def apportion(weights: Tensor, total: int | Tensor, caps: Tensor, minimum: int | Tensor = 0) -> Tensor:
    """Split a total over groups in proportion to their weights, by largest remainders, between a floor and caps.

    Shares are clamp(λ·weight, minimum, cap) with the λ that meets the total; whole parts first, then one more to the
    largest remainders, ties to the lowest index. What a full group cannot take goes to the others in proportion.

    Args:
        weights: (G,) or (B, G) non-negative; NaN counts as 0. A weight of 0 counts as a billionth of the largest, so
            that the total is met even when every other group is full.
        total: int or (B,), what to split.
        caps: (G,) or (B, G) long, the most a group can take.
        minimum: int or (…, G), the least a group gets; lowered to the cap where it exceeds it.

    Returns:
        long, shape of ``weights``; every row sums to its total exactly.

    Raises:
        ConfigError: if the total lies below the sum of the minima or above the sum of the caps.

    Reference:
        Hamilton's method of largest remainders; the water-filling of the caps is the usual one.
    """
    batched = weights.dim() == 2
    w = torch.nan_to_num(weights.detach().double().reshape(-1, weights.shape[-1]), nan=0.0).clamp_min(0)
    largest = w.amax(-1, keepdim=True)
    w = torch.where(largest > 0, torch.maximum(w / largest.clamp_min(1e-300), w.new_tensor(1e-9)), torch.ones_like(w))
    high = torch.as_tensor(caps, device=w.device).expand_as(w).double()
    low = torch.minimum(torch.as_tensor(minimum, device=w.device).expand_as(w).double(), high)
    goal = torch.as_tensor(total, device=w.device).expand(w.shape[0]).double()[:, None]
    if bool((goal < low.sum(-1, keepdim=True)).any()) or bool((goal > high.sum(-1, keepdim=True)).any()):
        raise ConfigError(
            f"total={goal.flatten().long().tolist()}: must lie between the sum of minima "
            f"{low.sum(-1).long().tolist()} and the sum of caps {high.sum(-1).long().tolist()}"
        )

    # Σ clamp(λw, low, high) is piecewise linear in λ with kinks at low/w and high/w: find the piece, then interpolate.
    kinks = torch.cat([torch.zeros_like(goal), low / w, high / w], -1).sort(-1).values  # (B, 2G + 1)
    level = torch.minimum(torch.maximum(kinks[..., None] * w[:, None], low[:, None]), high[:, None]).sum(-1)
    right = (level < goal).sum(-1, keepdim=True).clamp(1, kinks.shape[-1] - 1)
    left = right - 1
    l0, l1 = kinks.gather(-1, left), kinks.gather(-1, right)
    f0, f1 = level.gather(-1, left), level.gather(-1, right)
    scale = l0 + (l1 - l0) * ((goal - f0) / (f1 - f0).clamp_min(1e-300)).clamp(0, 1)
    share = torch.minimum(torch.maximum(scale * w, low), high)

    whole = (share + 1e-9).floor()  # a share that is whole up to rounding is whole
    remainder = torch.where(whole < high, (share - whole).mul(1e9).round(), -torch.inf)  # equal up to rounding: a tie
    order = remainder.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(w.shape[-1], device=w.device).expand_as(order))
    out = (whole + (rank < goal - whole.sum(-1, keepdim=True))).long()
    return out if batched else out[0]


def layer_average(
    n: int,
    average: float,
    *,
    depth: int,
    cuts: Sequence[int],
    shape: Sequence[float] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Tokens after each cut, so that the mean over *all* decoder layers is the wanted one.

    The layers ``start … cuts[0]-1`` see all ``n`` tokens, the layers from one cut to the next the tokens kept there,
    the layers below ``start`` and from ``stop`` on none. For one cut this is k = ⌊(L·A − c·N)/(X − c)⌋; for several,
    counts in the proportion of ``shape``, each rounded down, what rounding saves going to the later cuts; the sum over
    layers never exceeds L·A.

    Args:
        n: visual tokens of the image.
        average: wanted mean A, in tokens per layer.
        depth: decoder layers L.
        cuts: layers on whose input the set shrinks, ascending; stages on the input of one layer repeat it.
        shape: relative size after each cut, non-increasing; equal by default.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Returns:
        One count per cut, non-increasing, each in 1 … n.

    Raises:
        ConfigError: if the layers are out of order, or the average is too small for one token after each cut.

    Reference:
        EntropyPrune (one cut, stop = depth) and TwigVLM (one cut and an exit), budget rules of the published code.
    """
    # 1/3 means a third, though it cannot be written so.
    weights = [
        Fraction(repr(float(s))).limit_denominator(10**6) for s in (shape if shape is not None else [1.0] * len(cuts))
    ]
    if len(weights) != len(cuts) or min(weights, default=1) <= 0 or any(a < b for a, b in pairwise(weights)):
        raise ConfigError(f"shape={shape!r}: give one positive, non-increasing number per cut ({len(cuts)})")
    room, lengths = room_behind(n, average, depth=depth, cuts=cuts, start=start, stop=stop)
    counts: list[int] = []
    for i, weight in enumerate(weights):
        # What rounding and clamping leave goes to the later cuts: the scale is solved again over what remains.
        rest = room - sum(c * length for c, length in zip(counts, lengths, strict=False))
        scale = rest / sum((w * length for w, length in zip(weights[i:], lengths[i:], strict=True)), Fraction(0))
        affordable = (rest - sum(lengths[i + 1 :])) // lengths[i] if lengths[i] else n
        counts.append(max(1, min(math.floor(scale * weight), affordable, counts[-1] if counts else n)))
    return counts


def room_behind(
    n: int, average: float, *, depth: int, cuts: Sequence[int], start: int = 0, stop: int | None = None
) -> tuple[int, list[int]]:
    """What an average over all decoder layers leaves for those behind the first cut.

    Args:
        n: visual tokens of the image, which the layers ``start … cuts[0]-1`` see.
        average: wanted mean, in tokens per layer.
        depth: decoder layers.
        cuts: layers on whose input the set shrinks, ascending.
        start: first layer that sees visual tokens.
        stop: first layer that sees none any more; ``depth`` by default.

    Returns:
        tokens × layers, and for each cut the number of layers up to the next one.

    Raises:
        ConfigError: if the layers are out of order, or there is not one token for each layer.
    """
    end = depth if stop is None else stop
    edges = [start, *cuts, end]
    if not cuts or any(a > b for a, b in pairwise(edges)) or start < 0 or cuts[-1] >= end or end > depth:
        raise ConfigError(
            f"cuts={list(cuts)}: cuts must ascend, from start={start} on and below stop={end} <= depth={depth}"
        )
    lengths = [b - a for a, b in pairwise(edges[1:])]
    # The shortest decimal is what the user wrote; binary rounding must not cost a token.
    room = math.floor(Fraction(repr(float(average))) * depth) - (cuts[0] - start) * n
    if room < sum(lengths):
        least = Fraction((cuts[0] - start) * n + sum(lengths), depth)
        raise ConfigError(
            f"average={average}: with {n} tokens in layers {start} … {cuts[0] - 1} and one token per layer after that "
            f"the average is already {float(least):.2f}; raise the average or cut earlier"
        )
    return room, lengths
