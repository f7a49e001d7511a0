"""compress(), recipes and reports as a user meets them; the engine itself is tested in test_engine.py."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import re
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

import visiontok
from visiontok import Budget, Card, Method, Needs, Recipe, Selection
from visiontok.conformance.schedules import cut, inject, leave, prompt
from visiontok.conformance.zoo import batch, build, visual
from visiontok.engine.clock import Clock
from visiontok.engine.trace import Trace
from visiontok.engine.vision import locate
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage, resolve_layer


@pytest.fixture
def llava():
    model = build("llava")
    return model, batch("llava", model)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def test_substitutes_are_named_in_the_report():
    for name, label in (("llava", "idpruner[cls]"), ("qwen2_5_vl", "idpruner[received]")):
        model = build(name)
        with visiontok.compress(model, "idpruner", keep=2) as compression:
            run(model, batch(name, model))
            assert compression.report.recipe == label


# ---- ways to name a recipe


def test_a_function_of_the_context(llava):
    model, inputs = llava

    def every_other(ctx):
        return ctx.valid & (torch.arange(ctx.valid.shape[1]) % 2 == 0)

    with visiontok.compress(model, every_other) as compression:
        run(model, inputs)
        assert compression.report.recipe == "every_other"
        assert compression.report.recipe_hash is None
        assert [i.kept[0] for i in compression.report.images] == [8] * 4


def test_a_function_may_ask_for_attention_and_merge(llava):
    model, inputs = llava

    def top(ctx):
        keep = visiontok.functional.topk(ctx.attention.cls(-2), 4, ctx.valid)
        mean = ctx.features.mean(1, keepdim=True).expand_as(ctx.features)
        return Selection(keep=keep, features=torch.where(keep[..., None], mean, torch.nan))

    top.needs = Needs(vision_cls=(-2,))
    with visiontok.compress(model, top) as compression:
        merged = run(model, inputs).logits
        kept = compression.ledger.alive(0)

    def plain(ctx):
        return compression.ledger.units.gather(kept[..., None])[..., 0]

    with visiontok.compress(model, plain):
        pruned = run(model, inputs).logits
    assert not torch.allclose(merged, pruned)
    assert merged.isfinite().all()


def test_recipe_files_and_python_files(llava, tmp_path):
    model, inputs = llava
    recipe = visiontok.recipe("idpruner", keep=5, scorer="norm", balance=0.3, seed=7)
    for suffix in ("json", "yaml"):
        path = tmp_path / f"recipe.{suffix}"
        recipe.save(path)
        assert Recipe.load(path) == recipe
        with visiontok.compress(model, path) as compression:
            run(model, inputs)
            assert compression.report.images[0].kept == (5,) * 4
            assert compression.report.recipe_hash == recipe.hash()
    code = tmp_path / "mine.py"
    code.write_text("def first(ctx):\n    keep = ctx.valid.clone()\n    keep[:, 1:] = False\n    return keep\n")
    with visiontok.compress(model, f"{code}:first") as compression:
        run(model, inputs)
        assert compression.report.images[0].kept == (1,) * 4
    with pytest.raises(ConfigError, match=r"defines no 'second'; it has first"):
        visiontok.compress(model, f"{code}:second")


def test_the_hash_is_canonical():
    assert visiontok.recipe("fastv", keep=0.5).hash() == visiontok.recipe("fastv", keep=0.5, layer=2 / 32).hash()
    assert visiontok.recipe("fastv", keep=0.5).hash() != visiontok.recipe("fastv", keep=0.25).hash()
    a = visiontok.recipe("divprune", keep=9)
    assert Recipe.from_dict(json.loads(json.dumps(a.to_dict()))).hash() == a.hash()
    assert Recipe(stages=a.stages, name="renamed").hash() == a.hash()


@dataclass(frozen=True)
class Last(Method):
    """Keeps the last tokens of each image."""

    card: ClassVar[Card] = Card(name="last", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        rank = ctx.valid.flip(1).cumsum(1).flip(1)
        return ctx.valid & (rank <= ctx.count[:, None])


def test_other_packages_register_methods(llava, monkeypatch):
    model, inputs = llava
    entry = importlib.metadata.EntryPoint("last", f"{__name__}:Last", "visiontok.methods")
    known = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **q: [entry] if q["group"] == entry.group else known(**q)
    )
    assert [card.name for card in visiontok.methods()][-1] == "last"
    with visiontok.compress(model, "last", keep=2) as compression:
        run(model, inputs)
        assert compression.report.images[0].kept == (2,) * 4
    assert Recipe.from_dict(visiontok.recipe("last", keep=2).to_dict()) == visiontok.recipe("last", keep=2)


def test_methods_and_stages_compose(llava):
    model, inputs = llava
    both = visiontok.recipe("divprune", keep=8) + visiontok.recipe("fastv", keep=2, layer=2)
    with visiontok.compress(model, both) as compression:
        run(model, inputs)
        report = compression.report
    assert report.recipe == "divprune+fastv"
    assert report.images[0].kept == (8, 8, 2, 2)
    assert report.layer_average == 5


def test_an_average_does_not_go_over_to_stages_it_was_not_meant_for(llava):
    model, inputs = llava
    averaged = Recipe(stages=(cut(1), cut(2)), average=Budget.tokens(5))
    plain = visiontok.recipe("divprune", keep=8)
    for first, second in ((averaged, plain), (plain, averaged)):
        names = re.escape(f"{first.label} + {second.label}: about+about has keep=tokens:5")
        with pytest.raises(ConfigError, match=f"^{names}.*own keep, or .*keep="):
            _ = first + second
    # the way out that the error names
    both = replace(averaged, average=None) + plain
    with visiontok.compress(model, both, keep=5) as compression:
        run(model, inputs)
    assert both.average is None
    assert compression.report.requested == "tokens:5 on layer average"


# ---- budgets


@pytest.mark.parametrize("stages", [(cut(1), cut(2), cut(3)), (inject(1), cut(1), leave(3)), (prompt(), cut(2))])
@pytest.mark.parametrize("keep", [5, 6, 0.4])
def test_a_budget_of_a_schedule_is_its_layer_average(llava, stages, keep):
    model, inputs = llava
    stages = tuple(Stage(kind=s.kind, layer=s.layer, method=Last() if s.method is not None else None) for s in stages)
    with visiontok.compress(model, Recipe(stages=stages), keep=keep) as compression:
        run(model, inputs)
        report = compression.report
    wanted = keep if isinstance(keep, int) else keep * 16
    assert "layer average" in report.requested
    for image in report.images:
        assert wanted - 1 < image.average <= wanted


def test_ratios_round_half_up_and_keep_at_least_one(llava):
    model, inputs = llava
    for keep, kept in ((0.01, 1), (0.03125, 1), (0.09375, 2), (0.5, 8), (100, 16)):
        with visiontok.compress(model, "grid", keep=keep) as compression:
            run(model, inputs)
            assert compression.report.images[0].kept == (kept,) * 4


def test_a_budget_in_flops(llava):
    model, inputs = llava
    for share in (0.6, 0.9):
        with visiontok.compress(model, "grid", keep=Budget.flops(share)) as compression:
            run(model, inputs)
            costs = compression.report.account
        got = sum(costs.decoder) / sum(costs.decoder_stock)
        assert share - 0.1 < got <= share
    with visiontok.compress(model, "grid", keep=Budget.flops(0.01)), pytest.raises(ConfigError, match="flops"):
        run(model, inputs)


def test_a_budget_of_everything_does_not_ask_the_method(llava):
    model, inputs = llava

    def never(ctx):
        raise RuntimeError("asked")

    with visiontok.compress(model, never, keep=1.0):
        run(model, inputs)
    with visiontok.compress(model, never, keep=0.9), pytest.raises(RuntimeError, match="asked"):
        run(model, inputs)


def test_per_tile_budgets_count_tiles():
    model = build("llava_next")
    with visiontok.compress(model, "grid", keep=Budget.per_tile(3)) as compression:
        run(model, batch("llava_next", model))
    assert all(image.kept[0] == 6 for image in compression.report.images)  # thumbnail and tiled picture


# ---- report and ledger


def test_steps_of_a_stock_call_are_not_counted(llava):
    model, inputs = llava
    with visiontok.compress(model, "grid", keep=1.0) as compression, torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        report = compression.report
    assert report.steps is None
    assert report.seconds["decode"] is None
    assert report.seconds["prefill"] is not None
    assert report.to_dict()["steps"] is None
    assert "decode not counted" in str(report)


class Event:
    """A CUDA event on a device whose time the test sets."""

    now = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_decoding_is_timed_where_it_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    trace = Trace(1)
    Event.now = 100.0  # the host has long gone on
    trace.finish([], [], [])
    assert trace.seconds()["decode"] is None
    for Event.now in (101.0, 102.0, 105.0):
        trace.note_step()
    assert (trace.steps, trace.seconds()["decode"]) == (3, 5.0)
    assert copy.deepcopy(trace.clock)._marks == {}


def test_a_clock_keeps_the_first_mark_or_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for now[0] in (1.0, 2.0, 4.0):
        clock.mark("first")
        clock.mark("last", again=True)
    assert clock.seconds("first", "last") == 3.0
    assert copy.deepcopy(clock).seconds("first", "last") == 3.0


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(stages=(inject(0),)), "the stages hide no visual token from any layer"),
        (visiontok.recipe("grid", keep=99), "the budget is at least the number of visual tokens"),
        (visiontok.recipe("fastv", keep=99), "the budget is at least the number of visual tokens"),
    ],
    ids=["no budget", "prompt", "decoder"],
)
def test_the_report_says_why_nothing_was_dropped(llava, recipe, reason):
    model, inputs = llava
    with visiontok.compress(model, recipe) as compression:
        run(model, inputs)
        warnings = [w for w in compression.report.warnings if "dropped" in w]
    assert warnings == [f"nothing was dropped: {reason}"]


def test_the_report_counts_what_is_stored(llava):
    model, inputs = llava
    with visiontok.compress(model, "fastv", keep=4, layer=2) as compression, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        report = compression.report
    # two tokens were decoded on the cache since the prefill
    stored = [layer.keys[:, :, :-2] for layer in out.past_key_values.layers]
    assert report.layer_tokens == tuple(keys.shape[2] for keys in stored)
    assert report.account.kv == sum(2 * keys.numel() * keys.element_size() for keys in stored)
    assert report.steps == 2
    assert {"vision", "selection", "prefill", "decode"} == {k for k, v in report.seconds.items() if v is not None}
    text = str(report)
    assert "tokens:4" in text
    assert "16 -> " not in text
    assert json.loads(json.dumps(report.to_dict()))["images"][0]["average"] == 10.0


def test_the_ledger_says_where_each_token_lies(llava):
    model, inputs = llava
    with visiontok.compress(model, "grid", keep=4) as compression:
        run(model, inputs)
    ledger = compression.ledger
    grid, alive = ledger.grid(), ledger.alive(0)
    assert grid.shape == (*inputs["input_ids"].shape, 4)
    seen = visual(inputs)
    assert grid[0][seen[0]].tolist() == [
        [image, 0, row, col] for image in (0, 1) for row in range(4) for col in range(4)
    ]
    assert not (alive & ~inputs["attention_mask"].bool()).any()
    with pytest.raises(ConfigError, match=r"layer=4: this model has decoder layers 0 … 3"):
        ledger.alive(4)


# ---- errors


def test_applying_twice_raises_and_removing_helps(llava):
    model, _ = llava
    first = visiontok.compress(model, "grid", keep=4)
    with pytest.raises(ConfigError, match=r"already compressed with grid.*\.remove\(\)"):
        visiontok.compress(model, "random", keep=4)
    first.remove()
    first.remove()
    visiontok.compress(model, "random", keep=4).remove()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["grid", "cls_topk", "fastv"])
def test_a_copy_of_an_attached_model_can_be_detached(llava, name, way):
    known, inputs = llava
    stock = run(known, inputs).logits
    # transformers leaves a hook of its own, which cannot be pickled, on a model that has run
    model, plain = (type(known)(copy.deepcopy(known.config)).to(known.dtype).eval() for _ in range(2))
    model.load_state_dict(known.state_dict())
    run(plain, inputs)
    assert visiontok.attached(model) is None
    with visiontok.compress(model, name, keep=4) as compression:
        if way == "deepcopy":
            run(model, inputs)  # with the remains of a call
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        compressed = run(model, inputs).logits
        assert visiontok.attached(model) is compression
        with pytest.raises(ConfigError, match=r"already compressed with .*visiontok\.attached\(model\)"):
            visiontok.compress(twin, "grid", keep=2)
        assert torch.equal(run(twin, inputs).logits, compressed)
        visiontok.attached(twin).remove()
        assert visiontok.attached(twin) is None
        assert torch.equal(run(twin, inputs).logits, stock)
        assert not any("visiontok" in repr(list(m._forward_pre_hooks.values())) for m in twin.modules())
        assert [vars(m).keys() for m in twin.modules()] == [vars(m).keys() for m in plain.modules()]
        assert visiontok.attached(model) is compression
        assert torch.equal(run(model, inputs).logits, compressed)
    assert visiontok.attached(model) is None
    with pytest.raises(UnsupportedError):
        visiontok.attached(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("divprun", {}, "method='divprun': unknown; did you mean divprune"),
        ("divprune", {"keep": True}, "keep=True"),
        ("divprune", {"keep": 0}, "keep=0"),
        ("divprune", {"keep": 1.5}, "keep=1.5"),
        ("divprune", {"keep": "1"}, "keep='1' is ambiguous"),
        ("divprune", {"keep": 4, "lambda_": 1}, "lambda_=1: divprune has no such option; it takes background"),
        (
            "idpruner",
            {"keep": 4, "balanse": 1},
            "balanse=1: idpruner has no such option; it takes background, balance, features, layer, scorer",
        ),
        ("vtw", {"keep": 4}, "no budget"),
        ("fastv", {"keep": 4, "layer": 4}, "layer=4: this model has 4 layers"),
        ("fastv", {"keep": 4, "layer": 0}, "layer=0: this model has 4 layers; use 1"),
        ("fastv", {"keep": 4, "layer": 1.0}, "a fraction of the depth must lie in"),
        ("hiprune", {"keep": 4, "object_layer": 7}, "hiprune: vision object_layer=7"),
        ("divprune", {"keep": 4, "fidelity": "paper"}, "fidelity='paper'"),
        ("divprune", {"keep": 4, "seed": "x"}, "seed='x'"),
        (3, {}, "recipe=3"),
        ("missing.json", {}, "cannot be read"),
        (Recipe(stages=(leave(2),)), {"alpha": 1}, "options go with the name of a method"),
        (Recipe(stages=(inject(2), cut(1))), {}, "a cut where the visual tokens are absent"),
        (Recipe(stages=(cut(2), cut(2))), {}, "two cuts at one layer"),
        (Recipe(stages=(inject(2), leave(2))), {}, "hide the visual tokens from every layer"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_attached(llava, recipe, options, message):
    model, inputs = llava
    stock = run(model, inputs).logits
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        visiontok.compress(model, recipe, **options)
    assert torch.equal(run(model, inputs).logits, stock)
    visiontok.compress(model, "grid", keep=4).remove()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("not json", "not valid JSON"),
        ('{"stages": []}', "at least one stage"),
        ('{"stages": [{"kind": "prune"}]}', "kind='prune'"),
        ('{"stages": [{"kind": "prompt"}]}', "a prompt stage needs a method"),
        ('{"stages": [{"kind": "exit", "layer": 2, "keep": 3}]}', "takes no budget"),
        ('{"stages": [{"kind": "exit"}]}', "needs a layer"),
        ('{"stages": 3}', "a recipe needs a list of stages"),
        ('{"steps": []}', "a recipe has no such field"),
    ],
)
def test_bad_recipe_files_are_named(tmp_path, data, message):
    path = tmp_path / "bad.json"
    path.write_text(data)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(path)


def test_wrong_answers_of_a_method_are_named(llava):
    model, inputs = llava
    answers: list[tuple[Any, str]] = [
        (lambda ctx: ctx.valid[:, 1:], "must return a bool mask"),
        (lambda ctx: ctx.features, "must return a bool mask"),
        (lambda ctx: None, "returned NoneType"),
        (lambda ctx: ctx.valid & False, "kept no token of an image"),
        (lambda ctx: Selection(keep=ctx.valid, features=ctx.features[..., :3]), "Selection.features has shape"),
    ]
    for method, message in answers:
        with visiontok.compress(model, method), pytest.raises(ConfigError, match=message):
            run(model, inputs)


def test_placeholders_and_pictures_must_match(llava):
    model, inputs = llava
    with visiontok.compress(model, "grid", keep=4):
        short = inputs | {"pixel_values": inputs["pixel_values"][:3]}
        with pytest.raises((ValueError, UnsupportedError)):
            run(model, short)
        run(model, inputs)  # the failed call left nothing behind


def test_placeholders_without_their_images_are_named():
    def find(placeholders, *tokens):
        masks = {"image": torch.tensor(placeholders, dtype=torch.bool)}
        grids = {"image": [(0, i, torch.zeros(n, 3, dtype=torch.long)) for i, n in enumerate(tokens)]}
        return locate(masks, grids, join_adjacent=False, model="toy")

    rows = [[1, 1, 1, 0], [0, 0, 0, 1]]
    assert find(rows, 3, 1).sizes == [3, 1]
    assert find([[1, 1, 0], [1, 1, 0]], 2).sizes == [2, 2]  # beams: one picture for both rows
    with pytest.raises(UnsupportedError, match=r"toy: 3 encoded image tokens stand against 4 placeholders"):
        find(rows, 3)
    with pytest.raises(UnsupportedError, match=r"toy: 5 encoded image tokens stand against 4 placeholders"):
        find(rows, 3, 2)
    with pytest.raises(UnsupportedError, match=r"row 0 do not hold a whole number of images.*not be split between"):
        find(rows, 2, 2)
    with pytest.raises(UnsupportedError, match="row 0 do not hold a whole number"):
        find(rows, 2)


def test_models_that_are_none():
    with pytest.raises(ConfigError, match="expected a torch module"):
        visiontok.compress("llava", "grid", keep=4)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="AutoModelForImageTextToText"):
        visiontok.compress(torch.nn.Linear(2, 2), "grid", keep=4)


def test_layers_as_fractions_are_valid_on_any_depth():
    for depth in (1, 4, 28, 32, 80):
        for card in visiontok.methods():
            for stage in visiontok.recipe(card.name).stages:
                if stage.layer is not None:
                    assert 0 <= resolve_layer(stage.layer, depth, name="layer", lowest=min(1, depth - 1)) < depth


def test_features_given_directly_have_no_grid(llava):
    """Embeddings that hold the features already: selection by features works, by geometry it says why not."""
    model, inputs = llava
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    bare = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with visiontok.compress(model, "divprune", keep=4) as compression:
        run(model, bare)
        assert all(image.kept == (4,) * 4 for image in compression.report.images)
    with visiontok.compress(model, "grid", keep=4), pytest.raises(UnsupportedError, match="where tokens lie"):
        run(model, bare)
    with visiontok.compress(model, "cls_topk", keep=4), pytest.raises(UnsupportedError, match="features instead"):
        run(model, bare)


def test_an_attached_model_keeps_its_state_dict(llava):
    model = copy.deepcopy(llava[0])
    names = set(model.state_dict())
    with visiontok.compress(model, "hiprune", keep=4):
        assert set(model.state_dict()) == names
