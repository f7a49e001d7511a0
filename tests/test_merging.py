"""Merging inside vision transformers: against plain loops, and where pairs of equal patches make it exact.

Two oracles. A forward pass written out here, in NumPy-like loops, does what the papers say. And a picture whose patches
come in equal pairs, given to a model without positions, can lose one of each without any effect, if what is left is
attended to and pooled in proportion to what it stands for.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import tome_naive
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import visiontok
import visiontok.functional as F
from visiontok import Budget, Recipe
from visiontok.calibration import merge_thresholds
from visiontok.conformance.zoo import batch, build
from visiontok.encoder import EncoderCompression
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Mass, Stage
from visiontok.overlay import draw_kept
from visiontok.places import Crop
from visiontok.recipes import find
from visiontok.schedules import merge_rates

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

SIZE, PATCH, WIDTH, DEPTH = 48, 8, 32, 4
PATCHES = (SIZE // PATCH) ** 2
CLIP_VISION = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
    model = timm.models.vision_transformer.VisionTransformer(**shape, num_classes=5, init_values=0.5, **options)
    return lively(model)


def clip(**vision: Any) -> Any:
    torch.manual_seed(0)
    tower = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": 8, **vision}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return lively(open_clip.CLIP(16, open_clip.CLIPVisionCfg(**tower), open_clip.CLIPTextCfg(**text)))


def transformers_clip() -> Any:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return lively(T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=16)))


def transformers_siglip() -> Any:
    return lively(T.SiglipVisionModel(T.SiglipVisionConfig(**CLIP_VISION)))


def lively(model: Any) -> Any:
    """In float64, with weights that make tokens differ and attend to some more than to others."""
    model = model.double().eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.6 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1))
    return model


def features(model: Any, x: Tensor) -> Tensor:
    if isinstance(model, T.CLIPModel):
        found = model.get_image_features(pixel_values=x)
        return found if torch.is_tensor(found) else found.pooler_output
    if isinstance(model, T.SiglipVisionModel):
        return model(pixel_values=x).pooler_output
    return model.encode_image(x) if hasattr(model, "encode_image") else model(x)


def pictures(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
MODELS: dict[str, Callable[[], Any]] = {
    "timm, CLS": vit,
    "timm, mean": functools.partial(vit, class_token=False, global_pool="avg"),
    "timm, attention": functools.partial(vit, class_token=False, global_pool="map"),
    "timm, registers": functools.partial(vit, reg_tokens=4, qk_norm=True, no_embed_class=True),
    "timm, even prefix": functools.partial(vit, reg_tokens=1, no_embed_class=True, global_pool="avg"),
    "open_clip": clip,
    "open_clip, mean": functools.partial(clip, pool_type="avg", final_ln_after_pool=True),
    "open_clip, attention": functools.partial(clip, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=3),
    "transformers, CLIP": transformers_clip,
    "transformers, SigLIP": transformers_siglip,
}


@functools.cache
def model_of(name: str) -> Any:
    return MODELS[name]()


# ---- operators


@given(st.integers(2, 20), st.integers(0, 19), st.integers(0, 3), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_rounds_equal_a_plain_loop(n: int, r: int, prefix: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, size = torch.randn(n + prefix, 5, generator=g), torch.randint(1, 4, (n + prefix,), generator=g).float()
    group = F.bipartite_rounds(x[None], [r], size=size[None], prefix=prefix)[0]
    expected = tome_naive(x.double().numpy(), r, prefix, size.numpy())
    assert group.tolist() == expected
    assert group.max() + 1 == n + prefix - min(r, n - 1)


def test_rows_of_other_lengths_and_rates_in_one_batch() -> None:
    x = torch.randn(3, 13, 6, generator=torch.Generator().manual_seed(0))
    lengths, rates = [13, 9, 2], [11, 0, 5]
    valid = torch.arange(13) < torch.tensor(lengths)[:, None]
    group = F.bipartite_rounds(x, rates, prefix=1, valid=valid)
    for b, (n, r) in enumerate(zip(lengths, rates, strict=True)):
        assert group[b, :n].tolist() == F.bipartite_rounds(x[b : b + 1, :n], [r], prefix=1)[0].tolist()
        assert group[b, n:].eq(-1).all()


def test_a_threshold_merges_all_pairs_above_it() -> None:
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(3))
    cosines = F.pair_cosines(x, prefix=1)
    assert cosines[:, 0].eq(-torch.inf).all()
    group = F.bipartite(x, threshold=0.3, prefix=1)
    assert (12 - group.amax(1) - 1).tolist() == (cosines > 0.3).sum(1).tolist()


@given(st.integers(1, 600), st.floats(0, 1), st.integers(1, 30), st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_rates_add_up_and_lie_on_a_line(n: int, share: float, depth: int, inflect: float) -> None:
    total = int(n * share)
    rates = merge_rates(total, depth, inflect)
    assert (len(rates), sum(rates)) == (depth, total)
    line = [total / depth * (1 + inflect * (2 * i / max(depth - 1, 1) - 1) * (depth > 1)) for i in range(depth)]
    assert all(abs(r - wanted) <= 1 + 1e-6 for r, wanted in zip(rates, line, strict=True))


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_middle_of_a_group_by_brute_force(n: int, groups: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    group, grid = torch.randint(-1, groups, (n,), generator=g), torch.randint(0, 5, (n, 3), generator=g)
    valid = torch.rand(n, generator=g) < 0.8
    found = F.middles(group, grid, groups, valid)
    for i in range(n):
        members = [j for j in range(n) if group[j] == group[i] and valid[j]]
        if group[i] < 0 or not valid[i]:
            assert found[i] == -1
            continue
        centre = grid[members].double().mean(0)
        assert found[i] == min(members, key=lambda j: (round(float((grid[j] - centre).square().sum()), 9), j))


# ---- encoders alone


def paired(seed: int = 0) -> Tensor:
    """Pictures whose patches come in equal pairs, an even one and the odd one behind it, both in places from 0 on."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randn(2, 3, SIZE // PATCH, SIZE // PATCH // 2, PATCH, PATCH, generator=g)
    rows = cells.double().repeat_interleave(2, 3)
    return rows.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, SIZE, SIZE)


def without_positions(model: Any) -> Any:
    blind = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in blind.named_parameters():
            if "visual" not in name and "text" in name:
                continue
            if any(word in name for word in ("pos_embed", "positional_embedding", "position_embedding")):
                p.zero_()
    return blind


@pytest.mark.parametrize("name", MODELS)
def test_equal_pairs_merge_without_any_effect(name: str) -> None:
    model, x = without_positions(model_of(name)), paired()
    with torch.no_grad():
        stock = features(model, x)
        rates = (PATCHES // 4, 0, 0, 0)  # before they stand in another order, in which equals may both be even
        with visiontok.compress(model, "tome", r=rates) as compression:
            got = features(model, x)
        torch.testing.assert_close(got, stock, rtol=1e-10, atol=1e-10)
        groups = compression.groups
        assert (groups[:, ::2] == groups[:, 1::2]).sum(1).tolist() == [PATCHES // 4] * 2
        assert compression.report.kept == (PATCHES - PATCHES // 4,) * 2
        with visiontok.compress(model, "tome", r=rates, proportional=False):
            assert (features(model, x) - stock).abs().max() > 1e-6  # merged patches then count once
        assert torch.equal(features(model, x), stock)


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_of_everything_is_stock(name: str) -> None:
    model, x = model_of(name), pictures()
    with torch.no_grad():
        stock = features(model, x)
        with visiontok.compress(model, "tome", keep=1.0):
            assert torch.equal(features(model, x), stock)
        with visiontok.compress(model, "tome", keep=0.5):
            assert not torch.allclose(features(model, x), stock)
        assert torch.equal(features(model, x), stock)
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all("Layer" in type(m).__name__ or "Attention" in type(m).__name__ for m in hooked)  # transformers' own


def written_out(model: Any, x: Tensor, rates: list[int]) -> Tensor:
    """timm's VisionTransformer with ToMe, block by block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    prefix, sizes = model.num_prefix_tokens, [np.ones(x.shape[1]) for _ in x]
    for block, r in zip(model.blocks, rates, strict=True):
        h, bias = block.norm1(x), torch.tensor(np.log(np.stack(sizes)))
        q, k, v = block.attn.qkv(h).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias[:, None, None]).softmax(-1)
        x = x + block.ls1(block.attn.proj((weights @ v).transpose(1, 2).flatten(2)))
        merged, left = [], []
        for row, keys, size in zip(x, k.mean(1), sizes, strict=True):
            group = tome_naive(keys.detach().numpy(), r, prefix, size)
            members = [[i for i, j in enumerate(group) if j == g] for g in range(max(group) + 1)]
            weight = torch.tensor(size)
            merged.append(torch.stack([(row[m] * weight[m, None]).sum(0) / weight[m].sum() for m in members]))
            left.append(np.array([size[m].sum() for m in members]))
        x, sizes = torch.stack(merged), left
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x, size = model.norm(x), torch.tensor(np.stack(sizes))
    if model.global_pool == "token":
        pooled = x[:, 0]
    else:
        pooled = (x * size[..., None])[:, prefix:].sum(1) / size[:, prefix:].sum(1, keepdim=True)
    return model.head(model.fc_norm(pooled))


@pytest.mark.parametrize("name", ["timm, CLS", "timm, mean", "timm, registers", "timm, even prefix"])
@pytest.mark.parametrize("rates", [(3, 9, 0, 5), (25, 0, 4, 1)])  # 25 of 36 is more than half: two rounds
def test_hooks_equal_the_forward_pass_written_out(name: str, rates: tuple[int, ...]) -> None:
    model, x = model_of(name), pictures()
    expected = written_out(model, x, list(rates))
    with visiontok.compress(model, "tome", r=rates) as compression:
        got = model(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y.square().sum(), model.blocks[0].mlp.fc1.weight)[0] for y in (got, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    report, first = compression.report, model.num_prefix_tokens + PATCHES
    assert report.layer_tokens == tuple(first - sum(rates[:i]) for i in range(DEPTH + 1))


@pytest.mark.parametrize("name", ["timm, CLS", "timm, registers", "open_clip", "transformers, CLIP"])
def test_flops_are_those_of_the_flop_counter(name: str) -> None:
    model, x = model_of(name), pictures()

    def counted() -> int:
        # with gradients, or MultiheadAttention hides its products
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            features(model, x)
        return int(counter.get_total_flops())

    stock = counted()
    with visiontok.compress(model, "tome", keep=0.4, inflect=-0.5) as compression:
        merged = counted()
    report = compression.report
    told = sum(report.flops_stock) - sum(report.flops)
    metric = 2 * 2 * WIDTH * 8 * sum(report.layer_tokens[:-1]) if name == "open_clip" else 0  # keys, their mean alone
    assert stock - merged == told - metric
    assert report.matching == sum(2 * 2 * (n // 2) * (n - n // 2) * 8 for n in report.layer_tokens[:-1])


def test_zero_shot_classification_goes_on_working() -> None:
    model, x = model_of("open_clip"), pictures(3)
    text = torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), visiontok.compress(model, "tome", keep=0.6) as compression:
        image, words, scale = model(x, text)
        assert visiontok.attached(model) is compression
        assert torch.equal(model.encode_text(text, normalize=True), words)
        probabilities = (scale * image @ words.mT).softmax(-1)
    assert probabilities.shape == (3, 4)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, dtype=torch.float64))
    assert visiontok.attached(model) is None


def test_open_clip_with_a_trunk_of_timm() -> None:
    cfg = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(16, open_clip.CLIPVisionCfg(**cfg), open_clip.CLIPTextCfg(**text)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), visiontok.compress(model, "tome", keep=0.5) as compression:
        assert model.encode_image(x).shape == (1, 16)
    assert compression.report.kept == (98,)


def test_a_picture_of_a_batch_alone_and_two_threads() -> None:
    """With thresholds, pictures of one batch keep different numbers of tokens, which are padded."""
    model, x = model_of("timm, registers"), pictures(5)
    with torch.no_grad(), visiontok.compress(model, "dymu", thresholds=0.75) as compression:
        together, kept = model(x), compression.report.kept
        assert len(set(kept)) > 1
        for i in range(5):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-10)
            assert compression.report.kept == kept[i : i + 1]
        found: dict[int, list[Any]] = {0: [], 1: []}

        def work(who: int) -> None:
            for _ in range(10):
                with torch.no_grad():
                    found[who].append((model(x[who : who + 2]), compression.report.kept))

        threads = [threading.Thread(target=work, args=(who,)) for who in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for who, results in found.items():
        for logits, left in results:
            torch.testing.assert_close(logits, together[who : who + 2], rtol=1e-10, atol=1e-10)
            assert left == kept[who : who + 2]


def test_the_fused_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(attn_mask)
        return stock(q, k, v, attn_mask, *args, **kwargs)

    for module in (torch.nn.functional, torch._C._nn):
        monkeypatch.setattr(module, "scaled_dot_product_attention", spy)
    for name in ("timm, CLS", "open_clip", "transformers, CLIP"):
        calls.clear()
        with visiontok.compress(model_of(name), "tome", keep=0.5):
            features(model_of(name), pictures(1))
        assert calls[0] is None
        assert [mask.shape[-2] for mask in calls[1:]] == [1] * (DEPTH - 1)  # a bias per key, no matrix


def test_the_settings_of_tinychart_and_auroracap() -> None:
    tiny, aurora = find("tinychart")(), find("auroracap")(ratio=0.2)
    shape = {"depth": 26, "layers": 27}
    assert tiny.merging(2916, None, **shape, official=True).r == (84,) * 26
    assert aurora.merging(729, None, **shape, official=True).r == (int(729 * 0.8 / 27),) * 26
    assert sum(aurora.merging(729, None, **shape, official=False).r) == 729 - 146
    with visiontok.compress(model_of("timm, CLS"), "tinychart") as compression:
        model_of("timm, CLS")(pictures(1))
    assert compression.report.kept == (round(PATCHES * (1 - 26 * 84 / 2916)),)
    official = visiontok.recipe("tome", r=[30, 0, 0, 1], fidelity="official")  # at most half in each layer
    with visiontok.compress(model_of("timm, CLS"), official) as compression:
        model_of("timm, CLS")(pictures(1))
    assert compression.report.kept == (17,)


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (vit, {"recipe": "divprune", "keep": 0.5}, "one merge stage"),
        (vit, {"recipe": "tome", "keep": Budget.per_tile(4)}, "tokens or a ratio"),
        (vit, {"recipe": "tome", "keep": 0.5, "mass": True}, "no language model"),
        (vit, {"recipe": "tome", "keep": 0.5, "inflect": 2.0}, r"inflect=2\.0"),
        (vit, {"recipe": "tome", "r": -1}, "r=-1"),
        (vit, {"recipe": "dymu", "thresholds": ()}, r"thresholds=\(\)"),
        (functools.partial(timm.create_model, "resnet18"), {"recipe": "tome", "keep": 0.5}, "no timm Vision"),
        (functools.partial(vit, block_fn=timm.models.vision_transformer.ResPostBlock), {"recipe": "tome"}, "ResPost"),
        (functools.partial(clip, qk_norm=True), {"recipe": "tome", "keep": 0.5}, "CustomResidualAttentionBlock"),
    ],
)  # fmt: skip
def test_what_is_refused_before_it_runs(make: Callable[[], Any], arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=match):
        visiontok.compress(make(), **arguments)


def test_what_is_refused_when_it_runs() -> None:
    model = vit()
    for options, match in (
        ({"r": (1, 2)}, "each of the 4 layers"),
        ({"r": 3, "keep": 9}, "leave keep or r out"),
    ):
        with visiontok.compress(model, "tome", **options), pytest.raises(ConfigError, match=match):
            model(pictures(1))
    with visiontok.compress(model, "dymu", thresholds=(0.5, 0.5)), pytest.raises(ConfigError, match="2 for a tower"):
        model(pictures(1))
    with visiontok.compress(model, "tome", keep=0.5) as compression:
        with pytest.raises(ConfigError, match="already compressed"):
            visiontok.compress(model, "tome", keep=0.5)
        with pytest.raises(ConfigError, match="run the model first"):
            _ = compression.report
        with pytest.raises(ConfigError, match="groups"):
            _ = compression.ledger
        model.train().set_grad_checkpointing()
        with pytest.raises(UnsupportedError, match="checkpointing"):
            model(pictures(1))
    compression.remove()


def test_a_copy_is_compressed_too() -> None:
    model, x = vit(), pictures(1)
    with torch.no_grad(), visiontok.compress(model, "tome", keep=0.5):
        expected, twin = model(x), copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(x), expected)
        theirs = visiontok.attached(twin)
        assert isinstance(theirs, EncoderCompression)
        theirs.remove()
        assert torch.equal(twin(x), model(x))


# ---- thresholds


def test_calibrated_thresholds_keep_the_share_that_was_asked_for() -> None:
    model, x = model_of("timm, CLS"), [pictures(6, seed) for seed in range(3)]
    thresholds = merge_thresholds(model, x, keep=0.6)
    kept: list[int] = []
    with torch.no_grad(), visiontok.compress(model, "dymu", thresholds=thresholds) as compression:
        for pixels in x:
            model(pixels)
            kept += compression.report.kept
    assert len(set(kept)) > 1
    assert sum(kept) / len(kept) == pytest.approx(0.6 * PATCHES, abs=1)


# ---- in the vision tower of a vision-language model

ONE_PATCH_EACH = ("llava", "llava_next", "llava_onevision", "paligemma")


def tower_written_out(tower: Any, pixels: Tensor, rates: list[list[int]], depth: int) -> list[tuple[Tensor, list[int]]]:
    """Per picture the states behind ``depth`` layers of a CLIP or SigLIP tower with ToMe, and each token's group."""
    prefix, found = int("CLIP" in type(tower).__name__), []
    for picture, rate in zip(pixels, rates, strict=True):
        x = tower.embeddings(picture[None])
        x = tower.pre_layrnorm(x) if prefix else x
        size, whole = np.ones(x.shape[1]), list(range(x.shape[1]))
        for layer, r in zip(tower.encoder.layers[:depth], rate, strict=True):
            h, attention = layer.layer_norm1(x), layer.self_attn
            q, k, v = (
                p(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (q @ k.mT * attention.scale + torch.tensor(np.log(size))).softmax(-1)
            x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
            group = tome_naive(k.mean(1)[0].numpy(), r, prefix, size)
            members = [[i for i, j in enumerate(group) if j == g] for g in range(max(group) + 1)]
            weight = torch.tensor(size)
            x = torch.stack([(x[0, m] * weight[m, None]).sum(0) / weight[m].sum() for m in members])[None]
            size, whole = np.array([size[m].sum() for m in members]), [group[g] for g in whole]
            x = x + layer.mlp(layer.layer_norm2(x))
        found.append((x[0], whole))
    return found


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "paligemma"])
@torch.no_grad()
def test_the_prompt_holds_what_the_tower_written_out_makes(name: str) -> None:
    model = build(name)
    inputs, base = batch(name, model), model.model
    tower = base.vision_tower
    tower = getattr(tower, "vision_model", tower)
    keep, depth = 6, base.config.vision_config.num_hidden_layers - (name == "llava")
    seen: list[Tensor] = []
    watch = base.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    with visiontok.compress(model, "tome", keep=keep) as compression:
        model(**inputs)
        ledger = compression.ledger
    watch.remove()
    pixels = inputs["pixel_values"]
    written = tower_written_out(tower, pixels, [merge_rates(16 - keep, depth)] * len(pixels), depth)
    sources, prefix = ledger.sources(), int(name == "llava")
    for u, (states, groups) in enumerate(written):
        states = states if prefix else tower.post_layernorm(states)
        row, slots = int(ledger.units.row[u]), ledger.units.slots[u]
        home = sources[row, slots]
        for i, slot in enumerate(slots.tolist()):
            together = [j for j in range(16) if groups[j + prefix] == groups[i + prefix]]
            assert int(home[i]) in slots[together].tolist()
            assert bool(ledger.alive(0)[row, slot]) == (int(home[i]) == slot)
        assert sum(int(home[i]) == int(slots[i]) for i in range(16)) == keep
        expected = base.multi_modal_projector(states[None])[0]
        torch.testing.assert_close(seen[0][row, slots], expected[groups[prefix:]], rtol=1e-9, atol=1e-9)


@pytest.mark.engine
@pytest.mark.parametrize("name", ONE_PATCH_EACH)
@torch.no_grad()
def test_the_work_of_the_tower_falls_as_reported(name: str) -> None:
    model = build(name)
    inputs = batch(name, model)
    given = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}

    def counted() -> int:
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            model.model.get_image_features(**given)
        return int(counter.get_total_flops())

    stock = counted()
    with visiontok.compress(model, "tome", keep=0.4, inflect=0.5) as compression:
        merged = counted()
        model(**inputs)
        account = compression.report.account
    assert account.vision is not None
    assert account.vision_stock is not None
    before, after = (part.tower + part.projector for part in (account.vision_stock, account.vision))
    assert (stock, merged) == (before, after)
    assert after < before


@pytest.mark.engine
@torch.no_grad()
def test_with_a_prompt_and_a_decoder_stage_under_one_budget() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    recipe = Recipe(
        stages=(
            Stage(kind="merge", method=find("tome")(), keep=Budget.tokens(10)),
            Stage(kind="prompt", method=find("cls_topk")(), keep=Budget.tokens(7)),
            Stage(kind="cut", method=find("fastv")(), layer=2, keep=Budget.tokens(3)),
        )
    )
    with visiontok.compress(model, recipe) as compression:
        model(**inputs)
        report, ledger = compression.report, compression.ledger
    assert {image.kept for image in report.images} == {(7, 7, 3, 3)}
    stands = (ledger.sources() == torch.arange(ledger.visual.shape[1])) & ledger.visual
    assert (ledger.alive(0) & ledger.visual <= stands).all()
    assert stands.sum() == 10 * len(report.images)
    average = visiontok.recipe("tome") + visiontok.recipe("fastv", layer=2)
    with visiontok.compress(model, average, keep=0.5) as compression:
        model(**inputs)
    assert all(image.average <= 8 for image in compression.report.images)
    assert all(image.kept[0] < 16 for image in compression.report.images)


def test_merged_patches_are_drawn_in_their_mean_colour() -> None:
    picture = Image.new("RGB", (600, 600), (10, 20, 30))
    picture.paste((110, 220, 90), (300, 0, 600, 300))  # the second of four cells
    cells = torch.tensor([[0.0, 0, 300, 300], [300, 0, 600, 300], [0, 300, 300, 600], [300, 300, 600, 600]])
    kept, home = torch.tensor([True, False, False, False]), torch.tensor([0, 0, -1, 3])
    crops = [Crop(0, 0, torch.arange(4), cells)]
    drawn = draw_kept(picture, crops, kept[None], merged=home[None]).image
    assert [drawn.getpixel(at) for at in ((150, 150), (450, 150))] == [(60, 120, 60)] * 2
    plain = draw_kept(picture, crops, kept[None]).image
    assert plain.getpixel((150, 150)) == (10, 20, 30)
    assert [drawn.getpixel(at) == plain.getpixel(at) for at in ((150, 450), (450, 450))] == [True] * 2


@pytest.mark.engine
@torch.no_grad()
def test_mass_attention_counts_the_members_of_a_group() -> None:
    model = build("llava")
    inputs = batch("llava", model)
    with visiontok.compress(model, "dymu", thresholds=0.4, mass=Mass(beta=1.0, merge=0.0)) as compression:
        weighed = model(**inputs).logits
        ledger = compression.ledger
    sources, mass = ledger.sources(), ledger.mass(0)
    for row in range(len(sources)):
        for place in torch.nonzero(ledger.visual[row])[:, 0].tolist():
            assert mass[row, place] == (sources[row] == place).sum()
    with visiontok.compress(model, "dymu", thresholds=0.4):
        assert not torch.allclose(model(**inputs).logits, weighed)


@pytest.mark.engine
@torch.no_grad()
def test_shorter_inputs_say_the_same() -> None:
    model = build("llava_next")
    inputs = batch("llava_next", model)
    with visiontok.compress(model, "tome", keep=0.4) as compression:
        inside, kept = model(**inputs).logits[:, -1], [i.kept[0] for i in compression.report.images]
    short = visiontok.compress_inputs(model, inputs, "tome", keep=0.4)
    torch.testing.assert_close(model(**short).logits[:, -1], inside, rtol=1e-5, atol=1e-5)
    assert [i.kept[0] for i in short.report.images] == kept


@pytest.mark.parametrize(
    ("name", "match"),
    [("vipllava", "several layers"), ("qwen2_5_vl", "merged in its vision tower"), ("idefics3", "'aim_merge'")],
)
def test_towers_that_need_their_grid_are_refused(name: str, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        visiontok.compress(build(name), "tome", keep=0.5)


@torch.no_grad()
def test_budgets_below_the_number_of_tiles_and_features_for_pixels_are_refused() -> None:
    model = build("llava_next")
    with visiontok.compress(model, "tome", keep=3), pytest.raises(UnsupportedError, match="each of the 5 tiles"):
        model(**batch("llava_next", model))
    model = build("llava")
    inputs = batch("llava", model)
    made = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    given = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": made}}
    expected = model(**given).logits
    with visiontok.compress(model, "tome", keep=3), pytest.raises(UnsupportedError, match="pass pixels"):
        model(**given)
    with visiontok.compress(model, "tome", keep=1.0):
        assert torch.equal(model(**given).logits, expected)


@pytest.mark.engine
def test_the_calibration_of_a_language_model(tmp_path: Path) -> None:
    from visiontok.calibration import CALIBRATORS, calibrate

    model = build("llava")
    samples = [functools.partial(batch, "llava", model, pad=0, only=row) for row in range(2)]
    kind: Any = CALIBRATORS["dymu"]
    options: dict[str, Any] = {"name": "tiny", "data": {"hash": "0"}}
    whole = calibrate(kind(keep=0.5), model, samples, **options)
    thresholds = whole.recommended["thresholds"]  # type: ignore[index]
    assert len(thresholds) == 2

    class Stop(Exception):  # noqa: N818
        pass

    def interrupt(stage: str, done: int, of: int) -> None:
        if stage.startswith("layer 1") and done == 1:
            raise Stop

    partial = tmp_path / "dymu.partial"
    with pytest.raises(Stop):
        calibrate(kind(keep=0.5), model, samples, **options, partial=partial, progress=interrupt)
    assert calibrate(kind(keep=0.5), model, samples, **options, partial=partial).to_dict() == whole.to_dict()
    path = tmp_path / "dymu.json"
    whole.save(path)
    with torch.no_grad(), visiontok.compress(model, path) as compression:
        kept = []
        for make in samples:
            model(**make())
            kept += [image.kept[0] for image in compression.report.images]
    assert sum(kept) / len(kept) == pytest.approx(8, abs=1)
    assert "vision layer" in (tmp_path / "dymu.svg").read_text()
