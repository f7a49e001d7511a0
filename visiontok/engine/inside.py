"""Encoder stages: units leave the vision tower at one of its layers.

Hooks on the tower's layers, for one run of it: before the layer of the stage the method is asked, and from there on
layers get the rows of the units that stay, with their positions and the borders of what is left. Whatever reads a
layer's output (mergers, the projector) gets all rows again, so windows are put back in order and features are split by
the stock code: rows that left are copies, dropped before the language model; or they are reconstructed, and stay.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from visiontok.adapters.parts import Layers, Part

from ..errors import ConfigError, UnsupportedError
from ..method import Encoding, Rebuild, Stage

if TYPE_CHECKING:
    from .vision import Encoded


class Inside:
    """One run of the tower in which units leave it.

    Args:
        record: the run.
        layers: the tower's layers and what reads them.
        stage: who decides.
        layer: on whose input.
        counts: units that may stay of each item; ``budgeted`` says whether there is a budget.
        needs: whether the method reads the state before the last layer, and what received attention in it.

    Attributes:
        kept: per item (n,) bool on the host, of the units that the tower got; all True if nothing left.
        lengths: tower layer → lengths of its attention sequences, where rows are missing.
        mlp: tower layer → rows that its MLP computes, where these are fewer.
        dropped: whether what left is gone for the language model, too.
    """

    def __init__(
        self, record: Encoded, layers: Layers, stage: Stage, layer: int, counts: Sequence[int], *, budgeted: bool
    ) -> None:
        self._record, self._layers, self._stage, self._layer = record, layers, stage, layer
        self._counts, self._budgeted = counts, budgeted
        self._rebuild: Rebuild | None = stage.method.rebuild  # type: ignore[union-attr]
        smaller = record.smaller
        self._parts = [Part(list(range(len(counts))), {})] if smaller is None else list(smaller.parts)
        sizes = layers.sizes if smaller is None else [int(mask.sum()) for mask in smaller.kept]
        self._sizes: list[int] = list(sizes)
        self.kept: list[torch.Tensor] = [torch.ones(n, dtype=torch.bool) for n in self._sizes]
        self.lengths: dict[int, tuple[int, ...]] = {}
        self.mlp: dict[int, int] = {}
        self.dropped = self._rebuild is None
        self._thread = threading.get_ident()
        self._packed = not layers.prefix and len(self._parts) == 1
        self._calls = self._seen = 0
        self._rows: torch.Tensor | None = None  # (B, K) of the call in progress; None if nothing left
        self._copies: list[torch.Tensor | None] = []  # of each call (B, N): the kept row, without prefix, each has
        self._before: torch.Tensor | None = None
        self._known: _Known | None = None

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """The hooks, for as long as the tower runs."""
        blocks = self._layers.blocks
        handles = [
            blocks[index].register_forward_pre_hook(functools.partial(self._enter, index), with_kwargs=True)
            for index in range(self._layer - 1, len(blocks))
        ]
        if self._rebuild is not None:
            for index in range(self._layer, min(self._layer + self._rebuild.layers, len(blocks))):
                norm, mlp = (getattr(blocks[index], name) for name in self._layers.mlp)
                handles.append(norm.register_forward_pre_hook(self._before_mlp))
                handles.append(mlp.register_forward_hook(functools.partial(self._after_mlp, index)))
                handles.append(blocks[index].register_forward_hook(self._leave, prepend=True))
        readers = self._layers.readers
        handles += [r.register_forward_pre_hook(self._read, prepend=True, with_kwargs=True) for r in readers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._before = self._known = self._rows = None

    def spread(self, calls: list[torch.Tensor]) -> list[torch.Tensor]:
        """(B, patches, …) values of the attention calls of one layer, without CLS → of every patch the tower got."""
        if self._packed:  # each segment is a call of its own
            calls = [torch.cat([call.flatten(0, 1) for call in calls])[None]]
        spread = []
        for call, copies in zip(calls, self._copies, strict=True):
            if copies is None or call.shape[1] == copies.shape[1]:
                spread.append(call)
            else:
                spread.append(call[torch.arange(len(copies), device=call.device)[:, None], copies.to(call.device)])
        return spread

    # ---- hooks

    def _mine(self) -> bool:
        return threading.get_ident() == self._thread

    def _enter(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._mine():
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if index < self._layer:
            self._before = x
            return None
        if index == self._layer:
            self._decide(x)
        if self._rows is None:
            return None
        if self._rebuild is not None and index < self._layer + self._rebuild.layers:
            return self._given(x if index == self._layer else self._restored(x), args, kwargs)  # attention sees all
        if index == self._layer:
            x = _rows(x, self._rows)
        if "cu_seqlens" in kwargs:
            rows, stock = self._rows[0], kwargs["cu_seqlens"]
            stays = torch.zeros(int(stock[-1]), dtype=torch.long, device=rows.device).index_fill_(0, rows, 1)
            before = torch.nn.functional.pad(stays.cumsum(0), (1, 0))
            borders = torch.unique_consecutive(before[stock.long()])
            kwargs["cu_seqlens"] = borders.to(stock.dtype)
            kwargs["position_embeddings"] = tuple(t[rows] for t in kwargs["position_embeddings"])
            lengths = tuple(borders.diff().tolist())
        else:
            lengths = (self._rows.shape[1],) * len(self._rows)
        self.lengths[index] = self.lengths.get(index, ()) + lengths
        return self._given(x, args, kwargs)

    @staticmethod
    def _given(x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (x, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": x}

    def _read(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._mine() or self._rows is None or not args:
            return None
        x = args[0]
        cls = self._layers.prefix and x.shape[-2] != self._rows.shape[1]  # the family has taken it away
        compact = self._rows.shape[1] - (self._layers.prefix if cls else 0)
        if x.shape[-2] != compact:
            return None  # from a layer before
        if self._known is not None:
            return (self._restored(x, cut=int(cls)), *args[1:]), kwargs
        copies = self._copies[-1]
        if copies is None:
            return None
        if self._layers.prefix and not cls:
            first = torch.arange(self._layers.prefix, device=copies.device).expand(len(copies), -1)
            copies = torch.cat([first, copies + self._layers.prefix], 1)
        return (_rows(x, copies), *args[1:]), kwargs

    def _before_mlp(self, module: Any, args: tuple[Any, ...]) -> Any:
        return None if not self._mine() or self._rows is None else (_rows(args[0], self._rows), *args[1:])

    def _after_mlp(self, index: int, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if not self._mine() or self._rows is None or self._known is None:
            return None
        self.mlp[index] = self.mlp.get(index, 0) + self._rows.numel()
        full = output.new_zeros(*output.shape[:-2], self._known.number, output.shape[-1])
        at = self._rows if output.ndim == 3 else self._rows[0]
        return full.scatter(-2, at[..., None].expand_as(output), output)

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if not self._mine() or self._rows is None:
            return None
        if torch.is_tensor(output):
            return _rows(output, self._rows)
        return (_rows(output[0], self._rows), *output[1:])

    # ---- what leaves

    def _decide(self, x: torch.Tensor) -> None:
        part, prefix, area = self._parts[self._calls], self._layers.prefix, self._layers.area
        self._calls += 1
        order = self._layers.order(self._record.smaller or self._record)
        sizes = [self._sizes[item] for item in part.items]

        def by_item(values: torch.Tensor) -> Sequence[torch.Tensor]:
            """(B, prefix + patches, …) or (patches, …) in the tower's order → per item (n, m, …)."""
            patches = values[:, prefix:].flatten(0, 1) if values.ndim == x.ndim == 3 else values
            units = patches.unflatten(0, (-1, area))
            if order is not None:
                units = torch.empty_like(units).index_copy_(0, order.to(units.device), units)
            return units.split(sizes)

        now = by_item(x)
        before = by_item(self._before) if self._before is not None else [None] * len(sizes)
        received = self._received(sizes, order)
        with torch.no_grad():
            for item, states, last, seen in zip(part.items, now, before, received, strict=True):
                count = min(self._counts[item], len(states))
                asked = Encoding(states=states, before=last, received=seen, count=count, budgeted=self._budgeted)
                self.kept[item] = _answer(self._stage, asked)
        kept = [self.kept[item] for item in part.items]
        self._before = None
        if all(bool(mask.all()) for mask in kept):
            self._rows, self._known = None, None
            self._copies.append(None)
            return
        if x.ndim == 3:
            numbers = {int(mask.sum()) for mask in kept}
            if len(numbers) > 1:
                raise UnsupportedError(
                    f"{self._stage.label}: it keeps {sorted(numbers)} patches of the pictures of one call, which the "
                    "tower takes as a rectangle; use a budget, or one picture per call"
                )
            grid = torch.stack(kept)
        else:
            unit = torch.cat(kept)
            grid = (unit if order is None else unit[order.cpu()])[None]
        mask = grid.repeat_interleave(area, 1)
        rows = torch.stack([row.nonzero()[:, 0] for row in mask])
        here = torch.where(grid, torch.arange(grid.shape[1]), -1).cummax(1).values
        here = torch.where(here < 0, grid.long().argmax(1, keepdim=True), here)
        unit_rank = (grid.cumsum(1) - 1).gather(1, here)
        copies = (unit_rank[..., None] * area + torch.arange(area)).flatten(1)
        rows, copies, mask = rows.to(x.device), copies.to(x.device), mask.to(x.device)
        self._copies.append(copies)
        self._rows = rows
        if prefix:
            first = torch.arange(prefix, device=x.device).expand(len(rows), -1)
            self._rows = torch.cat([first, rows + prefix], 1)
        if self._rebuild is not None:
            owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            owner = (owner if order is None else owner[order.cpu()]).repeat_interleave(area).to(x.device)
            self._known = _Known(x, mask, prefix, owner if x.ndim == 2 else None, self._rebuild.neighbours)

    def _received(self, sizes: list[int], order: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        seen = self._record.attention.get(("received", self._layer - 1), [])[self._seen :]
        if not seen:
            return [None] * len(sizes)
        self._seen += len(seen)
        units = torch.cat([call.flatten() for call in seen]).unflatten(0, (-1, self._layers.area))
        if order is not None:
            units = torch.empty_like(units).index_copy_(0, order.to(units.device), units)
        return units.split(sizes)

    def _restored(self, x: torch.Tensor, cut: int = 0) -> torch.Tensor:
        """Rows that stay, as they are, and the others as their neighbours have moved."""
        if self._known is None:
            raise RuntimeError("no rows to restore")
        return self._known.restore(x, cut)


class _Known:
    """What is known of the rows that left: their last states, and who is near them.

    Args:
        x: (B, prefix + N, D), or (N, D) of items ``owner`` (N,), all rows on the input of the layer.
        stays: (B, N) bool.
        neighbours: how many kept rows of its own item move a row that left.
    """

    def __init__(
        self, x: torch.Tensor, stays: torch.Tensor, prefix: int, owner: torch.Tensor | None, neighbours: int
    ) -> None:
        self.number, self._prefix, self._flat = x.shape[-2], prefix, x.ndim == 2
        states = x if x.ndim == 3 else x[None]
        self._items = []
        for b, row in enumerate(states):
            patches = row[prefix:]
            groups = [None] if owner is None else owner.unique().tolist()
            for group in groups:
                mine = torch.ones_like(stays[b]) if group is None or owner is None else owner == group
                kept, gone = ((mine & flag).nonzero()[:, 0] for flag in (stays[b], ~stays[b]))
                if not len(gone):
                    continue
                near = _nearest(patches[gone], patches[kept], neighbours)
                rank = stays[b].cumsum(0) - 1
                self._items.append((b, gone, rank[kept][near], patches[gone]))
        self._first = [row[prefix:][keep] for row, keep in zip(states, stays, strict=True)]
        self._rows = [keep.nonzero()[:, 0] for keep in stays]

    def restore(self, x: torch.Tensor, cut: int = 0) -> torch.Tensor:
        """(B, prefix + K, D) or (K, D) → all rows; ``cut`` says that the prefix has been taken away."""
        prefix = 0 if cut else self._prefix
        batch = x if not self._flat else x[None]
        full = batch.new_empty(len(batch), self.number - self._prefix + prefix, batch.shape[-1])
        full[:, :prefix] = batch[:, :prefix]
        moved = [row[prefix:] - first for row, first in zip(batch, self._first, strict=True)]
        for b, rows in enumerate(self._rows):
            full[b, prefix + rows] = batch[b, prefix:]
        for b, gone, near, last in self._items:
            full[b, prefix + gone] = last + moved[b][near].mean(1)
        return full[0] if self._flat else full


_CHUNK = 1024  # rows whose distances to all kept ones are held at once


def _nearest(gone: torch.Tensor, kept: torch.Tensor, k: int) -> torch.Tensor:
    """(R, k) long: the nearest rows of ``kept`` by Euclidean distance; fewer if there are fewer."""
    exact = torch.promote_types(kept.dtype, torch.float32)
    there, most = kept.to(exact), min(k, len(kept))
    pieces = gone.to(exact).split(_CHUNK)
    return torch.cat([torch.cdist(rows, there).topk(most, largest=False).indices for rows in pieces])


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, N, D) or (N, D) → the rows ``index`` (B, K)."""
    if x.ndim == 2:
        return x[index[0]]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _answer(stage: Stage, asked: Encoding) -> torch.Tensor:
    """(n,) bool on the host: the units of one item that stay, checked."""
    keep, name = stage.method.stay(asked), stage.label  # type: ignore[union-attr]
    if keep.dtype != torch.bool or keep.shape != asked.states.shape[:1]:
        raise ConfigError(
            f"{name}: stay() returned {tuple(keep.shape)} {keep.dtype}; it must return a bool mask "
            f"({asked.states.shape[0]},)"
        )
    number = int(keep.sum())
    fixed = asked.budgeted and stage.method.card.contract.count_from_grid  # type: ignore[union-attr]
    if not number or (fixed and number != asked.count):
        raise ConfigError(f"{name}: stay() kept {number} units; keep {asked.count if fixed else 'at least one'}")
    return keep.cpu()
