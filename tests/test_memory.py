"""The vision memory: what the tower says of a picture alone is what it says of it among others, and is said once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration
from visiontok.adapters.base import find

from visiontok import Card, Method, Needs, compress
from visiontok.api import as_recipe, refuse_memory, remember_vision, vision_memory
from visiontok.conformance.zoo import (
    ARCHITECTURES,
    GRIDS,
    HYBRIDS,
    IMAGE_IDS,
    SIGLIP,
    TEXT,
    TILED,
    batch,
    build,
)
from visiontok.engine.tower import describe_tower
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Selection
from visiontok.report import REMEMBERED

pytestmark = pytest.mark.engine
PLAIN = "random"


@dataclass(frozen=True)
class Reader(Method):
    """Keeps everything but one token per image, and everything it can read of the tower."""

    needed: Needs = field(default_factory=Needs)
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    card: ClassVar[Card] = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self) -> Needs:
        return self.needed

    def select(self, ctx: Any) -> Selection:
        self.read["features"] = ctx.features
        for stat in ("cls", "keys", "received"):
            for layer in getattr(self.needed, f"vision_{stat}"):
                self.read[f"{stat} {layer}"] = getattr(ctx.attention, stat)(layer)
        if self.needed.encoder_features:
            self.read["encoder_features"] = ctx.need_encoder_features()
        return Selection(keep=ctx.valid & (ctx.valid.cumsum(1) > 1))


def reader(model: Any) -> Reader:
    """One that reads all that the family can tell."""
    adapter = find(model.model, inside=False)
    tower = describe_tower(adapter)
    layers = (0, tower.full_attention[-1])
    return Reader(
        Needs(
            vision_cls=layers if tower.has_cls else (),
            vision_keys=layers[-1:],
            vision_received=layers[-1:],
            encoder_features=True,
        )
    )


def pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if name in ("pixel_values", "image_sizes", "image_grid_thw")}


def flat(features: Any) -> list[torch.Tensor]:
    """The tensors in any nesting of sequences."""
    return [features] if torch.is_tensor(features) else [x for part in features for x in flat(part)]


def shape(features: Any) -> Any:
    return tuple(features.shape) if torch.is_tensor(features) else [type(features), *map(shape, features)]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
@torch.no_grad()
def test_the_memory_returns_what_the_tower_would(name: str) -> None:
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    given = pixels(inputs)
    stock = model.model.get_image_features(**given, return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with remember_vision(model) as memory:
        for _ in range(2):
            found = model.model.get_image_features(**given, return_dict=True)
            for what in ("pooler_output", "deepstack_features"):
                want, have = getattr(stock, what, None), getattr(found, what, None)
                assert (want is None) == (have is None)
                if want is not None:
                    assert shape(have) == shape(want)
                    for x, y in zip(flat(have), flat(want), strict=True):
                        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        assert memory.runs == memory.pictures == (2 if name in TILED else 3)  # of rows with tiles, or pictures
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        assert memory.runs == memory.pictures == (2 if name in TILED else 3)
    assert "get_image_features" not in vars(model.model)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
@torch.no_grad()
def test_taps_of_recipes_to_come_listen_in_the_one_run(name: str) -> None:
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    fresh, again = reader(model), reader(model)
    with compress(model, fresh):
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    recipes = [as_recipe(PLAIN), as_recipe(again), as_recipe(reader(model))]
    with remember_vision(model, recipes) as memory:
        with compress(model, recipes[0], keep=0.5):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        runs = memory.runs
        with compress(model, recipes[1]):
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert memory.runs == runs == memory.pictures
    assert torch.equal(found, expected)
    assert again.read.keys() == fresh.read.keys() >= {"features", "received " + str(again.needed.vision_received[0])}
    for what, value in fresh.read.items():
        torch.testing.assert_close(again.read[what], value, rtol=1e-5, atol=1e-6)  # attention is read in float32


@torch.no_grad()
def test_what_a_picture_is_padded_to_and_batched_with_is_no_part_of_it() -> None:
    model = build("mistral3")
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[32, 16], [16, 24], [24, 32]])
    pictures = torch.zeros(3, 3, 32, 32, dtype=torch.float64)
    for picture, (h, w) in zip(pictures, sizes.tolist(), strict=True):
        picture[:, :h, :w] = torch.randn(3, h, w, generator=g)
    stock = model.model.get_image_features(pictures, sizes, return_dict=True).pooler_output
    with remember_vision(model) as memory:
        for order in ([0, 1, 2], [2, 0], [1], [1, 1, 2]):
            height, width = sizes[order].amax(0).tolist()
            found = model.model.get_image_features(pictures[order, :, :height, :width], sizes[order], return_dict=True)
            for x, at in zip(found.pooler_output, order, strict=True):
                torch.testing.assert_close(x, stock[at], rtol=1e-10, atol=1e-10)
        assert memory.runs == 3


@torch.no_grad()
def test_onevision_knows_which_pictures_are_tiled() -> None:
    model = build("llava_onevision")
    given = pixels(batch("llava_onevision", model, images=[2, 1])) | {"batch_num_images": torch.tensor([2, 1])}
    stock = model.model.get_image_features(**given, return_dict=True).pooler_output
    with remember_vision(model):
        found = model.model.get_image_features(**given, return_dict=True).pooler_output
    assert [len(x) for x in found] == [len(x) for x in stock]
    assert len(stock[0]) < len(stock[2])
    for x, y in zip(found, stock, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llava", "mistral3", "paligemma", *GRIDS[:3]])
@torch.no_grad()
def test_pixel_stages_have_their_smaller_pictures_made_anew(name: str) -> None:
    model = build(name)
    inputs = batch(name, model)
    with compress(model, "resize", keep=0.5) as compression:
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        kept = compression.report.layer_average
    with remember_vision(model, [as_recipe("resize")]) as memory:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        pictures = memory.pictures
        for number in (1, 2):
            with compress(model, "resize", keep=0.5) as compression:
                assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
                assert compression.report.layer_average == kept
            assert memory.pictures == pictures
            assert memory.runs == pictures + 4 * number


@torch.no_grad()
def test_a_full_memory_forgets_what_was_not_asked_for_longest() -> None:
    model = build("llava")
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 1, 3, 32, 32, generator=g, dtype=torch.float64)
    with remember_vision(model) as memory:
        one = sum(x.nbytes for x in flat(model.model.get_image_features(a, return_dict=True).pooler_output))
    with remember_vision(model, capacity=2 * one) as memory:
        runs = []
        for picture in (a, b, a, c, a, b):
            model.model.get_image_features(picture, return_dict=True)
            runs.append(memory.runs)
        assert runs == [1, 2, 2, 3, 3, 4]
        assert memory.pictures == 3


def test_what_a_memory_cannot_serve_is_refused() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    with pytest.raises(ConfigError, match="capacity=0"):
        remember_vision(model, capacity=0)
    with remember_vision(model), pytest.raises(ConfigError, match="has a vision memory already"):
        remember_vision(model)
    with remember_vision(model), pytest.raises(UnsupportedError, match=r"no gradients; call the model within"):
        model(**inputs)
    with remember_vision(model), torch.no_grad(), pytest.raises(UnsupportedError, match="features by name"):
        model.model.get_image_features(**pixels(inputs), return_dict=False)
    assert "get_image_features" not in vars(model.model)
    text, vision = {"model_type": "cohere2", **TEXT}, SIGLIP
    unknown = AyaVisionForConditionalGeneration(AyaVisionConfig(text_config=text, vision_config=vision, **IMAGE_IDS))
    with pytest.raises(UnsupportedError, match="a vision memory cannot serve it, because no way to give"):
        remember_vision(unknown)


@torch.no_grad()
def test_times_are_refused_and_not_made_up() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    refuse_memory(model)
    with remember_vision(model) as memory, compress(model, PLAIN, keep=0.5) as compression:
        assert vision_memory(model) is memory
        with pytest.raises(ConfigError, match="times would lack the vision tower's"):
            refuse_memory(model)
        for known in (False, True):
            model(**inputs)
            assert (memory.tower_seconds() is None) == known
            assert compression.report.seconds["vision"] is None
            assert REMEMBERED in compression.report.warnings
    with compress(model, PLAIN, keep=0.5) as compression:
        model(**inputs)
        assert compression.report.seconds["vision"]
        assert REMEMBERED not in compression.report.warnings
    assert vision_memory(model) is None
