"""Merge tokens between attention and MLP in the blocks of a stock encoder, with hooks.

A block computes y = x + attention(x), then y + mlp(norm(y)). A hook before the norm merges, so that norm and MLP run on
fewer rows; a hook behind the MLP gives every row its group's, since the stock block adds them to y; a hook behind the
block merges again. Merging M is a weighted mean and U copies, so that M·U = 1: M(y + U·mlp(My)) = My + mlp(My).

From the first merge on, log(size) is the bias of a token's key. Rows of one run may hold different numbers of tokens;
they are padded at the end, and padding has the size 0, whose logarithm hides it. Tokens stand in the order of
:func:`~visiontok.functional.bipartite`, the prefix in front.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..functional import bipartite, bipartite_rounds, pair_cosines
from ..kernels import segment_mean
from ..method import Merging

if TYPE_CHECKING:
    from visiontok.adapters.encoder import Encoder


@dataclass
class Merged:
    """One run of an encoder on B pictures of N tokens each, the prefix included.

    Attributes:
        plans: what each layer merges, for each picture.
        prefix: tokens in front that never merge.
        tokens: N.
        widths: slots per picture on the input of each layer, and behind the last that ran.
        source: (B, N) long, the place of every token in the present list.
        entered: ``source`` on the input of each layer.
        lengths: tokens of each picture in the present list.
        size: (B, n) float, tokens that each slot stands for, 0 for padding; None where nothing has merged.
        flops: of the cosines.
        metric: of the layer that is running.
        group: (B, n) long, where its tokens went; None if it merges nothing.
        count: slots behind it.
    """

    plans: Sequence[Merging]
    prefix: int
    tokens: int
    widths: list[int]
    source: torch.Tensor
    entered: list[torch.Tensor]
    lengths: list[int]
    size: torch.Tensor | None = None
    flops: int = 0
    metric: torch.Tensor | None = None
    group: torch.Tensor | None = None
    count: int = 0

    def merges(self, layer: int) -> bool:
        """Whether any picture may have fewer tokens behind ``layer``."""
        return any(plan.thresholds or plan.r[layer : layer + 1] > (0,) for plan in self.plans)

    def match(self, layer: int) -> None:
        """Decide which tokens of ``layer`` go together."""
        metric, before, prefix = self.metric, self.lengths, self.prefix
        self.metric = None
        if metric is None:
            raise RuntimeError("the block's keys were not seen before its second norm")
        b, n, width = metric.shape
        valid = None if self.size is None or min(before) == n else self.size > 0
        first = self.plans[0]
        if first.observe is not None:
            first.observe(layer, pair_cosines(metric, prefix=prefix, valid=valid))
        if first.thresholds:
            group = bipartite(metric, threshold=first.thresholds[layer], prefix=prefix, valid=valid)
            after = (group.amax(1) + 1).tolist()
        else:
            most = [n - prefix - 1 if first.rounds else (n - prefix) // 2 for n in before]
            rates = [min(plan.r[layer], limit) for plan, limit in zip(self.plans, most, strict=True)]
            if first.rounds:
                group = bipartite_rounds(metric, rates, size=self.size, prefix=prefix, valid=valid)
            else:
                group = bipartite(metric, torch.tensor(rates, device=metric.device), prefix=prefix, valid=valid)
            after = [n - r for n, r in zip(before, rates, strict=True)]
        rounds = max(a - k for a, k in zip(before, after, strict=True)) if first.rounds else 0
        self.flops += 2 * b * width * _pairs(n, rounds, prefix)
        self.lengths, self.count = after, max(after)
        self.group = None if after == before else group

    def merge(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n, D) → means of the groups (B, m, D), and their sizes (B, m)."""
        size = torch.ones(x.shape[:2], device=x.device) if self.size is None else self.size
        merged, mass = segment_mean(x, self.group, self.count, size)
        return merged.to(x.dtype), mass

    def settle(self, mass: torch.Tensor) -> None:
        """The layer is through: its groups are the tokens."""
        group = self.group
        self.source, self.size, self.group = group.gather(1, self.source), mass, None  # type: ignore[union-attr]

    def spread(self, x: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """(B, n, …) values of merged tokens → (B, N, …), each token's that of its group."""
        at = (self.source if source is None else source).to(x.device)
        first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, (at + first).flatten()).unflatten(0, at.shape)

    def spread_patches(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """(B, n, …) values of what stands behind the prefix in ``layer`` → (B, patches, …)."""
        return self.spread(x, self.without_prefix(self.entered[layer]))

    def spread_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, C) merged tokens, with the prefix or without → every token's, likewise."""
        return self.spread(x, self.source if x.shape[1] == self.widths[-1] else self.without_prefix(self.source))

    def without_prefix(self, source: torch.Tensor) -> torch.Tensor:
        """(B, patches) long, places among the tokens behind the prefix."""
        return source[:, self.prefix :] - self.prefix

    @property
    def anything(self) -> bool:
        """Whether any tokens have merged."""
        return self.size is not None


def _pairs(n: int, r: int, prefix: int) -> int:
    """Cosines that are taken to merge ``r`` of ``n`` tokens away, in as many rounds as that needs."""
    pairs = (n // 2) * (n - n // 2)
    step = min(r, (n - prefix) // 2)
    return pairs if step == r else pairs + _pairs(n - step, r - step, prefix)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: dict[int, Merged] = {}  # by the encoder's hooks


_thread = _Thread()

Plan = Callable[[int, int], Sequence[Merging] | None]
"""Says for so many pictures of so many patches each what to merge; None to leave a run alone."""


class MergeHooks:
    """The hooks on one encoder.

    Args:
        encoder: where its parts are.
        plan: what to merge.
        depth: layers that may merge, from the first on.
        done: called with what was merged behind the last block.
        whole: whether every token comes back behind the blocks, at ``encoder.end``.
    """

    def __init__(
        self,
        encoder: Encoder,
        plan: Plan,
        *,
        depth: int,
        done: Callable[[Merged], None],
        whole: bool,
    ) -> None:
        self.encoder, self.plan, self.depth, self.done, self.whole = encoder, plan, depth, done, whole
        # Hooks of a MultiheadAttention forbid its fused path, so none is where it would have nothing to do.
        self._handles: list[Any] = [
            encoder.blocks[0].layer.register_forward_pre_hook(self._start, with_kwargs=True),
        ]
        for index, block in enumerate(encoder.blocks):
            if index:
                self._handles.append(block.attention.register_forward_pre_hook(self._mask, with_kwargs=True))
            if index < depth:
                note = functools.partial(self._note, index, block.metric)
                self._handles += [
                    block.keys.register_forward_hook(note),
                    block.norm.register_forward_pre_hook(functools.partial(self._merge, index)),
                    block.mlp.register_forward_hook(self._unmerge),
                ]
            # before the hook by which hidden states are collected
            leave = functools.partial(self._leave, index)
            self._handles.append(block.layer.register_forward_hook(leave, prepend=True))
        if whole:
            self._handles.append(encoder.end.register_forward_hook(self._whole))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        _thread.running.pop(id(self), None)

    @property
    def _run(self) -> Merged | None:
        return _thread.running.get(id(self))

    @torch.compiler.disable
    def _start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        _thread.running.pop(id(self), None)
        x = args[0] if args else (kwargs or {})["hidden_states"]
        plans = self.plan(len(x), x.shape[1] - self.encoder.prefix)
        if plans is None:
            return
        if self.encoder.checkpoints() and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{type(self.encoder.model).__name__}: gradient checkpointing runs blocks again without the others, so "
                "what they merged is not known; switch it off in this encoder"
            )
        b, n = x.shape[:2]
        here = torch.arange(n, device=x.device).expand(b, -1)
        _thread.running[id(self)] = Merged(plans, self.encoder.prefix, n, [n], here, [here], [n] * b)

    @torch.compiler.disable
    def _mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        run, encoder = self._run, self.encoder
        if run is None or run.size is None or kwargs is None:
            return None
        if kwargs.get(encoder.mask) is not None:
            raise UnsupportedError(
                f"{type(encoder.model).__name__}: {encoder.mask} is given, whose places merged tokens no longer have; "
                "leave it out"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        proportional = run.plans[0].proportional
        bias = run.size.log() if proportional else torch.where(run.size > 0, 0.0, -torch.inf)
        bias = bias.to(x.dtype)
        return args, kwargs | {encoder.mask: bias if encoder.per_key else bias[:, None, None]}

    @torch.compiler.disable
    def _note(self, layer: int, metric: Callable[..., torch.Tensor], module: Any, args: Any, output: Any) -> None:
        run = self._run
        if run is not None and run.merges(layer):
            with torch.no_grad():
                run.metric = metric(output).float()

    @torch.compiler.disable
    def _merge(self, layer: int, module: Any, args: tuple[Any, ...]) -> Any:
        run = self._run
        if run is None or not run.merges(layer):
            return None
        with torch.no_grad():
            run.match(layer)
        return None if run.group is None else (run.merge(args[0])[0], *args[1:])

    @torch.compiler.disable
    def _unmerge(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        run = self._run
        return None if run is None or run.group is None else run.spread(output, run.group.clamp_min(0))

    @torch.compiler.disable
    def _leave(self, layer: int, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        run = self._run
        if run is None:
            return None
        merged = None
        if run.group is not None:
            merged, mass = run.merge(output)
            run.settle(mass)
        run.widths.append(run.count if merged is not None else run.widths[-1])
        run.entered.append(run.source)
        if layer == len(self.encoder.blocks) - 1:
            self.done(run)
            if not self.whole:
                del _thread.running[id(self)]
        return merged

    @torch.compiler.disable
    def _whole(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        run = _thread.running.pop(id(self), None)
        return None if run is None or not run.anything else self.encoder.whole(output, run.spread)
