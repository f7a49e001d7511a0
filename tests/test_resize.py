"""Pixel stages: the vision tower sees a smaller picture, and its tokens stand where the picture's would.

The oracle is a stock model that is given the smaller picture, made here, in a prompt with as few placeholders, whose
positions are those of the whole prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import visiontok
from visiontok import Budget, Card, Method, Needs, Recipe, run
from visiontok._window import minor
from visiontok.conformance.zoo import BANNED, CLIP, IMAGE, IMAGE_IDS, TEXT, batch, build, prepare
from visiontok.engine.vision import FeatureRecorder
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage
from visiontok.recipes.resize import Resize, resize

pytestmark = pytest.mark.engine

CROPS = ("llava", "llava siglip", "vipllava", "paligemma")
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
PATCH, MERGE = 4, 2  # of the tiny models with grids


# ---- the grid


def test_the_grid_is_the_finest_in_nearly_the_same_proportions() -> None:
    for rows in range(1, 10):
        for columns in range(1, 10):
            for k in range(1, rows * columns):
                down, across = math.sqrt(k * rows / columns), math.sqrt(k * columns / rows)
                allowed = [
                    (h, w)
                    for h in range(1, math.ceil(down - 1e-9) + 1)
                    for w in range(1, math.ceil(across - 1e-9) + 1)
                    if h * w <= k
                ]
                finest = max(min(h / rows, w / columns) for h, w in allowed)
                fine = [(h, w) for h, w in allowed if min(h / rows, w / columns) > finest - 1e-9]
                most = max(h * w for h, w in fine)
                assert resize((rows, columns), k) == max(((h, w) for h, w in fine if h * w == most), key=lambda s: s[1])


@pytest.mark.parametrize(
    ("shape", "k", "expected"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 64, (8, 8)),
        ((12, 12), 15, (3, 4)),  # wider, not higher
        ((12, 10), 12, (4, 3)),  # but not against the picture
        ((2, 6), 9, (2, 4)),
        ((36, 17), 17, (5, 3)),
        ((24, 36), 216, (12, 18)),
        ((2, 50), 5, (1, 5)),
        ((50, 2), 5, (5, 1)),
        ((3, 4), 12, (3, 4)),
        ((3, 4), 99, (3, 4)),
        ((7, 9), 1, (1, 1)),
    ],
)
def test_grids(shape: tuple[int, int], k: int, expected: tuple[int, int]) -> None:
    assert resize(shape, k) == expected


def test_no_token_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="k=0"):
        resize((3, 3), 0)


# ---- the oracle


def tiny(name: str) -> Any:
    if name != "llava siglip":
        return build(name)
    vision = {**CLIP, "model_type": "siglip_vision_model"}
    text = {"model_type": "llama", **TEXT}
    torch.manual_seed(0)
    strategy = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = T.LlavaConfig(text_config=text, vision_config=vision, **strategy, **IMAGE_IDS)
    return prepare(T.AutoModelForImageTextToText.from_config(config))


def pictures(name: str) -> list[torch.Tensor]:
    """Two pictures of a row, (3, H, W); of different sizes where the family allows."""
    g = torch.Generator().manual_seed(7)
    sizes = [(32, 32), (32, 32)] if name in CROPS else [(48, 32), (24, 56)]
    return [torch.randn(3, h, w, generator=g).double() for h, w in sizes]


def made_smaller(picture: torch.Tensor, rows: int, columns: int, unit: int) -> torch.Tensor:
    size = (rows * unit, columns * unit)
    return F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0]


def patchified(picture: torch.Tensor) -> torch.Tensor:
    """(3, H, W) → (patches, 3 · 2 · P · P): blocks of merged patches in raster order, and in them the patches."""
    _, height, width = picture.shape
    unit = PATCH * MERGE
    patches = []
    for top in range(0, height, unit):
        for left in range(0, width, unit):
            for y in range(top, top + unit, PATCH):
                for x in range(left, left + unit, PATCH):
                    patch = picture[:, y : y + PATCH, x : x + PATCH]
                    patches.append(torch.stack([patch, patch], 1).flatten())
    return torch.stack(patches)


def pixels(name: str, shown: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    if name in CROPS:
        return {"pixel_values": torch.stack(shown)}
    grid = [(1, p.shape[1] // PATCH, p.shape[2] // PATCH) for p in shown]
    return {"pixel_values": torch.cat([patchified(p) for p in shown]), "image_grid_thw": torch.tensor(grid)}


def prompt(name: str, counts: list[int]) -> torch.Tensor:
    """(1, N) ids with so many tokens of each picture."""
    start, end = ([104], [105]) if name == "glm4v" else ([102], [103]) if name in GRIDS else ([], [])
    ids = [1, 5]
    for number, n in enumerate(counts):
        ids += [*start, *[IMAGE] * n, *end, 7 + number, 8]
    return torch.tensor([[*ids, 9, 10, 11]])


def typed(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = {"attention_mask": torch.ones_like(ids)}
    if name in GRIDS:
        mask["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "paligemma":
        mask["token_type_ids"] = torch.zeros_like(ids)
    return {"input_ids": ids, **mask}


def features(name: str, model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """(T, D): what stock tower and projector make of pictures, by hand where pictures have one size."""
    base = model.model
    if name in GRIDS:
        return torch.cat(list(base.get_image_features(**given, return_dict=True).pooler_output))
    seen = base.vision_tower(given["pixel_values"], output_hidden_states=True, interpolate_pos_encoding=True)
    states = {
        "llava": lambda: seen.hidden_states[-2][:, 1:],
        "llava siglip": lambda: seen.hidden_states[-1],
        "vipllava": lambda: torch.cat([seen.hidden_states[layer][:, 1:] for layer in (-2, -1)], -1),
        "paligemma": lambda: seen.last_hidden_state,
    }
    return base.multi_modal_projector(states[name]()).flatten(0, 1)


def nearest(n: int, k: int, kept: list[int]) -> bool:
    """Whether ``kept`` of n places are ascending and each as near as can be to the middle of its one of k cells."""
    middles = [(i + 0.5) * n / k for i in range(k)]
    best = [min(abs(place + 0.5 - middle) for place in range(n)) for middle in middles]
    found = [abs(place + 0.5 - middle) for place, middle in zip(kept, middles, strict=True)]
    return sorted(set(kept)) == kept and found == pytest.approx(best)


@pytest.mark.parametrize("keep", [0.25, 5, 0.7])
@pytest.mark.parametrize("name", [*CROPS, *GRIDS])
@torch.no_grad()
def test_a_stock_model_with_the_smaller_picture_in_its_prompt(name: str, keep: float) -> None:
    model, whole = tiny(name), pictures(name)
    unit = 8  # pixels of a token's side, in all of them
    shapes = [(p.shape[1] // unit, p.shape[2] // unit) for p in whole]
    ids = prompt(name, [h * w for h, w in shapes])
    inputs = typed(name, ids) | pixels(name, whole)
    entered: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with visiontok.compress(model, "resize", keep=keep) as compression:
        got = model(**inputs).logits[:, -1]
        alive, grid = compression.ledger.alive(0)[0], compression.ledger.grid()[0]
        report = compression.report
    hook.remove()

    counts = Budget.parse(keep).counts([h * w for h, w in shapes]).tolist()
    small = [resize(shape, count) for shape, count in zip(shapes, counts, strict=True)]
    assert [image.kept for image in report.images] == [(h * w,) * 4 for h, w in small]
    places = grid[alive & (ids[0] == IMAGE)][:, -2:].tolist()
    for (h, w), (rows, columns) in zip(small, shapes, strict=True):
        mine, places = places[: h * w], places[h * w :]
        down, across = sorted({row for row, _ in mine}), sorted({column for _, column in mine})
        assert mine == [[row, column] for row in down for column in across]
        assert nearest(rows, h, down)
        assert nearest(columns, w, across)

    shown = [made_smaller(p, h, w, unit) for p, (h, w) in zip(whole, small, strict=True)]
    given = pixels(name, shown)
    short = prompt(name, [h * w for h, w in small])
    assert torch.equal(short[0], ids[0, alive])
    made = features(name, model, given)
    visual = (short == IMAGE)[0]
    torch.testing.assert_close(entered[-1][0, alive & (ids[0] == IMAGE)], made)

    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    positions = model._prepare_position_ids_for_generation(ids, rest) + int(name == "paligemma")
    stock = {k: v for k, v in typed(name, short).items() if k != "input_ids"} | {"position_ids": positions[..., alive]}
    if name in GRIDS:
        expected = model(input_ids=short, **given, **stock).logits[:, -1]
    else:
        embeds = model.get_input_embeddings()(short.masked_fill(short == IMAGE, 0))
        embeds[0, visual] = made
        expected = model(inputs_embeds=embeds, **stock).logits[:, -1]
    torch.testing.assert_close(got, expected)


# ---- the tower's work


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_5_vl", "qwen3_vl", "mistral3"])
@torch.no_grad()
def test_the_tower_works_less_and_the_report_says_how_much(name: str) -> None:
    model = build(name)
    inputs, base = batch(name, model), model.model
    given = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    tower = base.visual if name in GRIDS else base.vision_tower
    embedding = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    embedded: list[int] = []

    def flops() -> int:
        attention = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            )
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            base.get_image_features(**given)
        return counter.get_total_flops()

    hook = embedding.register_forward_hook(lambda module, args, out: embedded.append(out[:, 0].numel()))
    stock = flops()
    with visiontok.compress(model, "resize", keep=0.25) as compression:
        small = flops()
        hook.remove()
        model(**inputs)
        costs, text = compression.report.account, str(compression.report)
    assert embedded == [costs.patches_stock, costs.patches]
    assert embedded[1] <= embedded[0] / 4
    assert costs.vision_stock is not None
    assert costs.vision is not None
    # Pixtral's rotary table, up to transformers 5.17, is a matrix product that costs do not count.
    assert stock == pytest.approx(costs.vision_stock.tower + costs.vision_stock.projector, rel=1e-3)
    assert small == pytest.approx(costs.vision.tower + costs.vision.projector, rel=1e-3)
    assert f"({embedded[0]} -> {embedded[1]} patches)" in text


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
def test_the_command_line_says_what_the_tower_saves(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = run.run_job(model=model, method="resize", keep="0.25", max_new_tokens=3, repeats=1)
    data = result.to_dict()
    tokens = data["tokens_in"]
    kept, share = {144: (36, 1), 81: (20, 4)}[tokens]
    assert data["compressed"]["visual_tokens"] == [kept] * 4
    assert (data["stock"]["tower_patches"], data["compressed"]["tower_patches"]) == (tokens * share, kept * share)
    assert data["compressed"]["flops"]["vision"] * 3.5 < data["stock"]["flops"]["vision"]
    assert any("smaller pictures" in note for note in result.notes)
    result.render(Console(width=200))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("patches in the vision tower")]
    assert line.split()[-2:] == [str(data[side]["tower_patches"]) for side in ("stock", "compressed")]


# ---- in the engine


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=list(BANNED), **more)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma"])
def test_shorter_inputs_are_the_same(name: str) -> None:
    model = build(name)
    inputs = batch(name, model, images=[2, 0])
    with visiontok.compress(model, "resize", keep=0.3) as compression:
        expected = generate(model, inputs)
        report = compression.report
    if minor(T.__version__) < (5, 18) and name in ("qwen3_vl", "paligemma"):
        return  # which plane 2 refuses there
    short = visiontok.compress_inputs(model, inputs, "resize", keep=0.3)
    assert "get_image_features" not in model.model.__dict__
    assert torch.equal(short.restore(generate(model, short)), expected)
    assert torch.equal(short.restore(generate(model, short, cache_implementation="static")), expected)
    if minor(T.__version__) < (5, 18):
        return  # which expands several images of a row in the wrong order
    with visiontok.compress(model, "resize", keep=0.3):
        assert torch.equal(generate(model, inputs, num_beams=3), short.restore(generate(model, short, num_beams=3)))
    assert short.report.images == report.images
    assert short.report.account.patches == report.account.patches < report.account.patches_stock


def test_linear_attention_gets_shorter_inputs() -> None:
    model = build("qwen3_5")
    inputs = batch("qwen3_5", model)
    with visiontok.compress(model, "resize", keep=0.5) as compression:
        generate(model, inputs)
        assert [image.kept[0] for image in compression.report.images] == [6, 6, 4, 6]


@torch.no_grad()
def test_another_image_on_a_used_cache() -> None:
    """The conversation turn by turn gives what it gives as one prompt."""
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0)
    ids, pictures = inputs["input_ids"], inputs["pixel_values"]
    cut = int((ids[0] == IMAGE).nonzero()[15]) + 2
    with visiontok.compress(model, "resize", keep=0.3):
        expected = model(**inputs).logits[:, -1]
        first = model(input_ids=ids[:, :cut], pixel_values=pictures[:1], use_cache=True)
        assert first.past_key_values is not None
        second = model(input_ids=ids[:, cut:], pixel_values=pictures[1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits[:, -1], expected)


def test_an_image_within_its_budget_is_left_alone() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model)  # its images have 16, 12, 8 and 16 tokens
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    stock = model.model.get_image_features(**given, return_dict=True).pooler_output
    with visiontok.compress(model, "resize", keep=9) as compression, torch.no_grad():
        model(**inputs)
        small = model.model.get_image_features(**given, return_dict=True).pooler_output
        assert [image.kept[0] for image in compression.report.images] == [9, 8, 8, 9]
    assert [torch.equal(a, b) for a, b in zip(stock, small, strict=True)] == [False, False, True, False]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_video_keeps_its_frames(name: str) -> None:
    """Each pair of frames is made as small as a picture would be, and the tower sees them as one video."""
    model = build(name)
    g = torch.Generator().manual_seed(3)
    frames = torch.randn(3, 3, 32, 32, generator=g).double()
    given = {
        "pixel_values_videos": torch.cat([patchified(frame) for frame in frames]),
        "video_grid_thw": torch.tensor([[3, 8, 8]]),
    }
    small = {
        "pixel_values_videos": torch.cat([patchified(made_smaller(frame, 2, 2, 8)) for frame in frames]),
        "video_grid_thw": torch.tensor([[3, 4, 4]]),
    }
    base = model.model
    [expected] = base.get_video_features(**small, return_dict=True).pooler_output
    with visiontok.compress(model, "resize", keep=0.25):
        output = base.get_video_features(**given, return_dict=True)
    [got] = output.pooler_output
    kept = torch.zeros(3, 4, 4, dtype=torch.bool)
    kept[:, 1::2, 1::2] = True
    torch.testing.assert_close(got[kept.flatten()], expected)
    with (
        visiontok.compress(model, "resize", keep=2),
        pytest.raises(UnsupportedError, match="a video of 3 has no 2 tokens"),
    ):
        base.get_video_features(**given, return_dict=True)


@dataclass(frozen=True)
class Reader(Method):
    """Notes what it is shown, and keeps everything."""

    seen: dict[str, torch.Tensor]
    card: ClassVar[Card] = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self) -> Needs:
        return Needs(vision_received=(0,), encoder_features=True, pixels=True)

    def select(self, ctx: Any) -> torch.Tensor:
        for name, value in {
            "received": ctx.attention.received(0),
            "encoder_features": ctx.encoder_features,
            "pixels": ctx.pixels,
            "features": ctx.features,
        }.items():
            self.seen[name] = value[ctx.valid]
        return ctx.valid


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_method_behind_it_sees_the_smaller_picture(name: str) -> None:
    model, whole = build(name), pictures(name)
    small = [made_smaller(whole[0], 3, 2, 8), made_smaller(whole[1], 1, 4, 8)]
    shown: list[dict[str, torch.Tensor]] = [{}, {}]
    both = Recipe(stages=(*visiontok.recipe("resize", keep=0.25).stages, Stage(kind="prompt", method=Reader(shown[0]))))
    with visiontok.compress(model, both):
        model(**typed(name, prompt(name, [24, 21])), **pixels(name, whole))
    with visiontok.compress(model, Reader(shown[1])):
        model(**typed(name, prompt(name, [6, 4])), **pixels(name, small))
    for key, value in shown[1].items():
        torch.testing.assert_close(shown[0][key], value, msg=key)


def test_kept_tokens_speak_for_their_cells() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    with visiontok.compress(model, "resize", keep=4, mass=True) as compression, torch.no_grad():
        model(**inputs)
        mass, alive = compression.ledger.mass(0), compression.ledger.alive(0) & compression.ledger.visual
    assert mass is not None
    assert mass[alive].tolist() == [4.0] * int(alive.sum())


def test_nothing_stays_on_the_model_and_no_other_compression_is_touched() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    with torch.no_grad():
        stock = model(**inputs).logits
        with visiontok.compress(model, "resize", keep=0.25):
            model(**inputs)
        assert "get_image_features" not in model.model.__dict__
        assert torch.equal(model(**inputs).logits, stock)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llava_next", "tiles"),
        ("llava_onevision", "tiles"),
        ("internvl", "tiles"),
        ("idefics3", "tiles"),
        ("smolvlm", "tiles"),
        ("gemma3", "pooled to a fixed number"),
    ],
)
def test_families_whose_pictures_have_a_fixed_size(name: str, reason: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedError, match=rf"^{name}: resize needs .*{reason}.*; use 'm3_pool'"):
        visiontok.compress(model, "resize", keep=0.25)
    assert not [value for value in model.model.__dict__.values() if isinstance(value, FeatureRecorder)]


def test_a_cls_token_among_the_visual_tokens() -> None:
    model = T.LlavaForConditionalGeneration(
        T.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=CLIP,
            vision_feature_select_strategy="full",
            **IMAGE_IDS,
        )
    )
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy='full'"):
        visiontok.compress(model, "resize", keep=0.25)


def test_features_that_were_made_without_it() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model, rows=1, pad=0, images=1)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE] = model.get_input_embeddings()(torch.tensor(IMAGE))
    with visiontok.compress(model, "resize", keep=0.25), pytest.raises(UnsupportedError, match="pass pixels"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_stages_and_budgets_that_make_no_sense() -> None:
    model = build("llava")
    with pytest.raises(ConfigError, match=r"keep=flops:0\.5: resize acts before the prompt is read"):
        visiontok.compress(model, "resize", keep="flops:0.5")
    with pytest.raises(ConfigError, match="resize and resize both act on the pixels"):
        visiontok.compress(model, visiontok.recipe("resize") + visiontok.recipe("resize"))
    with pytest.raises(ConfigError, match="'resize': it acts before the vision tower"):
        Stage(kind="prompt", method=Resize())
    with pytest.raises(ConfigError, match="'random': it acts behind the vision tower"):
        Stage(kind="pixel", method=visiontok.recipes.find("random")())
    with pytest.raises(ConfigError, match="a pixel stage has no layer"):
        Stage(kind="pixel", method=Resize(), layer=2)


def test_a_picture_larger_than_the_budget_is_refused() -> None:
    @dataclass(frozen=True)
    class Larger(Method):
        card: ClassVar[Card] = replace(Resize.card, name="larger")

        def picture(self, shape: tuple[int, int], count: int) -> tuple[int, int]:
            return shape

    model = build("llava")
    with (
        visiontok.compress(model, Larger(), keep=4),
        pytest.raises(ConfigError, match="larger: picture\\(\\) made 4 x 4 tokens of 4 x 4; at most 4"),
    ):
        model(**batch("llava", model))


def test_it_is_saved_and_read_as_any_other() -> None:
    recipe = visiontok.recipe("resize", keep=0.25)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["stages"] == [{"kind": "pixel", "method": "resize", "keep": 0.25}]
