"""``explain``: what a model's answer rests on, as an offline tool."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.adapters.base import RECURRENT, find, layer_kinds

from .api import Compression, base_model
from .engine.probe import Tap, attention_modules
from .engine.relevance import fresh, note, rollout
from .errors import ConfigError, UnsupportedError
from .recipe import recipe

_IGNORED = -100


def explain(model: nn.Module, inputs: Mapping[str, Any], answer: Tensor | None = None) -> list[Tensor]:
    """How much a model's answer rests on each visual token: gradient times attention, rolled out over all layers.

    R starts as the identity and becomes R + mean over heads of max(0, A ⊙ ∂y/∂A) · R, layer by layer; y is the sum of
    the answer's logits. What is returned is the mean of R's rows where the answer is predicted, at the visual tokens.

    An offline tool, for plots and as a teacher: the stock model runs forward and backward over the whole prompt, with
    its activations in memory. It keeps its attention kernel; nothing stays on it, no parameter gets a gradient.

    Args:
        model: a Hugging Face vision-language model in evaluation mode, with nothing attached by this thread.
        inputs: what its processor returned, left padded.
        answer: (B, T) long, tokens of each row's answer, -100 behind shorter ones; by default what the model generates
            greedily, without the token that ends it.

    Returns:
        for each image of the prompts, in their order, (n,) float32 of at least 0, in the order of its n tokens. Give
        them to ``compress(model, "explain", keep=…, scores=…)`` for the same inputs.

    Raises:
        ConfigError: for a model that is training or compressed, and for an answer of another shape.
        UnsupportedError: for a model whose layers do not all attend to the prompt's tokens by softmax.
    """
    base = base_model(model)
    adapter = find(base, inside=False)
    name = base.config.model_type  # type: ignore[union-attr]
    if adapter.cross_attention or layer_kinds(adapter) & RECURRENT:
        raise UnsupportedError(
            f"{name}: not every decoder layer has visual tokens in its attention, so there is no rollout; use a method "
            "that reads the vision tower"
        )
    if model.training:
        raise ConfigError(f"model={name}: it is training, and dropout would be explained, too; call model.eval() first")
    ids = inputs["input_ids"]
    # what keeps everything runs the stock model, and knows which token is whose
    with torch.inference_mode(False), Compression(model, recipe("grid", keep=1.0)) as compression:
        inputs = fresh(dict(inputs))
        answer = _generated(model, inputs) if answer is None else fresh(answer)
        if answer.ndim != 2 or len(answer) != len(ids) or not bool((answer[:, 0] >= 0).all()):
            raise ConfigError(
                f"answer: shape {tuple(answer.shape)}; give (B, T) token ids, B = {len(ids)}, T at least 1"
            )
        answer = answer.to(ids.device)
        given, said = _with_answer(inputs, answer), answer >= 0
        add = compression._attachment.add
        for index, layer in enumerate(getattr(base, adapter.text).layers):
            for module in attention_modules(layer):
                add(Tap(module, None, functools.partial(note, index)))
        tower = getattr(base, adapter.tower)  # what it computes is given here, and needs no graph
        add(tower.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None))
        add(tower.register_forward_hook(lambda *_: torch.set_grad_enabled(True) and None))

        def run() -> Tensor:
            logits = model(**given, use_cache=False, logits_to_keep=answer.shape[1]).logits
            return (logits.gather(2, answer.clamp_min(0)[..., None])[..., 0] * said).sum()

        weight = torch.zeros(given["input_ids"].shape, device=ids.device)
        weight[:, -answer.shape[1] :] = said / said.sum(1, keepdim=True)
        valid = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        total = rollout(run, weight, valid)
        units = compression.ledger.units
        found = units.gather(total[..., None])[..., 0]
        return [found[u, :size] for u, size in enumerate(units.sizes)]


@torch.no_grad()
def _generated(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) what a model says greedily, -100 from the end of a row's answer on."""
    out = model.generate(**inputs, do_sample=False, num_beams=1, return_dict_in_generate=False)
    answer = out[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=answer.device, dtype=torch.long).flatten()
    ended = torch.isin(answer, ends).cumsum(1) > 0
    ended[:, 0] = False  # who says nothing has said so
    longest = int((~ended).sum(1).max())
    return answer.masked_fill(ended, _IGNORED)[:, :longest]


def _with_answer(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """The prompts with their answers behind, but for the last token, which predicts nothing that is asked."""
    given, ids = dict(inputs), inputs["input_ids"]
    behind = answer[:, :-1].clamp_min(0)
    for key, value in inputs.items():
        if torch.is_tensor(value) and value.shape == ids.shape:
            more = behind if key == "input_ids" else torch.full_like(behind, key == "attention_mask")
            given[key] = torch.cat([value, more.to(value)], 1)
    return given
