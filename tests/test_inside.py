"""Units that leave the vision tower at one of its layers.

The oracle is the segment: the stock tower's layers are called one by one, and from the cut on the units that left have
attention segments of their own, so that the kept ones see exactly each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import vision_utils

import visiontok
from visiontok import Card, Contract, Needs, Recipe
from visiontok.conformance.zoo import IMAGE, batch, build
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Encoding, Method, Rebuild, Stage, UnitMethod

pytestmark = pytest.mark.engine

TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "vipllava", "paligemma")
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CARD = Card(name="given", title="-", paper="-", venue="-", stage="encoder", needs="-", budget=False,
            contract=Contract(count_from_grid=False, sync_free=False))  # fmt: skip


@dataclass(frozen=True)
class Given(UnitMethod):
    """Keeps every unit whose number is not a multiple of three."""

    layer: int = 1
    step: int = 3
    back: Rebuild | None = None
    card: ClassVar[Card] = CARD

    @property
    def rebuild(self) -> Rebuild | None:
        return self.back

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="encoder", method=self, layer=self.layer),)

    def stay(self, encoding: Encoding) -> torch.Tensor:
        return torch.arange(len(encoding.states)) % self.step != 1


def given(name: str, video: bool = False) -> tuple[Any, dict[str, Any]]:
    model = build(name)
    if video:
        g = torch.Generator().manual_seed(3)
        return model, {
            "pixel_values_videos": torch.randn(3 * 64 + 2 * 32, 96, generator=g).double(),
            "video_grid_thw": torch.tensor([[3, 8, 8], [2, 4, 8]]),
        }
    inputs = batch(name, model)
    return model, {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}


def levels(output: Any) -> list[torch.Tensor]:
    deep = getattr(output, "deepstack_features", None) or ()
    return [torch.cat(list(output.pooler_output)), *(x if torch.is_tensor(x) else torch.cat(list(x)) for x in deep)]


def encode(model: Any, inputs: dict[str, Any], method: Method | None) -> list[torch.Tensor]:
    modality = "video" if "video_grid_thw" in inputs else "image"
    encoder = getattr(model.model, f"get_{modality}_features")
    if method is None:
        return levels(encoder(**inputs, return_dict=True))
    with visiontok.compress(model, method):
        return levels(getattr(model.model, f"get_{modality}_features")(**inputs, return_dict=True))


def units(name: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(units,) bool, which stay; and the raster index of each in the order of the tower."""
    thw = next(value for key, value in inputs.items() if key.endswith("thw"))
    unit = torch.cat([torch.arange(n) % 3 != 1 for n in (thw.prod(1) // 4).tolist()])
    if name != "qwen2_5_vl":
        return unit, torch.arange(len(unit))
    order, _ = vision_utils.get_vision_window_index(thw, spatial_merge_size=2, window_size=16, patch_size=4)
    return unit, order


def watched(model: Any, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[dict[str, Any]], list[torch.Tensor]]:
    """What each block of the stock tower is given, and what comes out in the end."""
    states: list[torch.Tensor] = []
    told: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0])
        told.append(dict(kwargs))

    hooks = [b.register_forward_pre_hook(note, with_kwargs=True) for b in model.model.visual.blocks]
    stock = encode(model, inputs, None)
    for hook in hooks:
        hook.remove()
    return states, told, stock


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("video", [False, True], ids=["images", "videos"])
@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_what_stays_is_what_the_segment_oracle_makes_of_it(name: str, video: bool, attention: str) -> None:
    _, inputs = given(name, video)
    model = build(name, attention)
    tower = model.model.visual
    got = encode(model, inputs, Given(layer=1))
    unit, order = units(name, inputs)
    states, told, stock = watched(model, inputs)
    patch, x = unit[order].repeat_interleave(4), states[0]
    found: dict[int, torch.Tensor] = {}
    for index, block in enumerate(tower.blocks):
        segment = torch.repeat_interleave(
            torch.arange(len(told[index]["cu_seqlens"]) - 1), told[index]["cu_seqlens"].diff()
        )
        key = segment * 2 + (~patch).long() * (index >= 1)
        sorted_, counts = key.argsort(stable=True), torch.unique(key, return_counts=True)[1]
        tables = tuple(t[sorted_] for t in told[index]["position_embeddings"])
        borders = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        out = block(x[sorted_], **told[index] | {"cu_seqlens": borders, "position_embeddings": tables})
        x = found[index] = torch.empty_like(out).index_copy_(0, sorted_, out)
    merged = tower.merger(x)
    oracle = [torch.empty_like(merged).index_copy_(0, order, merged)]
    if name == "qwen3_vl":
        oracle += [
            m(found[i]) for i, m in zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True)
        ]
    for mine, theirs, whole in zip(got, oracle, stock, strict=True):
        assert torch.equal(mine[unit], theirs[unit])
        assert mine.shape == whole.shape
    assert not torch.equal(got[0][unit], stock[0][unit])


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_patches_that_left_are_never_seen_again(name: str) -> None:
    """A layer behind the cut makes what it makes of the kept rows alone; DeepStack levels before it are stock's."""
    model, inputs = given(name)
    seen: dict[int, int] = {}
    blocks = model.model.visual.blocks if name in GRIDS else model.model.vision_tower.encoder.layers
    hooks = [
        b.register_forward_hook(lambda m, args, out, i=i: seen.update({i: out[..., 0].numel()}))
        for i, b in enumerate(blocks)
    ]
    stock, whole = encode(model, inputs, None), dict(seen)
    last = len(blocks) - 1
    got = encode(model, inputs, Given(layer=last if name not in ("llava", "vipllava") else 1))
    for hook in hooks:
        hook.remove()
    assert seen[0] == whole[0]
    assert seen[last] < whole[last]
    if name == "qwen3_vl":  # levels of layers 0 and 1 come before the cut at layer 2
        assert all(torch.equal(a, b) for a, b in zip(got[1:], stock[1:], strict=True))


@pytest.mark.parametrize("method", [Given(step=10**6), Given(step=10**6, back=Rebuild(neighbours=3, layers=1))])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_nothing_left_is_the_stock_tower(name: str, method: Given) -> None:
    model, inputs = given(name)

    @dataclass(frozen=True)
    class All(Given):
        def stay(self, encoding: Encoding) -> torch.Tensor:
            return torch.ones(len(encoding.states), dtype=torch.bool)

    if method.back is not None and name in ("vipllava", "paligemma"):
        with pytest.raises(UnsupportedError, match=f"{name}: given brings back what left the tower"):
            visiontok.compress(model, All(back=method.back))
        return
    for mine, stock in zip(encode(model, inputs, All(back=method.back)), encode(model, inputs, None), strict=True):
        assert torch.equal(mine, stock)


# ---- reconstruction


@pytest.mark.parametrize("stabilised", [0, 1, 5])
@pytest.mark.parametrize("video", [False, True], ids=["images", "videos"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_left_comes_back_as_its_neighbours_moved(name: str, video: bool, stabilised: int) -> None:
    """A loop that says IPCV once more: attention of all rows, the MLP of kept ones, neighbours of one item."""
    model, inputs = given(name, video)
    tower, k, cut = model.model.visual, 3, 1
    got = encode(model, inputs, Given(layer=cut, back=Rebuild(neighbours=k, layers=stabilised)))
    thw = next(value for key, value in inputs.items() if key.endswith("thw"))
    sizes = thw.prod(1) // 4
    item = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    unit, order = units(name, inputs)
    states, told, _ = watched(model, inputs)
    stays = unit[order].repeat_interleave(4)
    owner = item[order].repeat_interleave(4)
    start = states[cut]
    now = start[stays].clone()

    def restored(now: torch.Tensor) -> torch.Tensor:
        full = start.clone()
        full[stays] = now
        for r in (~stays).nonzero()[:, 0].tolist():
            mine = (stays & (owner == owner[r])).nonzero()[:, 0]
            near = mine[(start[mine] - start[r]).norm(dim=-1).argsort()[:k]]
            place = stays.cumsum(0)[near] - 1
            full[r] = start[r] + (now[place] - start[near]).mean(0)
        return full

    deep = {}
    for index in range(cut, len(tower.blocks)):
        block, kwargs = tower.blocks[index], told[index]
        if index < cut + stabilised:
            x = restored(now)
            x = x + block.attn(block.norm1(x), **kwargs)
            now = x[stays] + block.mlp(block.norm2(x[stays]))
        else:
            borders, before = kwargs["cu_seqlens"], torch.nn.functional.pad(stays.long().cumsum(0), (1, 0))
            kwargs["cu_seqlens"] = torch.unique_consecutive(before[borders.long()]).int()
            kwargs["position_embeddings"] = tuple(t[stays] for t in kwargs["position_embeddings"])
            now = block(now, **kwargs)
        deep[index] = now
    merged = tower.merger(restored(now))
    torch.testing.assert_close(got[0], torch.empty_like(merged).index_copy_(0, order, merged))
    for level, (index, merger) in enumerate(
        zip(getattr(tower, "deepstack_visual_indexes", ()), getattr(tower, "deepstack_merger_list", ()), strict=True), 1
    ):
        if index >= cut:
            torch.testing.assert_close(got[level], merger(restored(deep[index])))


@torch.no_grad()
def test_ipcv_leaves_all_tokens_to_the_language_model() -> None:
    model = build("qwen3_vl")
    inputs = batch("qwen3_vl", model)
    with visiontok.compress(model, visiontok.recipe("ipcv", layer=1, stabilised=1, neighbours=2)) as compression:
        model(**inputs)
        report = compression.report
    assert [image.kept[0] for image in report.images] == [16, 12, 8, 16]
    assert report.account.vision is not None
    assert report.account.vision_stock is not None
    assert report.account.vision.tower < report.account.vision_stock.tower
    both = visiontok.recipe("ipcv", layer=1) + visiontok.recipe("divprune", keep=0.25)
    with visiontok.compress(model, both) as compression:
        model(**inputs)
        assert [image.kept[0] for image in compression.report.images] == [4, 3, 2, 4]


# ---- methods, books, stages


def kept(name: str, **options: Any) -> tuple[list[torch.Tensor], Any]:
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, visiontok.recipe("tower_cut", layer=1, keep=0.5, **options)) as compression:
        with torch.no_grad():
            model(**inputs)
        alive, report = compression.ledger.alive(0), compression.report
    flat, out = alive[inputs["input_ids"] == IMAGE], []
    for image in report.images:
        out.append(flat[: image.tokens])
        flat = flat[image.tokens :]
    return out, report


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "paligemma"])
@torch.no_grad()
def test_scorers_read_the_layers_before_the_cut(name: str) -> None:
    model, inputs = given(name)
    states: list[torch.Tensor] = []
    blocks = model.model.visual.blocks if name in GRIDS else model.model.vision_tower.encoder.layers
    hooks = [b.register_forward_pre_hook(lambda m, args: states.append(args[0]) and None) for b in blocks[:2]]
    encode(model, inputs, None)
    for hook in hooks:
        hook.remove()
    first, second = (x[:, int(name == "llava") :].flatten(0, 1) if x.ndim == 3 else x for x in states)
    area = 4 if name in GRIDS else 1
    for scorer, values in (("norm", second), ("transition", second - first)):
        scores = values.norm(dim=-1).view(-1, area).mean(1)
        if name == "qwen2_5_vl":
            order, _ = vision_utils.get_vision_window_index(
                inputs["image_grid_thw"], spatial_merge_size=2, window_size=16, patch_size=4
            )
            scores = torch.empty_like(scores).index_copy_(0, order, scores)
        mine, _ = kept(name, scorer=scorer)
        for keep, theirs in zip(mine, scores.split([len(m) for m in mine]), strict=True):
            expected = torch.zeros_like(keep)
            expected[theirs.argsort(descending=True)[: len(keep) // 2]] = True
            assert torch.equal(keep, expected)


@dataclass(frozen=True)
class Reader(Method):
    """Keeps what received most attention, read behind the tower, where no unit has left it."""

    layer: int = 0
    card: ClassVar[Card] = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self) -> Needs:
        return Needs(vision_received=(self.layer,))

    def select(self, ctx: Any) -> torch.Tensor:
        return visiontok.functional.topk(ctx.attention.received(self.layer), ctx.count, ctx.valid)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
@torch.no_grad()
def test_received_attention_is_that_of_the_layer_before(name: str) -> None:
    mine, _ = kept(name, scorer="received")
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, Reader(), keep=0.5) as compression:
        model(**inputs)
        alive = compression.ledger.alive(0)[inputs["input_ids"] == IMAGE]
    assert torch.equal(torch.cat(mine), alive)


@torch.no_grad()
def test_a_later_stage_reads_the_layers_behind_the_cut() -> None:
    """What patches that stayed receive; those that left have nothing of their own and are no candidates."""
    for name in ("qwen2_5_vl", "qwen3_vl", "llava"):
        model = build(name)
        inputs = batch(name, model)
        both = visiontok.recipe("tower_cut", layer=1, keep=0.5) + Recipe(
            stages=(Stage(kind="prompt", method=Reader(layer=1), keep=visiontok.Budget.ratio(0.25)),)
        )
        with visiontok.compress(model, both) as compression:
            model(**inputs)
            first, second = (compression.report.images[0].kept[0], compression.ledger.alive(0))
        assert first == 4
        one, _ = kept(name)
        assert bool((second[inputs["input_ids"] == IMAGE] <= torch.cat(one)).all())


@pytest.mark.parametrize("recipe", ["tower_cut", "ipcv"])
@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_the_report_counts_what_the_tower_computes(name: str, recipe: str) -> None:
    if (name, recipe) == ("paligemma", "ipcv"):
        return  # refused
    model, inputs = given(name)
    options: Any = {"layer": 1, "keep": 0.5} if recipe == "tower_cut" else {"layer": 1, "stabilised": 1}

    def flops() -> int:
        attention = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            )
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            model.model.get_image_features(**inputs)
        return counter.get_total_flops()

    stock = flops()
    with visiontok.compress(model, visiontok.recipe(recipe, **options)) as compression:
        less = flops()
        model(**batch(name, model))
        costs = compression.report.account
    assert costs.vision is not None
    # what neighbours cost is no part of the tower's account, and distances are no matrix products below 25 rows
    assert less == pytest.approx(costs.vision.tower + costs.vision.projector, rel=0.02 if recipe == "ipcv" else 1e-3)
    assert less < stock


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma"])
@torch.no_grad()
def test_it_goes_on_with_what_pixels_left(name: str) -> None:
    """Pixel, encoder and prompt stage in one recipe: each drops of what the one before left."""
    model = build(name)
    inputs = batch(name, model)
    three = (
        visiontok.recipe("pixel_entropy", keep=0.75)
        + visiontok.recipe("tower_cut", layer=1, keep=0.5)
        + visiontok.recipe("divprune", keep=0.25)
    )
    alive = []
    for number in (1, 2, 3):
        with visiontok.compress(model, Recipe(stages=three.stages[:number])) as compression:
            model(**inputs)
            alive.append(compression.ledger.alive(0)[inputs["input_ids"] == IMAGE])
            shares = [image.kept[0] / image.tokens for image in compression.report.images]
        assert shares == [{1: 0.75, 2: 0.5, 3: 0.25}[number]] * 4
    assert bool((alive[1] <= alive[0]).all())
    assert bool((alive[2] <= alive[1]).all())


# ---- what is refused


def test_towers_and_layers_that_cannot() -> None:
    for name in ("internvl", "glm4v", "llava_next", "gemma3"):
        with pytest.raises(UnsupportedError, match=f"{name}: tower_cut needs a vision tower that units can leave"):
            visiontok.compress(build(name), "tower_cut", keep=0.5)
    with pytest.raises(ConfigError, match="so units that leave behind it save nothing"):
        visiontok.compress(build("llava"), visiontok.recipe("tower_cut", layer=2, keep=0.5))
    with pytest.raises(ConfigError, match="layer=0"):
        visiontok.compress(build("qwen2_vl"), visiontok.recipe("tower_cut", layer=0, keep=0.5))
    with pytest.raises(ConfigError, match="tower_cut and tower_cut both act in the tower"):
        visiontok.compress(build("qwen2_vl"), visiontok.recipe("tower_cut") + visiontok.recipe("tower_cut"))
    with pytest.raises(ConfigError, match=r"'tower_cut': it acts inside the vision tower"):
        Stage(kind="prompt", method=visiontok.recipe("tower_cut").stages[0].method)
    with pytest.raises(ConfigError, match="encoder stage needs a layer"):
        Stage(kind="encoder", method=visiontok.recipe("tower_cut").stages[0].method)
    with pytest.raises(ConfigError, match=r"keep=flops:0\.5: tower_cut acts before the prompt is read"):
        visiontok.compress(build("qwen2_vl"), "tower_cut", keep="flops:0.5")


def test_pictures_of_one_call_that_keep_different_numbers() -> None:
    @dataclass(frozen=True)
    class Uneven(Given):
        def stay(self, encoding: Encoding) -> torch.Tensor:
            return torch.arange(len(encoding.states)) <= int(encoding.states.abs().sum() * 1000) % 7

    model, inputs = given("llava")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="which the tower takes as a rectangle"):
        encode(model, inputs, Uneven())


@torch.no_grad()
def test_what_left_a_tower_of_crops_comes_back_too() -> None:
    """LLaVA, whose projector reads the last layer but one, and whose CLS token always stays."""
    model, inputs = given("llava")
    tower, k = model.model.vision_tower, 3
    states: list[torch.Tensor] = []
    layer = tower.encoder.layers[1]
    hook = layer.register_forward_pre_hook(lambda m, args: states.append(args[0]) and None)
    encode(model, inputs, None)
    hook.remove()
    [start] = states
    stays = torch.cat([torch.tensor([True]), torch.arange(16) % 3 != 1])
    x = start + layer.self_attn(layer.layer_norm1(start), attention_mask=None)[0]
    now = x[:, stays] + layer.mlp(layer.layer_norm2(x[:, stays]))
    full = start.clone()
    full[:, stays] = now
    for b, picture in enumerate(start):
        for r in (~stays).nonzero()[:, 0].tolist():
            mine = (stays & (torch.arange(17) > 0)).nonzero()[:, 0]
            near = mine[(picture[mine] - picture[r]).norm(dim=-1).argsort()[:k]]
            full[b, r] = picture[r] + (now[b, stays.cumsum(0)[near] - 1] - picture[near]).mean(0)
    expected = model.model.multi_modal_projector(full[:, 1:]).flatten(0, 1)
    [got] = encode(model, inputs, Given(back=Rebuild(neighbours=k, layers=1)))
    torch.testing.assert_close(got, expected)
