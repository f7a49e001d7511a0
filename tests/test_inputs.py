"""The second plane, shorter inputs for the stock model: equal to the hooks, to the decoder called on the kept tokens, and
to the dense oracle; with every cache; nothing left on the model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as T
from test_engine import DEPTH, STEPS, generate, videos
from transformers.cache_utils import DynamicCache, StaticCache

import visiontok
from visiontok import Card, Method, Recipe, Selection, Stage
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import SCHEDULES, prompt, recipe
from visiontok.conformance.zoo import (
    ARCHITECTURES,
    BANNED,
    CLIP,
    HYBRIDS,
    IMAGE,
    IMAGE_IDS,
    TEXT,
    batch,
    build,
    prepare,
    visual,
)
from visiontok.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.engine
HALF = Recipe(stages=(prompt(),))
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(T.LlavaForConditionalGeneration.forward).parameters


@dataclass(frozen=True)
class Merge(Method):
    """Keeps every third token, which becomes the mean of itself and its neighbours."""

    card: ClassVar[Card] = Card(name="merge", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        keep = ctx.valid & (torch.arange(ctx.valid.shape[1]) % 3 == 0)
        near = ctx.features + ctx.features.roll(1, 1) + ctx.features.roll(-1, 1)
        return Selection(keep=keep, features=near / 3)


MERGE = Recipe(stages=(Stage(kind="prompt", method=Merge()),))


def shortened(model, inputs, what=HALF, **options):
    """Shorter inputs, where this transformers can take them; where not, that it is said."""
    if model.config.model_type.startswith("qwen3_vl") and not TAKES_FEATURES:
        with pytest.raises(UnsupportedError, match=r"DeepStack .* transformers >= 5.18"):
            visiontok.compress_inputs(model, inputs, what, **options)
        pytest.skip("this transformers has no way to give DeepStack features to generate()")
    return visiontok.compress_inputs(model, inputs, what, **options)


def same(got, expected, tolerance=1e-6):
    """Sequences are equal and the logits of every step are."""
    assert torch.equal(got.sequences, expected.sequences)
    a, b = torch.stack(got.logits), torch.stack(expected.logits)
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("what", [HALF, MERGE], ids=["choice", "merge"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_the_hooks(name, what):
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, what) as compression:
        expected = generate(model, inputs)
        kept = compression.ledger
        assert compression.report.plane == "hooks"
    short = shortened(model, inputs, what)
    out = short.restore(generate(model, short))
    same(out, expected)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [n + STEPS - 1 for n in kept.tokens()]
    assert short.ledger.tokens() == kept.tokens()
    assert all(torch.equal(short.ledger.alive(i), kept.alive(i)) for i in range(DEPTH))
    assert short.report.plane == "inputs"
    assert short.report.images == compression.report.images

    static = generate(model, short, cache_implementation="static")
    assert type(static.past_key_values) is StaticCache
    same(short.restore(static), expected)

    with torch.no_grad():
        assert torch.allclose(model(**short).logits[:, -1].float(), expected.logits[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava", "cls_topk"),
        ("llava", "hiprune"),
        ("llava_next", "hiprune"),
        ("internvl", "cls_topk"),
        ("qwen2_5_vl", "hiprune"),
        ("gemma3", "divprune"),
        ("idefics3", "random"),
    ],
)
def test_methods_see_the_tower_as_with_hooks(name, method):
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, method, keep=0.4) as compression:
        expected = generate(model, inputs)
    short = shortened(model, inputs, method, keep=0.4)
    assert torch.equal(short.ledger.alive(0), compression.ledger.alive(0))
    same(short.restore(generate(model, short)), expected)
    assert short.report.requested == "ratio:0.4"


@pytest.mark.parametrize("images", [[2, 0], [0, 1], [1, 3]])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "qwen3_5"])
def test_rows_may_hold_any_number_of_images(name, images):
    model = build(name)
    inputs = batch(name, model, images=images)
    short = shortened(model, inputs)
    got = short.restore(generate(model, short))
    if name == "qwen3_5":
        check_against_decoder(model, inputs, short, got)
    else:
        with visiontok.compress(model, HALF):
            same(got, generate(model, inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_right_padding_comes_out_left_padded(name):
    model = build(name)
    inputs = batch(name, model)
    expected = generate(model, shortened(model, inputs))
    rolled = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            shift = (inputs["attention_mask"] == 0).sum(1).tolist()
            rolled[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift, strict=True)])
    same(generate(model, shortened(model, rolled)), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_video_and_image_in_one_prompt(name):
    model = build(name)
    inputs = videos(name, model)
    for what in (HALF, MERGE):
        with visiontok.compress(model, what):
            expected = generate(model, inputs)
        short = shortened(model, inputs, what)
        same(short.restore(generate(model, short)), expected)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
def test_keeping_everything_is_bit_identical(name):
    model = build(name)
    inputs = batch(name, model)
    stock = generate(model, inputs)
    short = shortened(model, inputs, "grid", keep=1.0)
    # embeddings in the place of features may be rounded in another order
    same(short.restore(generate(model, short)), stock, 0 if TAKES_FEATURES else 1e-6)
    assert any("nothing was dropped" in w for w in short.report.warnings)


# ---- hybrids: the decoder itself, called on the kept rows' embeddings with their original positions


def decoder_rows(model, inputs, alive):
    """Per prompt row: embeddings (1, K, D) and positions (…, 1, K) of the tokens in ``alive`` (B, N)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
        features = model.model.get_image_features(inputs["pixel_values"], **grids, return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = torch.cat(list(features)).to(embeds)
        if grids:
            positions, _ = model.model.get_rope_index(
                ids, mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=mask, **grids
            )
        else:
            positions = mask.cumsum(1) - 1
    return [(embeds[b : b + 1, alive[b]], positions[..., b : b + 1, :][..., alive[b]]) for b in range(len(ids))]


def check_against_decoder(model, inputs, short, out, follow=None, tolerance=1e-5):
    """Every step of ``out``: the language model without cache on kept rows; ``follow`` holds per row the (T,) ids that
    came behind the prompt before."""
    embed, n = model.get_input_embeddings(), out.sequences.shape[1] - len(out.logits)
    for b, (x, positions) in enumerate(decoder_rows(model, inputs, short.ledger.alive(0))):
        for new in (() if follow is None else follow[b]):
            x = torch.cat([x, embed(new)[None, None]], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        for step, logits in enumerate(out.logits):
            with torch.no_grad():
                seen = torch.ones(1, x.shape[1])  # without a mask, gaps in positions are borders of packed sequences
                hidden = model.model.language_model(
                    inputs_embeds=x, attention_mask=seen, position_ids=positions, use_cache=False
                )
                expected = model.lm_head(hidden.last_hidden_state[:, -1])[0]
            assert (logits[b] - expected).abs().max() < tolerance * expected.abs().max()
            expected[list(BANNED)] = -torch.inf
            chosen = expected.argmax()
            assert out.sequences[b, n + step] == chosen
            x = torch.cat([x, embed(chosen)[None, None]], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)


def lfm2():
    """LLaVA around a language model of convolutions and attention."""
    torch.manual_seed(0)
    text = {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48}
    config = T.LlavaConfig(text_config=text, vision_config=CLIP, vision_feature_layer=-2, **IMAGE_IDS)
    return prepare(T.AutoModelForImageTextToText.from_config(config))


def hybrid(name):
    if name == "lfm2":
        model = lfm2()
        return model, batch("llava", model, images=[1, 2])
    model = build(name)
    return model, batch(name, model, images=[1, 2])


@pytest.mark.parametrize("name", [*HYBRIDS, "lfm2"])
def test_a_hybrid_equals_its_decoder_on_the_kept_tokens(name):
    """Left-padded rows of different lengths that keep different numbers of tokens."""
    model, inputs = hybrid(name)
    short = shortened(model, inputs)
    alive = short.ledger.alive(0)
    assert alive.sum() < inputs["attention_mask"].sum()
    assert len(alive.sum(1).unique()) == 2
    assert not short["attention_mask"].all()
    out = short.restore(generate(model, short))
    assert torch.equal(out.sequences[:, : alive.shape[1]], inputs["input_ids"])
    check_against_decoder(model, inputs, short, out)
    with visiontok.compress(model, HALF) as compression:
        same(generate(model, inputs), out, 0)
        assert compression.report.plane == "inputs"
        assert compression.report.images == short.report.images
        same(generate(model, inputs, cache_implementation="static"), out, 1e-5)
        plain = model.generate(**inputs, max_new_tokens=STEPS, suppress_tokens=list(BANNED), do_sample=False)
        assert torch.equal(plain, out.sequences)
    with visiontok.compress(model, MERGE) as compression:
        assert not torch.equal(generate(model, inputs).logits[0], out.logits[0])


@pytest.mark.parametrize("name", [*HYBRIDS, "lfm2"])
def test_what_a_hybrid_cannot_do_it_says(name):
    model, inputs = hybrid(name)
    with pytest.raises(UnsupportedError, match="recipe of prompt stages alone"):
        visiontok.compress(model, recipe("cut"))
    with visiontok.compress(model, HALF), torch.no_grad():
        with pytest.raises(UnsupportedError, match="compress_inputs"):
            model(**inputs)
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            generate(model, inputs, use_cache=False)
        text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        assert model(**text).logits.shape[:2] == (1, 3)
        generate(model, text)
    with torch.no_grad():
        model(**inputs)


# ---- later turns

@pytest.mark.parametrize("automatic", [True, False], ids=["compress", "compress_inputs"])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"])
def test_later_turns_of_text(name, kind, automatic):
    """Two more turns on the cache of the first; positions go on as if nothing had been dropped.

    In each, the text of the first row is one token shorter; not on hybrids, whose stock layers take padding between two
    texts for a token.
    """
    text, seen = torch.tensor([[0, 8, 9], [7, 8, 9]]), torch.tensor([[int(name in HYBRIDS), 1, 1], [1, 1, 1]])
    if automatic and kind is DynamicCache and name not in HYBRIDS:
        pytest.skip("hooks serve this one")
    model = build(name)
    inputs = batch(name, model)
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=100) if kind is StaticCache else DynamicCache(config=config)
    short = now = shortened(model, inputs)
    new = torch.ones(2, 3, dtype=torch.long)
    with visiontok.compress(model, HALF) if automatic else contextlib.nullcontext():
        out = generate(model, inputs if automatic else short, 3, past_key_values=cache)
        out = out if automatic else short.restore(out)
        mask = torch.cat([inputs["attention_mask"], new], 1)
        for _ in range(2):
            ids, mask = torch.cat([out.sequences, text], 1), torch.cat([mask, seen], 1)
            if automatic:
                out = generate(model, {"input_ids": ids, "attention_mask": mask}, 3, past_key_values=cache)
            else:
                now = now.extend(ids, cache, mask)
                out = now.restore(generate(model, now, 3))
            assert torch.equal(out.sequences[:, :-3], ids)
            before, mask = mask, torch.cat([mask, new], 1)
    n = inputs["input_ids"].shape[1]
    if name in HYBRIDS:
        follow = [row[there.bool()] for row, there in zip(ids[:, n:], before[:, n:], strict=True)]
        check_against_decoder(model, inputs, short, out, follow)
        return
    full = inputs | {"input_ids": ids, "attention_mask": before}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            full[key] = (ids == IMAGE).to(inputs[key].dtype)
    alive = torch.cat([short.ledger.alive(0), before[:, n:].bool()], 1)
    sequences, logits = greedy(model, full, [alive] * DEPTH, 3, BANNED)
    assert torch.equal(out.sequences, sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-6 * logits.abs().max()
