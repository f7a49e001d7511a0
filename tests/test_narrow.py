"""Narrow MLPs, and `yopo`, against stock models whose MLPs compute every row by itself, in full, and then forget."""

from __future__ import annotations

import copy
import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from test_cost import count, layer_counts
from test_engine import generate
from test_pmod import routers
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.modeling_layers import GradientCheckpointingLayer

import visiontok
from visiontok import Recipe
from visiontok.conformance.checks import against_oracle
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import cut, freeze, inject, leave, prompt
from visiontok.conformance.zoo import BANNED, CLIP, IMAGE, IMAGE_IDS, TEXT, batch, build, prepare, visual
from visiontok.cost import decoder_flops
from visiontok.engine.policy import StagePolicy
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage

T: Any = transformers
pytestmark = pytest.mark.engine
DEPTH, CHANNELS, SHRINK = 4, 48, 3
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
PLAIN = ("phi", "starcoder2")  # two projections and an activation between them
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # of checkpoints


def narrow(layer: int, until: int | None = None, shrink: float = SHRINK) -> Stage:
    return Stage(kind="narrow", layer=layer, until=until, shrink=shrink)


def narrowed(*layers: int, shrink: float = SHRINK) -> Recipe:
    return Recipe(stages=tuple(narrow(layer, shrink=shrink) for layer in layers), name="narrow")


class Literal(nn.Module):
    """An MLP that computes one row after the other, and of visual ones sets what lies behind ``channels`` to 0."""

    def __init__(self, mlp: Any, place: Tensor, channels: int) -> None:
        super().__init__()
        self.mlp, self.place, self.channels = mlp, place, channels

    def inner(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if hasattr(mlp, "fc1"):
            return mlp.activation_fn(mlp.fc1(x))
        if hasattr(mlp, "c_fc"):
            return mlp.act(mlp.c_fc(x))
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2)
            return mlp.activation_fn(gate) * up
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        last = next(getattr(self.mlp, name) for name in ("down_proj", "fc2", "c_proj") if hasattr(self.mlp, name))
        first = torch.arange(last.in_features) < self.channels
        rows = []
        for b, row in enumerate(x):
            for n, state in enumerate(row):
                inner = self.inner(state)
                is_visual = n < self.place.shape[1] and len(row) > 1 and bool(self.place[b, n])  # one row: decoding
                rows.append(last(inner * first if is_visual else inner))
        return torch.stack(rows).view_as(x)


def literal(model: Any, place: Tensor, layers: tuple[int, ...], channels: int = CHANNELS // SHRINK) -> Any:
    """A copy of ``model`` in which the MLPs of ``layers`` are narrow for ``place`` (B, N)."""
    twin = copy.deepcopy(model)
    for index in layers:
        layer = twin.get_decoder().layers[index]
        layer.mlp = Literal(layer.mlp, place, channels)
    return twin


@functools.cache
def plain_model(family: str) -> Any:
    torch.manual_seed(0)
    config = T.LlavaConfig(
        text_config={"model_type": family, **TEXT}, vision_config=CLIP, vision_feature_layer=-2, **IMAGE_IDS
    )
    return prepare(T.AutoModelForImageTextToText.from_config(config))


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and a padded batch of two rows with two images each."""
    model = plain_model(name) if name in PLAIN else build(name)
    return model, batch("llava" if name in PLAIN else name, model)


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((got - expected).abs().max() < tolerance * expected.abs().max())


# ------------------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("layers", [(0,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", [*FAMILIES, "glm4v", *PLAIN])
def test_states_logits_and_cache_are_those_of_the_literal_twin(name: str, layers: tuple[int, ...]) -> None:
    """At every position, image included, and in the cache slot by slot."""
    model, inputs = tiny(name)
    attended = inputs["attention_mask"].bool()
    with visiontok.compress(model, narrowed(*layers)) as compression, torch.no_grad():
        got = model(**inputs, output_hidden_states=True, use_cache=True)
        assert compression.ledger.narrow() == {k: (int(visual(inputs).sum()), 16) for k in layers}
    with torch.no_grad():
        expected = literal(model, visual(inputs), layers)(**inputs, output_hidden_states=True, use_cache=True)
        stock = model(**inputs).logits
    assert near(got.logits[attended], expected.logits[attended])
    assert not near(stock[attended], expected.logits[attended], 1e-3)
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert near(mine[attended], theirs[attended])
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert near(a.transpose(1, 2)[attended], b.transpose(1, 2)[attended])


RECIPES: dict[str, tuple[Recipe, tuple[int, ...]]] = {
    "yopo": (visiontok.recipe("yopo", shrink=SHRINK), (0, 1)),
    "yopo behind a method": (visiontok.recipe("divprune", keep=0.5) + visiontok.recipe("yopo", shrink=SHRINK), (0, 1)),
    "behind a cut": (Recipe(stages=(cut(2), narrow(2, 4))), (2, 3)),
    "around a cut": (Recipe(stages=(prompt(0.8), narrow(0, 4), cut(2))), (0, 1, 2, 3)),
    "injected late": (Recipe(stages=(inject(1), narrow(0, 4), cut(2, 0.7), leave(3))), (1, 2)),
    "some frozen": (Recipe(stages=(freeze(1), narrow(0, 4))), (0, 2, 3)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_other_stages_equals_the_masked_literal_twin(name: str, recipe: str) -> None:
    """Rows of different length hold different numbers of visual tokens, in other slots than those of the prompt."""
    model, inputs = tiny(name)
    stages, layers = RECIPES[recipe]
    with visiontok.compress(model, stages) as compression:
        out, ledger = generate(model, inputs), compression.ledger
    assert ledger.narrow() == {k: (int((ledger.alive(k) & ledger.visual).sum()), CHANNELS // SHRINK) for k in layers}
    alive, frozen = ([ask(k) for k in range(DEPTH)] for ask in (ledger.alive, ledger.frozen))
    twin = literal(model, visual(inputs), layers)
    steps = len(out.logits)
    sequences, logits = greedy(twin, inputs, alive, steps, BANNED, DenseMasked(twin, alive, frozen=frozen))
    assert torch.equal(out.sequences, sequences)
    assert near(torch.stack(out.logits, 1), logits, 1e-6)


@pytest.mark.parametrize("images", [[2, 0], [1, 3]])
def test_rows_with_any_number_of_images(images: list[int]) -> None:
    model = build("qwen3_vl")
    inputs = batch("qwen3_vl", model, images=images)
    with visiontok.compress(model, narrowed(0, 2)):
        out = generate(model, inputs)
    expected = generate(literal(model, visual(inputs), (0, 2)), inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert near(torch.stack(out.logits), torch.stack(expected.logits), 1e-6)


def test_later_turns_with_text_and_with_a_new_image() -> None:
    """Decoding and text turns run the whole MLP; of a new image, its own tokens are narrow, beside what is stored."""
    model, layers = build("llava"), (0, 1, 2, 3)
    first, second = (batch("llava", model, images=1, pad=pad, seed=seed) for pad, seed in ((2, 0), (0, 3)))
    second["pixel_values"] = second["pixel_values"].flip(-1)
    told = torch.tensor([[7, 8, 9], [11, 12, 13]])
    ids = torch.cat([first["input_ids"], told, second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(told), second["attention_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    edges = [0, first["input_ids"].shape[1], first["input_ids"].shape[1] + 3, ids.shape[1]]
    turns = [
        {
            "input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "position_ids": positions[:, a:b],
        } | ({"pixel_values": given["pixel_values"]} if given else {})
        for (a, b), given in zip(pairwise(edges), (first, None, second), strict=True)
    ]  # fmt: skip
    for before in ((), (prompt(0.5),)):  # the same cache, and one of two lengths
        got, cache, alive = [], None, []
        with visiontok.compress(model, Recipe(stages=(*before, narrow(0, 4)))) as compression, torch.no_grad():
            for turn in turns:
                out = model(**turn, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                got.append(out.logits[:, -1])
                if "pixel_values" in turn:
                    alive.append(compression.ledger.alive(0))
        alive.insert(1, torch.ones_like(told, dtype=torch.bool))
        twin = literal(model, ids == IMAGE, layers)
        pixels = torch.stack([first["pixel_values"], second["pixel_values"]], 1).flatten(0, 1)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}
        with DenseMasked(twin, [torch.cat(alive, 1)] * DEPTH), torch.no_grad():
            expected = twin(**whole, use_cache=False).logits
        for end, logits in zip(edges[1:], got, strict=True):
            assert near(logits, expected[:, end - 1], 1e-6)


def test_the_whole_mlp_is_the_stock_model_bit_for_bit() -> None:
    model, inputs = tiny("llava")
    with torch.no_grad():
        stock = model(**inputs).logits
        with visiontok.compress(model, narrowed(0, 1, 2, 3, shrink=1)) as compression:
            assert torch.equal(model(**inputs).logits, stock)
            assert any(w.startswith("nothing was dropped") for w in compression.report.warnings)
        with visiontok.compress(model, "vtw"):
            left = model(**inputs).logits
        with visiontok.compress(model, "yopo", shrink=1):
            assert torch.equal(model(**inputs).logits, left)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")
@pytest.mark.parametrize("name", ["llava", "glm4v"])
def test_loss_and_gradients_equal_the_literal_twin(name: str, reentrant: bool | None) -> None:
    """Of every parameter, with gradient checkpointing too; a narrow MLP's other channels learn from the text alone."""
    model = copy.deepcopy(build(name)).train()
    inputs = batch(name, model)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | visual(inputs), -100)
    labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100  # what padding would have predicted
    twin = literal(model, visual(inputs), (0, 2))
    expected = twin(**inputs, labels=labels, use_cache=False).loss
    expected.backward()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    with visiontok.compress(model, narrowed(0, 2)):
        if reentrant and HOOKS_INSIDE:
            with pytest.raises(UnsupportedError, match="use_reentrant"):
                model(**inputs, labels=labels).loss.backward()
            return
        got = model(**inputs, labels=labels).loss
        got.backward()
    assert torch.allclose(got, expected, rtol=1e-9)
    grads = {name.replace(".mlp.mlp.", ".mlp."): p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == grads.keys()
    for name, parameter in model.named_parameters():
        if name in grads:
            assert (parameter.grad - grads[name]).abs().max() <= 1e-6 * max(float(grads[name].abs().max()), 1e-6), name


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_who_reads_what_an_mlp_does_sees_all_rows_of_a_narrow_one(name: str) -> None:
    """The choice is that of the same method on the literal twin, whose layers before the cut are narrow."""
    model, inputs = tiny(name)
    method = visiontok.recipe("transprune", layers=(2,), shares=(0.5,), since=0)
    kept = []
    for subject, recipe in (
        (model, method + narrowed(0, 1)),
        (literal(model, visual(inputs), (0, 1)), method),
        (model, method),
    ):
        with visiontok.compress(subject, recipe) as compression, torch.no_grad():
            subject(**inputs)
            kept.append(compression.ledger.alive(3))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_a_route_scales_what_the_narrow_mlp_adds(tmp_path: Any) -> None:
    model, inputs = tiny("llava")
    against_oracle(model, inputs, visiontok.recipe("pmod", weights=routers(tmp_path)) + narrowed(1, 2, 3), BANNED)


# --------------------------------------------------------------------------------------------------------------- saved


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [*FAMILIES, "glm4v", *PLAIN])
def test_the_work_is_really_saved_and_the_report_says_how_much(name: str, rows: int) -> None:
    """Layer by layer what torch counts, in rows of different length, alone and behind a selection; and by hand."""
    model = copy.deepcopy(tiny(name)[0]).float()
    inputs = batch("llava" if name in PLAIN else name, model, rows=rows)
    width, matrices = TEXT["hidden_size"], 2 if name in PLAIN else 3
    for recipe in (narrowed(0, 2), Recipe(stages=(prompt(), narrow(0, 3), cut(2), leave(3)))):
        with visiontok.compress(model, recipe) as compression:
            flops = count(model, lambda m: m(**inputs, use_cache=True))
            costs, ledger = compression.report.account, compression.ledger
        assert list(costs.decoder) == layer_counts(flops, "model.language_model.layers.")
        plain = decoder_flops(model.config, ledger.tokens(), batch=rows)
        for layer in range(DEPTH):
            slots, tokens = rows * ledger.tokens()[layer], int((ledger.alive(layer) & ledger.visual).sum())
            few = tokens if layer in ledger.narrow() else 0
            each = 2 * matrices * width  # FLOPs of one channel of one token
            assert flops[f"model.language_model.layers.{layer}.mlp"] == (slots - few) * CHANNELS * each
            assert plain[layer] - costs.decoder[layer] == few * (CHANNELS - CHANNELS // SHRINK) * each
        assert sorted(ledger.narrow()) == ([0, 2] if recipe.name else [0, 1, 2])


def test_decoding_costs_what_it_does_in_the_stock_model() -> None:
    model = copy.deepcopy(build("llava")).float()
    inputs = batch("llava", model, rows=1, pad=0)
    step = {"input_ids": torch.tensor([[7]])}
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
    expected = layer_counts(count(model, lambda m: m(**step, past_key_values=stock)), "model.language_model.layers.")
    with visiontok.compress(model, narrowed(0, 1, 2, 3)):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        got = layer_counts(count(model, lambda m: m(**step, past_key_values=cache)), "model.language_model.layers.")
    assert got == expected


@pytest.mark.parametrize("select", ["grid", "fastv"])
def test_a_share_of_flops_counts_what_is_narrow(select: str) -> None:
    """The same share leaves more tokens where MLPs cost less, and one token more would be too many."""
    model = build("llava")
    inputs = batch("llava", model, rows=1, images=1, pad=0)
    stages, kept = visiontok.recipe(select, keep="flops:0.65").stages, []
    for beside in ((), (narrow(0, 4),)):
        with visiontok.compress(model, Recipe(stages=(*stages, *beside))) as compression, torch.no_grad():
            model(**inputs)
            report = compression.report
        kept.append(report.images[0].kept[-1])
        assert sum(report.account.decoder) <= 0.65 * sum(report.account.decoder_stock)
    assert kept[1] > kept[0]
    more = Recipe(stages=(*visiontok.recipe(select, keep=kept[1] + 1).stages, narrow(0, 4)))
    with visiontok.compress(model, more) as compression, torch.no_grad():
        model(**inputs)
        costs = compression.report.account
    assert sum(costs.decoder) > 0.65 * sum(costs.decoder_stock)


def test_the_report_says_what_was_done() -> None:
    model, inputs = tiny("llava")
    with visiontok.compress(model, "yopo") as compression, torch.no_grad():
        model(**inputs)
        report = compression.report
    assert report.layer_channels == (24, 24, None, None)
    assert report.to_dict()["layer_channels"] == (24, 24, None, None)
    assert "narrow MLP     24 channels in 2 of 4 layers" in str(report)
    with visiontok.compress(model, narrowed(1)) as compression, torch.no_grad():
        model(**inputs)
        assert not any("nothing was dropped" in warning for warning in compression.report.warnings)


# ------------------------------------------------------------------------------------------------- layers and channels


@pytest.mark.parametrize(
    ("depth", "options", "layers"),
    [
        (40, {}, range(20)),
        (28, {"layer": 24}, range(24)),
        (5, {"layer": 0.5}, range(2)),
        (4, {"shrink": 1}, ()),
    ],
)
def test_the_layers_of_yopo_are_those_before_its_exit(depth: int, options: dict[str, Any], layers: Any) -> None:
    policy = StagePolicy(visiontok.recipe("yopo", **options).stages, depth)
    assert [*policy.narrowed] == [*layers]
    assert [*policy.hidden] == [k >= (len(layers) or depth // 2) for k in range(depth)]


@pytest.mark.parametrize(("shrink", "channels"), [(1.01, 47), (5, 9), (3, 16), (48, 1)])
def test_channels_are_rounded_down(shrink: float, channels: int) -> None:
    model, inputs = tiny("llava")
    with visiontok.compress(model, narrowed(2, shrink=shrink)) as compression, torch.no_grad():
        model(**inputs)
        assert compression.report.layer_channels == (None, None, channels, None)


def test_it_goes_through_json() -> None:
    recipe = visiontok.recipe("yopo", shrink=4, layer=0.25)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.hash() != visiontok.recipe("yopo", shrink=3, layer=0.25).hash()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((narrow(2, 4), leave(2)), "layer=2: a narrow stage where the visual tokens are absent or frozen in every"),
        ((narrow(1), freeze(1)), "layer=1: a narrow stage where the visual tokens are absent or frozen in every"),
        ((narrow(0, 3), narrow(2)), "layer=2: two narrow stages in one layer"),
        ((narrow(2, 2),), "until=2: a narrow must end behind its layer 2"),
        ((narrow(4),), "narrow layer=4: this model has 4 layers"),
        ((narrow(0, shrink=49),), "shrink=49: the MLP of decoder layer 0 has 48 channels, so none is left"),
    ],
)
def test_what_makes_no_sense_is_refused(stages: tuple[Stage, ...], message: str) -> None:
    model = build("llava")
    with pytest.raises(ConfigError, match=message):
        visiontok.compress(model, Recipe(stages=stages))
    assert visiontok.attached(model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "keep=tokens:4: yopo has no budget; its layers fix what is computed"),
        ({"mass": True}, "yopo keeps no token that could speak for others"),
        ({"shrink": 0.5}, "shrink=0.5: a finite number of at least 1, which is the whole MLP"),
        ({"layer": 0}, "these stages hide the visual tokens from every layer"),
    ],
)
def test_options_of_yopo_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visiontok.compress(build("llava"), "yopo", **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "narrow"}, "shrink=None: a narrow stage needs shrink"),
        ({"kind": "freeze", "shrink": 2.0}, "shrink=2.0: a freeze stage has no shrink"),
        ({"kind": "narrow", "shrink": True}, "shrink=True: a finite number"),
        ({"kind": "narrow", "shrink": 2, "keep": visiontok.Budget.tokens(3)}, "a narrow stage drops no visual token"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stage(layer=1, **fields)


class Quantised(nn.Linear):
    """Stands for a layer whose weight is packed."""


def experts() -> Any:
    return build("qwen3_vl_moe")


def packed() -> Any:
    model = copy.deepcopy(build("llava"))
    model.get_decoder().layers[1].mlp.up_proj.__class__ = Quantised
    return model


def wrapped() -> Any:
    """Stands for torchao, whose weights are tensors made of others in a plain nn.Linear."""
    model = copy.deepcopy(build("llava"))
    linear = model.get_decoder().layers[1].mlp.up_proj
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    return model


def offloaded() -> Any:
    model = copy.deepcopy(build("llava"))
    model.get_decoder().layers[1].mlp.down_proj.to("meta")
    return model


def branched() -> Any:
    model = copy.deepcopy(build("llava"))
    model.get_decoder().layers[1].mlp.extra = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (experts, "qwen3_vl_moe: a narrow .* the Qwen3VLMoeTextSparseMoeBlock of decoder layer 0 has experts"),
        (packed, "llava: a narrow stage needs .* the LlamaMLP of decoder layer 1 has .* up_proj: Quantised"),
        (wrapped, "llava: a narrow stage needs .* the LlamaMLP of decoder layer 1 has .* up_proj: Linear"),
        (offloaded, "llava: a narrow stage needs .* that are loaded; the LlamaMLP of decoder layer 1"),
        (branched, "llava: a narrow stage needs .* extra: Linear, so .* leave the narrow stage out"),
    ],
)
def test_mlps_whose_weights_cannot_be_sliced_are_refused(made: Any, message: str) -> None:
    model = made()
    before = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    with pytest.raises(UnsupportedError, match=message):
        visiontok.compress(model, "yopo")
    assert visiontok.attached(model) is None
    assert [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()] == before
