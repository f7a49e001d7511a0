"""What the engine costs the host: nothing per layer where it need not, and no waiting for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from device import OnDevice, Watch, put

import visiontok
from visiontok import Recipe
from visiontok.conformance.schedules import SCHEDULES
from visiontok.conformance.zoo import batch, build
from visiontok.method import Stage

pytestmark = pytest.mark.engine
SYNC_FREE = [card.name for card in visiontok.methods() if card.contract.sync_free]


def layer_hooks(model):
    layers = model.model.language_model.layers
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for layer in layers for m in layer.modules())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_prompt_recipes_leave_no_hook_in_the_layers(name):
    model = copy.deepcopy(build(name))
    before = layer_hooks(model)  # transformers leaves some of its own where hidden states were once asked for
    for method in ("divprune", "cls_topk", "random"):
        with visiontok.compress(model, method, keep=4):
            assert layer_hooks(model) == before
    with visiontok.compress(model, "fastv", keep=4, layer=2):
        assert layer_hooks(model) >= before + 4


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("method", SYNC_FREE)
@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl"])
def test_the_host_never_waits_for_the_device(name, method, mass):
    """Token ids and padding are read before the vision tower starts; then all is counted on the host."""
    if method == "resize" and name != "llava":
        pytest.skip("its tower takes no smaller pictures")
    model = copy.deepcopy(build(name, "eager", torch.float32))
    inputs = batch(name, model, rows=1, pad=0)
    stages = visiontok.recipe(method).stages
    options = {} if stages[0].method is None else {"keep": 3 if len(stages) == 1 else 0.5}
    if mass and (not options or stages[0].kind == "cache"):
        pytest.skip("keeps no token that could speak for others")
    if options and mass:
        options["mass"] = True
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, method, **options) as compression, torch.no_grad():
        expected = model(**inputs).logits
        kept = compression.ledger.cached_tokens()
    towers = []
    with Watch() as watch, torch.no_grad():
        put(model)
        vision = next(m for n, m in model.model.named_children() if "vision" in n)
        vision.register_forward_pre_hook(lambda *_: towers.append(len(watch.reads)))
        given = {k: OnDevice(v) for k, v in inputs.items()}
        model(**given)
        stock = [r for r in watch.reads if r.startswith("ours")]
        assert not stock
        watch.reads.clear()
        towers.clear()
        with visiontok.compress(model, method, **options) as compression:
            out = model(**given, use_cache=True)
            ours = [r for r in watch.reads if r.startswith("ours")]
            assert len(ours) == 2, ours  # ids and padding
            assert sum(r.startswith("ours") for r in watch.reads[: towers[0]]) == 2
            watch.reads.clear()
            more = {"token_type_ids": OnDevice(torch.zeros(1, 1, dtype=torch.long))} if name == "gemma3" else {}
            model(
                input_ids=OnDevice(torch.tensor([[7]])),
                attention_mask=OnDevice(torch.ones(1, length + 1, dtype=torch.long)),
                position_ids=OnDevice(torch.tensor([[length]])),
                past_key_values=out.past_key_values,
                **more,
            )
            assert not [r for r in watch.reads if r.startswith("ours")]
            assert compression.ledger.cached_tokens() == kept
        assert torch.allclose(out.logits.inner, expected, atol=1e-5)


def test_what_the_host_takes_for_granted_is_checked_later():
    """A method that breaks its promise about the count is found out when somebody asks, and so are NaN features."""

    class Liar(visiontok.Method):
        card = visiontok.Card(name="liar", title="-", paper="-", venue="-", stage="prompt", needs="-")

        def select(self, ctx):
            return ctx.valid & (torch.arange(ctx.valid.shape[1], device=ctx.valid.device) < 2)

    recipe = Recipe(stages=(Stage(kind="prompt", method=Liar()),))
    for spoil, message in ((False, "against its card's contract"), (True, "NaN or infinity")):
        model = copy.deepcopy(build("llava", "eager", torch.float32))
        inputs = batch("llava", model, rows=1, pad=0)
        if spoil:
            inputs["pixel_values"].fill_(torch.nan)
        with Watch(), torch.no_grad():
            put(model)
            with visiontok.compress(model, recipe, keep=3) as compression:
                model(**{k: OnDevice(v) for k, v in inputs.items()})
                with pytest.raises(visiontok.errors.ConfigError, match=message):
                    _ = compression.ledger


@pytest.mark.parametrize("schedule", ["pyramid", "inject, cut, exit", "prompt and cut"])
def test_other_recipes_wait_only_to_count(schedule):
    """Methods that promise no count are asked once per selection how many they kept; decoding waits for nothing."""
    model = copy.deepcopy(build("llava", "eager", torch.float32))
    inputs = batch("llava", model, rows=1, pad=0)
    length = inputs["input_ids"].shape[1]
    selections = sum(stage.method is not None for stage in SCHEDULES[schedule])
    with Watch() as watch, torch.no_grad():
        put(model)
        with visiontok.compress(model, Recipe(stages=SCHEDULES[schedule])):
            given = {k: OnDevice(v) for k, v in inputs.items()}
            out = model(**given, use_cache=True)
            counted = [r for r in watch.reads if r.startswith("ours call.py")]
            assert len(counted) == selections
            watch.reads.clear()
            model(
                input_ids=OnDevice(torch.tensor([[7]])),
                attention_mask=OnDevice(torch.ones(1, length + 1, dtype=torch.long)),
                position_ids=OnDevice(torch.tensor([[length]])),
                past_key_values=out.past_key_values,
            )
            assert not [r for r in watch.reads if r.startswith("ours")]
