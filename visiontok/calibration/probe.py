"""What calibrators see of a model: logits, hidden states and attention of one prompt, stock or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import find
from ..api import Callback, base_model, compress
from ..context import Context
from ..engine.probe import Tap, attention_modules
from ..errors import ConfigError
from ..method import Needs, Stage
from ..recipe import Recipe

Select = Callable[[Context], Tensor]


@dataclass(frozen=True)
class Probe:
    """A model whose prompts are measured one by one.

    Attributes:
        model: in evaluation mode.
    """

    model: nn.Module

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        base = base_model(self.model)
        return list(getattr(base, find(base).text).layers)

    @torch.inference_mode()
    def log_probabilities(self, inputs: Mapping[str, Any]) -> Tensor:
        """(V,) float32, of the token behind the prompt."""
        logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        if not bool(logits.isfinite().all()):
            raise ConfigError("the logits of the model contain NaN or infinity; load it in bfloat16 or float32")
        return logits.float().log_softmax(-1)

    def visual(self, inputs: Mapping[str, Any]) -> Tensor:
        """(N,) bool, places of the visual tokens in the prompt."""
        with compress(self.model, cuts({0: lambda ctx: ctx.valid})) as compression:
            self.log_probabilities(inputs)
            return compression.ledger.visual[0].to(inputs["input_ids"].device)

    def states(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Per decoder layer (N, D) float32, the visual tokens on its input."""
        found: dict[int, Tensor] = {}

        def note(ctx: Context) -> Tensor:
            found[int(ctx.layer or 0)] = ctx.features[ctx.valid].float()
            return ctx.valid

        with compress(self.model, cuts(dict.fromkeys(range(len(self.layers)), note))):
            self.log_probabilities(inputs)
        return [found[layer] for layer in range(len(self.layers))]

    def last_rows(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Per decoder layer but the last (N,) float32: what the last prompt token looks at, of all there is, mean over
        heads."""
        found: dict[int, Tensor] = {}

        def note(ctx: Context) -> Tensor:
            found[int(ctx.layer or 0) - 1] = ctx.attention.last_row(-1)[ctx.valid]
            return ctx.valid

        needs = Needs(decoder_last_row=(-1,))
        with compress(self.model, cuts(dict.fromkeys(range(1, len(self.layers)), note), needs)):
            self.log_probabilities(inputs)
        return [found[layer] for layer in range(len(self.layers) - 1)]

    @contextlib.contextmanager
    def attention(self, sink: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Within it, ``sink(layer, weights)`` gets the attention (Q, K) of each decoder layer, the largest of any
        head. For short prompts."""
        taps: list[Tap] = []
        try:
            for index, layer in enumerate(self.layers):
                [module] = attention_modules(layer)

                def show(
                    call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: Any, index: int = index
                ) -> None:
                    sink(index, largest_of_heads(q[0], k[0], mask, kwargs.get("scaling")))

                taps.append(Tap(module, show))
            yield
        finally:
            for tap in taps:
                tap.remove()


def cuts(selects: Mapping[int, Select], needs: Needs | None = None) -> Recipe:
    """A recipe of one function per decoder layer."""
    stages = (
        Stage(kind="cut", layer=layer, method=Callback(select, needs or Needs())) for layer, select in selects.items()
    )
    return Recipe(stages=tuple(stages), name="calibration")


def largest_of_heads(q: Tensor, k: Tensor, mask: Any, scale: float | None) -> Tensor:
    """(H, Q, d) queries and (G, K, d) keys → (Q, K) float32: causal attention of one row without padding."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if torch.is_tensor(mask) and mask.ndim == 4:
        seen = mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 2
    else:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill(~seen[..., : k.shape[1]], -torch.inf).softmax(-1).amax(0)


def divergence(changed: Tensor, stock: Tensor) -> float:
    """Σ p·(log p - log q) of (V,) log probabilities p, changed, and q, stock."""
    return float((changed.exp() * (changed - stock)).sum())
