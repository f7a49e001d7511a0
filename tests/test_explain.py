"""Relevance: one layer against autograd, the rollout against eager maps with gradients, and what must not be left."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from visiontok.demo import curves

import visiontok
import visiontok.functional as F
from visiontok import Recipe
from visiontok.conformance.zoo import batch, build
from visiontok.engine import relevance as engine
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.recipes.explain import Explain

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
every_family = pytest.mark.parametrize("name", FAMILIES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("tile", [128, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_layer_is_attention_times_its_gradient(groups: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is a leaf here, so autograd says what depends on it; some rows see nothing, some weights are 0."""
    monkeypatch.setattr("visiontok.scorers.relevance.TILE", tile)
    q, k, v = normal(2, 4, 5, 6), normal(2, groups, 7, 6, seed=1), normal(2, groups, 7, 6, seed=2)
    visible = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    visible[0, 1] = False
    weight = torch.tensor([[0.0, 0.3, 0.2, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0, 0.0]])
    keys, values = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
    logits = (q @ keys.mT * 0.4).masked_fill(~visible[:, None], -torch.inf)
    a = logits.softmax(-1).nan_to_num(0.0).requires_grad_()
    out = (a @ values).detach().requires_grad_()

    def answer(o: Tensor) -> Tensor:
        return (o.tanh() * normal(2, 4, 5, 6, seed=5)).sum() + o.prod(-1).sum()

    [gradient] = torch.autograd.grad(answer(out), out)
    [slope] = torch.autograd.grad(answer(a @ values), a)
    expected = torch.einsum("bq,bqk->bk", weight, (a * slope).clamp_min(0).mean(1))
    got = F.relevance(weight, q, k, v, gradient, scale=0.4, visible=visible)
    torch.testing.assert_close(got, expected)
    one = F.relevance(weight[1], q[1], k[1], v[1], gradient[1], scale=0.4, visible=visible[1])
    torch.testing.assert_close(one, expected[1])


def test_a_window_that_only_the_kernel_knows_of() -> None:
    """Flash attention gets no mask of the window; the rollout is that of one that is written out."""
    q, k, v = normal(1, 2, 6, 4), normal(1, 1, 6, 4, seed=1), normal(1, 1, 6, 4, seed=2)
    at = torch.arange(6)
    near = (at[:, None] >= at) & (at[:, None] - at < 3)

    def run(mask: Tensor | None, window: int | None) -> Tensor:
        def forward() -> Tensor:
            out, _ = engine.note(0, q, k, v, mask, {"sliding_window": window}, (torch.zeros(1, 6, 2, 4), None))
            return (out * normal(1, 6, 2, 4, seed=4)).sum()

        return engine.rollout(forward, (at == 5).float()[None], torch.ones(1, 6, dtype=torch.bool))

    torch.testing.assert_close(run(None, 3), run(near[None, None], None))
    assert not torch.equal(run(None, 3), run(None, None))


# ----------------------------------------------------------------------------------------------------------- in models


def extended(inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """The prompts with all but the last token of the answers behind them."""
    out, behind = dict(inputs), answer[:, :-1].clamp_min(0)
    fill = {"input_ids": behind, "attention_mask": torch.ones_like(behind)}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            out[key] = torch.cat([inputs[key], fill.get(key, torch.zeros_like(behind)).to(inputs[key])], 1)
    return out


def rollout_naive(name: str, inputs: dict[str, Any], answer: Tensor, window: int | None = None) -> list[Tensor]:
    """Every map of an eager twin, its gradient by autograd, and R written out as a matrix."""
    twin = copy.deepcopy(build(name, "eager", torch.float32))
    twin.load_state_dict(build(name).state_dict())  # drawn in another precision
    long = {k: v.float() if v.is_floating_point() else v for k, v in extended(inputs, answer).items()}
    if window is not None:
        twin.config.text_config.sliding_window = twin.model.language_model.config.sliding_window = window
    found = twin(**long, output_attentions=True, use_cache=False)
    said, steps = answer >= 0, answer.shape[1]
    logits = found.logits[:, -steps:].gather(2, answer.clamp_min(0)[..., None])[..., 0]
    slopes = torch.autograd.grad((logits * said).sum(), found.attentions)
    out = []
    for b in range(len(answer)):
        r = torch.eye(long["input_ids"].shape[1])
        for a, slope in zip(found.attentions, slopes, strict=True):
            r = r + (a[b] * slope[b]).clamp_min(0).mean(0).detach() @ r
        row = r[-steps:][said[b]].mean(0)
        ids = inputs["input_ids"][b].tolist()
        places = [i for i, token in enumerate(ids) if token == 100]
        starts = [i for i in places if ids[i - 1] != 100]
        out += [row[[i for i in places if start <= i and not set(range(start, i)) - set(places)]] for start in starts]
    return out


ANSWER = torch.tensor([[7, 31, 55], [12, -100, -100]])


@pytest.mark.engine
@every_family
def test_the_rollout_is_that_of_eager_maps_with_gradients(name: str) -> None:
    """Padded prompts of two images and one, grouped-query attention, answers of three tokens and of one."""
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    got, expected = visiontok.explain(model, inputs, ANSWER), rollout_naive(name, inputs, ANSWER)
    assert [len(one) for one in got] == [len(one) for one in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine >= 0).all()
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5 * float(theirs.max()) + 1e-9)


@pytest.mark.engine
@every_family
def test_by_default_the_answer_is_what_the_model_says(name: str) -> None:
    model = copy.deepcopy(build(name))
    inputs = batch(name, model, images=[2, 1])
    model.generation_config.max_new_tokens = 3
    said = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ended = said.clone()
    model.generation_config.eos_token_id = int(said[0, 1])  # row 0 ends after one token, wherever row 1 does
    first = said == said[0, 1]
    first[:, 0] = False
    ended[first.cumsum(1) > 0] = -100
    got = visiontok.explain(model, inputs)
    for mine, theirs in zip(got, visiontok.explain(model, inputs, ended), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.engine
@every_family
def test_scores_choose_the_tokens_they_are_of(name: str) -> None:
    """The recipe asks for the first token of the answer by itself; with scores it takes those."""
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    said = model.generate(**inputs, do_sample=False, max_new_tokens=1)[:, -1:]
    scores = {"first_token": visiontok.explain(model, inputs, said), "": visiontok.explain(model, inputs, ANSWER)}
    for note, found in scores.items():
        options = {} if note else {"scores": found}
        with visiontok.compress(model, "explain", keep=3, **options) as compression, torch.no_grad():
            model(**inputs)
            ledger, report = compression.ledger, compression.report
        kept = ledger.units.gather(ledger.alive(0)[..., None])[..., 0]
        expected = [sorted(one.argsort(descending=True, stable=True)[:3].tolist()) for one in found]
        assert [row.nonzero()[:, 0].tolist() for row in kept] == expected
        assert report.recipe == ("explain[first_token]" if note else "explain")
        assert any("forward and backward" in warning for warning in report.warnings) == bool(note)


def state(model: Any) -> list[Any]:
    """What an explanation could leave behind."""
    modules = [
        (id(module.__dict__.get("config")), len(module._forward_pre_hooks), len(module._forward_hooks), module.training)
        for module in model.modules()
    ]
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    extra = sorted(set(vars(model.model)) | set(vars(model)))
    return [modules, parameters, extra, model.config._attn_implementation, torch.is_grad_enabled()]


@pytest.mark.engine
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_on_the_model(frozen: bool) -> None:
    """Whatever parameters require, in any mode, and after errors at both ends."""
    model = copy.deepcopy(build("llava")).requires_grad_(not frozen)
    inputs = batch("llava", model)
    with torch.no_grad():
        logits = model(**inputs).logits  # transformers puts hooks of its own on a model when it first runs
    before = state(model)
    first = visiontok.explain(model, inputs, ANSWER)
    assert state(model) == before
    with torch.inference_mode():
        again = visiontok.explain(model, {k: v.clone() for k, v in inputs.items()}, ANSWER)
    kept = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with visiontok.compress(model, "explain", keep=3) as compression, mode():
            model.generate(**inputs, max_new_tokens=2)
            kept.append(compression.ledger.alive(0).tolist())
        assert state(model) == before
    assert kept[0] == kept[1] == kept[2]
    with torch.no_grad():
        third = visiontok.explain(model, inputs, ANSWER)
    for one, two, three in zip(first, again, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)

    class Broken(Exception):  # noqa: N818  # thrown on purpose
        pass

    def fail(*_: Any) -> None:
        raise Broken

    for module in (
        model.lm_head,
        model.model.vision_tower.embeddings,
        model.model.language_model.layers[2],
    ):
        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            visiontok.explain(model, inputs, ANSWER)
        hook.remove()
        assert state(model) == before
        assert engine._thread.seen is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.engine
def test_what_cannot_be_explained() -> None:
    model = copy.deepcopy(build("llava"))
    inputs = batch("llava", model)
    with pytest.raises(ConfigError, match=r"answer: shape \(3,\); give .B, T. token ids, B = 2"):
        visiontok.explain(model, inputs, ANSWER[0])
    with visiontok.compress(model, "grid", keep=3), pytest.raises(ConfigError, match="already compressed with grid"):
        visiontok.explain(model, inputs, ANSWER)
    with pytest.raises(ConfigError, match=r"it is training.*call model.eval\(\) first"):
        visiontok.explain(model.train(), inputs, ANSWER)
    model.eval()
    hybrid = build("qwen3_5")
    with pytest.raises(UnsupportedError, match="not every decoder layer has visual tokens in its attention"):
        visiontok.explain(hybrid, batch("qwen3_5", hybrid), ANSWER)
    with pytest.raises(
        UnsupportedError, match=r"relevance needs the hooks of compress\(\).*scores of visiontok.explain"
    ):
        visiontok.compress_inputs(model, inputs, "explain", keep=3)
    layer = functools.partial(
        engine.note, 1, *normal(3, 1, 1, 2, 2), None, {"softcap": 30.0}, (normal(1, 2, 1, 2), None)
    )
    with pytest.raises(UnsupportedError, match="no plain softmax"):
        engine.rollout(layer, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    with visiontok.compress(model, "explain", keep=3), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        longer = inputs | {"attention_mask": torch.cat([torch.ones_like(inputs["attention_mask"])] * 2, 1)}
        with pytest.raises(UnsupportedError, match="holds an earlier turn"):
            model(**longer, past_key_values=cache)
    with (
        visiontok.compress(model.model, "explain", keep=3),
        pytest.raises(UnsupportedError, match="no output embeddings"),
    ):
        model.model(**inputs)


@pytest.mark.engine
def test_scores_of_other_images_are_refused() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model)
    scores = visiontok.explain(model, inputs, ANSWER)
    wrong = pytest.raises(ConfigError, match=r"they are of 1 images with \[16\] tokens, this call has 4")
    with visiontok.compress(model, "explain", keep=3, scores=scores[:1]), torch.no_grad(), wrong:
        model(**inputs)


def test_scores_are_numbers_that_a_recipe_is_saved_with() -> None:
    method = Explain(scores=[torch.tensor([0.5, 0.25]), torch.tensor([1.0])])  # type: ignore[list-item]
    assert method.scores == ((0.5, 0.25), (1.0,))
    recipe = visiontok.recipe("explain", keep=1, scores=[[0.5, 0.25], [1.0]])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.hash() == visiontok.recipe("explain", keep=1, scores=method.scores).hash()
    for wrong in ([], [[]], 3, [[float("nan")]], [0.5]):
        with pytest.raises(ConfigError, match=r"^scores=.*give finite numbers for every visual token"):
            Explain(scores=wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_embedded_model_can_answer_from_what_its_answer_rests_on() -> None:
    """Held-out scenes at 11 %: far above a random choice."""
    model, processor = visiontok.demo.load()
    sitting = curves.Sitting(model, processor, curves.write_exam("heldout", 100), 50)
    right = {
        method: sum(curves.measure(sitting, curves.Cell(method, 0.11, seed=seed))["hits"])
        for method, seed in (("explain", None), ("random", 0))
    }
    assert right["explain"] >= right["random"] + 10


def test_it_is_public() -> None:
    assert "explain" in visiontok.__all__
    assert Path(visiontok.explain.__code__.co_filename).name == "rollout.py"
