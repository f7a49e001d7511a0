"""What the engine hands to methods: the question, the pixels of a token, the projector; and the methods that live on it
in a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok
from visiontok import Method, Needs, Recipe
from visiontok.clip import OpenClip
from visiontok.conformance.zoo import ARCHITECTURES, IMAGE, batch, build, visual
from visiontok.context import Context
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Card, Stage
from visiontok.recipes.cdpruner import CDPruner
from visiontok.recipes.erase import Erase

pytestmark = pytest.mark.engine


@dataclasses.dataclass(frozen=True)
class Reader(Method):
    """Keeps every second token and remembers what it saw."""

    wants: Needs
    seen: dict[str, Context] = dataclasses.field(default_factory=dict)
    card = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self) -> Needs:
        return self.wants

    def select(self, ctx: Context) -> Tensor:
        self.seen["ctx"] = ctx
        return ctx.valid & (torch.arange(ctx.valid.shape[1]) % 2 == 0)


def read(model: Any, inputs: dict[str, Any], *, layer: int | None = None, **needs: Any) -> Context:
    reader = Reader(Needs(**needs))
    kind: Any = "prompt" if layer is None else "cut"
    with visiontok.compress(model, Recipe(stages=(Stage(kind=kind, method=reader, layer=layer),))), torch.no_grad():
        model(**inputs)
    return reader.seen["ctx"]


# --------------------------------------------------------------------------------------------------------- the question


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_the_question_is_the_text_behind_the_last_image_without_special_tokens(name: str) -> None:
    model = build(name)
    inputs = batch(name, model)
    special = {i for i in (0, 1, IMAGE, 101, 102, 103) if name == "qwen2_5_vl" or i not in (102, 103)}
    ids = inputs["input_ids"].clone()
    ids[0, -3] = 1  # a begin-of-sequence token in the middle of the question
    inputs["input_ids"] = ids
    ctx = read(model, inputs, question=True)
    embed = model.get_input_embeddings().weight
    for b, row in enumerate(ids.tolist()):
        last = max(i for i, token in enumerate(row) if token == IMAGE)
        words = [token for token in row[last + 1 :] if token not in special]
        assert ctx.question_ids is not None
        assert ctx.question_valid is not None
        assert ctx.question_features is not None
        assert ctx.question_ids[b][ctx.question_valid[b]].tolist() == words
        torch.testing.assert_close(ctx.question_features[b][ctx.question_valid[b]], embed[words])
    text, asked = ctx.question()
    assert text.shape[:2] == asked.shape
    assert torch.equal(asked.sum(1), ctx.question_valid.sum(1)[ctx.row])


def test_without_text_behind_the_image_the_question_is_all_text() -> None:
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=2, text=1)
    inputs["input_ids"][0, -1] = 1  # nothing but a special token behind the image
    ids = [i for i in inputs["input_ids"][0].tolist() if i not in (0, 1, IMAGE)]
    ctx = read(model, inputs, question=True)
    assert ctx.question_ids is not None
    assert ctx.question_ids[0].tolist() == ids


def test_at_a_cut_the_question_is_hidden_states() -> None:
    model, found = build("llava"), {}
    inputs = batch("llava", model)
    hook = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda m, a, k: found.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    ctx = read(model, inputs, layer=2, question=True)
    behind = torch.cummax(visual(inputs).long().flip(1), 1).values.flip(1).eq(0) & inputs["attention_mask"].bool()
    for b in range(2):
        assert ctx.question_features is not None
        assert ctx.question_valid is not None
        torch.testing.assert_close(ctx.question_features[b][ctx.question_valid[b]], found["x"][b, behind[b]])


def test_what_is_not_declared_is_not_there() -> None:
    ctx = read(build("llava"), batch("llava", build("llava")))
    assert (ctx.question_features, ctx.pixels, ctx.project, ctx.encoder_features) == (None, None, None, None)
    with pytest.raises(ConfigError, match="declare question=True"):
        ctx.question()


# -------------------------------------------------------------------------------------------------------- the projector


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_project_is_the_projector_token_by_token(name: str) -> None:
    model = build(name)
    ctx = read(model, batch(name, model), projector=True)
    assert ctx.project is not None
    assert ctx.encoder_features is not None
    seen = ctx.valid & (ctx.encoder_features != 0).any(-1)
    rows = ctx.encoder_features[seen]
    mine, features = ctx.project(rows), ctx.features[seen]
    torch.testing.assert_close(mine, features)
    torch.testing.assert_close(ctx.project(rows[:1]), mine[:1])
    together = ctx.project(ctx.encoder_features)
    torch.testing.assert_close(together[seen], ctx.project(rows))


class Packed(torch.nn.Module):
    """A linear layer in eight bits, as quantised models have it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale, self.bias = float(linear.weight.abs().max()) / 127, linear.bias
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype is torch.int8
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_packed_weights_of_the_projector_stay_packed() -> None:
    model = copy.deepcopy(build("llava"))
    projector = model.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = Packed(projector.linear_1), Packed(projector.linear_2)
    ctx = read(model, batch("llava", model), projector=True)
    assert ctx.project is not None
    assert ctx.encoder_features is not None
    torch.testing.assert_close(ctx.project(ctx.encoder_features), ctx.features)


def test_the_projector_runs_in_float32_and_has_derivatives() -> None:
    for name in ("qwen2_5_vl", "mistral3", "idefics3", "gemma3"):
        model = build(name, dtype=torch.bfloat16)
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(name, model).items()}
        ctx = read(model, inputs, projector=True)
        assert ctx.project is not None
        assert ctx.encoder_features is not None
        x = ctx.encoder_features[0, :3].float()
        with torch.no_grad():
            difference = (ctx.project(x + 1e-3) - ctx.project(x - 1e-3)) / 2e-3
        moved = torch.func.jvp(ctx.project, (x,), (torch.ones_like(x),))[1].detach()
        assert moved.dtype is torch.float32
        assert moved.abs().sum(1).gt(0).all()
        torch.testing.assert_close(moved, difference, rtol=2e-2, atol=2e-2 * moved.abs().max().item())


# ----------------------------------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pixels_are_those_that_change_when_the_picture_changes(name: str) -> None:
    """A disturbed pixel of the input shows in the pixels of one token (of two where a thumbnail repeats it)."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    plain = read(model, inputs, pixels=True).pixels
    assert plain is not None
    pictures = inputs["pixel_values"]
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        at = int(torch.randint(pictures.numel(), (1,), generator=g))
        other = pictures.clone()
        other.view(-1)[at] += 1.0
        changed = read(model, inputs | {"pixel_values": other}, pixels=True).pixels
        assert changed is not None
        moved = (changed != plain).nonzero()
        assert len(moved) <= 1
        if name not in ("llava_next", "llava_onevision") and "qwen" not in name and name != "glm4v":
            assert len(moved) == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "mistral3", "idefics3"])
def test_a_token_has_the_pixels_at_its_place(name: str) -> None:
    """A picture whose grey tells the place: the token at (row, column) has that grey, in levels of 0 … 1."""
    model = build(name)
    inputs = batch(name, model, rows=1, images=1, pad=0)
    ctx = read(model, inputs, pixels=True)
    assert ctx.pixels is not None
    height, width = (int(n) + 1 for n in ctx.grid[0].amax(0)[1:])
    place = (torch.arange(height)[:, None] * width + torch.arange(width)).double() / (height * width)
    mean, std = (torch.tensor(x).double() for x in visiontok_statistics(model))
    if "pixel_values" in inputs and inputs["pixel_values"].ndim > 2:
        size = inputs["pixel_values"].shape[-1] // width
        picture = place.repeat_interleave(size, 0).repeat_interleave(size, 1)
        planes = (picture - mean[:, None, None]) / std[:, None, None]
        inputs["pixel_values"] = planes.expand_as(inputs["pixel_values"]).clone()
    else:  # rows of patches, four of each token after the other: channels, frames, pixels
        rows = place.flatten().repeat_interleave(4)
        patch = ((rows[:, None] - mean) / std)[:, :, None].expand(-1, -1, inputs["pixel_values"].shape[1] // 3)
        inputs["pixel_values"] = patch.flatten(1).contiguous()
    ctx = read(model, inputs, pixels=True)
    assert ctx.pixels is not None
    where = ctx.grid[0, :, 1] * width + ctx.grid[0, :, 2]
    expected = (where / (height * width)).float()[:, None, None].expand_as(ctx.pixels[0])
    torch.testing.assert_close(ctx.pixels[0], expected, rtol=1e-5, atol=1e-6)


def test_pixels_are_those_of_the_first_of_two_frames() -> None:
    model = build("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", model, rows=1, pad=0)
    plain = read(model, inputs, pixels=True).pixels
    assert plain is not None
    for frame in (0, 1):
        other = inputs["pixel_values"].clone().view(-1, 3, 2, 16)
        other[:, :, frame] += 1
        changed = read(model, inputs | {"pixel_values": other.flatten(1)}, pixels=True).pixels
        assert changed is not None
        assert torch.equal(changed, plain) == (frame == 1)


@pytest.mark.parametrize("name", ["llava_next", "idefics3"])
def test_crops_that_pad_a_batch_are_nobodys_pixels(name: str) -> None:
    """A wide picture beside a square one: two of its five crops are filled up. Two tiles beside one."""
    from visiontok.adapters.base import find

    from visiontok.engine.vision import FeatureRecorder, record_of

    base, g = build(name).model, torch.Generator().manual_seed(0)
    if name == "llava_next":
        pixels, sizes = torch.randn(2, 5, 3, 32, 32, generator=g).double(), torch.tensor([[64, 64], [32, 64]])
        padding, inputs = (1, slice(3, None)), {"pixel_values": pixels, "image_sizes": sizes}
    else:
        pixels = torch.randn(2, 2, 3, 32, 32, generator=g).double()
        padding, inputs = (1, slice(1, None)), {"pixel_values": pixels}
    pixels[padding] = 0
    recorder = FeatureRecorder.on(base, "image")
    with torch.no_grad():
        record = record_of(base.get_image_features(**inputs, return_dict=True))
    recorder.remove()
    assert record is not None
    adapter = find(base)
    items = adapter.pixels(record)
    assert [len(item) for item in items] == [len(grid) for grid in adapter.grids(record)]
    assert not any(bool((item == 0).any()) for item in items)  # no pixel of the padding
    shown = torch.cat([item.flatten() for item in items])
    expected = pixels.numel() - pixels[padding].numel()
    assert shown.isfinite().sum() <= expected


def visiontok_statistics(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from visiontok.adapters.base import find

    return find(model.model).pixel_statistics


# ---------------------------------------------------------------------------------------------------------------- ERASE


def painted(model: Any, inputs: dict[str, Any], textured: float) -> dict[str, Any]:
    """The first image with noise in the share ``textured`` of its patches, the others flat; the second all flat."""
    pixels = torch.zeros_like(inputs["pixel_values"])
    size = model.config.vision_config.patch_size
    g = torch.Generator().manual_seed(0)
    side = pixels.shape[-1] // size
    for p in range(round(textured * side * side)):
        r, c = divmod(p, side)
        pixels[0, :, r * size : (r + 1) * size, c * size : (c + 1) * size] = torch.randn(3, size, size, generator=g)
    return inputs | {"pixel_values": pixels}


def test_erase_keeps_what_the_pixels_ask_for_and_ends_at_a_quarter() -> None:
    """The published setting: 0.827 of the complex picture's 16 tokens, 0.403 of the flat one's, then 4 of both."""
    model = build("llava")
    inputs = painted(model, batch("llava", model, rows=1, pad=0), textured=0.75)
    with visiontok.compress(model, "erase") as compression, torch.no_grad():
        model(**inputs)
        complex_, flat = (image.kept for image in compression.report.images)
        kept = compression.ledger.alive(0)[0][visual(inputs)[0]][:16]
    assert complex_ == (13, 13, 4, 4)
    assert flat == (6, 4, 4, 4)
    assert kept[:12].all()  # the textured patches


def test_erase_ranks_by_the_entropy_of_the_pixels() -> None:
    model = build("llava")
    inputs = painted(model, batch("llava", model, rows=1, pad=0), textured=0.25)  # the first four patches
    recipe = Recipe(stages=(Stage(kind="prompt", method=Erase(), keep=visiontok.Budget.tokens(10)),))
    with visiontok.compress(model, recipe) as compression, torch.no_grad():
        model(**inputs)
        kept = compression.ledger.alive(0)[0][visual(inputs)[0]].view(2, 16)
    # both pictures are flat in their median: 0.403 of what 0.827 would be, the textured patches first
    assert kept.sum(1).tolist() == [math.floor(10 * 0.403 / 0.827)] * 2
    assert kept[0, :4].all()
    assert kept[1, :4].all()  # all alike: lowest index


# ------------------------------------------------------------------------------------------------- CDPruner with a CLIP


@pytest.fixture(scope="module")
def clip() -> Any:
    """A tiny random model of open_clip; nothing is downloaded."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(16, open_clip.model.CLIPVisionCfg(**vision), open_clip.model.CLIPTextCfg(**text)).eval()


def words(ids: Any) -> str:
    return " ".join(f"word{i}" for i in ids)


def test_clip_texts_are_what_open_clip_makes_of_them(clip: Any) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    pair = OpenClip(clip, tokenizer.encode, words)
    with torch.no_grad():
        torch.testing.assert_close(pair.texts([3, 14, 15]), clip.encode_text(tokenizer(words([3, 14, 15]))))
    assert pair.texts(range(60)).shape == (3, 16)  # a long question in pieces of 77 tokens
    with pytest.raises(UnsupportedError, match="its patches have 32 channels, the vision tower's 20"):
        pair.images(torch.zeros(2, 20))


def test_a_clip_pair_is_exact_under_autocast(clip: Any) -> None:
    import open_clip

    pair = OpenClip(clip, open_clip.get_tokenizer("ViT-B-32").encode, words)
    patches = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    images, texts = pair.images(patches), pair.texts([3, 14, 15])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pair.images(patches), images)
        assert torch.equal(pair.texts([3, 14, 15]), texts)


def test_cdpruner_with_a_clip_pair_keeps_what_the_rule_says(clip: Any) -> None:
    """Relevance: minus the cosine of projected patches and the question's text; then the DPP, here by determinants."""
    import open_clip

    model = build("llava")
    inputs = batch("llava", model, rows=2, images=[1, 1])
    pair = OpenClip(clip, open_clip.get_tokenizer("ViT-B-32").encode, words)
    ctx = read(model, inputs, encoder_features=True, question=True)
    method = CDPruner(clip=pair)
    assert method.label == "cdpruner"
    with visiontok.compress(model, method, keep=4) as compression, torch.no_grad():
        model(**inputs)
        alive = compression.ledger.alive(0)
    visual_ = clip.visual
    for b in range(2):
        assert ctx.encoder_features is not None
        assert ctx.question_ids is not None
        assert ctx.question_valid is not None
        ids = ctx.question_ids[b][ctx.question_valid[b]].tolist()
        with torch.no_grad():
            patches = visual_.ln_post(ctx.encoder_features[b].float()) @ visual_.proj
            text = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(words(ids)))
        relevance = -torch.cosine_similarity(patches, text, dim=-1)
        r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        z = torch.nn.functional.normalize(ctx.features[b].double(), dim=-1)
        kernel = r[:, None] * (z @ z.T) * r
        chosen: list[int] = []
        for _ in range(4):
            gains = [
                -1.0 if i in chosen else float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))
                for i in range(16)
            ]
            chosen.append(max(range(16), key=gains.__getitem__))
        assert alive[b][visual(inputs)[b]].nonzero()[:, 0].tolist() == sorted(chosen)


def test_a_clip_pair_is_loaded_by_name_only_when_named(monkeypatch: pytest.MonkeyPatch, clip: Any) -> None:
    asked = []

    def load(name: str, tokenizer: str) -> OpenClip:
        import open_clip

        asked.append((name, tokenizer))
        return OpenClip(clip, open_clip.get_tokenizer("ViT-B-32").encode, words)

    monkeypatch.setattr(OpenClip, "load", load)
    model = build("llava")
    for options, loads in (({}, []), ({"clip": "ViT-X/w", "tokenizer": "here"}, [("ViT-X/w", "here")])):
        recipe = visiontok.recipe("cdpruner", keep=4, **options)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        with visiontok.compress(model, recipe), torch.no_grad():
            model(**batch("llava", model))
        assert asked == loads
