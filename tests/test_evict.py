"""The cache stage: what comes behind a prompt sees, in every key head, what the ledger says was kept; memory is freed.

The oracle is the stock model at full length, where rows behind the prompt are masked head by head.
"""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from test_cache import left_padded, sliding
from test_decoder_scorers import FAMILIES, asking, best
from test_generate import CANNOT_CHUNK, check_same, run
from transformers import DynamicCache

import visiontok
from visiontok import Budget, Card, Context, Method, Needs, Recipe, Selection
from visiontok.conformance.checks import against_oracle
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import cut, inject, leave, prompt
from visiontok.conformance.zoo import BANNED, IMAGE, batch, build, visual
from visiontok.engine.probe import Tap, attention_modules
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage
from visiontok.recipes._heads import each_head
from visiontok.recipes.snapkv import SnapKV

pytestmark = pytest.mark.engine
DEPTH = 4


@dataclass(frozen=True)
class Drawn(Method):
    """Every head keeps other tokens, drawn from how the prompt begins, so that beams agree."""

    heads: int = 2
    card: ClassVar[Card] = Card(name="drawn", title="-", paper="-", venue="-", stage="cache", needs="-")

    def select(self, ctx: Context) -> torch.Tensor:
        scores = torch.zeros(*ctx.valid.shape, self.heads)
        for u, (row, image) in enumerate(zip(ctx.row.tolist(), ctx.image.tolist(), strict=True)):
            begins = [] if ctx.text_ids is None else ctx.text_ids[row][ctx.text_valid[row]][:3].tolist()
            g = torch.Generator().manual_seed(hash((ctx.layer, image, *begins)) % 2**63)
            scores[u] = torch.rand(scores.shape[1:], generator=g)
        return each_head(visiontok.functional.topk, scores, ctx)


def cache(share: float = 0.4, method: Method | None = None) -> Stage:
    return Stage(kind="cache", method=method or Drawn(), keep=Budget.ratio(share))


RECIPES = {
    "snapkv": (cache(method=SnapKV(window=4)),),
    "any heads": (cache(),),
    "one choice": (cache(method=Drawn(heads=1)),),
    "prompt": (prompt(0.75), cache(0.25)),
    "cuts": (cut(1, 0.8, 1), cut(3, 0.7, 2), cache(0.25)),
    "inject, exit": (inject(1), leave(3), cache()),
}


def recipe(name: str) -> Recipe:
    return Recipe(stages=RECIPES[name], name=name)


def held(compression: Any) -> list[torch.Tensor]:
    return [compression.ledger.cached(layer) for layer in range(DEPTH)]


def alive(compression: Any) -> list[torch.Tensor]:
    return [compression.ledger.alive(layer) for layer in range(DEPTH)]


def taken(cache: Any) -> int:
    """Bytes that the storages of a cache take."""
    filled = [layer for layer in cache.layers if layer.is_initialized]
    return sum(x.untyped_storage().nbytes() for layer in filled for x in (layer.keys, layer.values))


# ------------------------------------------------------------------------------------------------ what is seen later


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_generation_equals_the_oracle(architecture: str, name: str, attention: str) -> None:
    dtype, close = (torch.float64, 1e-6) if attention == "sdpa" else (torch.float32, 1e-4)
    model = build(architecture, attention, dtype)
    inputs = batch(architecture, model, images=[2, 1])
    against_oracle(model, inputs, recipe(name), BANNED, close=close)
    with visiontok.compress(model, recipe(name)) as compression, torch.no_grad():
        model(**inputs)
        thinned, whole = held(compression), alive(compression)
        assert any(image.cached != image.kept for image in compression.report.images)
    assert any((a[..., None] & ~h).any() for a, h in zip(whole, thinned, strict=True))
    if name in ("any heads", "cuts"):
        assert all((layer[..., 0] != layer[..., 1]).any() for layer in thinned), (
            "heads agree, so the test shows nothing"
        )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_beams_and_samples(architecture: str, options: dict[str, Any]) -> None:
    model = build(architecture)
    inputs = batch(architecture, model, images=1)
    with visiontok.compress(model, recipe("any heads")) as compression:
        got = run(model, inputs, **options)
        masks, thinned = alive(compression), held(compression)
    with DenseMasked(model, masks, cached=thinned):
        check_same(got, run(model, inputs, **options | {"use_cache": False}))


TURNS = [*(recipe(name) for name in ("any heads", "cuts")), Recipe(stages=(prompt(),), name="nothing thinned")]


@pytest.mark.parametrize("made", TURNS, ids=lambda made: made.name)
@pytest.mark.parametrize("architecture", ["llava", "gemma3"])
def test_a_second_turn_sees_what_was_kept(architecture: str, made: Recipe) -> None:
    """Text behind the answer, on the same cache; the whole second turn sees the thinned cache."""
    model = build(architecture)
    inputs = batch(architecture, model)
    with visiontok.compress(model, made) as compression:
        first = run(model, inputs, 3)
        masks, thinned = alive(compression), held(compression)
        more = torch.randint(5, 90, (2, 5), generator=torch.Generator().manual_seed(9))
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in inputs:
            turn["token_type_ids"] = (ids == IMAGE).long()
        second = run(model, turn, 3, past_key_values=first.past_key_values)
    with DenseMasked(model, masks, cached=thinned):
        expected = run(model, turn | {"pixel_values": inputs["pixel_values"]}, 3, use_cache=False)
    check_same(second, expected)


@pytest.mark.parametrize("name", ["any heads", "cuts"])
@pytest.mark.parametrize("architecture", ["llava", "gemma3"])
def test_a_new_image_on_a_thinned_cache(architecture: str, name: str) -> None:
    """It sees what was kept of the first image, and is thinned for itself; what earlier turns kept stays."""
    model = build(architecture)
    one, two = (batch(architecture, model, rows=2, images=1, pad=2, seed=seed) for seed in (0, 3))
    two["pixel_values"] = two["pixel_values"].flip(-1)
    with visiontok.compress(model, recipe(name)) as compression:
        first = run(model, one, 3)
        masks, thinned = [alive(compression)], [held(compression)]
        ids = torch.cat([first.sequences, two["input_ids"]], 1)
        mask = torch.cat([one["attention_mask"], torch.ones(2, 3, dtype=torch.long), two["attention_mask"]], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "pixel_values": two["pixel_values"]}
        if "token_type_ids" in one:
            turn["token_type_ids"] = (ids == IMAGE).long()
        second = run(model, turn, 3, past_key_values=first.past_key_values)
        masks.append(alive(compression))
        thinned.append(held(compression))
    length, begin = ids.shape[1], ids.shape[1] - masks[1][0].shape[1]
    gap = begin - masks[0][0].shape[1]
    both = [torch.cat([a, a.new_ones(2, gap), b], 1) for a, b in zip(*masks, strict=True)]
    kept = [
        torch.cat([a.expand(-1, -1, 2), a.new_ones(2, gap, 2), b.expand(-1, -1, 2)], 1)
        for a, b in zip(*thinned, strict=True)
    ]
    since = torch.where(torch.arange(length) < begin, masks[0][0].shape[1], length)
    pixels = torch.stack([one["pixel_values"], two["pixel_values"]], 1).flatten(0, 1)
    oracle = DenseMasked(model, both, cached=kept, since=since)
    sequences, logits = greedy(model, turn | {"pixel_values": pixels}, both, 3, BANNED, oracle)
    assert torch.equal(second.sequences, sequences)
    torch.testing.assert_close(torch.stack(second.logits, 1), logits.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_prefill_is_the_stock_model_s(architecture: str) -> None:
    """A cache stage changes no logit of the prompt; with everything kept, none of the answer either."""
    model = build(architecture)
    inputs = batch(architecture, model)
    where = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock, answer = model(**inputs).logits, run(model, inputs)
    with visiontok.compress(model, "snapkv", keep=0.3), torch.no_grad():
        assert torch.equal(model(**inputs).logits[where], stock[where])
    for force in (False, True):
        with visiontok.api.Compression(model, visiontok.recipe("snapkv", keep=1.0), force=force):
            got = run(model, inputs)
        assert torch.equal(torch.stack(got.logits), torch.stack(answer.logits))


# -------------------------------------------------------------------------------------------------------- what is freed


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_storages_shrink_to_what_the_report_says(architecture: str, name: str) -> None:
    model = build(architecture)
    inputs = batch(architecture, model, images=[2, 1])
    held_at: list[int] = []
    gone: list[Any] = []

    def note(call: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
        gone.append(weakref.ref(k))

    def stored(module: Any, args: Any, output: Any) -> None:
        held_at.append(taken(cache))

    layers = model.get_decoder().layers
    cache = DynamicCache(config=model.config)
    with visiontok.compress(model, recipe(name)) as compression, torch.no_grad():
        taps = [Tap(attention_modules(layer)[0], note) for layer in layers]
        handles = [layer.register_forward_hook(stored) for layer in layers]
        model(**inputs, past_key_values=cache)
        for removable in (*taps, *handles):
            removable.remove()
        report, tokens = compression.report, compression.ledger.cached_tokens()
    assert [layer.keys.shape[2] for layer in cache.layers] == tokens
    assert taken(cache) == report.account.kv < report.account.kv_stock  # type: ignore[operator]
    per_layer = [2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers]
    assert held_at == [sum(per_layer[: i + 1]) for i in range(DEPTH)], "a layer is thinned before the next one runs"
    whole = [n // t * w for n, t, w in zip(per_layer, tokens, compression.ledger.tokens(), strict=True)]
    peak = max(sum(per_layer[:i]) + whole[i] + (per_layer[i] if whole[i] > per_layer[i] else 0) for i in range(DEPTH))
    assert report.account.kv_peak == peak
    left = [reference() for reference, n, m in zip(gone, per_layer, whole, strict=True) if n < m]
    assert left == [None] * len(left), "somebody holds on to the keys that were freed"
    cached = [sum(image.cached) / DEPTH for image in report.images]
    assert report.cache_average == pytest.approx(sum(cached) / len(cached))
    assert f"in the cache   {report.cache_average:.1f} per image" in str(report)


def test_keep_is_a_share_of_the_original_tokens_in_every_layer_and_head() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model)
    stages = (
        Stage(kind="cut", layer=2, method=visiontok.recipe("norm").stages[0].method, keep=Budget.ratio(0.25)),
        cache(0.5),
    )
    with visiontok.compress(model, Recipe(stages=stages)) as compression, torch.no_grad():
        model(**inputs)
        report = compression.report
        for layer, mask in enumerate(held(compression)):
            shown = (mask & visual(inputs)[..., None]).sum(1)
            for row in range(2):
                mine = [image.cached[layer] for image in report.images if image.row == row]
                assert shown[row].tolist() == [sum(mine)] * mask.shape[2]
    for image in report.images:
        assert image.kept == (image.tokens, image.tokens, image.tokens // 4, image.tokens // 4)
        assert image.cached == (image.tokens // 2,) * 2 + (image.tokens // 4,) * 2
    assert report.account.decoder is not None
    plain = Recipe(stages=stages[:1])
    with visiontok.compress(model, plain) as compression, torch.no_grad():
        model(**inputs)
        assert compression.report.account.decoder == report.account.decoder, "no FLOPs of the prefill are saved"


def test_rows_and_crops_of_a_thinned_cache() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    positions, token = mask.sum(1, keepdim=True) - 1, torch.tensor([[5], [6]])
    with visiontok.compress(model, recipe("any heads")), torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values

        def step(change: Any, rows: list[int]) -> torch.Tensor:
            changed = copy.deepcopy(kept)
            change(changed)
            more = {"attention_mask": mask[rows], "position_ids": positions[rows]}
            return model(input_ids=token[rows], past_key_values=changed, **more).logits

        plain = step(lambda c: None, [0, 1])
        assert torch.allclose(step(lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]), plain.flip(0))
        repeated = step(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1])
        assert torch.allclose(repeated, plain.repeat_interleave(2, 0))
        assert torch.allclose(step(lambda c: c.batch_select_indices(torch.tensor([1])), [1]), plain[1:])
        assert kept.get_seq_length() == inputs["input_ids"].shape[1]
        with pytest.raises(UnsupportedError, match="reaches into a compressed prompt"):
            copy.deepcopy(kept).crop(-6)
        model(input_ids=token, past_key_values=kept, attention_mask=mask, position_ids=positions)
        kept.crop(-1)
        assert torch.allclose(step(lambda c: None, [0, 1]), plain)
    with pytest.raises(UnsupportedError, match="inside the compress"), torch.no_grad():
        model(input_ids=token, past_key_values=kept)


# ------------------------------------------------------------------------------------------------------------ by a loop


def maps(architecture: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The eager attention of the stock model, per layer (B, H, N, N)."""
    twin = copy.deepcopy(build(architecture, "eager", torch.float32))
    twin.load_state_dict(build(architecture).state_dict())  # drawn in another precision
    floats = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return list(twin(**floats, output_attentions=True).attentions)


def places(inputs: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Row and positions of each image."""
    found: list[tuple[int, list[int]]] = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        for i, token in enumerate(ids):
            if token == IMAGE:
                if not i or ids[i - 1] != IMAGE:
                    found.append((row, []))
                found[-1][1].append(i)
    return found


def by_window(
    attention: torch.Tensor, inputs: dict[str, Any], row: int, own: list[int], heads: list[int], window: int = 3
) -> list[float]:
    rows = asking(inputs, row)[-window:]
    sums = [sum(float(attention[row, h, t, i]) for h in heads for t in rows) for i in own]
    return [sum(sums[max(0, i - 2) : i + 3]) / len(sums[max(0, i - 2) : i + 3]) for i in range(len(sums))]


def by_column(
    attention: torch.Tensor, inputs: dict[str, Any], row: int, own: list[int], heads: list[int]
) -> list[float]:
    rows = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
    return [sum(float(attention[row, h, t, i]) for h in heads for t in rows) for i in own]


LOOPS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "snapkv": ("snapkv", by_window, {"window": 3}),
    "snapkv, all text behind the image": ("snapkv", functools.partial(by_window, window=99), {"window": 99}),
    "h2o": ("h2o", by_column, {}),
}


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("case", LOOPS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_head_keeps_what_a_plain_loop_does(
    architecture: str, case: str, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visiontok.kernels.reference.TILE", 2000)  # a few query rows
    model = build(architecture)
    inputs = batch(architecture, model, images=[2, 1])
    method, rule, options = LOOPS[case]
    with visiontok.compress(model, method, keep=0.4, joined=joined, **options) as compression, torch.no_grad():
        model(**inputs)
        thinned = held(compression)
    for layer, attention in enumerate(maps(architecture, inputs)):
        groups = torch.arange(attention.shape[1]).chunk(1 if joined else 2)
        assert thinned[layer].shape[2] == len(groups)
        for row, own in places(inputs):
            k = int(Budget.ratio(0.4).counts([len(own)])[0])
            for g, heads in enumerate(groups):
                kept = [own[i] for i in best(rule(attention, inputs, row, own, heads.tolist()), k)]
                assert [i for i in own if thinned[layer][row, i, g]] == kept


@pytest.mark.parametrize("architecture", FAMILIES)
def test_dycoke_keeps_in_later_layers_what_the_last_token_looks_at(architecture: str) -> None:
    model = build(architecture)
    inputs = batch(architecture, model, images=[2, 1])
    with visiontok.compress(model, "dycoke_cache", keep=0.4, layer=2) as compression, torch.no_grad():
        model(**inputs)
        thinned, whole = held(compression), alive(compression)
    last = maps(architecture, inputs)[1].mean(1)[:, -1]
    for layer in range(DEPTH):
        assert thinned[layer].shape[2] == 1
        if layer < 2:
            assert torch.equal(thinned[layer][..., 0], whole[layer])
            continue
        for row, own in places(inputs):
            kept = [own[i] for i in best(last[row, own].tolist(), int(Budget.ratio(0.4).counts([len(own)])[0]))]
            assert [i for i in own if thinned[layer][row, i, 0]] == kept
    against_oracle(model, inputs, visiontok.recipe("dycoke_cache", keep=0.4, layer=2), BANNED)


# --------------------------------------------------------------------------------------------------- what is refused


class Refuses(Method):
    """Answers what it is told to."""

    card = Card(name="refuses", title="-", paper="-", venue="-", stage="cache", needs="-")

    def __init__(self, answer: Any) -> None:
        object.__setattr__(self, "answer", answer)

    def select(self, ctx: Context) -> Any:
        return self.answer(ctx)  # type: ignore[attr-defined]


def uneven(ctx: Context) -> torch.Tensor:
    keep = torch.stack([ctx.valid, ctx.valid], 2)
    keep[:, 0, 1] = False
    return keep


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (uneven, ConfigError, "another number of tokens than the budget"),
        (lambda ctx: ctx.valid.float(), ConfigError, "must return a bool mask"),
        (lambda ctx: Selection(keep=ctx.valid, features=ctx.features), UnsupportedError, "merged tokens at a cache"),
        (lambda ctx: ctx.attention.cache_window(3), ConfigError, r"attention.cache_window\(3\).*needs\(\)"),
        (lambda ctx: ctx.attention.last_row(-1), ConfigError, r"attention.last_row\(-1\)"),
    ],
)
def test_wrong_answers(answer: Any, error: type[Exception], message: str) -> None:
    model = build("llava")
    stage = Stage(kind="cache", method=Refuses(answer), keep=Budget.ratio(0.5))
    with visiontok.compress(model, Recipe(stages=(stage,))), torch.no_grad(), pytest.raises(error, match=message):
        model(**batch("llava", model))


def test_what_cannot_be_asked_for() -> None:
    snapkv = visiontok.recipe("snapkv", keep=0.4)
    model = build("llava")
    fixed = visiontok.recipe("norm").stages[0].method
    for make, message in (
        (lambda: Stage(kind="cache", method=fixed), "no answer for a cache stage"),
        (lambda: Stage(kind="prompt", method=SnapKV()), "no answer for a prompt stage"),
        (lambda: visiontok.compress(model, "dycoke_cache", keep=0.4, layer=0), "layer=0"),
        (lambda: visiontok.recipe("snapkv", keep="flops:0.5"), "leaves the prefill as it is"),
        (lambda: visiontok.recipe("snapkv", keep="layer_average:5"), "with a cache stage, give each"),
        (lambda: (visiontok.recipe("fastv") + visiontok.recipe("snapkv")).with_keep(Budget.ratio(0.5)), "give each"),
        (lambda: snapkv.with_mass(visiontok.Mass()), "keeps no token that could speak"),
        (lambda: snapkv.with_reserve(0.2), "picks no tokens to put others before"),
        (lambda: visiontok.compress(model, snapkv + snapkv), "both act on the cache; keep one"),
        (lambda: visiontok.compress(model, visiontok.recipe("visiontok", keep=0.5) + snapkv), "mass=False"),
        (lambda: visiontok.recipe("snapkv", window=0), "window=0"),
        (lambda: visiontok.recipe("snapkv", width=4), "width=4"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_what_a_model_or_a_call_cannot_have() -> None:
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with pytest.raises(UnsupportedError, match="cache stage acts inside the language model"):
        visiontok.compress_inputs(model, inputs, "snapkv", keep=0.4)
    with visiontok.compress(model, "snapkv", keep=0.4) as compression:
        with pytest.raises(UnsupportedError, match="DynamicCache"):
            run(model, inputs, cache_implementation="static")
        if not CANNOT_CHUNK:
            with pytest.raises(UnsupportedError, match="comes in chunks"):
                run(model, inputs, prefill_chunk_size=len(inputs["input_ids"][0]) - 2)
        with torch.no_grad():
            model(**inputs, use_cache=False)
        assert "this call kept no cache, so that the cache stage had nothing to thin" in compression.report.warnings
    narrow = sliding({"model_type": "mistral"})
    with (
        visiontok.compress(narrow, "snapkv", keep=0.4),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="slides over 8 tokens"),
    ):
        narrow(**inputs)
    with (
        visiontok.compress(model, Recipe(stages=(prompt(), Stage(kind="cut", layer=1, method=Asks())))),
        torch.no_grad(),
        pytest.raises(ConfigError, match="only a cache stage has it"),
    ):
        model(**inputs)


class Asks(Method):
    card = Card(name="asks", title="-", paper="-", venue="-", stage="decoder", needs="-")

    def needs(self) -> Needs:
        return Needs(cache_window=(3,))

    def select(self, ctx: Context) -> torch.Tensor:
        return ctx.attention.cache_window(3)


def test_a_window_that_holds_the_prompt_slides_over_what_was_kept() -> None:
    """It counts stored tokens: thinning a full layer and a sliding one gives the same, until the window is full."""
    inputs = batch("llava", sliding({"model_type": "mistral"}, window=60), rows=1, pad=0)
    answers = []
    for window in (60, 500):
        model = sliding({"model_type": "mistral"}, window=window)
        with visiontok.compress(model, recipe("any heads")):
            out = run(model, inputs, 4)
        answers.append(torch.stack(out.logits))
        stored = [layer.cumulative_length for layer in out.past_key_values.layers]
        assert stored == [layer.keys.shape[2] for layer in out.past_key_values.layers]
        assert max(stored) < inputs["input_ids"].shape[1]
    assert torch.equal(*answers)


def test_a_right_padded_row_and_one_without_image() -> None:
    model = build("llava")
    g = torch.Generator().manual_seed(0)
    ids, mask = left_padded(torch.randint(5, 90, (40,), generator=g).tolist(), [1, 5, 6, *[IMAGE] * 16, 7, 8, 9])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 32, 32, generator=g).double()}
    against_oracle(model, inputs, recipe("any heads"), BANNED)


def test_taps_go_with_the_compression() -> None:
    model = copy.deepcopy(build("llava"))
    before = [dict(vars(attention_modules(layer)[0])) for layer in model.get_decoder().layers]
    visiontok.compress(model, "snapkv", keep=0.4).remove()
    assert [dict(vars(attention_modules(layer)[0])) for layer in model.get_decoder().layers] == before
