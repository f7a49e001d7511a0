"""Frozen rows: tokens that a decoder layer passes on as they came, while the others attend to their keys and values.

The layer is called with the other rows alone, so it makes no queries, outputs and MLP of frozen ones. Their keys and
values are found beforehand (:func:`~visiontok.engine.probe.keys_values`) and join those of the computed rows, in the
order of the sequence, where the layer's attention reaches its kernel. To cache and later layers it is a layer like any
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UnsupportedError
from .layout import Layout


class Rows:
    """How the M slots of a layer are divided; every slot is of one kind.

    Left padding of ``computed`` takes frozen slots, whose outcome is not used.

    Attributes:
        computed: the slots that go through the whole layer.
        frozen: the others.
    """

    def __init__(self, computed: torch.Tensor, counts: Sequence[int]) -> None:
        """``computed`` (B, M) bool, ``counts`` its true entries per row, on the host; some slot must be left over."""
        self.computed = Layout(computed, counts)
        batch, slots = computed.shape
        left = torch.ones_like(computed).scatter(1, self.computed.slots, False)
        self.frozen = Layout(left, [slots - self.computed.width] * batch)
        self._place = torch.cat([self.frozen.slots, self.computed.slots], 1).argsort(1)

    def join(self, frozen: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        """(B, H, ·, d) of either kind → (B, H, M, d)."""
        both = torch.cat([frozen, computed], 2)
        return both.gather(2, self._place.to(both.device)[:, None, :, None].expand_as(both))


class Split:
    """One run of one layer.

    Args:
        rows: how its slots are divided.
        x: (B, M, D), what enters it.
        keys_values: of the frozen rows, each (B, H, ·, d).
        cache: where the layer stores keys and values, or None.
        layer: its index.
        trains: whether gradients are wanted.
    """

    def __init__(
        self,
        rows: Rows,
        x: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        layer: int,
        *,
        trains: bool,
    ) -> None:
        self.rows, self._x, self._keys_values, self._cache, self._layer = rows, x, keys_values, cache, layer
        self._trains = trains

    @torch.compiler.disable
    def attend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the computed rows → of all slots, behind those that are stored.

        Raises:
            UnsupportedError: in a reentrant checkpoint, which has no gradients for the frozen rows.
        """
        if self._trains and not torch.is_grad_enabled():
            raise UnsupportedError(
                "reentrant gradient checkpointing loses gradients of frozen tokens; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        k, v = (self.rows.join(a, b) for a, b in zip(self._keys_values, (key, value), strict=True))
        return (k, v) if self._cache is None else self._cache.update(k, v, self._layer)

    def leave(self, output: Any) -> Any:
        """What the layer returned, with the frozen rows as they entered."""
        hidden = output if torch.is_tensor(output) else output[0]
        hidden = self.rows.computed.scatter(self._x, hidden)
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])
