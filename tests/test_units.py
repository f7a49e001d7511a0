"""Some units of a picture in the tower instead of all.

The oracle is the segment: in the stock tower, called with stock arguments but the order of its patches, the dropped
units get attention segments of their own, so the kept ones see exactly each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import vision_utils
from visiontok.adapters.base import find

import visiontok
from visiontok import Card, Contract
from visiontok._window import minor
from visiontok.conformance.zoo import BANNED, GRIDS, IMAGE, batch, build
from visiontok.engine.pixels import Smaller
from visiontok.engine.vision import Encoded
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Kept, Picture, UnitMethod

pytestmark = pytest.mark.engine

CROPS = ("llava", "vipllava", "paligemma")
MERGE = 2


@dataclass(frozen=True)
class Drawn(UnitMethod):
    """Each unit with a chance of its own picture; the first one always."""

    chance: float = 0.5
    card: ClassVar[Card] = Card(
        name="drawn",
        title="-",
        paper="-",
        venue="-",
        stage="pixel",
        needs="-",
        gives="units",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def units(self, picture: Picture) -> Kept:
        g = torch.Generator().manual_seed(int(picture.pixels.double().abs().sum()))
        keep = torch.rand(picture.shape, generator=g) < self.chance
        keep[0, 0, 0] = True
        return Kept(keep=keep)


def video(name: str, frames: int = 3) -> tuple[Any, dict[str, Any]]:
    model = build(name)
    g = torch.Generator().manual_seed(3)
    return model, {
        "pixel_values_videos": torch.randn(frames * 64 + 2 * 32, 96, generator=g).double(),
        "video_grid_thw": torch.tensor([[frames, 8, 8], [2, 4, 8]]),
    }


def images(name: str) -> tuple[Any, dict[str, Any]]:
    model = build(name)
    inputs = batch(name, model)
    return model, {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}


def encoded(model: Any, given: dict[str, Any], kept: Sequence[torch.Tensor] | None, whole: Any = None) -> Any:
    """What get_image_features or get_video_features makes of the kept units of each item, at their places."""
    modality = "video" if "video_grid_thw" in given else "image"
    method = getattr(type(model.model), f"get_{modality}_features")
    if kept is None:
        return method(model.model, **given, return_dict=True)
    record: Any = Encoded(modality, dict(given))
    parts = find(model.model, inside=False).parts(record, kept)
    smaller = Smaller.units(record, parts, list(kept), [None] * len(kept))
    return smaller.encode(method, model.model, dict(given, return_dict=True))


def levels(output: Any) -> list[list[torch.Tensor]]:
    """Per level the features of each item; up to transformers 5.17 DeepStack has one tensor for all items."""
    first, deep = list(output.pooler_output), getattr(output, "deepstack_features", None) or ()
    sizes = [len(item) for item in first]
    return [first, *(list(x.split(sizes) if torch.is_tensor(x) else x) for x in deep)]


def draw(model: Any, given: dict[str, Any], seed: int = 5) -> list[torch.Tensor]:
    """Of each item a random half; a frame of which nothing is left among them where there are several."""
    record: Any = Encoded("video" if "video_grid_thw" in given else "image", given)
    g = torch.Generator().manual_seed(seed)
    masks = []
    for t, rows, columns in find(model.model, inside=False).shapes(record):
        keep = torch.rand(t, rows, columns, generator=g) < 0.5
        keep[0, -1, 0] = True
        keep[1:2] = False
        masks.append(keep.flatten())
    return masks


CASES = [*((name, images) for name in (*CROPS, *GRIDS)), *((n, video) for n in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))]
IDS = [f"{name} {made.__name__}" for name, made in CASES]


@pytest.mark.parametrize(("name", "made"), [*CASES, ("glm4v", video)], ids=[*IDS, "glm4v video"])
@torch.no_grad()
def test_all_units_are_the_stock_tower_to_the_last_bit(name: str, made: Any) -> None:
    """Also where every unit goes through the route of some."""
    model, given = made(name)
    if (name, made) == ("glm4v", video):  # its pixels must be a multiple of whole frames of one size
        given = {k: v[:192] if k.startswith("pixel") else v[:1] for k, v in given.items()}
    ones = [torch.ones_like(mask) for mask in draw(model, given)]
    for mine, stock in zip(levels(encoded(model, given, ones)), levels(encoded(model, given, None)), strict=True):
        joined = torch.cat(mine)
        assert torch.equal(joined, torch.cat(stock).view_as(joined))


@pytest.mark.parametrize(("name", "made"), CASES, ids=IDS)
@torch.no_grad()
def test_dropped_units_are_never_seen(name: str, made: Any) -> None:
    """What they show makes no difference, and kept units keep what the whole picture told of their place."""
    model, given = made(name)
    kept = draw(model, given)
    first = levels(encoded(model, given, kept))
    [pixels] = [key for key in given if key.startswith("pixel")]
    x = given[pixels].clone()
    if name in CROPS:
        cells = x.unfold(2, 8, 8).unfold(3, 8, 8)  # a view: (B, 3, rows, columns, 8, 8)
        for picture, mask in zip(cells, kept, strict=True):
            picture[:, ~mask.view(picture.shape[1:3])] = 7.0
    else:
        x[~torch.cat(kept).repeat_interleave(MERGE**2)] = torch.nan
    changed = levels(encoded(model, given | {pixels: x}, kept))
    stock = levels(encoded(model, given | {pixels: x.nan_to_num(0.0)}, None))
    for a, b, whole in zip(first, changed, stock, strict=True):
        for mask, one, two, other in zip(kept, a, b, whole, strict=True):
            assert torch.equal(one, two)
            assert one.shape == other.shape
            assert not torch.equal(one[mask], other[mask])


def order_of(kept: torch.Tensor, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of patches in which those kept of each segment are one piece and the others another, and the borders."""
    key = segments * 2 + (~kept).long()
    order = key.argsort(stable=True)
    return order, torch.nn.functional.pad(torch.unique_consecutive(key[order], return_counts=True)[1].cumsum(0), (1, 0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("made", [images, video])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
@torch.no_grad()
def test_kept_units_are_those_of_the_segment_oracle(name: str, made: Any, attention: str) -> None:
    _, given = made(name)
    model = build(name, attention)
    tower = model.model.visual
    kept = draw(model, given)
    thw = next(value for key, value in given.items() if key.endswith("thw"))
    pixels = next(value for key, value in given.items() if key.startswith("pixel"))
    patch = torch.cat(kept).repeat_interleave(MERGE**2)
    frames = torch.repeat_interleave(thw[:, 1] * thw[:, 2], thw[:, 0])
    order, borders = order_of(patch, torch.arange(len(frames)).repeat_interleave(frames))
    told = {"position_ids": vision_utils.get_vision_position_ids(thw, MERGE)[order], "cu_seqlens": borders.int()}
    if hasattr(tower, "num_grid_per_side"):
        found = vision_utils.get_vision_interpolation_indices_and_weights(
            thw, num_grid_per_side=8, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
        )
        told |= dict(zip(("interp_indices", "interp_weights"), (x[order] for x in found), strict=True))
    stock = tower(pixels[order], grid_thw=thw, return_dict=True, **told)
    units = order[:: MERGE**2] // MERGE**2
    for mine, theirs in zip(
        levels(encoded(model, given, kept)),
        [stock.pooler_output, *(getattr(stock, "deepstack_features", None) or ())],
        strict=True,
    ):
        oracle = torch.empty_like(theirs).index_copy_(0, units, theirs)
        assert torch.equal(torch.cat(mine)[torch.cat(kept)], oracle[torch.cat(kept)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("made", [images, video])
@torch.no_grad()
def test_windows_of_kept_units_are_those_of_the_segment_oracle(made: Any, attention: str) -> None:
    """Qwen2.5-VL: windows that lose all, or some, or none of their units; the oracle permutes windows, not units."""
    _, given = made("qwen2_5_vl")
    model = build("qwen2_5_vl", attention)
    tower = model.model.visual
    kept = draw(model, given)
    thw = next(value for key, value in given.items() if key.endswith("thw"))
    pixels = next(value for key, value in given.items() if key.startswith("pixel"))
    unit = torch.cat(kept)
    index, windows = vision_utils.get_vision_window_index(thw, spatial_merge_size=2, window_size=16, patch_size=4)
    # Units of each window, kept ones first; the full attention of the last layer is told apart by a mask of its own.
    window = torch.repeat_interleave(torch.arange(len(windows) - 1), windows.diff() // 4)
    order, cu_window = order_of(unit[index], window)
    frames = torch.repeat_interleave(thw[:, 1] * thw[:, 2] // 4, thw[:, 0])
    frame = torch.arange(len(frames)).repeat_interleave(frames)
    pieces: list[torch.Tensor] = []

    def masked(module: Any, args: Any, kwargs: Any) -> Any:
        """Full attention of one frame's kept units, in the order of the windows, and of all others together."""
        x, cosines = args[0], kwargs["position_embeddings"]
        at = index[order]
        out = torch.empty_like(x)
        for group in range(len(frames)):
            for here in (unit[at], ~unit[at]):
                rows = ((frame[at] == group) & here).repeat_interleave(4).nonzero()[:, 0]
                if len(rows):
                    borders = torch.tensor([0, len(rows)], dtype=torch.int32)
                    tables = tuple(t[rows] for t in cosines)
                    out[rows] = forward(x[rows], cu_seqlens=borders, max_seqlen=None, position_embeddings=tables)
        pieces.append(out)
        return out

    block = tower.blocks[2]
    forward = block.forward
    block.forward = lambda *args, **kwargs: masked(block, args, kwargs)
    try:
        stock = tower(
            pixels, grid_thw=thw, return_dict=True, window_index=index[order], cu_window_seqlens=(cu_window * 4).int()
        )
    finally:
        del block.forward
    assert pieces
    [mine] = levels(encoded(model, given, kept))
    torch.testing.assert_close(torch.cat(mine)[unit], stock.pooler_output[unit], rtol=0, atol=1e-12)


# ---- in the engine


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=list(BANNED), **more)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "glm4v", "qwen3_5"])
@torch.no_grad()
def test_the_prompt_is_that_of_the_kept_units(name: str) -> None:
    """Pictures of one row keep different numbers; shorter inputs give the same answers, and report the same."""
    model = build(name)
    inputs = batch(name, model, images=[2, 1])
    given = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    with visiontok.compress(model, Drawn()) as compression:
        expected = generate(model, inputs)
        alive, report = compression.ledger.alive(0), compression.report
        mine = model.model.get_image_features(**given, return_dict=True).pooler_output
    record: Any = Encoded("image", given)
    adapter = find(model.model, inside=False)
    kept = [
        Drawn().units(Picture(pixels=x.float() * s + m, count=99, budgeted=False)).keep.flatten()
        for x in adapter.units(record)
        for m, s in [[torch.tensor(v)[:, None, None] for v in adapter.pixel_statistics]]
    ]
    assert len({int(mask.sum()) for mask in kept}) > 1
    assert torch.equal(alive[inputs["input_ids"] == IMAGE], torch.cat(kept))
    assert [image.kept[0] for image in report.images] == [int(mask.sum()) for mask in kept]
    theirs = levels(encoded(model, given, kept))[0]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    if minor(transformers.__version__) < (5, 18) and name in ("qwen3_vl", "paligemma"):
        return  # which plane 2 refuses there
    short = visiontok.compress_inputs(model, inputs, Drawn())
    assert torch.equal(short.restore(generate(model, short)), expected)
    assert short.report.images == report.images


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
@torch.no_grad()
def test_the_tower_works_less_and_the_report_says_how_much(name: str) -> None:
    model, given = images(name)
    inputs = batch(name, model)

    def flops() -> int:
        attention = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            )
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            model.model.get_image_features(**given)
        return counter.get_total_flops()

    stock = flops()
    with visiontok.compress(model, Drawn()) as compression:
        some = flops()
        model(**inputs)
        costs, seconds = compression.report.account, compression.report.seconds
        kept = sum(image.kept[0] for image in compression.report.images)
    assert costs.vision_stock is not None
    assert costs.vision is not None
    area = 1 if name in CROPS else 4
    assert costs.patches == kept * area < costs.patches_stock
    assert stock == pytest.approx(costs.vision_stock.tower + costs.vision_stock.projector, rel=1e-3)
    assert some == pytest.approx(costs.vision.tower + costs.vision.projector, rel=1e-3)
    assert seconds["pixels"] is not None
    assert seconds["vision"] is not None


@torch.no_grad()
def test_later_stages_share_the_budget() -> None:
    """keep counts the original tokens, so a later stage drops only what the pixels left too many."""
    model = build("qwen3_vl")
    inputs = batch("qwen3_vl", model)
    both = visiontok.recipe("pixel_entropy", keep=0.5) + visiontok.recipe("divprune", keep=0.25)
    with visiontok.compress(model, both) as compression:
        model(**inputs)
        assert [image.kept[0] for image in compression.report.images] == [4, 3, 2, 4]
    with visiontok.compress(model, visiontok.recipe("pixelprune") + visiontok.recipe("divprune"), keep=0.25) as c:
        model(**inputs)
        assert [image.kept[0] for image in c.report.images] == [4, 3, 2, 4]


# ---- what is refused


def test_towers_that_take_whole_pictures() -> None:
    for name in ("internvl", "llava_next", "gemma3", "mistral3", "idefics3"):
        with pytest.raises(UnsupportedError, match=f"{name}: pixelprune needs a vision tower that takes some units"):
            visiontok.compress(build(name), "pixelprune")


def test_features_that_were_made_without_it() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model, rows=1, pad=0, images=1)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE] = model.get_input_embeddings()(torch.tensor(IMAGE))
    with visiontok.compress(model, "pixelprune"), pytest.raises(UnsupportedError, match="pass pixels"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda s: Kept(keep=torch.zeros(s, dtype=torch.bool)), "kept no unit"),
        (lambda s: Kept(keep=torch.ones(s[1:], dtype=torch.bool)), "must return a bool mask"),
        (lambda s: Kept(keep=torch.ones(s)), "must return a bool mask"),
        (
            lambda s: Kept(keep=torch.arange(s[1] * s[2]).view(s) > 0, source=torch.zeros(s, dtype=torch.long)),
            "names a unit that is not kept",
        ),
    ],
)
def test_answers_that_make_no_sense(answer: Any, error: str) -> None:
    @dataclass(frozen=True)
    class Wrong(Drawn):
        def units(self, picture: Picture) -> Kept:
            return answer(picture.shape)

    model = build("qwen2_vl")
    with visiontok.compress(model, Wrong()), pytest.raises(ConfigError, match=f"drawn: .*{error}"):
        model(**batch("qwen2_vl", model))
