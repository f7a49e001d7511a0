"""Positions without gaps: in every layer, what is left is counted through, as some papers' code does.

A token's number is its original one less the tokens of its row that the layer has dropped before it. So numbers go on
through later turns, each layer's on its own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .call import Prefill
from .layout import Layout

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

Tables = tuple[torch.Tensor, torch.Tensor]


class Renumber:
    """Rotary tables of counted positions.

    Args:
        adapter: where the language model is.

    Raises:
        UnsupportedError: if it has no rotary tables by one number per token.
    """

    def __init__(self, adapter: Adapter) -> None:
        text: Any = getattr(adapter.base, adapter.text)
        config, self.rotary = text.config, getattr(text, "rotary_emb", None)
        model = adapter.base.config.model_type
        if self.rotary is None or "mrope_section" in str(getattr(config, "rope_parameters", "")):
            raise UnsupportedError(
                f"positions='compact': {model} gives a token no single number that could be counted through; leave "
                "positions='original'"
            )
        if adapter.prompt_only:
            raise UnsupportedError(
                f"positions='compact': in {model} {adapter.prompt_only}, so layers cannot be given numbers of their "
                "own; leave positions='original'"
            )
        by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self._types = list(config.layer_types) if by_type else None

    def prefill(self, call: Prefill, index: int, x: torch.Tensor, layout: Layout | None, given: Any) -> Any:
        """Tables of layer ``index``, which holds ``layout``; ``given`` are those of the original positions.

        Notes in the cache how far numbers have moved.
        """
        stored = None if call.cache is None else call.cache.layers[index]
        moved = None if stored is None else stored.moved
        if moved is None and layout is None and call.entry is None:
            return given
        alive = call.alive[index]
        tables = self._counted(call, index, x, layout, alive, moved)
        if stored is not None:
            gone = (call.attended & ~alive).sum(1, keepdim=True)
            stored.moved = gone if moved is None else moved + gone
            call.cache.counted = True  # type: ignore[union-attr]  # what is stored is stored in it
        return tables

    def beforehand(self, call: Prefill, index: int, x: torch.Tensor, layout: Layout | None, given: Any) -> Any:
        """Likewise for the tokens that are alive before the cut of layer ``index``; notes nothing."""
        moved = None if call.cache is None else call.cache.layers[index].moved
        if moved is None and layout is None and call.entry is None:
            return given
        alive = torch.where(call.visual, call.kept, call.attended)
        return self._counted(call, index, x, layout, alive, moved)

    def decode(self, cache: Any, numbers: torch.Tensor | None, x: torch.Tensor) -> list[Tables | None]:
        """Per layer the tables of new tokens whose original positions are ``numbers`` (B or 1, M); None for those of
        the language model."""
        if numbers is None:
            numbers = (torch.arange(x.shape[1], device=x.device) + cache.get_seq_length())[None]
        made: dict[Any, Tables] = {}
        tables: list[Tables | None] = []
        for index, layer in enumerate(cache.layers):
            if layer.moved is None:
                tables.append(None)
                continue
            key = id(layer.moved), self._type(index)
            if key not in made:
                made[key] = self._tables(index, x, numbers - layer.moved)
            tables.append(made[key])
        return tables

    def _counted(
        self,
        call: Prefill,
        index: int,
        x: torch.Tensor,
        layout: Layout | None,
        alive: torch.Tensor,
        moved: torch.Tensor | None,
    ) -> Tables:
        if call.numbers.ndim != 2:
            raise UnsupportedError(
                "positions='compact': position_ids give a token more than one number; leave positions='original'"
            )
        numbers = call.numbers - (call.attended & ~alive).cumsum(1)
        at = call.enter(numbers if moved is None else numbers - moved)
        return self._tables(index, x, at if layout is None else layout.gather(at))

    def _tables(self, index: int, x: torch.Tensor, at: torch.Tensor) -> Tables:
        options = {} if self._types is None else {"layer_type": self._types[index]}
        return self.rotary(x, at, **options)  # type: ignore[misc]

    def _type(self, index: int) -> str | None:
        return None if self._types is None else self._types[index]
