"""Pages that stay whole or go whole: late interaction, the selector, URaG in models, and what follows when nothing is
left of an image."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Array, cos
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor
from visiontok.adapters.base import find as find_adapter

import visiontok
import visiontok.functional as F
from visiontok import Budget, Recipe, overlay
from visiontok.conformance.checks import CHECKS, Case, Failed, against_oracle, rows
from visiontok.conformance.zoo import BANNED, IMAGE, VIDEO, batch, build
from visiontok.errors import ConfigError
from visiontok.method import Stage
from visiontok.places import find_places
from visiontok.recipe import of_method
from visiontok.recipes import find
from visiontok.recipes.urag import URaG, urag

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
CUT = 2
every_family = pytest.mark.parametrize("name", FAMILIES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- the operators


def interaction_naive(question: Array, pages: list[Array]) -> list[float]:
    return [sum(max(cos(q, v) for v in page) for q in question) if len(page) else -math.inf for page in pages]


def whole_naive(scores: list[float], sizes: list[int], k: int, most: int | None) -> list[int]:
    order = sorted(range(len(scores)), key=lambda g: (-scores[g] if not math.isnan(scores[g]) else math.inf, g))
    kept: list[int] = []
    for g in order:
        fits = not kept or sum(sizes[j] for j in kept) + sizes[g] <= k
        if sizes[g] and fits and len(kept) < (most or len(scores)):
            kept.append(g)
    return sorted(kept)


@pytest.mark.parametrize("seed", range(3))
def test_late_interaction_is_the_sum_of_the_best_cosines(seed: int) -> None:
    """Rows of their own length, groups in any order, one without tokens; padding holds values that would win."""
    question, tokens = normal(2, 4, 6, seed=seed), normal(2, 12, 6, seed=seed + 9)
    group = torch.randint(0, 3, (2, 12), generator=torch.Generator().manual_seed(seed))
    asks, valid = torch.arange(4) < torch.tensor([[4], [2]]), torch.arange(12) < torch.tensor([[12], [7]])
    tokens[0, 3, 1] = torch.nan
    question[0, 1, 0] = torch.inf
    shown = tokens.masked_fill(~valid[..., None], 0.0)
    shown[~valid] = question[1, 0]  # a perfect answer where no token is
    got = F.late_interaction(question, shown, group, 4, question_valid=asks, valid=valid)
    for b in range(2):
        words = [question[b, t].double().numpy() for t in range(4) if asks[b, t] and question[b, t].isfinite().all()]
        members = [i for i in range(12) if valid[b, i] and tokens[b, i].isfinite().all()]
        pages = [[tokens[b, i].double().numpy() for i in members if group[b, i] == g] for g in range(4)]
        np.testing.assert_allclose(got[b], interaction_naive(np.array(words), pages), atol=1e-5)
    assert torch.equal(got[:, 3], torch.full((2,), -torch.inf))
    torch.testing.assert_close(F.late_interaction(question[1, :2], tokens[1, :7], group[1, :7], 4), got[1])
    assert F.late_interaction(question[1], tokens[1]).shape == (1,)


@pytest.mark.parametrize("most", [None, 1, 2, 9])
@pytest.mark.parametrize("k", [1, 7, 12, 100])
def test_whole_takes_the_best_groups_that_fit(k: int, most: int | None) -> None:
    scores = torch.tensor([[0.5, 2.0, 2.0, torch.nan, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    sizes = torch.tensor([[4, 5, 6, 1, 0, 2], [3, 3, 3, 3, 3, 3]])
    keep = F.whole(scores, sizes, k, most)
    for b in range(2):
        expected = whole_naive(scores[b].tolist(), sizes[b].tolist(), k, most)
        assert keep[b].nonzero()[:, 0].tolist() == expected
        assert torch.equal(F.whole(scores[b], sizes[b], k, most), keep[b])
    hidden = F.whole(scores, sizes, torch.tensor([k, 3]), most, scores != 2.0)
    assert not hidden[0, 1:3].any()
    assert hidden[1].nonzero().tolist() == [[0]]


# ------------------------------------------------------------------------------------------------------------ in models


@functools.cache
def seen(name: str, images: tuple[int, ...] = (3, 1)) -> tuple[Any, dict[str, Any], Array]:
    """The stock model, prompts with those numbers of images, and normed states (B, N, D) on the input of layer CUT."""
    model = build(name)
    inputs = batch(name, model, images=list(images))
    states: list[Tensor] = []

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hook = model.get_decoder().layers[CUT].register_forward_pre_hook(entering, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        normed = model.get_decoder().norm(states[0])
    hook.remove()
    return model, inputs, normed.numpy()


def pages_of(ids: list[int]) -> list[list[int]]:
    """Positions of each image of a prompt."""
    pages: list[list[int]] = []
    for i, token in enumerate(ids):
        if token == IMAGE:
            if ids[i - 1] != IMAGE:
                pages.append([])
            pages[-1].append(i)
    return pages


def words_of(name: str, ids: list[int], tail: int = 0) -> list[int]:
    """Positions of the question: behind the last image and its end token, ``tail`` short of the end."""
    last = max(i for i, token in enumerate(ids) if token == IMAGE)
    return [i for i in range(last + 1, len(ids) - tail) if ids[i] not in (103, 105)]


def expected(name: str, *, most: int = 9, share: float = 1.0, tail: int = 0, images: tuple[int, ...] = (3, 1)) -> Any:
    """Kept tokens of each image, by the plain loops."""
    _, inputs, states = seen(name, images)
    kept: list[int] = []
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        pages, sizes = pages_of(ids), [len(page) for page in pages_of(ids)]
        scores = interaction_naive(states[b][words_of(name, ids, tail)], [states[b][page] for page in pages])
        budget = sum(max(1, math.floor(share * n + 0.5)) for n in sizes)
        chosen = whole_naive(scores, sizes, budget, most)
        kept += [n if g in chosen else 0 for g, n in enumerate(sizes)]
    return kept


def kept(model: Any, inputs: dict[str, Any], recipe: Any, **options: Any) -> list[int]:
    with visiontok.compress(model, recipe, **options) as compression, torch.no_grad():
        model(**inputs)
        images = compression.report.images
    assert all(image.kept[:CUT] == (image.tokens,) * CUT for image in images)
    assert all(image.kept[CUT] == image.kept[-1] for image in images)
    return [image.kept[-1] for image in images]


@pytest.mark.engine
@every_family
def test_kept_pages_are_those_of_the_plain_loop(name: str) -> None:
    """Prompts of three images and of one, padded; pages of other prompts are no rivals."""
    model, inputs, _ = seen(name)
    for groups in (1, 2):
        assert kept(model, inputs, "urag", layer=CUT, groups=groups) == expected(name, most=groups)
    for share in (0.05, 0.4, 0.7, 1.0):
        assert kept(model, inputs, "urag", layer=CUT, keep=share) == expected(name, share=share)
    assert kept(model, inputs, "urag", layer=CUT, keep=0.7, groups=1) == expected(name, share=0.7, most=1)
    assert kept(model, inputs, "urag", layer=CUT, keep=1.0, groups=1) == expected(name, most=1)
    assert kept(model, inputs, "urag", layer=CUT, groups=1, tail=4) == expected(name, most=1, tail=4)


@pytest.mark.engine
def test_five_pages_stay_where_nothing_else_is_said() -> None:
    model, inputs, _ = seen("llava", (7, 2))
    assert sum(n > 0 for n in kept(model, inputs, "urag", layer=CUT)) == 5 + 2
    assert kept(model, inputs, "urag", layer=CUT) == expected("llava", most=5, images=(7, 2))
    assert sum(n > 0 for n in kept(model, inputs, "urag", layer=CUT, keep=0.9)) == 6 + 1


@pytest.mark.engine
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[3, 1], [2, 0]], ids=str)
@every_family
def test_generation_equals_the_oracle_in_which_pages_are_masked(name: str, images: list[int], attention: str) -> None:
    exact = attention == "sdpa"
    dtype = torch.float64 if exact else torch.float32
    model = build(name, attention, dtype)
    inputs = batch(name, model, images=images)
    recipe = visiontok.recipe("urag", layer=CUT, groups=1)
    alive, _ = against_oracle(model, inputs, recipe, BANNED, **({} if exact else {"close": 1e-4}))
    assert [int((mask & (inputs["input_ids"] == IMAGE)).any(1).sum()) for mask in alive] == [sum(map(bool, images))] * 4
    assert alive[CUT].sum() < alive[CUT - 1].sum()


@pytest.mark.engine
def test_frames_of_a_video_and_tiles_of_a_picture_compete() -> None:
    """A newline is of the tile before it; what is alive is a union of whole tiles."""
    model = build("llava_next")
    with visiontok.compress(model, "urag", layer=CUT, groups=1, of="frame") as compression:
        model(**batch("llava_next", model, rows=1))
        ledger = compression.ledger
    alive = ledger.units.gather(ledger.alive(CUT)[..., None])[..., 0]
    stays = []
    for u, n in enumerate(ledger.units.sizes):
        tile = ledger.units.grid[u, :n, 0].tolist()
        assert -1 in tile
        for i in range(n):
            tile[i] = tile[i - 1] if tile[i] < 0 else tile[i]
        stays += [{bool(alive[u, i]) for i in range(n) if tile[i] == t} for t in (0, 1)]
    assert sorted(map(list, stays)) == [[False], [False], [False], [True]]

    model, frames = build("qwen2_5_vl"), 3
    ids = torch.tensor([[1, 7, 102, *[VIDEO] * 4 * frames, 103, 8, 9]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": torch.tensor([[frames, 4, 4]]),
        "pixel_values_videos": normal(16 * frames, 96).double(), "mm_token_type_ids": 2 * (ids == VIDEO).int(),
    }  # fmt: skip
    for options, number in (({"groups": 1}, 4), ({"keep": 0.7}, 8)):
        assert kept(model, inputs, "urag", layer=CUT, of="frame", **options) == [number]
    assert kept(model, inputs, "urag", layer=CUT, groups=1) == [4 * frames]


# --------------------------------------------------------------------------------------------------- ties, head, budget


def test_of_equal_pages_exactly_as_many_stay_the_first_ones() -> None:
    page, question = normal(4, 6), normal(3, 6, seed=1)
    pages, asked = page.expand(5, 4, 6), question.expand(5, 3, 6)
    for groups in (1, 2, 4):
        keep = urag(pages, asked, 20, most=groups)
        assert keep.all(1).tolist() == [True] * groups + [False] * (5 - groups)
        assert urag(pages, asked, 20, most=groups, official=True).all()
    row = torch.tensor([0, 0, 1, 1, 1])
    assert urag(pages, asked, 20, most=1, row=row).all(1).tolist() == [True, False, True, False, False]


@pytest.mark.engine
def test_the_published_ties_keep_more() -> None:
    """Three copies of one picture in a prompt, on the input of the first layer, where nothing tells them apart."""
    model, inputs, _ = seen("llava", (3, 1))
    inputs = inputs | {"pixel_values": inputs["pixel_values"][:1].expand(4, -1, -1, -1)}
    counts = {}
    for fidelity in ("fixed", "official"):
        with visiontok.compress(model, "urag", layer=0, groups=1, fidelity=fidelity) as compression, torch.no_grad():
            model(**inputs)
            counts[fidelity] = [image.kept[-1] for image in compression.report.images]
    assert counts == {"fixed": [16, 0, 0, 16], "official": [16] * 4}


def head(width: int = 32, hidden: int = 12, out: int = 5) -> dict[str, Tensor]:
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (out, hidden), "2.bias": (out,)}
    return {name: normal(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.engine
@every_family
def test_a_trained_head_stands_behind_the_final_norm(name: str, tmp_path: Path) -> None:
    save_file(head(), tmp_path / "head.safetensors")
    model, inputs, states = seen(name)
    parts = {key: value.double().numpy() for key, value in head().items()}
    inner = states @ parts["0.weight"].T + parts["0.bias"]
    gelu = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    made = gelu @ parts["2.weight"].T + parts["2.bias"]
    wanted: list[int] = []
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        pages = pages_of(ids)
        scores = interaction_naive(made[b][words_of(name, ids)], [made[b][page] for page in pages])
        wanted += [len(page) if g == int(np.argmax(scores)) else 0 for g, page in enumerate(pages)]
    recipe = visiontok.recipe("urag", layer=CUT, groups=1, head=str(tmp_path))
    assert recipe.label == "urag"
    assert kept(model, inputs, recipe) == wanted


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"0.weight": torch.ones(2, 2)}, r"no retrieval head \(no 0.bias, 2.bias, 2.weight\); it has 0.weight"),
        (head() | {"2.weight": torch.ones(5, 11)}, r"0.weight \(12, 32\).*2.weight \(5, 11\).*must be \(H, D\)"),
        (head() | {"0.bias": torch.ones(3)}, r"0.bias \(3,\).*biases \(H,\) and \(E,\)"),
        (head() | {"2.bias": torch.ones(3)}, r"2.bias \(3,\)"),
        (head() | {"0.weight": torch.ones(12)}, r"0.weight \(12,\)"),
    ],
)
def test_wrong_heads_are_named(tmp_path: Path, parts: dict[str, Tensor], message: str) -> None:
    path = str(tmp_path / "head.safetensors")
    save_file(parts, path)
    with pytest.raises(ConfigError, match=f"head='{path}': .*{message}"):
        URaG(head=path)


@pytest.mark.engine
def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    model, inputs, _ = seen("llava")
    save_file(head(width=48), tmp_path / "head.safetensors")
    wrong = pytest.raises(ConfigError, match="it takes states of width 48, those of this llava have 32; use the head")
    with visiontok.compress(model, "urag", layer=CUT, groups=1, head=str(tmp_path)), torch.no_grad(), wrong:
        model(**inputs)


@pytest.mark.engine
def test_a_question_must_be_left() -> None:
    model, inputs, _ = seen("llava")
    wrong = pytest.raises(ConfigError, match="tail=5: no word of the question of a prompt is left")
    with visiontok.compress(model, "urag", layer=CUT, groups=1, tail=5), torch.no_grad(), wrong:
        model(**inputs)


@pytest.mark.engine
def test_the_report_says_where_one_page_is_more_than_the_budget() -> None:
    model, inputs, _ = seen("llava")
    with visiontok.compress(model, "urag", layer=CUT, keep=0.2) as compression, torch.no_grad():
        model(**inputs)
    assert compression.report.warnings == (
        "prompt 0 keeps 16 visual tokens instead of 9: the best image, or frame, stays whole",
    )
    alone = batch("llava", model, images=1)
    with visiontok.compress(model, "urag", layer=CUT, keep=0.5) as compression, torch.no_grad():
        model(**alone)
    assert compression.report.warnings == (
        "prompt 0 keeps 16 visual tokens instead of 8: the best image, or frame, stays whole",
    )


@dataclass(frozen=True)
class Faulty(URaG):
    """Says that pages stay or go whole, and keeps all of them or none."""

    all_of_them: bool = True
    card = replace(URaG.card, name="faulty")

    def select(self, ctx: visiontok.Context) -> Tensor:
        return ctx.valid & self.all_of_them


@pytest.mark.engine
@pytest.mark.parametrize(("keeps", "found"), [(True, r"\[16, 16\]"), (False, r"\[0, 0\]")])
def test_the_kit_rejects_more_than_the_budget_and_nothing(keeps: bool, found: str) -> None:
    case = Case(of_method(Faulty(layer=CUT, all_of_them=keeps)), "llava")
    with pytest.raises(Failed, match=f"it keeps {found} of its images: keep the best group"):
        CHECKS["budget"](case)


# -------------------------------------------------------------------------------------- images of which nothing is left

LATER: dict[str, dict[str, Any]] = {
    **{name: {"layer": 3, "keep": 3} for name in ("fastv", "sieve", "entropyprune")},
    **{name: {"layers": (3,), "shares": (0.25,)} for name in ("sparsevlm", "sparsevlm_plus", "fitprune", "transprune")},
}


@pytest.mark.engine
@pytest.mark.parametrize("method", LATER)
def test_a_later_cut_is_asked_about_what_is_left(method: str) -> None:
    name = "qwen3_vl"
    model, inputs, _ = seen(name)
    recipe = visiontok.recipe("urag", layer=CUT, groups=1) + visiontok.recipe(method, **LATER[method])
    alive, _ = against_oracle(model, inputs, recipe, BANNED)
    visual = inputs["input_ids"] == IMAGE
    sizes = [(mask & visual).sum(1).tolist() for mask in alive]
    first = [n for n in expected(name, most=1) if n]
    assert sizes[CUT] == first
    share = LATER[method].get("shares")
    assert sizes[3] == [3 if share is None else int(n * share[0] + 0.5) for n in first]
    rows(Case(recipe, name))  # which images are left, and at which index, differs between a batch and its rows


@pytest.mark.engine
def test_a_later_draw_is_that_of_the_image() -> None:
    draw = Recipe(stages=(Stage(kind="cut", layer=3, method=find("random")(), keep=Budget.tokens(3)),))
    rows(Case(visiontok.recipe("urag", layer=CUT, groups=1) + draw, "llava"))


@pytest.mark.engine
def test_behind_a_cut_that_leaves_nothing_nobody_is_asked() -> None:
    model, inputs, _ = seen("llava")
    recipe = visiontok.recipe("todre_exit", layer=CUT, threshold=1.0) + visiontok.recipe("fastv", layer=3, keep=3)
    alive, _ = against_oracle(model, inputs, recipe, BANNED)
    assert [int((mask & (inputs["input_ids"] == IMAGE)).sum()) for mask in alive] == [64, 64, 0, 0]


def test_nobody_is_nearest_where_nothing_is_kept() -> None:
    keep = torch.tensor([[True, False, True], [False, False, False]])
    assert F.nearest_kept(normal(2, 3, 4), keep)[1].tolist() == [-1, -1, -1]
    assert (F.nearest_kept(normal(2, 3, 4), keep)[0] >= 0).all()


@pytest.mark.engine
@every_family
def test_mass_goes_with_its_page(name: str) -> None:
    """A dropped page has nobody to speak for it; a page that stays speaks for itself, or for what went before."""
    model, inputs, _ = seen(name)
    plain: list[Tensor] = []
    weighed: list[Tensor] = []
    for mass, found in ((False, plain), (True, weighed)):
        with visiontok.compress(model, "urag", layer=CUT, groups=1, mass=mass) as compression, torch.no_grad():
            found += [model(**inputs).logits, compression.ledger.mass(CUT)]
    where = inputs["attention_mask"].bool()
    torch.testing.assert_close(weighed[0][where], plain[0][where], atol=1e-9, rtol=1e-9)
    assert torch.equal(weighed[1], plain[1])

    recipe = visiontok.recipe("divprune", keep=2).with_mass(visiontok.Mass()) + visiontok.recipe("urag", groups=1)
    with visiontok.compress(model, recipe) as compression, torch.no_grad():
        assert model(**inputs).logits[where].isfinite().all()
        ledger = compression.ledger
        masses = ledger.units.gather(ledger.mass(3)[..., None])[..., 0].sum(1).tolist()
        sizes, left = ledger.units.sizes, [n > 0 for n in ledger.kept()[3]]
    assert masses == [n if stays else 0 for n, stays in zip(sizes, left, strict=True)]
    assert left.count(False) == 2


@pytest.mark.engine
def test_coordinate_tokens_stay_of_dropped_pages_too() -> None:
    model, inputs, _ = seen("llava")
    reserved = sorted(kept(model, inputs, "urag", layer=CUT, groups=1, reserve=0.2))
    assert reserved == [6, 6, 16, 16]


def test_only_a_cut_can_drop_images_whole() -> None:
    with pytest.raises(ConfigError, match="method='urag': it may drop images whole, which only a cut can do"):
        Stage(kind="prompt", method=URaG())


@pytest.mark.engine
def test_the_overlay_of_a_dropped_picture_is_dark() -> None:
    model, inputs, _ = seen("llava")
    picture = Image.new("RGB", (64, 64), "green")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for groups, bright in ((1, 16 if expected("llava", most=1)[0] else 0), (3, 16)):
        with visiontok.compress(model, "urag", layer=CUT, groups=groups) as compression, torch.no_grad():
            model(**inputs)
        ledger, pictures = compression.ledger, [picture] * len(inputs["pixel_values"])
        adapter = find_adapter(model.model)
        crops = find_places(adapter, ledger.units, pictures, lambda like: processor(like, return_tensors="pt"))
        drawn = overlay.draw_kept(picture, crops[:1], overlay.living(ledger, overlay.last_layer(ledger)))
        middles = [((left + right) // 2, (top + bottom) // 2) for left, top, right, bottom in drawn.cells.tolist()]
        colours = [drawn.image.getpixel(middle) for middle in middles]
        assert (len(colours), colours.count(picture.getpixel((0, 0)))) == (16, bright)
    assert not expected("llava", most=1)[0]  # the case this test is about


def test_round_trip_and_label() -> None:
    method = URaG(layer=6, groups=2, of="frame", tail=9)
    assert method.label == "urag[training_free, frame]"
    assert URaG.build(method.options()) == method
    recipe = visiontok.recipe("urag", keep=0.25)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.stages[0].keep == Budget.ratio(0.25)
