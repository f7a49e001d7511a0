"""The adapter contract: what attaches by default, what is refused and why, and adapters from other packages."""

from __future__ import annotations

import copy
import importlib.metadata
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as T
from visiontok.adapters.base import Adapter, check, find, is_supported

import visiontok
from visiontok import Budget, Card, Method, Recipe
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import SCHEDULES, cut, prompt
from visiontok.conformance.zoo import (
    ARCHITECTURES,
    BANNED,
    IMAGE,
    SIGLIP,
    TEXT,
    batch,
    build,
    config,
    prepare,
)
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage, resolve_layer

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def aya():
    """A family without an adapter of its own."""
    torch.manual_seed(0)
    config = T.AyaVisionConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGLIP, image_token_id=IMAGE, downsample_factor=2
    )
    config.image_token_index = IMAGE
    return prepare(T.AutoModelForImageTextToText.from_config(config))


@pytest.fixture
def aya_inputs():
    ids = torch.tensor([[0, 1, 5, *[IMAGE] * 4, 7, *[IMAGE] * 4, 8, 9], [1, 5, 6, *[IMAGE] * 4, 7, 8, *[IMAGE] * 4, 9]])
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_family_that_passes_the_check_needs_no_adapter(aya, aya_inputs, schedule):
    assert not is_supported("aya_vision")
    with visiontok.compress(aya, Recipe(stages=SCHEDULES[schedule])) as compression, torch.no_grad():
        got = aya.generate(**aya_inputs, max_new_tokens=4, do_sample=False, suppress_tokens=list(BANNED))
        alive, frozen = (
            [ask(layer) for layer in range(4)] for ask in (compression.ledger.alive, compression.ledger.frozen)
        )
        assert "aya_vision" in str(compression.report.account.not_counted) or compression.report.account.vision is None
    expected, _ = greedy(aya, aya_inputs, alive, 4, BANNED, DenseMasked(aya, alive, frozen=frozen))
    assert torch.equal(got, expected)


def test_what_the_default_adapter_does_not_know_it_says(aya, aya_inputs):
    with visiontok.compress(aya, "divprune", keep=2) as compression, torch.no_grad():
        aya(**aya_inputs)
        assert compression.report.images[0].kept == (2,) * 4
    for method, message in (("cls_topk", "no mapping from vision-tower patches"), ("grid", "where tokens lie")):
        with (
            visiontok.compress(aya, method, keep=2),
            pytest.raises(UnsupportedError, match=message),
            torch.no_grad(),
        ):
            aya(**aya_inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_check_accepts_only_what_the_default_adapter_serves(name):
    """On families that need an adapter the default one is refused; the others pass it."""
    base = build(name).model
    own = find(base)
    needs_own = own.text != "language_model" or own.own_mask or own.deepstack is not None
    if needs_own:
        with pytest.raises(UnsupportedError, match="register an adapter"):
            check(Adapter(base))
    else:
        check(Adapter(base))


def test_cross_attention_models_without_an_adapter_are_refused():
    vision = {"embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    idefics = T.IdeficsConfig(**TEXT, vision_config=vision, cross_layer_interval=2)
    with pytest.raises(UnsupportedError, match=r"idefics: .*gated cross-attention"):
        visiontok.compress(T.IdeficsForVisionText2Text(idefics), "divprune", keep=2)


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "chunked_attention"])
def test_the_layer_kinds_count_not_the_name_of_the_family(kind):
    """Recurrent layers can be given fewer tokens, but none can be dropped inside; of other kinds nothing is known."""
    model = copy.deepcopy(build("llava"))
    model.model.language_model.config.layer_types = [kind, "full_attention"] * 2
    if kind == "chunked_attention":
        with pytest.raises(UnsupportedError, match=r"llava: visiontok needs plain attention layers \(it has chunked"):
            visiontok.compress(model, "random", keep=4)
    else:
        visiontok.compress(model, "random", keep=4).remove()
    message = "register an adapter" if kind == "chunked_attention" else f"it has {kind}.*prompt stages alone"
    with pytest.raises(UnsupportedError, match=message):
        visiontok.compress(model, Recipe(stages=(cut(2),)))


def test_llava_next_with_a_cls_token_per_crop_is_refused():
    """The stock model cannot tile such crops; say so before it fails."""
    settings = config("llava_next")
    settings.vision_feature_select_strategy = "full"
    model = T.AutoModelForImageTextToText.from_config(settings).eval()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.get_image_features(torch.zeros(1, 5, 3, 32, 32), image_sizes=torch.tensor([[64, 64]]))
    with pytest.raises(UnsupportedError, match="llava_next: vision_feature_select_strategy='full'"):
        visiontok.compress(model, "random", keep=4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_share_of_flops_behind_a_prompt_stage_counts_what_is_alive_there(name):
    model = build(name)
    inputs = batch(name, model)
    random = visiontok.recipe("random", keep=4)

    def kept(share):
        stages = (*random.stages, Stage(kind="cut", layer=3, method=random.stages[0].method, keep=Budget.flops(share)))
        with visiontok.compress(model, Recipe(stages=stages)) as compression, torch.no_grad():
            model(**inputs)
            account = compression.report.account
            ratio = sum(account.decoder) / sum(account.decoder_stock)
            return ratio, [image.kept for image in compression.report.images]

    ratio, counts = kept(1.0)
    assert set(counts) == {(4,) * 4}
    tighter, counts = kept(ratio - 0.01)
    assert tighter <= ratio - 0.01
    assert all(k[:3] == (4,) * 3 and 1 <= k[3] < 4 for k in counts)
    with pytest.raises(ConfigError, match="even one token per image costs more"):
        kept(ratio / 2)


@dataclass(frozen=True)
class Everything(Method):
    """Asks for every token an image ever had."""

    card: ClassVar[Card] = Card(name="everything", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx):
        return torch.ones_like(ctx.valid)


@pytest.mark.parametrize("first", ["prompt", "cut"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_a_later_stage_revives_nothing(name, first):
    model = build(name)
    inputs = batch(name, model)
    start = prompt() if first == "prompt" else cut(1)
    stages = (start, Stage(kind="cut", layer=2, method=Everything()))
    with visiontok.compress(model, Recipe(stages=stages)) as compression, torch.no_grad():
        got = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=list(BANNED))
        alive = [compression.ledger.alive(layer) for layer in range(4)]
    assert all(torch.equal(mask, alive[1]) for mask in alive[2:])
    assert alive[1].sum() < inputs["attention_mask"].sum()
    expected, _ = greedy(model, inputs, alive, 3, BANNED)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layer", [True, False])
def test_a_bool_is_no_layer(layer):
    with pytest.raises(ConfigError, match=f"layer={layer}: a layer is an index or a fraction"):
        resolve_layer(layer, 4, name="layer")


class AyaAdapter(Adapter):
    """What another package would ship."""

    model_types = ("aya_vision",)

    def grids(self, record):
        return [torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])] * len(record.output.pooler_output)


@pytest.mark.parametrize("value", ["AyaAdapter", "AyaAdapter.model_types"])
def test_other_packages_register_adapters(aya, aya_inputs, monkeypatch, value):
    entry = importlib.metadata.EntryPoint("aya_vision", f"{__name__}:{value}", "visiontok.adapters")
    known = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **q: [entry] if q["group"] == entry.group else known(**q)
    )
    if value != "AyaAdapter":
        with pytest.raises(ConfigError, match="not an Adapter subclass"):
            visiontok.compress(aya, "grid", keep=2)
        return
    with visiontok.compress(aya, "grid", keep=2) as compression, torch.no_grad():
        aya(**aya_inputs)
    assert compression.ledger.alive(0)[0, 3:7].sum() == 2
