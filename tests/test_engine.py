"""Every schedule on every architecture against the dense masked oracle, and the cases where engines like this break."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import visiontok
from visiontok.conformance.checks import STEPS, against_oracle
from visiontok.conformance.oracle import DenseMasked
from visiontok.conformance.schedules import SCHEDULES, recipe
from visiontok.conformance.zoo import ARCHITECTURES, BANNED, IMAGE, VIDEO, batch, build, visual
from visiontok.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.engine
DEPTH = 4


def generate(model, inputs, steps=STEPS, **options):
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=list(BANNED),
            **options,
        )


def masks(compression):
    return [compression.ledger.alive(layer) for layer in range(DEPTH)]


def still(compression):
    """Per layer the tokens that pass it as they are."""
    return [compression.ledger.frozen(layer) for layer in range(DEPTH)]


@pytest.mark.support(mode="greedy")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_equals_the_oracle(name, schedule, attention):
    # eager attention takes its softmax in float32, where masks of float64 overflow to -inf: stock gives NaN there
    dtype, tolerance = (torch.float64, 1e-6) if attention == "sdpa" else (torch.float32, 1e-4)
    model = build(name, attention, dtype)
    inputs = batch(name, model)
    alive, out = against_oracle(model, inputs, recipe(schedule), BANNED, close=tolerance)

    seen = visual(inputs)
    hiding = {stage.kind for stage in recipe(schedule).stages} - {"freeze"}
    assert bool(hiding) == any((seen & ~mask).any() for mask in alive), "nothing was dropped, so the test shows nothing"
    stored = [layer.keys.shape[-2] - STEPS + 1 for layer in out.past_key_values.layers]
    needed = [int(mask.sum(1).max()) for mask in alive]
    padding = int((inputs["attention_mask"] == 0).sum(1).min())
    assert all(n <= slots <= n + padding for n, slots in zip(needed, stored, strict=True))
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.support(mode="any number of images", stage=("prompt", "cut", "inject", "exit", "freeze"))
@pytest.mark.parametrize("images", [[2, 0], [0, 1], [1, 3]])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "llava_next"])
def test_rows_may_hold_any_number_of_images(name, images):
    model = build(name)
    inputs = batch(name, model, images=images)
    for schedule in ("prompt", "pyramid", "inject, cut, exit", "freeze"):
        against_oracle(model, inputs, recipe(schedule), BANNED)


@pytest.mark.support(mode="right padding", stage=("prompt", "cut", "inject", "exit", "freeze"))
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_right_padding(name):
    """A forward over a right-padded batch; logits of padding mean nothing."""
    model = build(name)
    inputs = batch(name, model)
    shift = [int((row == 0).sum()) for row in inputs["attention_mask"]]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift, strict=True)])
    attended = inputs["attention_mask"].bool()
    for schedule in ("prompt", "cut", "inject, cut, exit", "freeze"):
        with visiontok.compress(model, recipe(schedule)) as compression, torch.no_grad():
            got = model(**inputs).logits
            alive, frozen = masks(compression), still(compression)
        with DenseMasked(model, alive, frozen=frozen), torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        where = attended & alive[-1]
        assert (got - expected)[where].abs().max() < 1e-6 * expected.abs().max()


def videos(name, model):
    g = torch.Generator().manual_seed(0)
    if name == "llava_onevision":
        ids = torch.tensor([[1, 5, 6] + [VIDEO] * 13 + [7, 8, 9, 10]])
        pixels = torch.randn(1, 3, 3, 32, 32, generator=g).double()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    if name == "qwen3_vl":  # every frame has placeholders of its own, with a timestamp between them
        clip = [5, 102] + [VIDEO] * 8 + [103, 6, 102] + [VIDEO] * 8 + [103]
        grid = torch.tensor([[2, 4, 8]])
    else:
        clip = [102] + [VIDEO] * 24 + [103]
        grid = torch.tensor([[3, 4, 8]])
    ids = torch.tensor([[1, 5, *clip, 7, 8, 102] + [IMAGE] * 16 + [103, 9, 10, 11]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(int(grid.prod()), 96, generator=g).double(),
        "video_grid_thw": grid,
        "pixel_values": torch.randn(64, 96, generator=g).double(),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    } | ({"second_per_grid_ts": torch.tensor([1.0])} if name == "qwen2_5_vl" else {})


@pytest.mark.support(mode="video", stage=("prompt", "cut", "inject", "exit", "skip", "freeze"))
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_video_and_image_in_one_prompt(name):
    model = build(name)
    inputs = videos(name, model)
    for schedule in SCHEDULES:
        against_oracle(model, inputs, recipe(schedule), BANNED)
    with visiontok.compress(model, "grid", keep=4) as compression:
        generate(model, inputs)
        images = compression.report.images
    assert [i.modality for i in images] == (["video"] if name == "llava_onevision" else ["video", "image"])
    assert [i.kept[0] for i in images] == [4] * len(images)
    frames = compression.ledger.grid()[0][visual(inputs)[0]][:, 1]
    assert frames.max() == {"qwen3_vl": 1}.get(name, 2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_gaps_in_positions_are_no_packed_sequences(name):
    """Neither mask nor cache, as in training without padding: gaps must not be read as borders of sequences."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    with visiontok.compress(model, recipe("prompt")) as compression, torch.no_grad():
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        got = model(**bare, use_cache=False).logits
        alive = masks(compression)
    with DenseMasked(model, alive), torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    assert (got - expected)[alive[0]].abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("schedule", ["prompt", "cut"])
def test_flash_attention_gets_consecutive_positions(name, schedule):
    """With one row, flash attention reads any gap in its position ids as the border of a packed sequence."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    seen = []

    def pretend_flash(module, q, k, v, mask, **kwargs):
        seen.append(kwargs.get("position_ids"))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("pretend_flash", pretend_flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pretend_flash", sdpa_mask)
    model = copy.deepcopy(build(name))
    for module in model.model.language_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "pretend_flash"
    inputs = batch(name, model, rows=1, pad=0)
    with visiontok.compress(model, recipe(schedule)):
        generate(model, inputs, 1)  # it hands over text positions, which a plain forward of Qwen does not
    given = [p for p in seen if p is not None]
    assert len(given) == DEPTH
    assert all((p.diff(dim=-1) == 1).all() for p in given)


def test_a_call_without_image_is_stock():
    model = build("llava")
    inputs = batch("llava", model, images=0)
    stock = generate(model, inputs)
    for _ in range(20):  # a new attachment may live where an old one died
        with visiontok.compress(model, "grid", keep=2):
            generate(model, batch("llava", model, rows=1), 1)
    with visiontok.compress(model, "divprune", keep=2) as compression:
        got = generate(model, inputs)
        with pytest.raises(ConfigError, match="no image"):
            _ = compression.report
    assert torch.equal(got.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, stock.logits, strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_draw_depends_on_the_prompt_not_on_the_batch(name):
    model = build(name)
    inputs = batch(name, model, pad=0)
    alone = batch(name, model, pad=0, only=0)
    padding = int((inputs["attention_mask"][0] == 0).sum())

    def kept(x, seed, **options):
        with visiontok.compress(model, "random", keep=5, seed=seed) as compression:
            generate(model, x, 2, **options)
            return compression.ledger.alive(0)

    together, single = kept(inputs, 3), kept(alone, 3)
    assert torch.equal(together[0, padding:], single[0])
    assert not torch.equal(kept(inputs, 4), together)
    beams = kept(alone, 3, num_beams=3)
    assert len(beams) == 3
    assert all(torch.equal(row, single[0]) for row in beams)


def test_half_precision_and_inference_mode():
    model = copy.deepcopy(build("llava")).to(torch.bfloat16)
    inputs = batch("llava", model)
    with visiontok.compress(model, "divprune", keep=4) as compression, torch.inference_mode():
        model(**inputs)
        assert compression.report.images[0].kept == (4,) * DEPTH


def test_the_cache_of_a_compressed_prompt_cannot_be_cut_into_the_prompt():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, "grid", keep=4):
        cache = generate(model, inputs).past_key_values
        with pytest.raises(UnsupportedError, match="compressed prompt"):
            cache.crop(-STEPS - 6)


@pytest.mark.support(architecture="llava", mode="static cache", stage="cut")
def test_static_caches_are_refused_where_layers_hold_different_tokens(record_property):
    model = build("llava")
    inputs = batch("llava", model)
    with (
        visiontok.compress(model, recipe("cut")),
        pytest.raises(UnsupportedError, match="DynamicCache") as refusal,
    ):
        generate(model, inputs, cache_implementation="static")
    record_property("refused", str(refusal.value))


def test_an_attached_model_can_be_copied_and_the_copy_is_its_own():
    model = copy.deepcopy(build("llava"))
    inputs = batch("llava", model)
    with visiontok.compress(model, "grid", keep=4) as compression:
        twin = copy.deepcopy(model)
        expected = generate(model, inputs).sequences
    assert torch.equal(generate(twin, inputs).sequences, expected)
    assert not torch.equal(generate(model, inputs).sequences, expected)
    assert compression.model is model
