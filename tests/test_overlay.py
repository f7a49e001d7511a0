"""The overlay: a token's rectangle lies where the picture has the patch that the token comes from."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import test_mllama
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from visiontok.adapters.base import Adapter, find

import visiontok
from visiontok import overlay as o
from visiontok.conformance import zoo
from visiontok.errors import UnsupportedError
from visiontok.named import load_model
from visiontok.places import Crop, find_places, sheets

SIDE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 32}
ANYRES = {"size": EDGE, "crop_size": SIDE, "image_grid_pinpoints": zoo.PINPOINTS}
NATIVE = T.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
TILES = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
CASES: dict[str, tuple[str, Any]] = {
    "resize and crop": ("llava", T.CLIPImageProcessor(size=EDGE, crop_size=SIDE)),
    "resize and crop less": ("llava", T.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE)),
    "crop more than there is": ("llava", T.CLIPImageProcessor(size={"shortest_edge": 26}, crop_size=SIDE)),
    "resize to a square": ("vipllava", T.CLIPImageProcessor(size=SIDE, crop_size=SIDE, do_center_crop=False)),
    "pad to a square": ("llava", T.LlavaImageProcessor(do_pad=True, size=EDGE, crop_size=SIDE)),
    "thumbnail and tiles": ("llava_next", T.LlavaNextImageProcessor(**ANYRES)),
    "thumbnail and tiles, not cropped": (
        "llava_onevision", T.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=zoo.PINPOINTS)
    ),
    "tiles and thumbnail": ("internvl", T.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=6)),
    "one tile": ("internvl", T.GotOcr2ImageProcessor(size=SIDE)),
    "tiles apart": ("idefics3", T.Idefics3ImageProcessor(**TILES)),
    "tiles apart again": ("smolvlm", T.SmolVLMImageProcessor(**TILES)),
    "rows of any length": (
        "mistral3", T.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    ),
    "stretched": ("paligemma", T.SiglipImageProcessor(size=SIDE)),
    "pooled": ("gemma3", T.Gemma3ImageProcessor(size=SIDE)),
    "pan and scan": (
        "gemma3", T.Gemma3ImageProcessor(
            size=SIDE, do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=3,
            pan_and_scan_min_ratio_to_activate=1.2,
        )
    ),
    "tiles on a canvas": ("mllama", T.MllamaImageProcessor(size=SIDE, max_image_tiles=4)),
    **{name: (name, NATIVE) for name in (*zoo.QWEN[:-1], *zoo.HYBRIDS)},
    "glm4v": (
        "glm4v", T.Glm4vImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 64 * 64},
        )
    ),
}  # fmt: skip


def build(name: str) -> Any:
    return test_mllama.build() if name == "mllama" else zoo.build(name)


@functools.cache
def local(name: str) -> Any:
    """A model whose tower attention says nothing, so that a feature depends on its own patches only."""
    model = copy.deepcopy(build(name))
    silent = 0
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if re.search(r"(attn|attention)\.(out_proj|proj|o_proj|projection_layer)\.(weight|bias)$", key) and (
                "language_model" not in key and "text_model" not in key
            ):
                weight.zero_()
                silent += 1
    assert silent
    return model


def see(name: str, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Inputs of a prompt with pictures, without their text."""
    seen = dict(processor(images=list(pictures), return_tensors="pt"))
    if name == "mllama":  # the tiny model knows three of the eight ratios; they say nothing of places
        seen["aspect_ratio_ids"] = seen["aspect_ratio_ids"].clamp(max=1)
    unused = ("num_tiles", "num_crops", "num_patches", "pixel_attention_mask")
    return {key: value for key, value in seen.items() if key not in unused}


def features(name: str, pixels: dict[str, Any]) -> torch.Tensor:
    """(N, D) of all visual tokens, in the order of their placeholders."""
    model = local(name)
    pixels = pixels | {"pixel_values": pixels["pixel_values"].double()}
    with torch.no_grad():
        if name == "mllama":
            out = model.model.multi_modal_projector(model.model.vision_model(**pixels).last_hidden_state)
            shown = pixels["aspect_ratio_mask"].bool().flatten()
            return out.reshape(len(shown), -1, out.shape[-1])[shown].flatten(0, 1)
        found = model.model.get_image_features(**pixels).pooler_output
    return torch.cat([item.reshape(-1, item.shape[-1]) for item in found])


def ledger_of(name: str, processor: Any, pictures: Sequence[Image.Image], method: str = "grid", **options: Any) -> Any:
    """The ledger of a compressed prompt that shows pictures, with a word between them."""
    model, pixels = build(name), see(name, processor, pictures)
    alone = [len(features(name, see(name, processor, [picture]))) for picture in pictures]
    runs = [[zoo.IMAGE] * (1 if name == "mllama" else n) for n in alone]
    ids = torch.tensor([[1, 5, *(i for run in runs for i in (6, *run)), 7, 8]])
    inputs = pixels | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    if name in zoo.GRIDS:
        inputs["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == zoo.IMAGE).long()
    if name == "mllama":
        shown = pixels["aspect_ratio_mask"]
        inputs["cross_attention_mask"] = shown[:, None].expand(-1, ids.shape[1], -1, -1).clone()
    with torch.no_grad(), visiontok.compress(model, method, **options) as compression:
        if name in zoo.HYBRIDS:
            model.generate(**inputs, max_new_tokens=1)
        else:
            model(**inputs)
        return compression.ledger


def crops_of(name: str, processor: Any, pictures: Sequence[Image.Image], ledger: Any) -> list[Crop]:
    adapter = find(build(name).model, inside=False)
    return find_places(adapter, ledger.units, pictures, lambda like: see(name, processor, like))


def overlap(cells: torch.Tensor, box: tuple[float, ...]) -> torch.Tensor:
    """(n,) area that each cell shares with a box."""
    low, high = torch.tensor(box[:2]), torch.tensor(box[2:])
    return (torch.minimum(cells[:, 2:], high) - torch.maximum(cells[:, :2], low)).clamp(min=0).prod(1)


def paint_and_look(
    name: str, processor: Any, pictures: Sequence[Image.Image], trials: int, dice: random.Random
) -> None:
    """Paint spots inside single cells of every sheet: of its tokens the marked one must change most."""
    pixels = see(name, processor, pictures)
    before, ledger = features(name, pixels), ledger_of(name, processor, pictures)
    crops, units = crops_of(name, processor, pictures, ledger), ledger.units
    starts = torch.tensor(units.sizes).cumsum(0) - torch.tensor(units.sizes)
    for k, picture in enumerate(pictures):
        size = picture.size
        for sheet in sheets([crop for crop in crops if crop.picture == k]):
            cells = torch.cat([crop.boxes for crop in sheet])
            tokens = torch.cat([crop.tokens + starts[crop.unit] for crop in sheet])
            sides = (cells[:, 2:] - cells[:, :2]).amin(0)
            tried = failed = 0
            while tried < trials:
                failed += 1
                assert failed < 4000, "no spot lies inside a single cell"
                x, y = dice.uniform(0, size[0]), dice.uniform(0, size[1])
                (w, h) = sides.tolist()
                spot, reach = ((x - r * w, y - r * h, x + r * w, y + r * h) for r in (0.2, 0.42))
                areas = overlap(cells, reach)  # resizing spreads the spot by two of the model's pixels
                if (
                    float(areas.max()) < 0.99 * 0.84**2 * w * h
                    or min(spot) < 0
                    or spot[2] > size[0]
                    or spot[3] > size[1]
                ):
                    continue  # outside of the crop, or near a border between cells
                painted = picture.copy()
                ImageDraw.Draw(painted).rectangle(tuple(map(round, spot)), fill=(255, 0, 0))
                shown = [painted if i == k else other for i, other in enumerate(pictures)]
                change = (features(name, see(name, processor, shown)) - before).norm(dim=1)[tokens]
                assert int(change.argmax()) == int(areas.argmax()), (k, spot, cells[change.argmax()])
                tried += 1


def plain(*size: int) -> Image.Image:
    return Image.new("RGB", size, (90, 110, 130))


@pytest.mark.parametrize("size", [(150, 90), (80, 128)])
@pytest.mark.parametrize("case", CASES)
def test_the_rectangle_is_the_patch(case: str, size: tuple[int, int]) -> None:
    paint_and_look(*CASES[case], [plain(*size)], 6, random.Random(f"{case} {size}"))


@pytest.mark.parametrize(
    "case",
    [
        "pad to a square",
        "thumbnail and tiles",
        "tiles and thumbnail",
        "tiles apart",
        "rows of any length",
        "qwen2_5_vl",
    ],
)
def test_several_pictures(case: str) -> None:
    paint_and_look(*CASES[case], [plain(96, 60), plain(70, 120), plain(88, 88)], 3, random.Random(case))


def test_the_embedded_model_sees_what_is_painted() -> None:
    loaded, picture = load_model("tiny", torch.device("cpu")), plain(288, 144)
    model, processor = loaded.model, loaded.processor
    with torch.no_grad(), visiontok.compress(model, "grid", keep=10) as compression:
        model(**loaded.inputs(([picture], "what colour is the star?")))
        units = compression.ledger.units
    [crop] = find_places(find(model.model), units, [picture], lambda like: loaded.processed((like, "?")))
    assert crop.frame == pytest.approx((0, 0, 288, 144), abs=0.5)
    cells = crop.boxes

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
    ("case", "size", "frames"),
    [
        ("resize and crop", (150, 90), [[(30, 0, 90, 90)]]),
        ("resize and crop less", (80, 80), [[(8, 8, 64, 64)]]),
        ("crop more than there is", (52, 52), [[(-6, -6, 64, 64)]]),
        ("resize to a square", (150, 90), [[(0, 0, 150, 90)]]),
        ("pad to a square", (150, 90), [[(0, -30, 150, 150)]]),
        ("qwen2_5_vl", (150, 90), [[(0, 0, 150, 90)]]),
        ("thumbnail and tiles", (128, 128), [[(0, 0, 128, 128)], [(0, 0, 128, 128)]]),
        (
            "tiles and thumbnail",
            (120, 80),
            [[(x, y, 40, 40) for y in (0, 40) for x in (0, 40, 80)], [(0, 0, 120, 80)]],
        ),
        ("tiles on a canvas", (64, 40), [[(0, 0, 32, 32), (32, 0, 32, 32), (0, 32, 32, 32), (32, 32, 32, 32)]]),
    ],
)
def test_frames(case: str, size: tuple[int, int], frames: list[list[tuple[int, ...]]]) -> None:
    name, processor = CASES[case]
    picture = plain(*size)
    found = sheets(crops_of(name, processor, [picture], ledger_of(name, processor, [picture])))
    assert [len(sheet) for sheet in found] == [len(sheet) for sheet in frames]
    for sheet, expected in zip(found, frames, strict=True):
        for crop, frame in zip(sheet, expected, strict=True):
            assert crop.frame == pytest.approx(frame, abs=0.02 * max(size))


@given(
    size=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    case=st.sampled_from(["resize to a square", "tiles and thumbnail", "stretched", "qwen2_5_vl", "tiles apart"]),
)
@settings(max_examples=12, deadline=None)
def test_the_tokens_of_a_sheet_cover_the_picture_once(case: str, size: tuple[int, int]) -> None:
    name, processor = CASES[case]
    picture = plain(*size)
    for sheet in sheets(crops_of(name, processor, [picture], ledger_of(name, processor, [picture]))):
        cells = torch.cat([crop.boxes for crop in sheet])
        assert float((cells[:, 2:] - cells[:, :2]).prod(1).sum()) == pytest.approx(size[0] * size[1], rel=0.05)
        assert float(overlap(cells, (0, 0, *size)).sum()) == pytest.approx(size[0] * size[1], rel=0.05)


def one_crop() -> Crop:
    """Two rows of four square cells."""
    place = torch.cartesian_prod(torch.arange(2), torch.arange(4)).flip(1).float() * 16
    return Crop(0, 0, torch.arange(8), torch.cat([place, place + 16], 1))


def test_kept_patches_are_bright_and_framed_and_the_others_dark() -> None:
    picture, kept = Image.new("RGB", (64, 32), (0, 200, 0)), torch.tensor([[1, 0, 0, 1, 0, 1, 0, 0]]).bool()
    drawn = o.draw_kept(picture, [one_crop()], kept)
    assert drawn.image.size == (64 * 12, 32 * 12)
    for (left, top, right, bottom), bright in zip(drawn.cells.tolist(), kept[0], strict=True):
        middle = drawn.image.getpixel(((left + right) // 2, (top + bottom) // 2))
        assert (middle == (0, 200, 0)) == bool(bright)
        assert (drawn.image.getpixel((right - 1, bottom - 1)) == o.KEPT_FRAME) == bool(bright)
    assert drawn.token_at(12 * 20, 12 * 20) == (0, 5)
    assert drawn.token_at(64 * 12, 0) is None


def test_heat_goes_by_rank_and_leaves_tokens_without_a_score_grey() -> None:
    picture = Image.new("RGB", (64, 32), (100, 100, 100))
    scores = torch.tensor([[1e-9, 1.0, 3.0, 1e9, torch.nan, 2.0, 5.0, 4.0]])
    drawn = o.draw_heat(picture, [one_crop()], scores)
    seen = [drawn.image.getpixel((left + 5, top + 5)) for left, top, _, _ in drawn.cells.tolist()]
    assert seen[4] == (100, 100, 100)
    order = scores[0, [0, 1, 2, 3, 5, 6, 7]].argsort()
    greens = torch.tensor([pixel[1] for i, pixel in enumerate(seen) if i != 4])[order]
    assert bool((greens.diff() > 0).all())


def test_what_is_padded_is_drawn_and_each_sheet_apart() -> None:
    name, processor = CASES["pad to a square"]
    picture = plain(60, 30)
    ledger = ledger_of(name, processor, [picture], keep=5)
    drawn = o.draw_kept(picture, crops_of(name, processor, [picture], ledger), o.living(ledger, 3))
    assert drawn.image.width == pytest.approx(drawn.image.height, rel=0.05)
    assert len(drawn.cells) == 16
    name, processor = CASES["tiles and thumbnail"]
    ledger = ledger_of(name, processor, [plain(96, 64)], keep=5)
    drawn = o.draw_kept(plain(96, 64), crops_of(name, processor, [plain(96, 64)], ledger), o.living(ledger, 3))
    assert drawn.image.width > 2 * 96 * o.scale_of((96, 64))
    assert len(drawn.cells) == 7 * 16


def drawn_by(name: str, processor: Any, picture: Image.Image, method: str, **options: Any) -> o.Overlay:
    ledger = ledger_of(name, processor, [picture], method, **options)
    adapter = find(build(name).model, inside=False)
    return o.overlay([picture], ledger, adapter, lambda like: see(name, processor, like), f"{method} x")


@pytest.mark.parametrize(
    ("method", "keep", "layer", "kept"), [("grid", 5, 3, 5), ("fastv", 5, 3, 5), ("vtw", None, 1, 16)]
)
def test_the_last_layer_that_holds_visual_tokens(method: str, keep: int | None, layer: int, kept: int) -> None:
    drawn = drawn_by(*CASES["resize and crop"], plain(60, 60), method, keep=keep)
    assert (drawn.layer, drawn.kept, drawn.cells) == (layer, kept, 16)
    assert drawn.caption.startswith(f"{method} x: {kept} of 16 visual tokens kept in decoder layer {layer}")
    assert ("none from layer 2 on" in drawn.caption) == (method == "vtw")


@pytest.mark.parametrize("case", CASES)
def test_as_many_patches_are_bright_as_are_kept(case: str) -> None:
    drawn = drawn_by(*CASES[case], plain(90, 60), "divprune", keep=0.4)
    kept, tokens = map(int, re.findall(r"(\d+) of (\d+) visual", drawn.caption)[0])
    if "none of its patches" not in drawn.caption:
        assert (drawn.kept, drawn.cells) == (kept, tokens)
    else:  # newlines of LLaVA-NeXT, CLS tokens of Mllama
        assert case.startswith(("thumbnail", "tiles on a canvas"))
        assert drawn.kept <= kept
        assert f"{tokens - drawn.cells} tokens that are none of its patches" in drawn.caption


def entering(case: str, shown: Image.Image, method: str, keep: float) -> tuple[torch.Tensor, Any]:
    """(K, D) what enters the language model of a picture's kept tokens, and the ledger."""
    name, processor = CASES[case]
    model, pixels = local(name), see(name, processor, [shown])
    ids = torch.tensor([[1, 5, *[zoo.IMAGE] * len(features(name, pixels)), 7]])
    inputs = pixels | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    if name in zoo.QWEN:
        inputs["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad(), visiontok.compress(model, method, keep=keep) as compression:
        model(**inputs)
        ledger = compression.ledger
    hook.remove()
    return seen[0][0, 2:-1], ledger


def painted_at(crop: Crop, token: int, picture: Image.Image) -> Image.Image:
    painted = picture.copy()
    ImageDraw.Draw(painted).rectangle(crop.boxes[token].round().int().tolist(), fill=(255, 0, 0))
    return painted


def test_a_smaller_picture_is_marked_where_its_patches_stand() -> None:
    """A pixel stage halves both sides: of every 2 × 2 tokens one stays, and what is painted there changes it most."""
    picture = plain(64, 64)
    before, ledger = entering("qwen2_5_vl", picture, "resize", 0.25)
    kept = torch.nonzero(o.living(ledger, 0)[0]).flatten()
    [crop] = crops_of(*CASES["qwen2_5_vl"], [picture], ledger)
    assert len(kept) == len(crop.tokens) // 4
    for k, token in enumerate(kept.tolist()):
        after, _ = entering("qwen2_5_vl", painted_at(crop, token, picture), "resize", 0.25)
        assert int((after - before).norm(dim=1).argmax()) == k


@pytest.mark.parametrize("case", ["resize and crop", "qwen2_5_vl"])
def test_what_is_painted_on_a_merged_patch_changes_the_one_that_took_it_over(case: str) -> None:
    picture = plain(64, 64)
    before, ledger = entering(case, picture, "m3_pool", 0.25)
    [choice], [crop] = ledger.choices, crops_of(*CASES[case], [picture], ledger)
    kept = torch.nonzero(choice.kept[0]).flatten().tolist()
    for token in range(len(crop.tokens)):
        after, _ = entering(case, painted_at(crop, token, picture), "m3_pool", 0.25)
        assert kept[int((after - before).norm(dim=1).argmax())] == int(choice.into[0, token])


@pytest.mark.parametrize(
    ("case", "drop", "error"),
    [
        ("resize and crop", "grids", "does not say where its tokens lie"),
        ("resize and crop", "group", "is not known"),
    ],
)
def test_unknown_places_are_an_error(case: str, drop: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, processor = CASES[case]
    ledger = ledger_of(name, processor, [plain(60, 60)], "random", keep=4)
    adapter = type(find(build(name).model))
    monkeypatch.setattr(adapter, drop, getattr(Adapter, drop))
    if drop == "grids":
        ledger.units.grid.fill_(-1)
    with pytest.raises(UnsupportedError, match=error):
        crops_of(name, processor, [plain(60, 60)], ledger)
