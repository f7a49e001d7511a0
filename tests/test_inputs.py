"""Plane 2, shorter inputs for the stock model: equal to the hooks, to the decoder called on the kept tokens and
to the dense oracle; with every cache; nothing is left on the model."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
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
    if TAKES_FEATURES:
        return visiontok.compress_inputs(model, inputs, what, **options)
    family = model.config.model_type
    missing = "DeepStack features" if family.startswith("qwen3_vl") else "embeddings"
    if family in ("qwen3_vl", "qwen3_vl_moe", "gemma3", "paligemma"):
        missing = f"neither encoded images nor {missing}; use transformers >= 5.18"
    elif family == "llava_onevision" and "pixel_values_videos" in inputs:
        missing = "12 encoded video tokens stand against 13 placeholders.* use transformers >= 5.18"
    else:
        return visiontok.compress_inputs(model, inputs, what, **options)
    with pytest.raises(UnsupportedError, match=missing):
        visiontok.compress_inputs(model, inputs, what, **options)
    pytest.skip(f"generate() of transformers {T.__version__} takes no features of {family}")


def same(got, expected, tolerance=1e-6):
    """Sequences are equal and the logits of every step are."""
    assert torch.equal(got.sequences, expected.sequences)
    a, b = torch.stack(got.logits), torch.stack(expected.logits)
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.support(mode="static cache", stage="prompt")
@pytest.mark.parametrize("what", [HALF, MERGE], ids=["choice", "merge"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_the_hooks(name, what, record_property):
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, what) as compression:
        expected = generate(model, inputs)
        kept = compression.ledger
        assert compression.report.plane == "hooks"
    short = shortened(model, inputs, what)
    if name == "smolvlm" and what is HALF and TAKES_FEATURES and T.__version__ < "5.23":
        with pytest.raises(ValueError, match="not divisible by patch_size") as refusal:  # what merges keep, is
            generate(model, short)
        record_property("refused", f"stock: {refusal.value}")
        return
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
        for new in () if follow is None else follow[b]:
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


@pytest.mark.support(mode="greedy", stage="prompt")
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


@pytest.mark.support(mode="greedy", stage="cut")
@pytest.mark.parametrize("name", [*HYBRIDS, "lfm2"])
def test_what_a_hybrid_cannot_do_it_says(name, record_property):
    model, inputs = hybrid(name)
    with pytest.raises(UnsupportedError, match="recipe of prompt stages alone") as refusal:
        visiontok.compress(model, recipe("cut"))
    record_property("refused", str(refusal.value))
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


def test_a_turn_that_does_not_fit_its_cache_is_refused():
    model = build("llava")
    inputs = batch("llava", model)
    short = shortened(model, inputs)
    out = generate(model, short)
    cache, whole = out.past_key_values, short.restore(out).sequences
    text = torch.tensor([[7, 8], [7, 8]])
    with pytest.raises(ConfigError, match="the whole conversation"):
        short.extend(torch.cat([out.sequences, text], 1), cache)
    with pytest.raises(ConfigError, match="past_key_values: it holds 0 tokens"):
        short.extend(torch.cat([whole, text], 1), DynamicCache(config=model.config.get_text_config()))
    with pytest.raises(ConfigError, match="3 rows do not belong to 2 prompts"):
        short.extend(torch.cat([whole, whole])[:3], cache)
    if TAKES_FEATURES:  # else sequences hold only what is new
        with pytest.raises(ConfigError, match="do not begin with these inputs"):
            short.restore(whole)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    with visiontok.compress(model, HALF):
        generate(model, inputs, past_key_values=static)
        with pytest.raises(UnsupportedError, match="no image can be added"):
            generate(model, inputs, past_key_values=static)
        static.reset()
        same(generate(model, inputs, past_key_values=static), short.restore(out))
        static.reset()
        generate(model, batch("llava", model, images=0), past_key_values=static)
        with pytest.raises(UnsupportedError, match="begin a conversation"):
            generate(model, inputs, past_key_values=static)


# ---- generate(): beams, lengths, chunks, caches, compilation


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "glm4v", "gemma3"])
def test_beams_and_several_sequences(name):
    """Compared with the dense oracle inside the same beam search; a row is repeated together with all its images."""
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    short = shortened(model, inputs)
    options = {"num_beams": 3, "num_return_sequences": 2}
    got = short.restore(generate(model, short, **options)).sequences
    twice = short.restore(generate(model, short, **options)).sequences
    assert torch.equal(got, twice), "generate() changed the inputs it was given"
    with DenseMasked(model, [short.ledger.alive(0).repeat_interleave(3, 0)] * DEPTH):
        if name == "glm4v" and TAKES_FEATURES:
            pytest.skip("stock glm4v repeats the images of a row in the wrong order; ours are one item per row")
        if not TAKES_FEATURES and name != "qwen2_5_vl":
            pytest.skip("stock repeats the images of a row in the wrong order in this transformers")
        expected = generate(model, inputs, use_cache=False, **options).sequences
    assert torch.equal(got, expected)


def test_lengths_count_the_whole_prompt():
    model = build("llava")
    inputs = batch("llava", model)
    n = inputs["input_ids"].shape[1]
    settings = copy.deepcopy(model.generation_config)
    settings.max_length = n + 3
    with visiontok.compress(model, HALF):
        for options in ({"max_length": n + 3}, {"generation_config": settings}, {"max_new_tokens": 3}):
            with torch.no_grad():
                out = model.generate(**inputs, **options, do_sample=False, cache_implementation="static")
            assert out.shape == (2, n + 3)
            assert torch.equal(out[:, :n], inputs["input_ids"])


CACHES = {
    "static": {"cache_implementation": "static"},
    "fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "chunks": {"prefill_chunk_size": 8},
}


@pytest.mark.support(stage="prompt")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("static", marks=pytest.mark.support(mode="static cache")),
        pytest.param("fp8", marks=pytest.mark.support(mode="quantised cache")),
        pytest.param("chunks", marks=pytest.mark.support(mode="chunked prefill")),
    ],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compress_takes_this_plane_where_hooks_cannot_serve(name, kind, record_property):
    model = build(name)
    inputs = batch(name, model)
    before = vars(model).keys() - {"_previous_max_cache_length"}
    with visiontok.compress(model, HALF) as compression:
        expected = generate(model, inputs)
        assert compression.report.plane == "hooks"
        if T.__version__ < "5.23" and kind == "chunks":
            with pytest.raises(UnsupportedError, match=r"prefill_chunk_size.* use transformers >= 5.23") as refusal:
                generate(model, inputs, **CACHES[kind])
            record_property("refused", str(refusal.value))
            return
        if kind == "fp8" and not hasattr(T.cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this transformers has no quantised cache without another package")
        out = generate(model, inputs, **CACHES[kind])
        report = compression.report
        assert report.plane == "inputs"
        assert "stock generate() on shorter inputs" in str(report)
        assert report.seconds["decode"] is None
        assert generate(model, inputs).sequences.equal(expected.sequences)
        assert compression.report.plane == "hooks"
    if kind == "fp8":  # later steps see rounded keys and values, the prefill does not
        assert torch.equal(out.logits[0], expected.logits[0])
        assert type(out.past_key_values).__name__ == "QuantizedCache"
        assert out.past_key_values.get_seq_length() == report.layer_tokens[0] + STEPS - 1
    else:
        same(out, expected)
    assert vars(model).keys() - {"_previous_max_cache_length"} == before


@pytest.mark.slow
def test_a_quantised_cache_of_another_package():
    """Quanto builds an extension when it is first used, which takes minutes."""
    try:
        importlib.metadata.version("optimum-quanto")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("optimum-quanto is not installed")
    model = build("llava", dtype=torch.float32)
    inputs = batch("llava", model)
    with visiontok.compress(model, HALF) as compression:
        expected = generate(model, inputs)
        settings = {"backend": "quanto", "nbits": 4, "q_group_size": 8}
        out = generate(model, inputs, cache_implementation="quantized", cache_config=settings)
        assert compression.report.plane == "inputs"
    assert torch.allclose(out.logits[0], expected.logits[0])
    assert not torch.equal(out.logits[-1], expected.logits[-1])
    assert type(out.past_key_values).__name__ == "QuantizedCache"


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False], ids=["compress", "compress_inputs"])
@pytest.mark.parametrize("name", ["llava", "qwen3_5"])
def test_compiled_decoding(name, automatic):
    """generate() compiles the decoding step of a static cache; on a CPU only when it is told to."""
    model = copy.deepcopy(build(name))
    inputs = batch(name, model)
    expected = visiontok.compress_inputs(model, inputs, HALF)
    expected = expected.restore(generate(model, expected))
    compiled = T.CompileConfig(backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if automatic:
        with visiontok.compress(model, HALF):
            out = generate(model, inputs, **options)
    else:
        short = visiontok.compress_inputs(model, inputs, HALF)
        out = short.restore(generate(model, short, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    same(out, expected, 1e-5)


# ---- attention kernels that read positions


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_flash_attention_takes_no_gap_for_a_border(name, monkeypatch):
    """With one row and no padding mask, flash attention reads any gap in its position ids as the border of a packed
    sequence; a stand-in kernel does the same."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_flash_attention_utils import _is_packed_sequence
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def pretend_flash(module, q, k, v, mask, **kwargs):
        positions = kwargs.get("position_ids")
        if q.shape[2] > 1:
            calls.append(mask is not None)
            assert mask is not None or positions is None or not _is_packed_sequence(positions, len(q))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past := k.shape[2] - q.shape[2])
        if mask is not None:
            assert mask.ndim == 2
            seen = seen & mask[:, None, None, -k.shape[2] :].bool() | seen.triu(past)
        else:
            seen = seen[None, None]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, seen, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("pretend_flash", pretend_flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pretend_flash", flash_attention_mask)
    model = copy.deepcopy(build(name))
    inputs = batch(name, model, rows=1, pad=0)
    inputs.pop("token_type_ids", None)
    with visiontok.compress(model, HALF):
        expected = generate(model, inputs)
    for module in model.model.language_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "pretend_flash"
    short = shortened(model, inputs)
    same(short.restore(generate(model, short)), expected)
    assert len(calls) == DEPTH
    assert short.prompt.ids.shape[1] == short.report.layer_tokens[0]


def test_neither_mask_nor_cache_is_refused():
    """There a gap in the positions would be read as the border of a packed sequence."""
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    short = shortened(model, inputs)
    with pytest.raises(TypeError, match="use_cache"):
        model.generate(**short, use_cache=False)
    settings = copy.deepcopy(model.generation_config)
    settings.use_cache = False
    expected = generate(model, short)
    same(generate(model, short, generation_config=settings), expected)
    with visiontok.compress(model, HALF), pytest.raises(UnsupportedError, match="use_cache=False"):
        generate(model, inputs, use_cache=False, prefill_chunk_size=4)


# ---- nothing is left on the model, and nothing is dropped in silence


def state(model):
    """All that could be left on a model: hooks, attributes of modules, configs."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        name: (set(module.__dict__), [list(getattr(module, h)) for h in hooks], id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    } | {"rope_deltas": getattr(model.model, "rope_deltas", None)}


@dataclass(frozen=True)
class Fails(Method):
    """Fails in the middle of everything."""

    card: ClassVar[Card] = Card(name="fails", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self):
        return visiontok.Needs(vision_received=(0,), encoder_features=True)

    def select(self, ctx):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_nothing_is_left_on_the_model(name):
    model = build(name)
    inputs = batch(name, model)
    generate(model, inputs)  # Transformers installs hooks of its own when a tower first runs
    before = state(model)
    short = shortened(model, inputs, "hiprune", keep=4)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        visiontok.compress_inputs(model, inputs, Fails)
    assert state(model) == before
    compression = visiontok.compress(model, "hiprune", keep=4)
    with pytest.raises(ConfigError, match="already compressed"):
        visiontok.compress_inputs(model, inputs, HALF)
    expected = generate(model, inputs, cache_implementation="static")
    compression.remove()
    with visiontok.compress(model, Fails), pytest.raises(RuntimeError, match="on purpose"):
        generate(model, inputs, cache_implementation="static")
    after = state(model)
    assert after[""][0] - before[""][0] <= {"_previous_max_cache_length"}
    del after[""], before[""]
    assert after == before
    same(short.restore(generate(model, short, cache_implementation="static")), expected)


def test_two_threads_on_two_planes():
    model = build("llava")
    inputs = batch("llava", model)
    barrier = threading.Barrier(2)

    def run(options):
        barrier.wait()
        return [generate(model, inputs, **options) for _ in range(4)], compression.report.plane

    with visiontok.compress(model, HALF) as compression, ThreadPoolExecutor(2) as pool:
        expected = generate(model, inputs)
        hooked, static = pool.map(run, ({}, {"cache_implementation": "static"}))
    assert (hooked[1], static[1]) == ("hooks", "inputs")
    for out in hooked[0] + static[0]:
        same(out, expected)
    with ThreadPoolExecutor(4) as pool:
        for short in pool.map(lambda _: shortened(model, inputs), range(8)):
            same(short.restore(generate(model, short)), expected)


@pytest.mark.parametrize("name", ["llava", "qwen3_5"])
def test_a_copy_of_an_attached_model_is_its_own(name):
    model = copy.deepcopy(build(name))
    inputs = batch(name, model)
    with visiontok.compress(model, HALF):
        expected = generate(model, inputs, cache_implementation="static")
        twin = copy.deepcopy(model)
    assert "generate" not in model.__dict__
    same(generate(twin, inputs, cache_implementation="static"), expected)
    assert visiontok.attached(twin).report.plane == "inputs"
    visiontok.attached(twin).remove()
    assert "generate" not in twin.__dict__


def test_a_stage_inside_the_model_is_refused():
    model = build("llava")
    inputs = batch("llava", model)
    for schedule, stages in SCHEDULES.items():
        if schedule != "prompt":
            kind = next(stage.kind for stage in stages if stage.kind != "prompt")
            with pytest.raises(UnsupportedError, match=f"its {kind} stage acts inside .* use compress"):
                visiontok.compress_inputs(model, inputs, recipe(schedule))
            with (
                visiontok.compress(model, recipe(schedule)),
                pytest.raises(UnsupportedError, match="DynamicCache"),
            ):
                generate(model, inputs, cache_implementation="static")


def test_inputs_that_cannot_be_shortened_are_refused():
    model = build("llava")
    inputs = batch("llava", model)
    ids = inputs["input_ids"]

    def refused(error, message, **changes):
        with pytest.raises(error, match=message):
            visiontok.compress_inputs(model, {k: v for k, v in (inputs | changes).items() if v is not None}, HALF)

    refused(ConfigError, "no pixels", pixel_values=None)
    refused(ConfigError, "input_ids", input_ids=None)
    refused(ConfigError, "input_ids", inputs_embeds=torch.zeros(2, 3, 32))
    refused(UnsupportedError, "labels", labels=ids)
    refused(ConfigError, "attention_mask=", attention_mask=torch.ones(2, 1, 4, 4))
    refused(ConfigError, "padding id 0", attention_mask=None)
    refused(
        ConfigError, "48 encoded image tokens stand against 64 placeholders", pixel_values=inputs["pixel_values"][:3]
    )
    refused(UnsupportedError, "ends with a visual token", input_ids=torch.cat([ids[:, -10:], ids[:, :-10]], 1))
    cache = DynamicCache(config=model.config.get_text_config())
    cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    refused(UnsupportedError, "begin a conversation", past_key_values=cache)
    with pytest.raises(UnsupportedError, match="it cannot generate"):
        visiontok.compress_inputs(model.model, inputs, HALF)


@pytest.mark.skipif(not TAKES_FEATURES, reason="encoded images can be marked, embeddings cannot")
@pytest.mark.parametrize("method", ["cls_topk", "fastv"])
def test_short_inputs_are_not_compressed_again_by_another_thread(method):
    """A thread without a compression of its own is served by the oldest one, but not for what it has shortened."""
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    alone = visiontok.compress_inputs(model, inputs, "cls_topk", keep=4)
    expected = generate(model, alone)
    with visiontok.compress(model, method, keep=2), ThreadPoolExecutor(1) as pool:

        def other():
            short = visiontok.compress_inputs(model, inputs, "cls_topk", keep=4)
            assert short.report.images == alone.report.images
            return generate(model, short)

        got = pool.submit(other).result()
    assert torch.equal(got.sequences, expected.sequences)
    assert [x.keys.shape for x in got.past_key_values.layers] == [x.keys.shape for x in expected.past_key_values.layers]


@pytest.mark.skipif(not TAKES_FEATURES, reason="static caches need encoded images")
def test_a_patched_generate_and_a_compiled_model_keep_the_gate():
    model = copy.deepcopy(build("llava"))
    inputs = batch("llava", model)
    stock = model.generate
    model.generate = lambda **anything: stock(**anything)
    for wrapped in (model, torch.compile(model, backend="eager")):
        with visiontok.compress(wrapped, "grid", keep=4) as compression:
            generate(model, inputs, cache_implementation="static")
            assert compression.report.plane == "inputs"


@pytest.mark.skipif(not TAKES_FEATURES, reason="static caches need encoded images")
def test_a_cache_of_short_inputs_is_refused_by_hand():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, "grid", keep=4), torch.no_grad():
        cache = generate(model, inputs, cache_implementation="static").past_key_values
        with pytest.raises(UnsupportedError, match="compressed before the model"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
