"""Mllama: dropping cross-attention states equals the stock model whose cross-attention masks hide them."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import visiontok
from visiontok import Budget, Card, Method, Needs, Recipe, Selection, Stage
from visiontok.api import Compression
from visiontok.conformance.schedules import cut, inject, leave, prompt
from visiontok.conformance.zoo import TEXT, prepare
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.named import Loaded

pytestmark = pytest.mark.engine
IMAGE, STEPS, DEPTH, CROSS, TILES, PATCHES = 100, 4, 4, (1, 3), 4, 17
RATIOS = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # tiles of an image → its aspect ratio
RAGGED = [[2, 1], [4]]  # tiles of each image of each row


@functools.cache
def build(attention="sdpa", dtype=torch.float64):
    """A tiny random model whose cross-attention gates are open; they start at zero, where nothing could be seen."""
    config = T.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": list(CROSS)},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 32, "patch_size": 8, "max_num_tiles": TILES, "vision_output_dim": 96,
            "intermediate_layers_indices": [0, 2], "supported_aspect_ratios": [list(r) for r in RATIOS.values()],
        },
        image_token_index=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prepare(T.AutoModelForImageTextToText.from_config(config, attn_implementation=attention), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.ndim == 1:
                parameter.fill_(0.7)
    return model


def batch(model, images=RAGGED, pad=2, seed=0):
    """Left-padded prompts with text before, between and behind the images; masks as the processor makes them."""
    g = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(5, 90, (n,), generator=g).tolist()

    rows = [[1, *(t for _ in row for t in (*words(2), IMAGE)), *words(4 + 2 * b)] for b, row in enumerate(images)]
    length, places = max(map(len, rows)) + pad, max(map(len, images))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    sparse = [get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()]
    pixels = torch.zeros(len(rows), places, TILES, 3, 32, 32)
    ratio, tiles = torch.zeros(len(rows), places, dtype=torch.long), torch.zeros(len(rows), places, TILES).long()
    tiles[:, :, 0] = 1  # the processor gives even a missing image one tile
    for b, row in enumerate(images):
        for m, n in enumerate(row):
            pixels[b, m, :n] = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(10 * b + m))
            ratio[b, m], tiles[b, m, :n] = list(RATIOS).index(n) + 1, 1
    mask = convert_sparse_cross_attention_mask_to_dense(
        sparse, num_tiles=[list(row) for row in images], max_num_tiles=TILES, length=length
    )
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels.to(model.dtype),
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": torch.as_tensor(mask).view(len(rows), length, -1, TILES)[:, :, :places].long(),
    }


class Dense:
    """The oracle: the stock model at full length, whose cross-attention layers may look at ``alive`` (B, V) only.

    Its masks are made here, from the caller's. Text that sees nothing attends to all that is alive, without a
    feed-forward part; a row of which nothing is alive skips the layer.
    """

    def __init__(self, model, alive, states=lambda x: x):
        self.alive, self.states, self.handles = alive, states, []
        text = model.model.language_model
        self.handles.append(model.model.register_forward_pre_hook(self._base, with_kwargs=True))
        for index in CROSS:
            self.handles.append(text.layers[index].register_forward_pre_hook(self._pre, with_kwargs=True))
            self.handles.append(text.layers[index].register_forward_hook(self._post, with_kwargs=True))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _base(self, module, args, kwargs):
        self.given = kwargs.get("cross_attention_mask")

    def _pre(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        alive = self.alive[:, None]
        if self.given is None:
            sees = alive.expand(-1, hidden.shape[1], -1)
        else:
            assert self.given.shape[1] == hidden.shape[1], "the oracle runs without a cache"
            sees = self.given.bool().repeat_interleave(PATCHES, 3).flatten(2) & alive
        blind = ~sees.any(-1, keepdim=True)
        allowed = (sees | (blind & alive))[:, None]
        kwargs["cross_attention_mask"] = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(
            ~allowed, torch.finfo(hidden.dtype).min
        )
        kwargs["full_text_row_masked_out_mask"] = (~blind)[:, None].to(hidden.dtype)
        kwargs["cross_attention_states"] = self.states(kwargs["cross_attention_states"])
        return args, kwargs

    def _post(self, module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return torch.where(self.alive.any(1)[:, None, None], output, hidden)


def generate(model, inputs, steps=STEPS, **options):
    with torch.no_grad():
        return model.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": steps, "suppress_tokens": [IMAGE], **options},
            return_dict_in_generate=True,
            output_logits=True,
        )


def alive_of(compression, model):
    """(B, V) bool from the ledger, which must say the same of every layer."""
    ledger = compression.ledger
    columns = ledger.visual.shape[1] - ledger.stock[0]
    masks = [ledger.alive(layer)[:, :columns] for layer in range(DEPTH)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    return masks[0]


def oracle(model, inputs, alive, steps=STEPS, **options):
    with Dense(model, alive):
        return generate(model, inputs, steps, use_cache=False, **options)


def assert_same(out, expected, tolerance=1e-6):
    assert torch.equal(out.sequences, expected.sequences)
    got, want = torch.stack(out.logits, 1), torch.stack(expected.logits, 1)
    assert (got - want).abs().max() < tolerance * want.abs().max()


def recipe(fraction=0.5, draw=1):
    return Recipe(stages=(prompt(fraction, draw),))


def test_the_oracle_is_the_stock_model_where_everything_is_alive():
    model = build()
    inputs = batch(model)
    everything = torch.ones(2, 2 * TILES * PATCHES, dtype=torch.bool)
    assert_same(oracle(model, inputs, everything), generate(model, inputs))
    less = everything.clone()
    less[:, :PATCHES] = False  # the first tile
    assert not torch.equal(oracle(model, inputs, less, 1).logits[0], generate(model, inputs, 1).logits[0])


@pytest.mark.parametrize("merge", [0.0, 0.5])
def test_masses_are_copies_of_keys_and_values(merge):
    """β = 1 counts every kept token as often as the tokens it speaks for, through prefill and decode."""
    model = build()
    inputs = batch(model)
    stages = tuple(replace(stage, mass=visiontok.Mass(merge=merge)) for stage in recipe().stages)
    with visiontok.compress(model, Recipe(stages=stages)) as compression:
        out = generate(model, inputs)
        alive = alive_of(compression, model)
        ledger = compression.ledger
        mass = ledger.mass(0)[:, : alive.shape[1]]
        owner = torch.where(ledger.visual, ledger.grid()[..., 0], -1)[:, : alive.shape[1]]
    for b, image in ((0, 0), (0, 1), (1, 0)):
        assert mass[b][owner[b] == image].sum() == (owner[b] == image).sum()

    class Weighed(Dense):
        def _pre(self, module, args, kwargs):
            states = kwargs["cross_attention_states"]
            args, kwargs = super()._pre(module, args, kwargs)
            kwargs["cross_attention_mask"] = kwargs["cross_attention_mask"] + mass.clamp_min(1).log()[:, None, None]
            kwargs["cross_attention_states"] = merged(states)
            return args, kwargs

    def merged(states):
        states = states.reshape(2, -1, states.shape[-1])
        new = states.clone()
        for b in range(2):
            z = torch.nn.functional.normalize(states[b].float(), dim=-1)
            groups = {}
            for i in (owner[b] >= 0).nonzero()[:, 0].tolist():
                kept = (alive[b] & (owner[b] == owner[b, i])).nonzero()[:, 0].tolist()
                groups.setdefault(i if i in kept else max(kept, key=lambda j: float(z[i] @ z[j])), []).append(i)
            for j, group in groups.items():
                assert len(group) == mass[b, j]
                new[b, j] = (1 - merge) * states[b, j] + merge * states[b, group].mean(0)
        return new

    with Weighed(model, alive):
        expected = generate(model, inputs, use_cache=False)
    assert_same(out, expected, 2e-6)
    assert not torch.equal(out.logits[0], oracle(model, inputs, alive, 1).logits[0])


@pytest.mark.support(architecture="mllama", stage="prompt")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [RAGGED, [[1]], [[1, 4, 2], [2, 2, 1]], [[2], []], [[], [1, 1]]], ids=str)
@pytest.mark.parametrize(
    "caching",
    [
        pytest.param(True, marks=pytest.mark.support(mode="greedy")),
        pytest.param(False, marks=pytest.mark.support(mode="no cache")),
    ],
)
def test_generation_equals_the_oracle(attention, images, caching):
    # eager attention takes its softmax in float32, where masks of float64 overflow to -inf: stock gives NaN there
    dtype, tolerance = (torch.float64, 1e-6) if attention == "sdpa" else (torch.float32, 1e-4)
    model = build(attention, dtype)
    inputs = batch(model, images)
    with visiontok.compress(model, recipe()) as compression:
        out = generate(model, inputs, use_cache=caching)
        alive, report, tokens = alive_of(compression, model), compression.report, compression.ledger.tokens()
    assert_same(out, oracle(model, inputs, alive), tolerance)

    sizes = [n * PATCHES for row in images for n in row]
    assert [image.tokens for image in report.images] == sizes
    assert [(image.row, image.image) for image in report.images] == [
        (b, m) for b, row in enumerate(images) for m in range(len(row))
    ]
    owner = [b for b, row in enumerate(images) for _ in row]
    for b in range(len(images)):  # about half of each image, as the method says
        assert sum(image.kept[0] for image, row in zip(report.images, owner, strict=True) if row == b) == alive[b].sum()
    assert all(n // 2 - 2 <= image.kept[0] <= n // 2 for image, n in zip(report.images, sizes, strict=True))
    assert all(image.kept == image.kept[:1] * DEPTH for image in report.images)
    length, widest = inputs["input_ids"].shape[1], int(alive.sum(1).max())
    if not caching:  # every step is a prefill
        length += STEPS - 1
    assert tokens == [widest if layer in CROSS else length for layer in range(DEPTH)]
    if caching:
        stored = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        assert stored == [widest if layer in CROSS else length + STEPS - 1 for layer in range(DEPTH)]
        assert widest < max(map(len, images)) * TILES * PATCHES / 2
        assert out.past_key_values.get_seq_length() == length + STEPS - 1


@pytest.mark.parametrize("images", [RAGGED, [[2], []]], ids=str)
def test_keeping_everything_is_bit_identical(images):
    model = build()
    inputs = batch(model, images)
    with torch.no_grad():
        stock = model(**inputs).logits
    tokens = generate(model, inputs)
    with visiontok.compress(model, "grid", keep=1.0) as compression, torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
        assert torch.equal(generate(model, inputs).sequences, tokens.sequences)
        assert any("nothing was dropped" in w for w in compression.report.warnings)
        assert compression.report.account.kv == compression.report.account.kv_stock
    with Compression(model, recipe(3.0), force=True), torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
        out = generate(model, inputs)
        assert torch.equal(out.sequences, tokens.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, tokens.logits, strict=True))
    with visiontok.compress(model, recipe()), torch.no_grad():
        assert not torch.equal(model(**inputs).logits, stock)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)


def test_a_row_without_image_is_as_in_a_batch_without_images():
    """The stock model lets it attend to the features of empty tiles."""
    model = build()
    inputs = batch(model, [[2], []])
    alone = {name: inputs[name][1:] for name in ("input_ids", "attention_mask")}
    expected = generate(model, alone)
    assert not torch.allclose(generate(model, inputs).logits[0][1:], expected.logits[0])
    with visiontok.compress(model, recipe()):
        out = generate(model, inputs)
    assert torch.equal(out.sequences[1:], expected.sequences)
    for got, want in zip(out.logits, expected.logits, strict=True):
        assert torch.allclose(got[1:], want)


@dataclass(frozen=True)
class FirstTile(Method):
    """Keeps some tokens of the first tile only."""

    card: ClassVar[Card] = Card(name="first tile", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        return ctx.valid & (ctx.grid[..., 0] == 0) & (ctx.grid[..., 1] < 2)


def test_text_of_whose_images_nothing_is_left():
    """It sees tiles of which no token is kept, and is treated as text that sees no image."""
    model = build()
    inputs = batch(model, [[4]])
    inputs["cross_attention_mask"][:, -2:, :, 0] = 0
    with visiontok.compress(model, FirstTile()) as compression:
        out = generate(model, inputs)
        alive = alive_of(compression, model)
    assert alive.sum() == 8
    assert_same(out, oracle(model, inputs, alive))


def test_without_a_cross_attention_mask_and_on_a_cache_without_layers():
    model = build()
    inputs = {k: v for k, v in batch(model).items() if k != "cross_attention_mask"}
    with visiontok.compress(model, recipe()) as compression:
        out = generate(model, inputs, past_key_values=T.DynamicCache())
        alive = alive_of(compression, model)
    assert_same(out, oracle(model, inputs, alive))


@pytest.mark.support(architecture="mllama", stage="prompt")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 3}, marks=pytest.mark.support(mode="beams")),
        pytest.param({"num_beams": 4, "num_return_sequences": 2}, marks=pytest.mark.support(mode="several beams")),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, marks=pytest.mark.support(mode="several samples")),
    ],
    ids=str,
)
def test_beams_and_samples(options):
    model = build()
    inputs = batch(model)
    with visiontok.compress(model, visiontok.recipe("random", keep=0.3)) as compression:
        torch.manual_seed(0)
        out = generate(model, inputs, **options)
        alive = alive_of(compression, model)
    torch.manual_seed(0)
    expected = oracle(model, inputs, alive, **options)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("mass", [None, visiontok.Mass()])
def test_a_cache_whose_rows_are_reordered(mass):
    """Which columns a row holds, and what they weigh, goes with the row."""
    model = build()
    inputs = batch(model)
    token, mask = torch.tensor([[7], [8]]), inputs["cross_attention_mask"]
    longer = torch.cat([mask, mask[:, -1:]], 1)
    attended = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)

    def step(cache, rows):
        length = inputs["input_ids"].shape[1]
        return model(
            input_ids=token[rows],
            attention_mask=attended[rows],
            cross_attention_mask=longer[rows],
            position_ids=torch.full((len(rows), 1), length),
            past_key_values=cache,
        ).logits

    stages = (replace(prompt(), mass=mass),)
    with visiontok.compress(model, Recipe(stages=stages)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = step(copy.deepcopy(cache), [0, 1])
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([1, 0]))
        assert torch.allclose(step(other, [1, 0]), expected[[1, 0]])
        other = copy.deepcopy(cache)
        other.batch_repeat_interleave(2)
        assert torch.allclose(step(copy.deepcopy(other), [0, 0, 1, 1]), expected[[0, 0, 1, 1]])
        other.batch_select_indices(torch.tensor([3]))
        assert torch.allclose(step(other, [1]), expected[[1]])


@pytest.mark.support(architecture="mllama", stage="prompt", mode="text turns")
@pytest.mark.parametrize("cropped", [0, 2])
def test_text_turn_on_a_compressed_cache(cropped):
    model = build()
    inputs = batch(model, [[2, 1]], pad=0)
    with visiontok.compress(model, recipe()) as compression:
        first = generate(model, inputs, 4)
        alive, cache = alive_of(compression, model), first.past_key_values
        if cropped:
            cache.crop(-cropped)
        said = first.sequences[:, : first.sequences.shape[1] - cropped]
        ids = torch.cat([said, torch.tensor([[7, 8, 9]])], 1)
        mask = inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1, -1)], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
        second = generate(model, turn, 3, past_key_values=cache)
        steps = compression.report.steps
    assert_same(second, oracle(model, inputs | turn, alive, 3))
    assert steps == 3 + 3


@pytest.mark.support(architecture="mllama", stage="prompt", mode="new image in a later turn")
@pytest.mark.parametrize(("fraction", "then"), [(0.4, 0.6), (3.0, 0.6), (0.4, 3.0)])
def test_a_new_image_on_a_used_cache(fraction, then):
    """Its columns stand behind those of the earlier turn, of which the cache holds some or all."""
    model = build()
    inputs = batch(model, [[2, 4], [1, 1]], pad=0)
    cutoff = 6  # behind the first image of both rows, before the second
    mask = inputs["cross_attention_mask"]
    mask[..., 0, 0][~mask.flatten(2).any(2)] = 1  # text that sees no image attends to all there is: later, to more
    vision = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {k: v[:, :1] if k in vision else v[:, :cutoff] for k, v in inputs.items()}
    assert not first["cross_attention_mask"][:, :, 1].any()
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {k: v[:, 1:] if k in vision else v for k, v in inputs.items()}
    with visiontok.compress(model, recipe(fraction, 1)) as compression:
        cache = generate(model, first, 1).past_key_values
        alive = [alive_of(compression, model)]
    with visiontok.compress(model, recipe(then, 2)) as compression:
        out = generate(model, second, past_key_values=cache)
        alive.append(alive_of(compression, model))
    columns = TILES * PATCHES  # empty tiles stay as long as nothing is dropped
    held = [columns if part > 1 else int(a.sum(1).max()) for part, a in zip((fraction, then), alive, strict=True)]
    assert cache.layers[1].keys.shape[2] == sum(held)
    assert_same(out, oracle(model, inputs, torch.cat(alive, 1)))


@pytest.mark.support(architecture="mllama", stage="prompt")
@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(False, marks=pytest.mark.support(mode="training")),
        pytest.param(True, marks=pytest.mark.support(mode="gradient checkpointing")),
    ],
)
def test_gradients_equal_those_of_the_oracle(checkpointing):
    model = copy.deepcopy(build()).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    with visiontok.compress(model, recipe()) as compression:
        got = gradients()
        alive = alive_of(compression, model)
    with Dense(model, alive):
        expected = gradients()
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-6, atol=1e-9 * gradient.abs().max()), name
    name = "model.multi_modal_projector.weight"
    assert not torch.allclose(stock[name], expected[name])


@dataclass(frozen=True)
class Halves(Method):
    """Keeps every second token, as the mean with its neighbour; every image has an even number of tiles."""

    card: ClassVar[Card] = Card(name="halves", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        x = ctx.features
        keep = torch.zeros_like(ctx.valid)
        keep[:, ::2] = True
        merged = (x + x.roll(-1, 1)) / 2
        return Selection(keep=keep & ctx.valid, features=merged)


def test_merged_tokens():
    model = build()
    inputs = batch(model, [[2], [4]])
    pixels = inputs["pixel_values"].clone()

    def merged(states):
        states = states.reshape(2, -1, states.shape[-1])
        return (states + states.roll(-1, 1)) / 2

    with visiontok.compress(model, Halves()) as compression:
        out = generate(model, inputs)
        alive = alive_of(compression, model)
    assert torch.equal(alive.sum(1), torch.tensor([PATCHES, 2 * PATCHES]))
    with Dense(model, alive, merged):
        assert_same(out, generate(model, inputs, use_cache=False))
    assert torch.equal(inputs["pixel_values"], pixels)


@dataclass(frozen=True)
class Watch(Method):
    """Looks at the context through a function, and drops one token of each image."""

    look: object = None
    needed: Needs = field(default_factory=Needs)
    card: ClassVar[Card] = Card(name="watch", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self):
        return self.needed

    def select(self, ctx):
        self.look(ctx)
        return ctx.valid & (torch.arange(ctx.valid.shape[1]) > 0)


def watch(model, inputs, look, **needed):
    seen = []
    with visiontok.compress(model, Watch(lambda ctx: seen.append((ctx, look(ctx))), Needs(**needed))), torch.no_grad():
        model(**inputs)
    return seen[0]


def test_received_attention_is_that_of_the_tower():
    """From the queries of real tiles to all places, padding included, as the eager tower computes it."""
    model = build("eager", torch.float32)
    inputs = batch(model)
    maps = {}
    tower = model.model.vision_model
    modules = [layer.self_attn for stack in (tower.transformer, tower.global_transformer) for layer in stack.layers]
    handles = [
        m.register_forward_hook(lambda m, a, out, i=i: maps.__setitem__(i, out[1])) for i, m in enumerate(modules)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    layers = (0, 2, 3)
    ctx, got = watch(
        model, inputs, lambda ctx: [ctx.attention.received(layer) for layer in layers], vision_received=layers
    )
    tiles, places = inputs["aspect_ratio_mask"].flatten(0, 1), [0, 1, 2]  # the fourth place holds no image
    for layer, scores in zip(layers, got, strict=True):
        for u, place in enumerate(places):
            full = maps[layer][place].mean(0).unflatten(0, (TILES, -1))[:, :PATCHES]  # (tiles, patches, keys)
            real = tiles[place].bool()
            received = full[real].flatten(0, 1).mean(0).unflatten(0, (TILES, -1))[real, :PATCHES].flatten()
            assert torch.allclose(scores[u, : len(received)], received, atol=1e-6)
            assert (scores[u, len(received) :] == -1).all()
    assert not ctx.has_cls


def test_keys_are_those_of_the_tower():
    model = build()
    inputs, made = batch(model), {}
    module = model.model.vision_model.global_transformer.layers[-1].self_attn
    handle = module.k_proj.register_forward_hook(lambda m, args, out: made.__setitem__("keys", out))
    _, got = watch(model, inputs, lambda ctx: ctx.attention.keys(-1), vision_keys=(-1,))
    handle.remove()
    tiles = inputs["aspect_ratio_mask"].flatten(0, 1)
    for u, place in enumerate([0, 1, 2]):  # the fourth place holds no image
        real = tiles[place].bool()
        expected = made["keys"][place].unflatten(0, (TILES, -1))[real, :PATCHES].flatten(0, 1)
        torch.testing.assert_close(got[u, : len(expected)].flatten(1), expected.float())
        assert not got[u, len(expected) :].any()


@pytest.mark.parametrize(
    "method", ["visionzip", "prumerge_plus", "vispruner", "vscan", "aim_merge", "m3_pool", "kmeans"]
)
def test_methods_that_merge_or_look_at_keys(method):
    model = build()
    inputs = batch(model)
    with visiontok.compress(model, method, keep=5) as compression, torch.no_grad():
        logits = model(**inputs).logits
    assert all(image.kept[-1] == 5 for image in compression.report.images)
    assert logits.isfinite().all()


def test_projector_inputs_belong_to_the_features():
    model = build()
    ctx, _ = watch(model, batch(model), lambda ctx: None, encoder_features=True)
    projected = model.model.multi_modal_projector(ctx.encoder_features)
    assert torch.allclose(projected[ctx.valid], ctx.features[ctx.valid])


def test_the_grid_names_the_patch_that_was_disturbed():
    """In a tower without attention a patch changes its own token only."""
    model = copy.deepcopy(build())
    with torch.no_grad():
        for module in model.model.vision_model.modules():
            if hasattr(module, "o_proj"):
                module.o_proj.weight.zero_()
    inputs = batch(model)
    ctx, _ = watch(model, inputs, lambda ctx: None)
    for u, (place, tile, row, column) in enumerate([((0, 0), 1, 2, 3), ((0, 1), 0, 3, 0), ((1, 0), 2, 1, 2)]):
        changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        changed["pixel_values"][(*place, tile)][:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        other, _ = watch(model, changed, lambda ctx: None)
        moved = ((other.features - ctx.features).abs() > 1e-9).any(-1).nonzero().tolist()
        assert len(moved) == 1
        assert moved[0][0] == u
        assert ctx.grid[tuple(moved[0])].tolist() == [tile, row, column]
    assert (ctx.grid[:, ::PATCHES][ctx.valid[:, ::PATCHES]] == -1).all()  # class tokens


def test_what_a_method_sees_of_the_text():
    model = build()
    inputs = batch(model)
    ctx, _ = watch(model, inputs, lambda ctx: None)
    for b, row in enumerate(inputs["input_ids"]):
        words = row[(row != 0) & (row != IMAGE)]
        assert torch.equal(ctx.text_ids[b][ctx.text_valid[b]], words)
        assert torch.equal(ctx.text_features[b][ctx.text_valid[b]], model.get_input_embeddings()(words))
    assert ctx.row.tolist() == [0, 0, 1]
    assert ctx.image.tolist() == [0, 1, 0]


def test_a_draw_depends_on_the_prompt_not_on_the_batch():
    model = build()
    inputs = batch(model)
    alone = {k: v[1:, :1] if "aspect" in k or k == "pixel_values" else v[1:] for k, v in inputs.items()}
    alone["cross_attention_mask"] = alone["cross_attention_mask"][:, :, :1]
    with visiontok.compress(model, "random", keep=7) as compression, torch.no_grad():
        model(**inputs)
        together = alive_of(compression, model)
        model(**alone)
        single = alive_of(compression, model)
    assert torch.equal(together[1:, : TILES * PATCHES], single)


@pytest.mark.parametrize("budget", [5, 0.25, Budget.per_tile(3), Budget.layer_average(6)], ids=str)
def test_budgets_are_per_image_over_its_real_tiles(budget):
    model = build()
    with visiontok.compress(model, "random", keep=budget) as compression, torch.no_grad():
        model(**batch(model))
        images = compression.report.images
    expected = {"tokens": (5, 5, 5), "ratio": (9, 4, 17), "per_tile": (6, 3, 12), "layer_average": (6, 6, 6)}
    assert [image.tokens for image in images] == [34, 17, 68]
    assert tuple(image.kept[0] for image in images) == expected[Budget.parse(budget).kind]


def flops_of(model, run):
    """{module: FLOPs}; torch has no formula for the CPU's SDPA kernel, so it gets the GPU ones'."""
    formula = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **b: sdpa_flop_count(q, k, v)
    }
    with torch.no_grad(), FlopCounterMode(display=False, depth=99, custom_mapping=formula) as counter:
        run(model)
    return {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_report_counts_what_is_stored_and_computed(attention):
    model = build(attention, torch.float32)
    inputs = batch(model)
    prefix = type(model).__name__ + ".model."

    def measure():
        caches = []
        flops = flops_of(model, lambda m: caches.append(m(**inputs, use_cache=True).past_key_values))
        held = sum(t.numel() * t.element_size() for layer in caches[0].layers for t in (layer.keys, layer.values))
        layers = tuple(flops[f"{prefix}language_model.layers.{i}"] for i in range(DEPTH))
        n = TILES * 24
        outer = 2 * 4 * n * n  # the tower makes its masks, one per place for an image, by a matrix product
        tower, projector = flops[prefix + "vision_model"] - outer, flops[prefix + "multi_modal_projector"]
        return held, layers, tower, projector

    held, layers, tower, projector = measure()
    with visiontok.compress(model, "grid", keep=6) as compression:
        kept, computed, *vision = measure()
        report = compression.report
    costs = report.account
    assert (costs.kv_stock, costs.kv) == (held, kept)
    assert (costs.decoder_stock, costs.decoder) == (layers, computed)
    assert [costs.vision.tower, costs.vision.projector] == [tower, projector] == vision
    assert not costs.not_counted
    text = {k: inputs[k][:, 2:] for k in ("input_ids", "attention_mask")}  # without the padding of all rows
    flops = flops_of(model, lambda m: m(**text))
    assert costs.decoder_text == tuple(flops.get(f"{prefix}language_model.layers.{i}", 0) for i in range(DEPTH))
    assert "kept           18 in the first layer, 18 in the last" in str(report)
    assert report.seconds["vision"] > 0


def test_features_instead_of_pixels():
    """They do not say which tiles are real: what some text may see counts."""
    model = build()
    inputs = batch(model)
    vision = {k: inputs.pop(k) for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        states = model.model.multi_modal_projector(model.model.vision_model(**vision).last_hidden_state)
        inputs["cross_attention_states"] = states.flatten(0, 2)
        with visiontok.compress(model, recipe()) as compression:
            got = model(**inputs).logits
            alive, images = alive_of(compression, model), compression.report.images
        with Dense(model, alive):
            expected = model(**inputs, use_cache=False).logits
        assert (got - expected).abs().max() < 1e-6 * expected.abs().max()
        assert [image.tokens for image in images] == [34, 17, 68]
        with visiontok.compress(model, "hiprune", keep=4), pytest.raises(UnsupportedError, match="pass pixels"):
            model(**inputs)


def test_calls_without_image_are_stock():
    model = build()
    inputs = batch(model)
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    nothing = {**batch(model, [[], [1]]), "aspect_ratio_ids": torch.zeros(2, 1, dtype=torch.long)}
    stock = [generate(model, x) for x in (text, nothing)]
    with visiontok.compress(model, "grid", keep=2) as compression:
        got = [generate(model, x) for x in (text, nothing)]
        with pytest.raises(ConfigError, match="no image"):
            _ = compression.report
    for a, b in zip(got, stock, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
        assert torch.equal(a.sequences, b.sequences)


def test_threads_and_copies_do_not_meet():
    model = copy.deepcopy(build())
    batches = [batch(model, images, seed=seed) for seed, images in enumerate([RAGGED, [[1], [4]], [[2, 2, 1]]])] * 2
    with visiontok.compress(model, "random", keep=0.3) as compression:
        expected = [generate(model, inputs).sequences for inputs in batches]
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda inputs: generate(model, inputs).sequences, batches))
        twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stock = generate(model, batches[0], 1).logits[0]
    with torch.no_grad():
        assert torch.equal(generate(twin, batches[0]).sequences, expected[0])
        assert not torch.equal(generate(twin, batches[0], 1).logits[0], stock)
    assert visiontok.attached(model) is None
    assert visiontok.attached(twin) is not compression


@pytest.mark.support(architecture="mllama", mode="greedy")
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=pytest.mark.support(stage=stage.kind))
        for stage in (cut(2), inject(2), leave(3), Stage(kind="skip", layer=1, until=2))
    ],
    ids=str,
)
def test_stages_inside_the_language_model_are_refused(stage, record_property):
    refused = f"{stage.kind} stage at layer .* no visual tokens in the sequence"
    with pytest.raises(UnsupportedError, match=refused) as refusal:
        visiontok.compress(build(), Recipe(stages=(stage, *recipe().stages)))
    record_property("refused", str(refusal.value))
    assert visiontok.attached(build()) is None


def test_what_is_refused_says_why():
    model = build()
    inputs = batch(model)
    share = replace(recipe().stages[0], keep=Budget.flops(0.5))
    with pytest.raises(UnsupportedError, match="share of FLOPs"):
        visiontok.compress(model, Recipe(stages=(share,)))
    with pytest.raises(UnsupportedError, match="a CLS token in every tile"):
        watch(model, inputs, lambda ctx: ctx.attention.cls(0), vision_cls=(0,))
    with visiontok.compress(model, "grid", keep=4):
        with pytest.raises(UnsupportedError, match=r"StaticCache\[.*DynamicCache"):
            generate(model, inputs, cache_implementation="static")
        cache = generate(model, inputs, 1).past_key_values
        short = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache}
        mask = inputs["cross_attention_mask"].repeat(1, 2, 1, 1)  # longer than all text so far
        with pytest.raises(ConfigError, match="cross_attention_mask has 68 columns"), torch.no_grad():
            model(**short, cross_attention_mask=mask[:, :, :1], attention_mask=None)
        before = cache.columns, cache.layers[1].keys.shape
        again = {k: v for k, v in inputs.items() if k != "attention_mask"} | {"cross_attention_mask": mask}
        with pytest.raises(ConfigError, match="have 272 tokens"), torch.no_grad():
            model(**again, past_key_values=cache)
        assert (cache.columns, cache.layers[1].keys.shape) == before
    with pytest.raises(UnsupportedError, match="inside the compress"), torch.no_grad():
        model(**short)


def test_the_command_line_comparison_is_refused():
    loaded = Loaded("tiny", build(), None, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"tiny: a model of type mllama .* use visiontok\.compress"):
        _ = loaded.text


def test_a_recipe_by_name_and_half_precision():
    model = copy.deepcopy(build()).to(torch.bfloat16)
    inputs = batch(model, [[2, 1], []])
    for name in ("hiprune", "divprune", "idpruner", "random", "grid"):
        with visiontok.compress(model, name, keep=4) as compression, torch.inference_mode():
            assert model(**inputs).logits.isfinite().all()
            assert [image.kept[0] for image in compression.report.images] == [4, 4]
