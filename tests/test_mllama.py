"""Mllama: dropping cross-attention states equals the stock model whose cross-attention masks hide them."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from visiontok.conformance.schedules import About, cut, inject, leave, prompt
from visiontok.conformance.zoo import TEXT, prepare
from visiontok.errors import ConfigError, UnsupportedError

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
    rows = [
        [1, *(t for _ in row for t in (*torch.randint(5, 90, (2,), generator=g).tolist(), IMAGE))]
        + torch.randint(5, 90, (4 + 2 * b,), generator=g).tolist()
        for b, row in enumerate(images)
    ]
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [RAGGED, [[1]], [[1, 4, 2], [2, 2, 1]], [[2], []], [[], [1, 1]]], ids=str)
@pytest.mark.parametrize("caching", [True, False])
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
    kept = [max(1, n // 2 - u % 2) for u, n in enumerate(sizes)]  # as the method says
    assert [image.kept for image in report.images] == [(n,) * DEPTH for n in kept]
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


def test_without_a_cross_attention_mask():
    model = build()
    inputs = {k: v for k, v in batch(model).items() if k != "cross_attention_mask"}
    with visiontok.compress(model, recipe()) as compression:
        out = generate(model, inputs)
        alive = alive_of(compression, model)
    assert_same(out, oracle(model, inputs, alive))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
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


def test_a_cache_whose_rows_are_reordered():
    """Which columns a row holds goes with the row."""
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

    with visiontok.compress(model, recipe()), torch.no_grad():
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


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "stock"])
def test_a_new_image_on_a_used_cache(compressed):
    """Its columns stand behind those of the earlier turn, of which the cache holds some or all."""
    model = build()
    inputs = batch(model, [[2, 4], [1, 1]], pad=0)
    cutoff = 6  # behind the first image of both rows, before the second
    mask = inputs["cross_attention_mask"]
    blind = ~mask.flatten(2).any(2)
    mask[..., 0, 0][blind] = 1  # text that sees no image would see in one call what it cannot in two
    vision = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {k: v[:, :1] if k in vision else v[:, :cutoff] for k, v in inputs.items()}
    assert not first["cross_attention_mask"][:, :, 1].any()
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {k: v[:, 1:] if k in vision else v for k, v in inputs.items()}
    with torch.no_grad():
        if compressed:
            with visiontok.compress(model, recipe(0.4, 1)) as compression:
                cache = generate(model, first, 1).past_key_values
                before = alive_of(compression, model)
        else:
            cache = generate(model, first, 1).past_key_values
            before = torch.ones(2, TILES * PATCHES, dtype=torch.bool)
    with visiontok.compress(model, recipe(0.6, 2)) as compression:
        out = generate(model, second, past_key_values=cache)
        after = alive_of(compression, model)
    assert cache.layers[1].keys.shape[2] == int(before.sum(1).max() + after.sum(1).max())
    assert_same(out, oracle(model, inputs, torch.cat([before, after], 1)))
