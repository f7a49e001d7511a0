"""The overlay: a token's rectangle lies where the picture has the patch that the token comes from."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

import visiontok
from visiontok import overlay as o
from visiontok.conformance import zoo
from visiontok.errors import UnsupportedError

SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "resize and crop": ("llava", CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)),
    "resize and crop less": ("llava", CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE)),
    "crop more than there is": ("llava", CLIPImageProcessor(size={"shortest_edge": 26}, crop_size=SQUARE)),
    "resize to a square": ("llava", CLIPImageProcessor(size=SQUARE, crop_size=SQUARE, do_center_crop=False)),
    "pad to a square": ("llava", LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE)),
    "native resolution": (
        "qwen2_5_vl",
        Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
    ),
}


@functools.cache
def local(name: str) -> Any:
    """A model whose tower attention says nothing, so that a feature depends on its own patch only."""
    model = copy.deepcopy(zoo.build(name))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("self_attn.out_proj.weight", "attn.proj.weight")):
                weight.zero_()
    return model


def see(name: str, processor: Any, picture: Image.Image) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(N, D) visual features of a picture, and the model's inputs for a prompt with it."""
    model = local(name)
    pixels = dict(processor(images=[picture], return_tensors="pt"))
    pixels["pixel_values"] = pixels["pixel_values"].double()
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
    ids = torch.tensor([[1, 5, 6, *[zoo.IMAGE] * len(features), 7, 8]])
    if name in zoo.QWEN:
        pixels["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
    return features, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def compressed(name: str, inputs: dict[str, torch.Tensor], method: str = "grid", **options: Any) -> Any:
    """The ledger of a compressed forward."""
    model = zoo.build(name)
    with torch.no_grad(), visiontok.compress(model, method, **options) as compression:
        model(**inputs)
        return compression.ledger


def overlap(cells: torch.Tensor, box: tuple[float, ...]) -> torch.Tensor:
    """(n,) area that each cell shares with a box."""
    low, high = torch.tensor(box[:2]), torch.tensor(box[2:])
    return (torch.minimum(cells[:, 2:], high) - torch.maximum(cells[:, :2], low)).clamp(min=0).prod(1)


@pytest.mark.parametrize("size", [(96, 96), (150, 90), (80, 128)])
@pytest.mark.parametrize("case", PROCESSORS)
def test_the_rectangle_is_the_patch(case: str, size: tuple[int, int]) -> None:
    name, processor = PROCESSORS[case]
    picture = Image.new("RGB", size, (90, 110, 130))
    before, inputs = see(name, processor, picture)
    ledger = compressed(name, inputs)
    frame = o.frame_of(zoo.config(name), processor, size)
    assert frame is not None
    cells = o.boxes(ledger.grid()[0][ledger.visual[0]][:, 1:], frame)
    dice, tried = random.Random(f"{case} {size}"), 0
    while tried < 8:
        x, y = dice.uniform(0, size[0]), dice.uniform(0, size[1])
        cell = float((cells[0, 2:] - cells[0, :2]).min())
        spot, reach = ((x - r, y - r, x + r, y + r) for r in (0.15 * cell, 0.42 * cell))
        areas = overlap(cells, reach)  # resizing spreads the spot by two of the model's pixels
        if float(areas.max()) < 0.99 * (0.84 * cell) ** 2 or min(spot) < 0 or spot[2] > size[0] or spot[3] > size[1]:
            continue  # outside of the crop, or near a border between cells
        painted = picture.copy()
        ImageDraw.Draw(painted).rectangle(tuple(map(round, spot)), fill=(255, 0, 0))
        after, _ = see(name, processor, painted)
        assert int((after - before).norm(dim=1).argmax()) == int(areas.argmax()), spot
        tried += 1


def test_the_embedded_model_sees_what_is_painted() -> None:
    model, processor = visiontok.demo.load()
    picture = Image.new("RGB", (288, 144), (90, 110, 130))
    frame = o.frame_of(model.config, processor.image_processor, picture.size)
    assert frame == (0, 0, 288, 144)
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(12), torch.arange(12))
    cells = o.boxes(grid, frame)

    def features(image: Image.Image) -> torch.Tensor:
        with torch.no_grad():
            pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            found: torch.Tensor = model.model.get_image_features(pixels).pooler_output[0]
        return found

    before = features(picture)
    for token in (0, 17, 70, 143):
        painted = picture.copy()
        ImageDraw.Draw(painted).rectangle((cells[token] + torch.tensor([4, 2, -5, -3])).tolist(), fill=(255, 0, 0))
        assert int((features(painted) - before).norm(dim=1).argmax()) == token


@pytest.mark.parametrize(
    ("case", "size", "frame"),
    [
        ("resize and crop", (150, 90), (28.3, 0.0, 90.6, 90.0)),
        ("resize and crop less", (80, 80), (8.0, 8.0, 64.0, 64.0)),
        ("crop more than there is", (52, 52), (-6.0, -6.0, 64.0, 64.0)),
        ("resize to a square", (150, 90), (0.0, 0.0, 150.0, 90.0)),
        ("pad to a square", (150, 90), (0.0, -30.0, 150.0, 150.0)),
        ("native resolution", (150, 90), (0.0, 0.0, 150.0, 90.0)),
    ],
)
def test_frames(case: str, size: tuple[int, int], frame: tuple[float, ...]) -> None:
    name, processor = PROCESSORS[case]
    assert o.frame_of(zoo.config(name), processor, size) == pytest.approx(frame, abs=1)


def test_kept_patches_are_bright_and_framed_and_the_others_dark() -> None:
    picture = Image.new("RGB", (64, 32), (0, 200, 0))
    place = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(2), torch.arange(4))
    cells, kept = o.boxes(place, (0, 0, 64, 32)), torch.tensor([1, 0, 0, 1, 0, 1, 0, 0]).bool()
    drawn = o.draw(picture, cells, kept, "a caption")
    factor = o.enlargement(picture.size)
    assert drawn.width == 64 * factor
    assert drawn.height > 32 * factor
    for (left, top, right, bottom), bright in zip((cells * factor).int().tolist(), kept, strict=True):
        middle = drawn.getpixel(((left + right) // 2, (top + bottom) // 2))
        assert (middle == (0, 200, 0)) == bool(bright)
        assert (drawn.getpixel((right - 1, bottom - 1)) == o.KEPT_FRAME) == bool(bright)


@pytest.mark.parametrize(
    ("method", "keep", "layer", "kept"), [("grid", 5, 3, 5), ("fastv", 5, 3, 5), ("vtw", None, 1, 16)]
)
def test_the_last_layer_that_holds_visual_tokens(method: str, keep: int | None, layer: int, kept: int) -> None:
    _, processor = PROCESSORS["resize and crop"]
    picture = Image.new("RGB", (60, 60))
    _, inputs = see("llava", processor, picture)
    ledger = compressed("llava", inputs, method, keep=keep)
    drawn = o.overlay(picture, ledger, zoo.config("llava"), processor, inputs["pixel_values"], f"{method} x")
    assert (drawn.layer, drawn.kept, drawn.cells) == (layer, kept, 16)
    assert drawn.caption.startswith(f"{method} x: {kept} of 16 visual tokens kept in decoder layer {layer}")
    assert ("none from layer 2 on" in drawn.caption) == (method == "vtw")


@pytest.mark.parametrize(("name", "tokens", "cells"), [("internvl", 16, 16), ("idefics3", 32, 16)])
def test_other_families_show_the_first_crop_as_the_model_saw_it(name: str, tokens: int, cells: int) -> None:
    inputs = zoo.batch(name, zoo.build(name), rows=1, pad=0, images=2 if name == "idefics3" else 1)
    ledger = compressed(name, inputs, keep=4)
    processor = CLIPImageProcessor()
    drawn = o.overlay(Image.new("RGB", (60, 60)), ledger, zoo.config(name), processor, inputs["pixel_values"], "t")
    assert "the first crop as the model saw it" in drawn.caption
    assert ("are not shown" in drawn.caption) == (cells < tokens)
    assert (drawn.cells, drawn.kept, drawn.image.width) == (cells, 4, 32 * o.enlargement((32, 32)))


def test_the_normalisation_is_undone() -> None:
    picture = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    processor = CLIPImageProcessor(size=SQUARE, crop_size=SQUARE)
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert o.as_seen(pixels, processor, "x").tobytes() == picture.tobytes()
    with pytest.raises(UnsupportedError, match="packs its pixels"):
        o.as_seen(torch.zeros(64, 96), processor, "x")


def test_unknown_places_are_an_error() -> None:
    inputs = zoo.batch("llava", zoo.build("llava"), rows=1, pad=0, images=1)
    ledger = compressed("llava", inputs, "random", keep=4)
    ledger.units.grid.fill_(-1)
    with pytest.raises(UnsupportedError, match="does not say where its tokens lie"):
        o.overlay(Image.new("RGB", (9, 9)), ledger, zoo.config("llava"), None, inputs["pixel_values"], "t")
