"""The cache in situations that one greedy prefill does not show: ragged rows, later turns, crops, sliding windows."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
import transformers as T
from test_engine import DEPTH, generate, masks, still

import visiontok
from visiontok import Recipe
from visiontok.api import Compression
from visiontok.conformance.checks import against_oracle
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import SCHEDULES, cut, prompt, recipe
from visiontok.conformance.zoo import BANNED, CLIP, IMAGE, IMAGE_IDS, QWEN_IDS, TEXT, VIDEO, batch, build, prepare
from visiontok.engine.vision import Encoded
from visiontok.errors import UnsupportedError

pytestmark = pytest.mark.engine


def left_padded(*rows):
    """(ids, mask) of token lists."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_layers_of_one_width_may_hold_different_slots(name, schedule):
    """A long text row makes every layer equally wide; the empty slots of the image's row differ all the same."""
    model = build(name)
    g = torch.Generator().manual_seed(0)
    image = 4 if name == "gemma3" else 16
    ids, mask = left_padded(torch.randint(5, 90, (40,), generator=g).tolist(), [1, 5, 6, *[IMAGE] * image, 7, 8, 9])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(1, 3, 32, 32, generator=g).double(),
    } | ({"token_type_ids": (ids == IMAGE).long()} if name == "gemma3" else {})
    against_oracle(model, inputs, recipe(schedule), BANNED)


@pytest.mark.parametrize("schedule", ["prompt", "cut", "inject", "prompt, inject, exit"])
def test_an_image_behind_a_padded_text_turn(schedule):
    model = build("llava")
    text, text_mask = left_padded([1, 5], [1, 6, 7, 8, 9, 10])
    image = batch("llava", model, rows=1, images=1, pad=0)["input_ids"].repeat(2, 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.cat([text, image], 1)
    mask = torch.cat([text_mask, torch.ones_like(image)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with visiontok.compress(model, recipe(schedule)) as compression, torch.no_grad():
        first = model(input_ids=text, attention_mask=text_mask, position_ids=positions[:, :6], use_cache=True)
        got = model(
            input_ids=image,
            attention_mask=mask,
            position_ids=positions[:, 6:],
            pixel_values=pixels,
            past_key_values=first.past_key_values,
        ).logits[:, -1]
        alive = [torch.cat([text_mask.bool(), mask_], 1) for mask_ in masks(compression)]
    with DenseMasked(model, alive), torch.no_grad():
        full = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}
        expected = model(**full, use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.support(mode="new image in a later turn")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_a_new_image_in_the_second_turn(name, schedule):
    model = build(name)
    first, second = (batch(name, model, rows=2, images=1, pad=2, seed=seed) for seed in (0, 3))
    second["pixel_values"] = second["pixel_values"].flip(-1)
    with visiontok.compress(model, recipe(schedule)) as compression:
        one = generate(model, first, 3)
        before, still_before = masks(compression), still(compression)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, 3, dtype=torch.long), second["attention_mask"]], 1)
        turn = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
        if name == "gemma3":
            turn["token_type_ids"] = (ids == IMAGE).long()
        two = generate(model, turn, 3, past_key_values=one.past_key_values)
        after, still_after = masks(compression), still(compression)
    # the second prefill begins with the last token of the first answer, which was not stored yet
    gap = ids.shape[1] - before[0].shape[1] - after[0].shape[1]
    alive = [torch.cat([a, a.new_ones(2, gap), b], 1) for a, b in zip(before, after, strict=True)]
    frozen = [torch.cat([a, a.new_zeros(2, gap), b], 1) for a, b in zip(still_before, still_after, strict=True)]
    pixels = torch.stack([first["pixel_values"], second["pixel_values"]], 1).flatten(0, 1)
    dense = DenseMasked(model, alive, frozen=frozen)
    sequences, logits = greedy(model, turn | {"pixel_values": pixels}, alive, 3, BANNED, dense)
    assert torch.equal(two.sequences, sequences)
    assert (torch.stack(two.logits, 1) - logits).abs().max() < 1e-6 * logits.abs().max()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "short windows"])
def test_own_masks_of_a_new_image_lie_behind_what_is_stored(name, force):
    """Keeping everything, two turns with an image each are the stock model's two turns, position ids given or not."""
    if name == "short windows":  # they count stored tokens, so padding would matter
        if T.__version__ < "5.17":
            pytest.skip("transformers 5.16 sizes Gemma 3's masks by layer 0")
        model = short_windows("gemma3")
        inputs = batch("gemma3", model, rows=1, pad=0, images=1)
    else:
        model = build(name)
        inputs = batch(name, model, rows=2, pad=2, images=1)
    length = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"]] * 2, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + int(name == "paligemma")

    def turns(numbered):
        given = [{"position_ids": p} if numbered else {} for p in positions.split(length, 1)]
        with torch.no_grad():
            first = model(**inputs, **given[0], use_cache=True)
            # stock reads the token types of a used cache from its beginning
            types = torch.cat([inputs["token_type_ids"]] * 2, 1)
            second = inputs | {"attention_mask": mask, "token_type_ids": types}
            return model(**second, **given[1], past_key_values=first.past_key_values).logits[:, -1]

    for numbered in (True, False):
        stock = turns(numbered)
        stages = (prompt(3.0), cut(1, 3.0)) if force else (prompt(3.0),)
        with Compression(model, Recipe(stages=stages), force=force):
            got = turns(numbered)
        assert (got - stock).abs().max() < 1e-6 * stock.abs().max()


def sliding(text, window=8):
    """A LLaVA whose language model slides over a few tokens."""
    torch.manual_seed(0)
    config = T.LlavaConfig(text_config={**TEXT, **text, "sliding_window": window}, vision_config=CLIP, **IMAGE_IDS)
    return prepare(T.AutoModelForImageTextToText.from_config(config))


@functools.cache
def short_windows(name):
    if name == "gemma3":
        model = copy.deepcopy(build("gemma3"))
        model.config.text_config.sliding_window = 8
        for module in model.model.language_model.modules():
            if hasattr(module, "config"):
                module.config.sliding_window = 8
            if getattr(module, "sliding_window", None):
                module.sliding_window = 8
        return model
    if name == "mistral":
        return sliding({"model_type": "mistral"})
    return sliding(
        {"model_type": "qwen2", "use_sliding_window": True}
        | {"layer_types": ["full_attention", "sliding_attention"] * 2}
    )


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_windows_shorter_than_the_prompt(name):
    """Kept whole through the machinery the model is stock; pruned, a step on the cache equals one forward."""
    if name == "gemma3" and T.__version__ < "5.17":
        pytest.skip("transformers 5.16 sizes Gemma 3's masks by layer 0")
    model = short_windows(name)
    kind = "gemma3" if name == "gemma3" else "llava"
    inputs = batch(kind, model)
    attended = inputs["attention_mask"].bool()
    tokens = generate(model, inputs)
    with torch.no_grad():
        stock = model(**inputs).logits
    for schedule in ("prompt", "cut", "pyramid"):
        everything = [
            s if s.method is None else s.__class__(kind=s.kind, layer=s.layer, method=_All())
            for s in SCHEDULES[schedule]
        ]
        with Compression(model, Recipe(stages=tuple(everything)), force=True), torch.no_grad():
            assert torch.equal(model(**inputs).logits[attended], stock[attended])
            assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs).logits, tokens.logits, strict=True))
    single = batch(kind, model, rows=1, pad=0)
    for schedule in ("prompt", "cut", "pyramid"):
        with visiontok.compress(model, recipe(schedule)), torch.no_grad():
            out = model(**single, use_cache=True)
            more = {"attention_mask": torch.cat([single["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)}
            if kind == "gemma3":
                more["token_type_ids"] = torch.zeros(1, 1, dtype=torch.long)
            step = model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values, **more).logits
            whole = single | {"input_ids": torch.cat([single["input_ids"], torch.tensor([[9]])], 1)} | more
            if kind == "gemma3":
                whole["token_type_ids"] = (whole["input_ids"] == IMAGE).long()
            once = model(**whole, use_cache=False).logits[:, -1:]
        assert (step - once).abs().max() < 1e-6 * once.abs().max()


class _All(visiontok.Method):
    card = visiontok.Card(name="all", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        return ctx.valid


def test_rows_of_a_cache_can_be_reordered_repeated_and_selected():
    model = build("llava")
    inputs = batch("llava", model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    positions, token = mask.sum(1, keepdim=True) - 1, torch.tensor([[5], [6]])
    with visiontok.compress(model, recipe("cut")), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values

        def step(change, rows):
            changed = copy.deepcopy(cache)
            change(changed)
            return model(
                input_ids=token[rows], attention_mask=mask[rows], position_ids=positions[rows], past_key_values=changed
            ).logits

        plain = step(lambda c: None, [0, 1])
        assert torch.allclose(step(lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]), plain.flip(0))
        repeated = step(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1])
        assert torch.allclose(repeated, plain.repeat_interleave(2, 0))
        assert torch.allclose(step(lambda c: c.batch_select_indices(torch.tensor([1])), [1]), plain[1:])


def test_a_crop_that_one_layer_refuses_crops_none():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, recipe("cut")):
        cache = generate(model, inputs).past_key_values
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    with pytest.raises(UnsupportedError, match="compressed prompt"):
        cache.crop(-15)
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths
    cache.crop(-2)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n - 2 for n in lengths]


@pytest.mark.parametrize("schedule", ["prompt", "cut", "inject and select"])
def test_text_behind_the_last_image_can_be_taken_back(schedule):
    """What a crop leaves, in rows with empty slots, is the cache of the shorter prompt."""
    model = build("llava")
    inputs = batch("llava", model)
    attended = inputs["attention_mask"]
    positions, other = (attended.cumsum(1) - 1).clamp(min=0), torch.tensor([[11, 12, 13], [14, 15, 16]])
    shorter = inputs | {k: inputs[k][:, :-3] for k in ("input_ids", "attention_mask")}
    with visiontok.compress(model, recipe(schedule)), torch.no_grad():
        cropped, expected = (model(**given, use_cache=True).past_key_values for given in (inputs, shorter))
        cropped.crop(-3)
        more = {"input_ids": other, "attention_mask": attended, "position_ids": positions[:, -3:]}
        got, wanted = (model(**more, past_key_values=cache).logits for cache in (cropped, expected))
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_a_sliding_layer_that_stores_less_than_its_window_can_be_cropped():
    """Stock refuses to crop once the window is full; what fills it are stored tokens, not those they stand for."""
    model = sliding({"model_type": "mistral"}, window=40)
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, "grid", keep=2):
        cache = generate(model, inputs).past_key_values
        before = cache.layers[0].keys.shape[2]
        assert before < 40 < cache.get_seq_length()
        cache.crop(-2)
        assert cache.layers[0].keys.shape[2] == before - 2


def test_a_compressed_cache_is_refused_outside_its_block():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, recipe("cut")), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    stored = [layer.keys.shape[2] for layer in cache.layers]
    with pytest.raises(UnsupportedError, match="inside the compress"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == stored, "a refused call must store nothing"
    with (
        visiontok.compress(model, "grid", keep=4),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="another recipe"),
    ):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="inside the compress"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_used_cache_is_served_even_where_nothing_is_dropped():
    """Turn 1 is pruned, turn 2 keeps all of its image: the masks of turn 2 must know turn 1."""
    model = build("llava")
    inputs = batch("llava", model, rows=2, images=1)
    mask = torch.cat([inputs["attention_mask"]] * 2, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, "grid", keep=4) as compression, torch.no_grad():
        first = model(**inputs, position_ids=positions[:, :length], use_cache=True)
        before = masks(compression)
    with visiontok.compress(model, "grid", keep=1.0), torch.no_grad():
        turn = inputs | {"attention_mask": mask, "position_ids": positions[:, length:]}
        got = model(**turn, past_key_values=first.past_key_values).logits[:, -1]
    alive = [torch.cat([a, inputs["attention_mask"].bool()], 1) for a in before]
    whole = {
        "input_ids": torch.cat([inputs["input_ids"]] * 2, 1),
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": inputs["pixel_values"].repeat_interleave(2, 0),
    }
    with DenseMasked(model, alive), torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.support(architecture="llava", mode="chunked prefill", stage="cut")
def test_chunked_prefill_is_refused(record_property):
    if T.__version__ < "5.23":
        pytest.skip("transformers up to 5.22 cannot chunk a prompt with images")
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with (
        visiontok.compress(model, recipe("cut")),
        pytest.raises(UnsupportedError, match="prefill_chunk_size") as refusal,
    ):
        generate(model, inputs, prefill_chunk_size=8)
    record_property("refused", str(refusal.value))


def test_a_custom_mask_is_refused():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.zeros(1, 1, length, length, dtype=torch.float64)
    with (
        visiontok.compress(model, "divprune", keep=4),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="2-D padding mask"),
    ):
        model(**inputs)


def test_a_prompt_may_not_end_with_a_token_that_is_dropped():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0, text=0, images=1)
    assert inputs["input_ids"][0, -1] == IMAGE
    for method, options in (("vtw", {}), ("grid", {"keep": 2})):
        with (
            visiontok.compress(model, method, **options),
            torch.no_grad(),
            pytest.raises(UnsupportedError, match="ends with a visual token"),
        ):
            model(**inputs)


def test_pictures_that_cannot_be_found_are_announced():
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    with visiontok.compress(model, "divprune", keep=4), torch.no_grad():
        with pytest.warns(UserWarning, match="nothing is pruned"):
            model(input_ids=inputs["input_ids"])
        embeds = torch.randn(1, 5, 32).double()
        with pytest.warns(UserWarning, match="nothing is pruned"):
            model(inputs_embeds=embeds)


def test_a_placeholder_without_its_picture_is_text():
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model, rows=1, pad=0)
    inputs["input_ids"][0, -1] = VIDEO
    with visiontok.compress(model, "cls_topk", keep=4) as compression, torch.no_grad():
        model(**inputs)
        assert [image.modality for image in compression.report.images] == ["image", "image"]


def test_video_of_glm4v_stands_at_image_placeholders():
    model = build("glm4v")
    ids = torch.tensor([[1, 5, 106, 104] + [IMAGE] * 8 + [105, 104] + [IMAGE] * 8 + [105, 107, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).double(),
        "video_grid_thw": torch.tensor([[2, 4, 8]]),
        "mm_token_type_ids": 2 * (ids == IMAGE).int(),
    }
    assert QWEN_IDS["image_token_id"] == IMAGE
    for schedule in ("prompt", "pyramid", "inject, cut, exit"):
        alive, _ = against_oracle(model, inputs, recipe(schedule), BANNED)
        assert len(alive) == DEPTH


def test_nothing_of_a_call_outlives_it():
    model = build("llava")
    inputs = batch("llava", model)
    gc.collect()
    gc.disable()
    try:
        with visiontok.compress(model, "fastv", keep=4, layer=2) as compression, torch.no_grad():
            for _ in range(3):
                model(**inputs)
                model.get_image_features(inputs["pixel_values"], return_dict=True)
        del compression
        alive = [o for o in gc.get_objects() if isinstance(o, Encoded)]
        assert len(alive) == 0
    finally:
        gc.enable()
    with visiontok.compress(model, "fastv", keep=4, layer=2) as compression:
        with pytest.raises(ValueError, match="match"), torch.no_grad():
            model(**inputs | {"pixel_values": inputs["pixel_values"][:3]})
        attachment = weakref.ref(compression._attachment)
    del compression
    gc.collect()
    assert attachment() is None
    with torch.no_grad():
        model.model.language_model(inputs_embeds=torch.randn(1, 3, 32).double())
