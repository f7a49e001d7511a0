"""Mass attention: kept tokens speak for those they replace. The oracles do everything naively and densely."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_cache import short_windows
from test_engine import DEPTH, STEPS, generate, masks

import visiontok
from visiontok import Mass, Recipe
from visiontok.api import Compression
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import About, cut, freeze, inject, leave, prompt
from visiontok.conformance.spy import spied
from visiontok.conformance.zoo import ARCHITECTURES, BANNED, IMAGE, batch, build, visual
from visiontok.errors import ConfigError
from visiontok.method import Selection, Stage

pytestmark = pytest.mark.engine


def weighed(stage, mass=Mass()):  # noqa: B008  # frozen
    return Stage(kind=stage.kind, layer=stage.layer, method=stage.method, mass=mass)


SCHEDULES = {
    "prompt": (weighed(prompt()),),
    "prompt, merged only": (weighed(prompt(), Mass(beta=0.0)),),
    "prompt, not merged": (weighed(prompt(), Mass(merge=0.0)),),
    "cut": (weighed(cut(2)),),
    "pyramid": (weighed(cut(1, 0.75, 1)), weighed(cut(2, 0.7, 2)), weighed(cut(3, 0.5, 3))),
    "only the second of two": (cut(1, 0.75, 1), weighed(cut(2, 0.5, 2))),
    "prompt, then a cut without": (weighed(prompt(0.7)), cut(2)),
    "prompt, injected, leaving": (weighed(prompt()), inject(1), leave(3)),
    "inject, cut, exit": (inject(1), weighed(cut(1, 0.6), Mass(beta=0.5, merge=1.0)), leave(3)),
    "prompt, frozen": (weighed(prompt()), freeze(0), freeze(2, 4)),
}


class DenseMass(DenseMasked):
    """The dense oracle with masses: values move and keys get their bias by the definition, token by token."""

    def __init__(self, model, alive, stages, owner, frozen=None):
        super().__init__(model, alive, frozen=frozen)
        self.stages, self.owner, self.visual = stages, owner, owner >= 0
        text = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
        self.handles.append(text.register_forward_pre_hook(self._enter, with_kwargs=True))

    def _enter(self, module, args, kwargs):
        self.size = [[1.0] * self.owner.shape[1] for _ in self.owner]
        self.bias = torch.zeros(self.owner.shape, dtype=torch.float64)
        self.left = self.visual.clone()
        hidden = kwargs["inputs_embeds"]
        for stage in self.stages:
            if stage.kind == "prompt":
                layer = next(i for i in range(DEPTH) if (self.alive[i] & self.visual).any())
                hidden = self._select(stage, hidden, self.alive[layer] & self.visual)
        kwargs["inputs_embeds"] = hidden
        return args, kwargs

    def _select(self, stage, hidden, keep):
        hidden, before = hidden.clone(), hidden
        if stage.mass is not None:
            for b in range(len(hidden)):
                for image in range(int(self.owner[b].max()) + 1):
                    mine = [i for i in range(self.owner.shape[1]) if self.owner[b, i] == image and self.left[b, i]]
                    kept = [i for i in mine if keep[b, i]]
                    z = torch.nn.functional.normalize(before[b].detach().float(), dim=-1)
                    group = {j: [] for j in kept}
                    for i in mine:
                        group[i if i in group else max(kept, key=lambda j: float(z[i] @ z[j]))].append(i)
                    sizes = {j: sum(self.size[b][i] for i in g) for j, g in group.items()}
                    for j, g in group.items():
                        mean = sum(self.size[b][i] * before[b, i] for i in g) / sizes[j]
                        hidden[b, j] = (1 - stage.mass.merge) * before[b, j] + stage.mass.merge * mean
                        if stage.mass.beta:
                            self.bias[b, j] = stage.mass.beta * math.log(sizes[j])
                    for j in kept:
                        self.size[b][j] = sizes[j]
        self.left = self.left & keep
        return hidden

    def _pre(self, index, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        for stage in self.stages:
            if stage.kind == "cut" and stage.layer == index:
                hidden = self._select(stage, hidden, self.alive[index] & self.visual)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        args, kwargs = super()._pre(index, args, kwargs)
        mask = kwargs["attention_mask"]
        bias = torch.zeros(len(mask), mask.shape[-1], dtype=mask.dtype)
        bias[:, : self.bias.shape[1]] = torch.where(self.alive[index] & self.left, self.bias, 0.0).to(mask.dtype)
        kwargs["attention_mask"] = mask + bias[:, None, None]
        return args, kwargs


def check(model, inputs, stages, tolerance, **options):
    with visiontok.compress(model, Recipe(stages=tuple(stages))) as compression:
        out = generate(model, inputs, **options)
        alive = masks(compression)
        owner = compression.ledger.grid()[..., 0]
        owner = torch.where(visual(inputs), owner, -1)
        masses = [compression.ledger.mass(layer) for layer in range(DEPTH)]
        frozen = [compression.ledger.frozen(layer) for layer in range(DEPTH)]
    oracle = DenseMass(model, alive, stages, owner, frozen)
    sequences, logits = greedy(model, inputs, alive, STEPS, BANNED, oracle=oracle)
    got = torch.stack(out.logits, 1)
    assert torch.equal(out.sequences, sequences)
    assert (got - logits).abs().max() < tolerance * logits.abs().max()
    return alive, owner, masses, out


@pytest.mark.support(mode="greedy", stage="mass")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "paligemma"])
def test_generation_equals_the_dense_model_with_masses(name, schedule):
    model = build(name)
    inputs = batch(name, model)
    alive, owner, masses, out = check(model, inputs, SCHEDULES[schedule], 2e-6)
    for layer, mass in enumerate(masses):  # what is conserved: all tokens of an image are spoken for
        for b in range(len(owner)):
            for image in range(int(owner[b].max()) + 1):
                mine = owner[b] == image
                if (alive[layer][b] & mine).any() and all(
                    s.mass is not None or s.method is None for s in SCHEDULES[schedule]
                ):
                    whole = layer >= max((s.layer or 0 for s in SCHEDULES[schedule] if s.method), default=0)
                    assert not whole or mass[b][mine].sum() == mine.sum()
    with visiontok.compress(
        model, Recipe(stages=tuple(weighed(s, None) if s.method else s for s in SCHEDULES[schedule]))
    ):
        plain = generate(model, inputs)
    assert not torch.allclose(torch.stack(plain.logits), torch.stack(out.logits)), "masses changed nothing"


@pytest.mark.support(mode="greedy", stage="mass")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_eager_attention(name):
    for attention, dtype, tolerance in (("sdpa", torch.float64, 2e-6), ("eager", torch.float32, 1e-4)):
        model = build(name, attention, dtype)
        check(model, batch(name, model), (weighed(prompt(0.7)), weighed(cut(2))), tolerance)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_kept_token_counts_as_many_copies(name):
    """β = 1, m = 0 is the stock model with each kept token repeated, at its own position, as often as its mass says."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0, images=1)
    stages = (weighed(prompt(), Mass(merge=0.0)),)
    positions = model._prepare_position_ids_for_generation(
        inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
    )
    with visiontok.compress(model, Recipe(stages=stages)) as compression, torch.no_grad():
        got = model(**inputs, position_ids=positions).logits[:, -1]
        mass = compression.ledger.mass(0)[0].long()
    repeated = torch.arange(len(mass)).repeat_interleave(mass)
    assert len(repeated) == inputs["input_ids"].shape[1]
    seen = {}

    def catch(module, args, kwargs):
        seen.update(kwargs)

    text = model.model.language_model
    handle = text.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, position_ids=positions)
    handle.remove()
    # a copy sees all copies of its own token, and whatever its token sees
    if name == "gemma3":
        full = seen["attention_mask"]["full_attention"]
        visible = full if full.dtype == torch.bool else full > -1
        visible = visible[:, :, repeated][..., repeated]
        visible = visible | (repeated[:, None] == repeated)
        mask = dict.fromkeys(seen["attention_mask"], visible)
    else:
        mask = (repeated[:, None] >= repeated)[None, None]
    with torch.no_grad():
        out = text(
            inputs_embeds=seen["inputs_embeds"][:, repeated],
            position_ids=positions[..., repeated],
            attention_mask=mask,
            use_cache=False,
        )
        expected = model.lm_head(out.last_hidden_state[:, -1])
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


def test_masses_of_one_change_nothing():
    """Where nothing is dropped, with masses or without, the model is the stock model, bit for bit."""
    model = build("llava")
    inputs = batch("llava", model)
    stock = generate(model, inputs)
    for recipe in ("grid", "fastv"):
        with visiontok.compress(model, recipe, keep=1.0, mass=True):
            got = generate(model, inputs)
        assert torch.equal(got.sequences, stock.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, stock.logits, strict=True))


def agreeing(stage):
    """The stage with a method that chooses alike for all beams of a prompt."""
    keep = visiontok.Budget.ratio(stage.method.fraction if stage.layer in (None, 1) else 0.4)
    method = visiontok.recipe("divprune").stages[0].method
    return Stage(kind=stage.kind, layer=stage.layer, method=method, keep=keep, mass=stage.mass)


MODES = {
    "beams": {"num_beams": 3},
    "several samples": {"num_return_sequences": 3, "do_sample": True, "temperature": 2.0},
}


@pytest.mark.support(stage="mass")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("schedule", ["prompt", "pyramid", "inject, cut, exit"])
def test_beams_and_samples_keep_their_masses(name, schedule, mode):
    model = build(name)
    inputs = batch(name, model, images=1)
    stages = tuple(s if s.method is None else agreeing(s) for s in SCHEDULES[schedule])

    def run(**more):
        torch.manual_seed(0)
        with torch.no_grad():
            return model.generate(
                **inputs,
                max_new_tokens=STEPS,
                suppress_tokens=list(BANNED),
                **{"do_sample": False} | MODES[mode] | more,
            )

    with visiontok.compress(model, Recipe(stages=stages)) as compression:
        got = run()
        alive = masks(compression)
        owner = torch.where(compression.ledger.visual, compression.ledger.grid()[..., 0], -1)
    with DenseMass(model, alive, stages, owner):
        expected = run(use_cache=False)
    assert torch.equal(got, expected)


def test_masses_live_with_the_cache():
    """Copies, crops, other rows and a text turn go on as if nothing had happened."""
    model = build("llava")
    inputs = batch("llava", model, images=1)
    stages = (weighed(prompt(0.7)), weighed(cut(2)))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    positions, token = mask.sum(1, keepdim=True) - 1, torch.tensor([[5], [6]])
    with visiontok.compress(model, Recipe(stages=stages)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert all(layer.bias.shape == (2, layer.keys.shape[2]) for layer in cache.layers)

        def step(change, rows):
            changed = copy.deepcopy(cache)
            change(changed)
            return model(
                input_ids=token[rows], attention_mask=mask[rows], position_ids=positions[rows], past_key_values=changed
            ).logits

        plain = step(lambda c: None, [0, 1])
        assert torch.allclose(step(lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]), plain.flip(0))
        repeated = step(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1])
        assert torch.allclose(repeated, plain.repeat_interleave(2, 0))
        assert torch.allclose(step(lambda c: c.batch_select_indices(torch.tensor([1])), [1]), plain[1:])

        longer = copy.deepcopy(cache)
        grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        for i in range(2):
            width = mask.shape[1] + i
            model(input_ids=token, attention_mask=grown[:, :width], position_ids=positions + i, past_key_values=longer)
        longer.crop(-2)
        again = model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=longer).logits
        assert torch.allclose(again, plain)


@pytest.mark.parametrize("schedule", ["prompt", "cut"])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_masses_leave_the_window_with_their_tokens(name, schedule):
    """With windows shorter than the prompt, steps on the cache equal one forward without."""
    model, kind = short_windows(name), "gemma3" if name == "gemma3" else "llava"
    inputs, more = batch(kind, model, rows=1, pad=0, text=2), torch.tensor([[9, 10]])
    ids = torch.cat([inputs["input_ids"], more], 1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = {"input_ids": more, "attention_mask": whole["attention_mask"]}
    if kind == "gemma3":
        whole["token_type_ids"], step["token_type_ids"] = (ids == IMAGE).long(), torch.zeros_like(more)
    with visiontok.compress(model, Recipe(stages=SCHEDULES[schedule])) as compression, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert all(mass.max() > 1 for mass in (compression.ledger.mass(layer)[:, -8:] for layer in (2, 3)))
        got = model(**step, past_key_values=cache).logits
        expected = model(**whole, use_cache=False).logits[:, -2:]
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.support(mode="new image in a later turn", stage="mass")
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_second_image_brings_its_own_masses(name):
    model = build(name)
    first, second = (batch(name, model, rows=2, images=1, pad=2, seed=seed) for seed in (0, 3))
    second["pixel_values"] = second["pixel_values"].flip(-1)
    stages = (weighed(prompt(0.7)), weighed(cut(2)))
    with visiontok.compress(model, Recipe(stages=stages)) as compression:
        one = generate(model, first, 3)
        before = masks(compression)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, 3, dtype=torch.long), second["attention_mask"]], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
        if name == "gemma3":
            turn["token_type_ids"] = (ids == IMAGE).long()
        two = generate(model, turn, 3, past_key_values=one.past_key_values)
        after = masks(compression)
    gap = ids.shape[1] - before[0].shape[1] - after[0].shape[1]
    alive = [torch.cat([a, a.new_ones(2, gap), b], 1) for a, b in zip(before, after, strict=True)]
    image = ids == IMAGE
    owner = torch.where(image, (torch.arange(ids.shape[1]) >= before[0].shape[1]).long(), -1)
    pixels = torch.stack([first["pixel_values"], second["pixel_values"]], 1).flatten(0, 1)
    oracle = DenseMass(model, alive, stages, owner)
    sequences, logits = greedy(model, turn | {"pixel_values": pixels}, alive, 3, BANNED, oracle=oracle)
    assert torch.equal(two.sequences, sequences)
    assert (torch.stack(two.logits, 1) - logits).abs().max() < 2e-6 * logits.abs().max()


@pytest.mark.support(stage="mass")
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(False, marks=pytest.mark.support(mode="training")),
        pytest.param(True, marks=pytest.mark.support(mode="gradient checkpointing")),
    ],
)
def test_gradients(name, checkpointing):
    model = copy.deepcopy(build(name)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch(name, model)
    stages = (weighed(prompt(0.7)), weighed(cut(2)))

    def gradients():
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with visiontok.compress(model, Recipe(stages=stages)) as compression:
        got = gradients()
        alive = masks(compression)
        owner = torch.where(visual(inputs), compression.ledger.grid()[..., 0], -1)
    model.gradient_checkpointing_disable()
    with DenseMass(model, alive, stages, owner):
        expected = gradients()
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        scale = max(float(expected[parameter].abs().max()), 1e-6)
        assert (gradient - expected[parameter]).abs().max() < 1e-5 * scale, parameter


def test_attention_taps_see_the_bias():
    """FastV behind a weighed prompt stage scores by the attention that really is paid."""
    model = build("llava", "eager", torch.float32)
    inputs = batch("llava", model, rows=1, pad=0)
    seen = {}

    def scores(ctx):
        seen["tap"] = ctx.attention.last_row(-1)
        seen["valid"] = ctx.valid
        return ctx.valid & (torch.arange(ctx.valid.shape[1]) % 2 == 0)

    scores.needs = visiontok.Needs(decoder_last_row=(-1,))
    method = visiontok.api.as_recipe(scores).stages[0].method
    stages = (weighed(prompt(0.7)), Stage(kind="cut", layer=2, method=method))
    model.set_attn_implementation("eager")
    with visiontok.compress(model, Recipe(stages=stages)) as compression, torch.no_grad():
        out = model(**inputs, output_attentions=True)
        alive, visible = compression.ledger.alive(0)[0], visual(inputs)[0]
    paid = out.attentions[1][0, :, -1].mean(0)  # over the slots of layer 1
    by_token = torch.zeros(len(alive)).masked_scatter(alive, paid)
    expected = by_token[visible].view(2, -1)
    assert torch.allclose(
        torch.where(seen["valid"], seen["tap"], 0.0), torch.where(seen["valid"], expected, 0.0), atol=1e-6
    )


SPEAKING = [c.name for c in visiontok.methods() if c.budget and c.contract.keeps_some and c.stage != "cache"]


@pytest.mark.parametrize("method", SPEAKING)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_masses_of_every_method_add_up_to_all_tokens(name, method):
    if visiontok.recipes.find(method).card.stage == "merge" and name != "llava":
        pytest.skip("its vision tower needs every patch")
    model = build(name, dtype=torch.float32)
    inputs = batch(name, model)
    with visiontok.compress(model, method, keep=0.4, mass=True) as compression, torch.no_grad():
        model(**inputs)
    ledger, layers = compression.ledger, range(model.config.text_config.num_hidden_layers)
    last = max(layer for layer in layers if (ledger.alive(layer) & ledger.visual).any())  # before an exit, if any
    owner = torch.where(ledger.visual, ledger.grid()[..., 0], -1)
    for b in range(len(owner)):
        for image in range(int(owner[b].max()) + 1):
            mine = owner[b] == image
            assert ledger.mass(last)[b][mine].sum() == mine.sum()
            assert ledger.mass(last)[b][mine].count_nonzero() == ledger.alive(last)[b][mine].sum() < mine.sum()


@pytest.mark.parametrize("method", ["aim_merge", "kmeans", "m3_pool", "visionzip", "vscan"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_merged_token_weighs_what_was_merged_into_it(name, method):
    """Its value is the method's: what is in it already does not enter a second time, nor a second token."""
    model = build(name, dtype=torch.float32)
    inputs = batch(name, model)
    entered, log = [], []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    recipe = visiontok.recipe(method, keep=0.3, **({"share": 0.5} if method == "visionzip" else {}))
    try:
        for mass in (None, Mass()):
            with Compression(model, spied(recipe.with_mass(mass), log)) as compression, torch.no_grad():
                model(**inputs)
    finally:
        hook.remove()
    assert torch.equal(*entered)
    masses = compression.ledger.mass(0)[compression.ledger.visual]
    answer, valid = log[-1].answer, log[-1].context.valid
    sources = [[into.count(i) if kept else 0 for i, kept in enumerate(keep)]
               for into, keep in zip(answer.into.tolist(), answer.keep.tolist(), strict=True)]  # fmt: skip
    expected = torch.tensor(sources).masked_fill(answer.keep & (torch.tensor(sources) == 0), 1)  # alone
    assert torch.equal(masses, expected[valid].float())
    assert masses.max() > 1


def test_a_token_cannot_go_into_one_that_is_dropped():
    def astray(ctx):
        keep = visiontok.functional.topk(-ctx.grid[..., 1].float(), ctx.count, ctx.valid)
        return Selection(keep=keep, features=ctx.features, into=ctx.size[:, None] - 1 + torch.zeros_like(keep).long())

    model = build("llava")
    with (
        visiontok.compress(model, astray, keep=4, mass=True),
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"Selection\.into names a token that select\(\) did not keep"),
    ):
        model(**batch("llava", model))


@pytest.mark.parametrize("kind", ["flash", "flex"])
def test_kernels_without_a_bias_give_way_to_sdpa(kind, monkeypatch):
    """FlexAttention, and flash attention whose heads are too wide for more columns (test_bias.py has the others):
    layers whose keys have a bias run sdpa, others keep their kernel, and the report says so."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask, flex_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []
    monkeypatch.setattr("visiontok.engine.probe.WIDEST", 8)

    def pretended(module, q, k, v, mask, **kwargs):
        assert not torch.is_tensor(mask) or mask.ndim == 2
        calls.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(f"pretended_{kind}", pretended)
    mask_function = {"flash": flash_attention_mask, "flex": flex_attention_mask}[kind]
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"pretended_{kind}", mask_function)
    reference = build("llava")
    model = copy.deepcopy(reference)
    for module in model.model.language_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = f"pretended_{kind}"
    inputs = batch("llava", model, rows=1, pad=0)
    recipe = Recipe(stages=(weighed(cut(2)),))
    with visiontok.compress(reference, recipe):
        expected = generate(reference, inputs)
    with visiontok.compress(model, recipe) as compression:
        got = generate(model, inputs)
        assert f"run sdpa instead of pretended_{kind}" in str(compression.report.warnings)
    assert torch.equal(got.sequences, expected.sequences)
    assert set(calls) == {0, 1}


@pytest.mark.parametrize(("name", "label"), [("llava", "visiontok["), ("qwen3_vl", "visiontok[received, ")])
def test_the_default_recipe_has_masses(name, label):
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, keep=0.5) as default, torch.no_grad():
        logits = model(**inputs).logits
    assert default.report.recipe == f"{label}mass merge=0.75]"
    with visiontok.compress(model, "idpruner", balance=0.15, keep=0.5, mass=Mass(merge=0.75)), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    for other in (False, True):
        with visiontok.compress(model, keep=0.5, mass=other), torch.no_grad():
            assert not torch.equal(model(**inputs).logits, logits)


def test_naming_saving_and_errors(tmp_path):
    recipe = visiontok.recipe("divprune", keep=4).with_mass(Mass(beta=0.5))
    assert recipe.label == "divprune[mass beta=0.5]"
    recipe.save(tmp_path / "mass.yaml")
    assert Recipe.load(tmp_path / "mass.yaml") == recipe
    assert recipe.hash() != visiontok.recipe("divprune", keep=4).hash()
    model = build("llava")
    with visiontok.compress(model, "idpruner", keep=4, mass=True) as compression, torch.no_grad():
        model(**batch("llava", model))
        assert compression.report.recipe == "idpruner[cls, mass]"
    with pytest.raises(ConfigError, match=r"mass=mass: vtw keeps no token"):
        visiontok.compress(model, "vtw", mass=True)
    with pytest.raises(ConfigError, match=r"mass\.merge=2: must be a number in \[0, 1\]"):
        Mass(merge=2)
    with pytest.raises(ConfigError, match=r"mass\.beta=-1"):
        Mass(beta=-1)
    with pytest.raises(ConfigError, match="mass='yes'"):
        visiontok.compress(model, "grid", keep=4, mass="yes")
    assert About().label == "about"
