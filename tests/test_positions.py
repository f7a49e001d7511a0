"""Counted positions: in every layer, what is left has numbers without gaps, as in a dense model given such numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import visiontok
from visiontok.conformance.checks import STEPS, generate
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import SCHEDULES, recipe
from visiontok.conformance.zoo import BANNED, batch, build
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.recipes.pyramiddrop import PyramidDrop

pytestmark = pytest.mark.engine
DEPTH = 4


class Counted(DenseMasked):
    """The dense masked model, whose layers turn queries and keys by the number of tokens they still see before them."""

    def __init__(self, model, alive, frozen, attended):
        self.text, self.attended = model.get_decoder(), attended
        super().__init__(model, alive, frozen=frozen)

    def _pre(self, index, args, kwargs):
        args, kwargs = super()._pre(index, args, kwargs)
        length = self.before.shape[1]
        rest = torch.ones(len(self.attended), length - self.attended.shape[1], dtype=torch.bool)
        seen = torch.cat([self.attended & self.alive[index], rest], 1)
        numbers = (seen.long().cumsum(1) - 1).clamp_min(0)
        kinds = getattr(self.text.config, "layer_types", None)
        by_kind = type(self.text.rotary_emb).__name__.startswith("Gemma3")
        options = {"layer_type": kinds[index]} if by_kind else {}
        kwargs["position_embeddings"] = self.text.rotary_emb(self.before, numbers, **options)
        return args, kwargs


def compact(schedule):
    return replace(recipe(schedule), positions="compact")


def against_counted(model, inputs, made, close):
    with visiontok.compress(model, made) as compression:
        out = generate(model, inputs, BANNED)
        ledger = compression.ledger
    alive, frozen = ([table(layer) for layer in range(DEPTH)] for table in (ledger.alive, ledger.frozen))
    oracle = Counted(model, alive, frozen, inputs["attention_mask"].bool())
    sequences, logits = greedy(model, inputs, alive, STEPS, BANNED, oracle)
    assert torch.equal(out.sequences, sequences)
    torch.testing.assert_close(torch.stack(out.logits, 1).to(logits), logits, atol=close, rtol=0)
    return out


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3"])
def test_generation_equals_the_oracle(name, schedule, attention):
    dtype, close = (torch.float64, 1e-6) if attention == "sdpa" else (torch.float32, 1e-4)
    model = build(name, attention, dtype)
    inputs = batch(name, model)
    against_counted(model, inputs, compact(schedule), close)


def test_numbers_decide():
    """Else the tests above would show nothing."""
    model, made = build("llava"), recipe("pyramid")
    inputs = batch("llava", model)
    with visiontok.compress(model, made):
        original = generate(model, inputs, BANNED)
    with visiontok.compress(model, made, positions="compact"):
        counted = generate(model, inputs, BANNED)
    assert (torch.stack(original.logits) - torch.stack(counted.logits)).abs().max() > 1e-4


def test_scores_asked_beforehand_are_of_counted_positions():
    """PyramidDrop's second cut asks the layer behind it, which sees numbers counted through after the first."""
    model = build("llava", dtype=torch.float64)
    inputs = batch("llava", model)
    made = replace(visiontok.recipe("pyramiddrop", layers=(1, 3), shares=(0.5, 0.25)), positions="compact")
    against_counted(model, inputs, made, 1e-6)
    assert isinstance(made.stages[0].method, PyramidDrop)


@pytest.mark.parametrize("schedule", ["prompt", "pyramid", "inject, cut, exit"])
def test_everything_kept_is_stock(schedule):
    model = build("llava")
    inputs = batch("llava", model)
    stock = generate(model, inputs, BANNED)
    made = compact(schedule)
    everything = tuple(replace(s, keep=visiontok.Budget.ratio(1.0)) for s in made.stages if s.method is not None)
    with visiontok.compress(model, replace(made, stages=everything)):
        same = generate(model, inputs, BANNED)
    assert torch.equal(torch.stack(stock.logits), torch.stack(same.logits))


@pytest.mark.parametrize("schedule", ["prompt", "pyramid", "inject, cut, exit"])
def test_later_turns_and_beams_go_on_counting(schedule):
    """A second turn on the cache, token by token or at once; beams that reorder it."""
    model = build("llava", dtype=torch.float64)
    inputs = batch("llava", model, images=[1, 1])
    made = compact(schedule)
    with visiontok.compress(model, made), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        more = torch.randint(3, 20, (2, 5))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        at_once = model(input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        cache = model(**inputs, use_cache=True).past_key_values
        length = inputs["input_ids"].shape[1]
        singly = []
        for i in range(5):
            seen = mask[:, : length + i + 1]
            step = model(input_ids=more[:, i : i + 1], attention_mask=seen, past_key_values=cache, use_cache=True)
            singly.append(step.logits)
        torch.testing.assert_close(torch.cat(singly, 1), at_once)
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(BANNED)}
        beams = model.generate(**inputs, **options)
        alone = model.generate(**{k: v[:1] for k, v in inputs.items()}, **options)
    assert torch.equal(beams[:1], alone)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_models_of_several_numbers_per_token_are_refused(name):
    with pytest.raises(UnsupportedError, match="positions='compact'"):
        visiontok.compress(build(name), compact("cut"))


def test_recipes_say_so():
    made = replace(visiontok.recipe("pyramiddrop"), positions="compact")
    assert made.label == "pyramiddrop[compact]"
    assert (made + visiontok.recipe("divprune")).label == "pyramiddrop+divprune[compact]"
    assert visiontok.Recipe.from_dict(made.to_dict()) == made
    with pytest.raises(ConfigError, match="positions"):
        replace(made, positions="dense")
    model = build("llava")
    with pytest.raises(UnsupportedError, match="positions='compact'"):
        visiontok.compress_inputs(model, batch("llava", model), replace(recipe("prompt"), positions="compact"))
