"""The dense masked oracle: the stock model at full length, where a token that is not alive in a layer is neither seen
(its column is masked) nor processed (its state is restored behind the layer). No cache, no removal, no layouts: exact
reference for every schedule, and independent of the engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class DenseMasked:
    """Context manager: mask a stock model by ``alive``, per layer a (B, N) bool; later positions are always alive.

    ``merged`` are the embeddings (B, N, D) that a merging method put in the place of the model's own, NaN where it left
    them. ``means`` are per decoder layer (row, position, positions): on its input, the state becomes
    the mean of those. ``frozen`` are per layer the (B, N) tokens that are seen but not processed. ``cached`` are per
    layer the (B, N, G) tokens that positions from N on see in each key head; ``since`` (N,) long says so for each
    token, if some are thinned earlier. ``weights`` are (B, N) factors in layers that some pass by: of
    the states of these, and of what the MLP adds to the others, which is what the layer returns more than with an MLP
    that returns nothing. ``narrow`` are per layer (B, N) tokens and a number of channels: behind these, what the MLP
    hands its last projection of such a token is 0.
    """

    def __init__(
        self,
        model: Any,
        alive: Sequence[torch.Tensor],
        merged: torch.Tensor | None = None,
        means: Mapping[int, Sequence[tuple[int, int, list[int]]]] | None = None,
        frozen: Sequence[torch.Tensor] | None = None,
        cached: Sequence[torch.Tensor] | None = None,
        since: torch.Tensor | None = None,
        weights: Mapping[int, torch.Tensor] | None = None,
        narrow: Mapping[int, tuple[torch.Tensor, int]] | None = None,
    ) -> None:
        base, text = model.model, model.get_decoder()
        self.alive, self.merged, self.means = alive, merged, means or {}
        self.processed = alive if frozen is None else [a & ~still for a, still in zip(alive, frozen, strict=True)]
        self.cached, self.since = cached, since
        self.heads = model.config.get_text_config().num_attention_heads
        self.weights, self.silent = weights or {}, False
        self.handles = [
            base.register_forward_pre_hook(self._base_pre, with_kwargs=True),
            text.register_forward_pre_hook(self._text_pre, with_kwargs=True),
        ]
        for index, layer in enumerate(text.layers):
            self.handles += [
                layer.register_forward_pre_hook(lambda m, a, k, i=index: self._pre(i, a, k), with_kwargs=True),
                layer.register_forward_hook(lambda m, a, k, o, i=index: self._post(i, o), with_kwargs=True),
            ]
            if weights is not None:
                run = functools.partial(self._weighed, index)
                self.handles += [
                    layer.register_forward_hook(run, prepend=True, with_kwargs=True),
                    layer.mlp.register_forward_hook(self._silenced),
                ]

        for index, (tokens, channels) in (narrow or {}).items():
            mlp: Any = text.layers[index].mlp
            last = next(getattr(mlp, name) for name in ("down_proj", "fc2", "c_proj") if hasattr(mlp, name))
            self.handles.append(last.register_forward_pre_hook(functools.partial(self._zeroed, tokens, channels)))

    def __enter__(self) -> DenseMasked:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _base_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.mask_2d = kwargs.get("attention_mask")

    def _text_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs.pop("logits_to_keep", None)  # every layer runs at full length
        if self.merged is not None:
            own, merged = kwargs["inputs_embeds"], self.merged
            prompt = torch.where(merged.isnan(), own[:, : merged.shape[1]], merged.to(own.dtype))
            kwargs["inputs_embeds"] = torch.cat([prompt, own[:, merged.shape[1] :]], 1)
        return args, kwargs

    @staticmethod
    def _onwards(known: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([known, known.new_ones(known.shape[0], length - known.shape[1])], 1)

    def _pre(self, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        self.before = given.clone()
        for row, place, members in self.means.get(index, ()):
            self.before[row, place] = given[row, members].mean(0)
        if args:
            args = (self.before, *args[1:])
        else:
            kwargs["hidden_states"] = self.before
        length = self.before.shape[-2]  # Gemma 3n stacks states in front of the batch
        given = kwargs.get("attention_mask")
        if given is not None and given.ndim == 4:
            seen = given if given.dtype == torch.bool else given > -1
        else:
            seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            if self.mask_2d is not None:
                seen = seen & self.mask_2d.bool()[:, None, None]
        seen = seen & self._onwards(self.alive[index], length)[:, None, None]
        if self.cached is not None:
            held = self.cached[index].transpose(1, 2).repeat_interleave(self.heads // self.cached[index].shape[2], 1)
            prompt = held.shape[2]
            since = torch.full((prompt,), prompt) if self.since is None else self.since
            shown = held[:, :, None] | (torch.arange(length)[:, None] < since)  # (B, H, length, N)
            seen = seen & torch.cat([shown, shown.new_ones(*shown.shape[:3], length - prompt)], 3)
        seen = seen | torch.eye(length, dtype=torch.bool)
        lowest = torch.finfo(self.before.dtype).min
        kwargs["attention_mask"] = torch.zeros(seen.shape, dtype=self.before.dtype).masked_fill(~seen, lowest)
        return args, kwargs

    @staticmethod
    def _zeroed(tokens: torch.Tensor, channels: int, module: nn.Module, args: Any) -> Any:
        inner = args[0].clone()
        inner[:, : tokens.shape[1], channels:] *= ~tokens[..., None]
        return inner

    def _silenced(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.silent:
            return None
        return torch.zeros_like(output) if torch.is_tensor(output) else (torch.zeros_like(output[0]), *output[1:])

    def _weighed(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if index not in self.weights:
            return None
        self.silent = True
        residual = module.forward(*args, **kwargs)
        self.silent = False
        hidden, residual = (x if torch.is_tensor(x) else x[0] for x in (output, residual))
        weight = self._onwards(self.weights[index], hidden.shape[1])[..., None].to(hidden.dtype)
        hidden = residual + weight * (hidden - residual)
        self.before = weight * self.before  # of those that pass by
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    def _post(self, index: int, output: Any) -> Any:
        hidden = output if torch.is_tensor(output) else output[0]
        hidden = torch.where(self._onwards(self.processed[index], hidden.shape[-2])[..., None], hidden, self.before)
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])


@contextmanager
def encodings(base: Any, known: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """In this block, note what the ``get_…_features`` methods of ``base`` return; or return what is ``known``, by name.

    The oracle knows nothing of what a pixel stage gives the vision tower, so it is handed the features.
    """
    names = [name for name in ("get_image_features", "get_video_features") if hasattr(type(base), name)]
    covered = {name: base.__dict__.get(name) for name in names}
    noted: dict[str, Any] = {} if known is None else known

    def standing_before(name: str) -> Any:
        @functools.wraps(getattr(type(base), name).__get__(base))  # generate() reads the signature
        def encode(*args: Any, **kwargs: Any) -> Any:
            if known is None:
                noted[name] = (covered[name] or getattr(type(base), name).__get__(base))(*args, **kwargs)
            return copy.copy(noted[name])

        return encode

    for name in names:
        base.__dict__[name] = standing_before(name)
    try:
        yield noted
    finally:
        for name, method in covered.items():
            if method is None:
                del base.__dict__[name]
            else:
                base.__dict__[name] = method


def greedy(
    model: Any,
    inputs: dict[str, Any],
    alive: Sequence[torch.Tensor],
    steps: int,
    banned: Sequence[int],
    oracle: DenseMasked | None = None,
) -> Any:
    """Greedy decoding under the oracle (:class:`DenseMasked` if none is given), recomputing everything at every step.

    Returns:
        sequences (B, N + steps) and the logits of each step (B, steps, V).
    """
    inputs, logits = dict(inputs), []
    paligemma = model.config.model_type == "paligemma"
    with torch.no_grad(), oracle or DenseMasked(model, alive):
        for _ in range(steps):
            ids = inputs["input_ids"]
            rest = {k: v for k, v in inputs.items() if k != "input_ids"}
            positions = model._prepare_position_ids_for_generation(ids, rest) + int(paligemma)
            step = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
            logits.append(step.clone())
            step[:, list(banned)] = -1e9
            chosen = step.argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([ids, chosen], 1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(chosen)], 1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in inputs:
                    kind = torch.full_like(chosen, int(paligemma)).to(inputs[name].dtype)
                    inputs[name] = torch.cat([inputs[name], kind], 1)
    return inputs["input_ids"], torch.stack(logits, 1)
