"""Frozen visual tokens beyond generation, which the generic tests compare: what is saved, shown, refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_cache import short_windows
from test_cost import count, layer_counts
from test_engine import generate
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import visiontok
from visiontok import Recipe
from visiontok.conformance.checks import STEPS
from visiontok.conformance.oracle import DenseMasked
from visiontok.conformance.schedules import cut, freeze, inject, leave, prompt
from visiontok.conformance.zoo import batch, build, visual
from visiontok.cost import decoder_flops
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage
from visiontok.recipes.shortv import ShortV

pytestmark = pytest.mark.engine
DEPTH = 4
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")


def frozen(*layers: int) -> Recipe:
    return Recipe(stages=tuple(freeze(layer) for layer in layers), name="frozen")


class Restored:
    """The stock model with a hook behind each layer that puts visual rows back as they came; caches as ever."""

    def __init__(self, model: Any, inputs: dict[str, Any], layers: tuple[int, ...]) -> None:
        self.visual = visual(inputs)
        self.hooks = [
            model.get_decoder().layers[layer].register_forward_hook(self.restore, prepend=True, with_kwargs=True)
            for layer in layers  # before the hook that collects hidden states
        ]

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def restore(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        hidden = output if torch.is_tensor(output) else output[0]
        if hidden.shape[1] != self.visual.shape[1]:  # decoding
            return None
        hidden = torch.where(self.visual[..., None], before, hidden)
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])


# ------------------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("layers", [(0,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_logits_and_cache_are_those_of_the_restored_model(name: str, layers: tuple[int, ...]) -> None:
    """At every position, image included, and in the cache slot by slot."""
    model = build(name)
    inputs = batch(name, model)
    attended = inputs["attention_mask"].bool()
    with visiontok.compress(model, frozen(*layers)) as compression, torch.no_grad():
        got = model(**inputs, output_hidden_states=True, use_cache=True)
        assert [bool(compression.ledger.frozen(k).any()) for k in range(DEPTH)] == [k in layers for k in range(DEPTH)]
    with Restored(model, inputs, layers), torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, use_cache=True)
    with torch.no_grad():
        stock = model(**inputs).logits
    scale = expected.logits.abs().max()
    assert (got.logits - expected.logits)[attended].abs().max() < 1e-9 * scale
    assert (stock - expected.logits)[attended].abs().max() > 1e-3 * scale
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert (mine - theirs)[attended].abs().max() < 1e-9 * theirs[attended].abs().max()
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert (a - b).transpose(1, 2)[attended].abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_windows_shorter_than_the_prompt(name: str, pad: int) -> None:
    """No token is gone, so that the window is that of the stock model, padding included."""
    model = short_windows(name)
    inputs = batch("gemma3" if name == "gemma3" else "llava", model, pad=pad)
    layers = (0, 1, 3)
    with visiontok.compress(model, frozen(*layers)):
        got = generate(model, inputs)
    with Restored(model, inputs, layers):
        expected = generate(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, theirs in zip(got.logits, expected.logits, strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_beams_and_samples() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model, rows=1, images=1)
    options = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    with visiontok.compress(model, frozen(1, 2)), torch.no_grad():
        got = model.generate(**inputs, **options)
    wide = {k: v for k, v in inputs.items() if k in ("input_ids",)}
    restored = Restored(model, wide, (1, 2))
    restored.visual = restored.visual[:1]  # of every beam
    with restored, torch.no_grad():
        assert torch.equal(model.generate(**inputs, **options), got)


def test_kernels_that_take_no_mask_of_their_own_run_sdpa_where_tokens_are_frozen() -> None:
    seen: list[int] = []

    def pretend_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("pretend_flash", pretend_flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pretend_flash", sdpa_mask)
    model = copy.deepcopy(build("llava"))
    inputs = batch("llava", model)
    with visiontok.compress(model, frozen(1, 3)), torch.no_grad():
        expected = model(**inputs).logits
    for module in model.model.language_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "pretend_flash"
    with visiontok.compress(model, frozen(1, 3)) as compression, torch.no_grad():
        got = model(**inputs).logits
        assert "layers that visual tokens pass frozen run sdpa instead of pretend_flash" in compression.report.warnings
    assert seen == [0, 2]
    assert torch.allclose(got, expected)


# --------------------------------------------------------------------------------------------------------------- saved


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"])
def test_the_work_is_really_saved_and_the_report_says_how_much(name: str, attention: str, rows: int) -> None:
    """Layer by layer what torch counts, in rows of different length, alone and behind a selection."""
    model = build(name, attention, torch.float32)
    inputs = batch(name, model, rows=rows)
    for recipe in (frozen(0, 2), Recipe(stages=(prompt(), freeze(1), cut(2), freeze(2, 4)))):
        with visiontok.compress(model, recipe) as compression:
            flops = count(model, lambda m: m(**inputs, use_cache=True))
            costs, ledger = compression.report.account, compression.ledger
        assert list(costs.decoder) == layer_counts(flops, "model.language_model.layers.")
        text = int((ledger.attended & ~ledger.visual).sum(1).max())
        still = [layer for s in recipe.stages if s.kind == "freeze" for layer in range(s.layer, s.until or s.layer + 1)]
        assert ledger.computed() == [text if k in still else n for k, n in enumerate(ledger.tokens())]
        plain = decoder_flops(model.config, ledger.tokens(), batch=rows)
        assert [mine < whole for mine, whole in zip(costs.decoder, plain, strict=True)] == [
            k in still for k in range(DEPTH)
        ]
    assert costs.kv == sum(
        2 * layer.keys.numel() * layer.keys.element_size() for layer in _cache(model, inputs, recipe).layers
    )


def _cache(model: Any, inputs: dict[str, Any], recipe: Recipe) -> Any:
    with visiontok.compress(model, recipe), torch.no_grad():
        return model(**inputs, use_cache=True).past_key_values


def test_a_share_of_flops_counts_what_is_frozen() -> None:
    """The same share leaves more tokens where some layers cost less."""
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    select = visiontok.recipe("grid", keep="flops:0.7").stages
    kept = []
    for layers in ((), (0, 1, 2)):
        with visiontok.compress(model, Recipe(stages=(*select, *map(freeze, layers)))) as compression, torch.no_grad():
            model(**inputs)
            report = compression.report
        kept.append(report.images[0].kept[0])
        assert sum(report.account.decoder) <= 0.7 * sum(report.account.decoder_stock)
    assert kept[1] > kept[0]


def test_the_report_says_that_something_was_done() -> None:
    model = build("llava")
    with visiontok.compress(model, "shortv", layers=[1, -1]) as compression, torch.no_grad():
        model(**batch("llava", model))
        report = compression.report
    assert report.layer_average == 16
    assert not any("nothing was dropped" in warning for warning in report.warnings)
    assert "frozen         in 2 of 4 layers" in str(report)


# ------------------------------------------------------------------------------------------------------------- layers


def test_the_published_layers_are_those_of_32() -> None:
    published = {31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19}
    assert layers_of(32) == published
    assert layers_of(4) == {2, 3}
    assert layers_of(40) == {0, 2, 3, 4, 15, *range(21, 40)}
    assert layers_of(1) == {0}
    assert layers_of(10, layers=(0, 0.25, -1)) == {0, 2, 9}


def layers_of(depth: int, **options: Any) -> set[int]:
    from visiontok.engine.policy import StagePolicy

    return set(StagePolicy(ShortV(**options).stages(), depth).frozen)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((freeze(3), leave(2)), "layer=3: a freeze where the visual tokens are absent"),
        ((freeze(0), inject(1)), "layer=0: a freeze where the visual tokens are absent"),
        ((freeze(2, 2),), "until=2: a freeze must end behind its layer 2"),
        ((freeze(4),), "freeze layer=4: this model has 4 layers"),
        ((freeze(1, 5),), "until=5"),
        (
            (freeze(1), visiontok.recipe("fastv", layer=2, keep=4).stages[0]),
            "layer=2: fastv reads what layer 1 computes, which visual tokens pass as they are; cut elsewhere",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visiontok.compress(build("llava"), Recipe(stages=stages))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "keep=tokens:4: shortv has no budget; its layers fix what is computed"),
        ({"layers": []}, r"layers=\(\): name at least one"),
        ({"layers": [1, 7]}, "freeze layer=7: this model has 4 layers"),
        ({"mass": True}, "shortv keeps no token that could speak for others"),
    ],
)
def test_options_of_shortv_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visiontok.compress(build("llava"), "shortv", **options)


def test_a_budget_is_refused_by_the_stage_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match="a freeze stage drops no visual token and takes no budget"):
        Stage(kind="freeze", layer=1, keep=visiontok.Budget.tokens(3))


def test_a_cut_may_stand_at_a_frozen_layer_or_read_it_without_rotary_positions() -> None:
    """What the cut's own layer would attend to is asked beforehand."""
    model = build("llava")
    inputs = batch("llava", model)
    for name in ("pyramiddrop", "feather"):
        recipe = visiontok.recipe(name)
        cuts = {s.layer if isinstance(s.layer, int) else int(s.layer * DEPTH) for s in recipe.stages if s.kind == "cut"}
        still = tuple(map(freeze, sorted(cuts)))
        with visiontok.compress(model, Recipe(stages=(*recipe.stages, *still))) as compression, torch.no_grad():
            got = model(**inputs).logits
            alive, held = (
                [ask(k) for k in range(DEPTH)] for ask in (compression.ledger.alive, compression.ledger.frozen)
            )
        with DenseMasked(model, alive, frozen=held), torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        where = inputs["attention_mask"].bool() & alive[-1]
        assert (got - expected)[where].abs().max() < 1e-6 * expected.abs().max()


def test_a_layer_whose_queries_have_no_projection_of_their_own_is_refused() -> None:
    model = copy.deepcopy(build("llava"))
    layer = model.get_decoder().layers[1].self_attn
    layer.qkv_proj = layer.q_proj
    del layer.q_proj
    with pytest.raises(UnsupportedError, match="llava: LlamaAttention has no projection 'q_proj'"):
        visiontok.compress(model, frozen(1))
    assert visiontok.attached(model) is None
