"""Attention taps and encoder features: the numbers equal eager attention, and they land on the right tokens."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers as T
from visiontok.adapters.base import find
from visiontok.adapters.paligemma import PaliGemmaAdapter

import visiontok
from visiontok import Card, Method, Needs
from visiontok.conformance.zoo import (
    ARCHITECTURES,
    IMAGE,
    IMAGE_IDS,
    QWEN,
    SIGLIP,
    TEXT,
    VIT,
    batch,
    build,
    config,
    visual,
)
from visiontok.engine.probe import attention_modules
from visiontok.engine.tower import _exists, _received, describe_tower
from visiontok.engine.vision import FeatureRecorder, record_of
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Stage

pytestmark = pytest.mark.engine
CLIP = ("llava", "vipllava", "llava_next", "internvl")


@dataclass(frozen=True)
class Reader(Method):
    """Reads what it is told to and keeps everything but one token per image."""

    needed: Needs = field(default_factory=Needs)
    seen: dict[str, Any] = field(default_factory=dict)
    card: ClassVar[Card] = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self):
        return self.needed

    def select(self, ctx):
        for stat in ("cls", "cls_joined", "cls_logits", "keys", "received"):
            for layer in getattr(self.needed, f"vision_{stat}"):
                self.seen[f"{stat}{layer}"] = getattr(ctx.attention, stat)(layer)
        for offset in self.needed.decoder_last_row:
            self.seen[f"last{offset}"] = ctx.attention.last_row(offset)
        for offset in self.needed.decoder_text_rows:
            self.seen[f"text{offset}"] = ctx.attention.text_rows(offset)
        for offset in self.needed.decoder_received:
            self.seen[f"received{offset}"] = ctx.attention.decoder_received(offset)
        self.seen["ctx"] = ctx
        keep = ctx.valid.clone()
        keep[:, 0] = False
        return keep


def pixels(inputs):
    """What get_image_features takes of a batch."""
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}


def spy_on_eager(monkeypatch, model, stack):
    """Record the probabilities of every eager attention call of a stack, by its attention module."""
    calls: dict[Any, list[torch.Tensor]] = {}
    for module in attention_modules(stack):
        source = sys.modules[type(module).__module__]
        eager = source.eager_attention_forward
        if not hasattr(eager, "spied"):

            def spy(module, *args, eager=eager, **kwargs):
                out = eager(module, *args, **kwargs)
                calls.setdefault(module, []).append(out[1])
                return out

            spy.spied = True
            monkeypatch.setattr(source, "eager_attention_forward", spy)
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vision_taps_equal_eager_attention(name, monkeypatch):
    model, eager = build(name, "sdpa", torch.float32), build(name, "eager", torch.float32)
    inputs = batch(name, model)
    reader = Reader(Needs(vision_received=(0, -1), vision_cls=(-1,) if name in CLIP else ()))
    with torch.no_grad():
        stock = model(**inputs).logits
        with visiontok.compress(model, reader):
            model(**inputs)
        ctx = reader.seen["ctx"]
        adapter = find(eager.model)
        tower = getattr(eager.model, adapter.tower)
        calls = spy_on_eager(monkeypatch, eager, tower)
        recorder = FeatureRecorder.on(eager.model, "image")
        record = record_of(eager.model.get_image_features(**pixels(inputs), return_dict=True))
        recorder.remove()
        assert torch.equal(model(**inputs).logits, stock), "a tap was left behind"
    modules, skip = attention_modules(tower), int(adapter.cls_token)
    for layer in (0, -1):
        probabilities = calls[modules[layer]]
        if name == "mistral3":  # all images in one call, block by block: a mean over queries is one per image
            probabilities = [
                p[:, :, at : at + 64, at : at + 64] for p in probabilities for at in range(0, p.shape[2], 64)
            ]
        patches = [p.mean((1, 2))[:, skip:] for p in probabilities]
        expected = [g.mean(1)[:, 0] for g in adapter.group(record, [p[..., None] for p in patches])]
        got = reader.seen[f"received{layer}"]
        for u, scores in enumerate(expected):
            torch.testing.assert_close(got[u, : len(scores)], scores.nan_to_num(nan=-1.0), rtol=1e-4, atol=1e-6)
    if name in CLIP:
        patches = [p.mean(1)[:, 0, skip:] for p in calls[modules[-1]]]
        expected = [g.mean(1)[:, 0] for g in adapter.group(record, [p[..., None] for p in patches])]
        for u, scores in enumerate(expected):
            got = reader.seen["cls-1"][u, : len(scores)]
            torch.testing.assert_close(got, scores.nan_to_num(nan=-1.0), rtol=1e-4, atol=1e-6)
    assert ctx.has_cls == (name in CLIP)


def spy_on_kernel(monkeypatch, model, stack):
    """Record the queries and keys of every eager attention call of a stack, by its attention module."""
    calls: dict[Any, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    modules = attention_modules(stack)
    source = sys.modules[type(modules[0]).__module__]
    eager = source.eager_attention_forward

    def spy(module, query, key, *args, **kwargs):
        calls.setdefault(module, []).append((query, key, kwargs["scaling"]))
        return eager(module, query, key, *args, **kwargs)

    monkeypatch.setattr(source, "eager_attention_forward", spy)
    return calls


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "llava_onevision", "qwen2_5_vl"])
def test_keys_and_logits_are_those_of_the_tower(name, monkeypatch):
    model = build(name, "eager", torch.float32)
    inputs, adapter = batch(name, model), find(model.model)
    of_cls = {"vision_cls_logits": (-1,), "vision_cls_joined": (-1,)} if name in CLIP else {}
    reader = Reader(Needs(vision_keys=(-1,), **of_cls))
    tower = getattr(model.model, adapter.tower)
    with torch.no_grad():
        with visiontok.compress(model, reader):
            model(**inputs)
        calls = spy_on_kernel(monkeypatch, model, tower)[attention_modules(tower)[-1]] = []
        calls = spy_on_kernel(monkeypatch, model, tower)
        recorder = FeatureRecorder.on(model.model, "image")
        record = record_of(model.model.get_image_features(**pixels(inputs), return_dict=True))
        recorder.remove()
    seen, skip = calls[attention_modules(tower)[-1]], int(adapter.cls_token)

    def grouped(values):
        """Per image, the (n, C) means of (crops, patches, C) over the patches of each token."""
        return [g.mean(1) for g in adapter.group(record, values)]

    # one head after the other
    keys = [torch.cat([k[:, h, skip:] for h in range(k.shape[1])], -1) for _, k, _ in seen]
    got = reader.seen["keys-1"]
    assert got.shape[2:] == (seen[0][1].shape[1], seen[0][1].shape[3])
    for u, expected in enumerate(grouped(keys)):
        torch.testing.assert_close(got[u, : len(expected)].flatten(1), expected.nan_to_num(nan=0.0))
        assert not got[u, len(expected) :].any()
    if name in CLIP:
        heads = [[q[:, h, :1] @ k[:, h].mT for h in range(q.shape[1])] for q, k, _ in seen]
        logits = [
            torch.stack(products).mean(0)[:, 0, skip:] * scale
            for products, (*_, scale) in zip(heads, seen, strict=True)
        ]
        width = got[0, 0].numel()
        joined = [(sum(products) / width**0.5).softmax(-1)[:, 0, skip:] for products in heads]
        for stat, values, missing in (("cls_logits-1", logits, 0.0), ("cls_joined-1", joined, -1.0)):
            for u, expected in enumerate(grouped([v[..., None] for v in values])):
                mine = reader.seen[stat][u, : len(expected)]
                torch.testing.assert_close(mine, expected[:, 0].nan_to_num(nan=missing), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patches_are_mapped_to_the_tokens_they_become(name):
    """Disturb one patch behind the tower and see which token changes: that is where its score must go."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0, images=2)
    adapter = find(model.model)
    where: dict[str, Any] = {}

    def disturb(hidden):
        where["shape"] = hidden.shape
        if "patch" in where:
            hidden = hidden.clone(memory_format=torch.contiguous_format)
            hidden.view(-1, hidden.shape[-1])[where["patch"]] += torch.linspace(-9, 9, hidden.shape[-1])
        return hidden

    if name in ("internvl", "idefics3", "smolvlm", "mistral3", *QWEN):  # where the projector sees merged patches
        tower = getattr(model.model, adapter.tower)
        wanted, skip = attention_modules(tower)[-1], int(adapter.cls_token)
        block = next(m for m in tower.modules() if any(child is wanted for child in m.children()))

        def behind(module, args, output):
            return disturb(output) if torch.is_tensor(output) else (disturb(output[0]), *output[1:])

        hook = block.register_forward_hook(behind)
    else:
        skip = 0
        projector = model.model.get_submodule(adapter.projector)
        hook = projector.register_forward_pre_hook(lambda module, args: (disturb(args[0]), *args[1:]))
    recorder = FeatureRecorder.on(model.model, "image")

    def encode():
        output = model.model.get_image_features(**pixels(inputs), return_dict=True)
        where["record"] = record_of(output)
        return torch.cat([item.reshape(-1, item.shape[-1]) for item in output.pooler_output])

    try:
        with torch.no_grad():
            plain = encode()
            record = where["record"]
            shape = where["shape"]
            crops, length = (1, shape[0]) if len(shape) == 2 else shape[:2]
            total = crops * (length - skip)
            for patch in torch.randperm(total, generator=torch.Generator().manual_seed(0))[:12].tolist():
                crop, p = divmod(patch, length - skip)
                where["patch"] = crop * length + skip + p
                changed = ((encode() - plain).abs().amax(-1) > 1e-9).nonzero().flatten().tolist()
                del where["patch"]
                indicator = torch.zeros(crops, length - skip, 1)
                indicator[crop, p] = 1
                groups = adapter.group(record, [indicator])
                scores = torch.cat([g.mean(1)[:, 0] for g in groups])
                assert (scores > 0).nonzero().flatten().tolist() == changed
    finally:
        hook.remove()
        recorder.remove()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_features_are_the_projector_input_of_their_token(name):
    model = build(name)
    inputs = batch(name, model)
    reader = Reader(Needs(encoder_features=True))
    with visiontok.compress(model, reader), torch.no_grad():
        model(**inputs)
    ctx = reader.seen["ctx"]
    features = ctx.encoder_features
    assert features.shape[:2] == ctx.features.shape[:2]
    if name in ("llava", "vipllava", "paligemma"):  # here a token is a function of its own patch alone
        with torch.no_grad():
            projected = model.model.multi_modal_projector(features)
        torch.testing.assert_close(projected, ctx.features)
    if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        merger = model.model.visual.merger
        rows = features[ctx.valid].reshape(-1, 32)
        with torch.no_grad():
            torch.testing.assert_close(merger(rows), ctx.features[ctx.valid])


@pytest.mark.parametrize("schedule", ["cut", "prompt and cut", "inject and cut"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v", "idefics3"])
def test_decoder_taps_equal_eager_attention(name, schedule, monkeypatch):
    model, eager = build(name, "sdpa", torch.float32), build(name, "eager", torch.float32)
    inputs = batch(name, model)
    reader = Reader(Needs(decoder_last_row=(-1, -2), decoder_text_rows=(-1,), decoder_received=(-1,)))
    before = {
        "cut": (),
        "prompt and cut": (Stage(kind="prompt", method=Reader()),),
        "inject and cut": (Stage(kind="inject", layer=1),),
    }[schedule]
    stages = (*before, Stage(kind="cut", method=reader, layer=3))
    with visiontok.compress(model, visiontok.Recipe(stages=stages)), torch.no_grad():
        model(**inputs)
    taken = dict(reader.seen)
    text = eager.model.text_model if hasattr(eager.model, "text_model") else eager.model.language_model
    calls = spy_on_eager(monkeypatch, eager, text)
    with visiontok.compress(eager, visiontok.Recipe(stages=stages)) as compression, torch.no_grad():
        eager(**inputs)
    ctx = reader.seen["ctx"]
    seen = visual(inputs)
    for offset in (-1, -2):
        layer = 3 + offset
        probabilities = calls[text.layers[layer].self_attn][0].mean(1)  # (B, M, M) in slots
        alive = compression.ledger.alive(layer)
        if probabilities.shape[-1] == alive.shape[1]:  # nothing was removed yet: slots are positions, padding too
            alive = torch.ones_like(alive)
        for u in range(len(ctx.row)):
            row = int(ctx.row[u])
            positions = alive[row].nonzero().flatten().tolist()
            slot = {p: probabilities.shape[-1] - len(positions) + i for i, p in enumerate(positions)}
            mine = compression.ledger.units.slots[u][compression.ledger.units.valid[u]].tolist()
            for n, p in enumerate(mine):
                if not ctx.valid[u, n]:
                    continue
                expected = probabilities[row, -1, slot[p]]
                torch.testing.assert_close(taken[f"last{offset}"][u, n], expected, rtol=1e-3, atol=1e-6)
                if offset == -1:
                    last = int(seen[row].nonzero().max())
                    asking = [slot[q] for q in positions if q > last]
                    expected = probabilities[row, asking, slot[p]].mean()
                    torch.testing.assert_close(taken["text-1"][u, n], expected, rtol=1e-3, atol=1e-6)
                    everyone = [slot[q] for q in positions if inputs["attention_mask"][row, q]]
                    expected = probabilities[row, everyone, slot[p]].mean()
                    torch.testing.assert_close(taken["received-1"][u, n], expected, rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class Asker(Reader):
    """A cut that reads what attention could not be read of without the cut's own layer, or turned."""

    alone: bool = False  # no visual token is in the layer before

    def needs(self):
        own = Needs(decoder_last_row=(0,), decoder_text_rows=(0,), decoder_received=(0,), question=True)
        if self.alone:
            return dataclasses.replace(own, decoder_text_heads=(0,))
        return dataclasses.replace(
            own, decoder_text_heads=(-1, 0), decoder_unturned_row=(-1,), decoder_flow=(-1,), decoder_to_text=(-1,)
        )

    def select(self, ctx):
        read = ctx.attention
        self.seen.update(last=read.last_row(0), text=read.text_rows(0), all=read.decoder_received(0))
        self.seen["heads0"] = read.text_heads(0)
        if not self.alone:
            self.seen.update(
                {
                    "heads-1": read.text_heads(-1),
                    "unturned": read.unturned_row(-1),
                    "flow": read.flow(-1),
                    "to": read.to_text(-1),
                }
            )
        return super().select(ctx)


@pytest.mark.parametrize("schedule", ["cut", "prompt and cut", "two cuts", "inject and cut", "inject at the cut"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v"])
def test_a_layer_tells_beforehand_what_it_would_attend_to(name, schedule, monkeypatch):
    """The attention of the layer behind the cut, had there been none, in an eager model; and that of the words."""
    model, eager = build(name, "sdpa", torch.float32), build(name, "eager", torch.float32)
    inputs = batch(name, model)
    asker = Asker(alone=schedule == "inject at the cut")
    stages: tuple[Stage, ...] = {
        "cut": (),
        "prompt and cut": (Stage(kind="prompt", method=Reader()),),
        "two cuts": (Stage(kind="cut", layer=1, method=Reader()),),
        "inject and cut": (Stage(kind="inject", layer=1),),
        "inject at the cut": (Stage(kind="inject", layer=3),),
    }[schedule]
    recipe = visiontok.Recipe(stages=(*stages, Stage(kind="cut", method=asker, layer=3)))
    with visiontok.compress(model, recipe) as compression, torch.no_grad():
        model(**inputs)
    units = compression.ledger.units

    text = eager.model.text_model if hasattr(eager.model, "text_model") else eager.model.language_model
    calls, states = spy_on_eager(monkeypatch, eager, text), {}
    hook = text.layers[2].input_layernorm.register_forward_pre_hook(lambda module, args: states.update(x=args[0]))
    attended = inputs["attention_mask"].bool()
    with torch.no_grad():
        if stages:
            with visiontok.compress(eager, visiontok.Recipe(stages=stages)) as compression:
                eager(**inputs)
            alive = compression.ledger.alive(3)
        else:
            eager(**inputs)
            alive = attended
    hook.remove()
    maps = {layer: calls[text.layers[layer].self_attn][0] for layer in (2, 3)}  # (B, H, M, M) in slots
    if maps[3].shape[-1] == alive.shape[1]:  # slots are positions, padding too
        alive = torch.ones_like(alive)
    ctx, seen, special = asker.seen["ctx"], visual(inputs), find(eager.model).special_ids()
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    for u, row in enumerate(ctx.row.tolist()):
        positions = alive[row].nonzero().flatten().tolist()
        slot = {p: maps[3].shape[-1] - len(positions) + i for i, p in enumerate(positions)}
        asking = [p for p in positions if p > int(seen[row].nonzero().max())]
        words = [slot[p] for p in asking if int(inputs["input_ids"][row, p]) not in special]
        everyone = [slot[p] for p in positions if attended[row, p]]
        pictures = [slot[p] for p in positions if seen[row, p]]
        mean = maps[3].mean(1)[row]
        here = ctx.valid[u].nonzero().flatten().tolist()
        columns = [slot[p] for p in units.slots[u][here].tolist()]
        close(asker.seen["last"][u, here], mean[-1, columns])
        close(asker.seen["text"][u, here], mean[[slot[p] for p in asking]].mean(0)[columns])
        close(asker.seen["all"][u, here], mean[everyone].mean(0)[columns])
        close(asker.seen["heads0"][u, here][..., : len(words)], maps[3][row][:, words][..., columns].permute(2, 0, 1))
        if schedule == "inject at the cut":  # no visual token was in the layer before
            continue
        close(asker.seen["heads-1"][u, here][..., : len(words)], maps[2][row][:, words][..., columns].permute(2, 0, 1))
        sharp = maps[2][row].double() ** 10
        sharp = (sharp / sharp.sum(-1, keepdim=True))[:, everyone][:, :, everyone]
        walk = torch.full((len(sharp), 1, len(everyone)), 1 / len(everyone)).double()
        for _ in range(5):
            walk = walk @ sharp
        flow = walk[:, 0].square().mean(0).sqrt().float()
        close(asker.seen["flow"][u, here], flow[[everyone.index(c) for c in columns]])
        read = [slot[p] for p in positions if attended[row, p] and not seen[row, p]]
        close(asker.seen["to"][u, here], maps[2][row].mean(0)[columns][:, read].sum(-1))
        module = text.layers[2].self_attn
        with torch.no_grad():
            x = text.layers[2].input_layernorm(states["x"][row])
            q, k = (w(x).unflatten(-1, (-1, module.head_dim)) for w in (module.q_proj, module.k_proj))
            if hasattr(module, "q_norm"):
                q, k = module.q_norm(q), module.k_norm(k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)[pictures]
        weights = (torch.einsum("hd,nhd->hn", q[-1], k) * module.scaling).softmax(-1).mean(0)
        close(asker.seen["unturned"][u, here], weights[[pictures.index(c) for c in columns]])


@pytest.mark.parametrize("stat", ["vision_cls", "vision_cls_joined", "vision_cls_logits"])
def test_a_tower_without_cls_says_so(stat):
    model = build("qwen2_5_vl")
    with (
        visiontok.compress(model, Reader(Needs(**{stat: (-1,)}))),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="no CLS token"),
    ):
        model(**batch("qwen2_5_vl", model))


def test_undeclared_attention_is_an_error():
    def method(ctx):
        ctx.attention.received(0)

    model = build("llava")
    with visiontok.compress(model, method), torch.no_grad(), pytest.raises(ConfigError, match="declare it"):
        model(**batch("llava", model))


def as_numbers(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def mean_of_dense(q, k, mask):
    """(1, N) mean of the map's rows over heads and the patches that exist, by hand, in float64; one picture."""
    shown = mask.any(0)
    weights = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights[:, :, shown].mean((1, 2)).float()


def test_pictures_that_share_a_call_are_told_apart():
    """Flash attention takes all images of a Qwen tower in one call and says where they end; a mask may say so, too."""
    q, k = torch.randn(2, 1, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    parts = [slice(0, 8), slice(8, 24)]
    expected = torch.cat(
        [mean_of_dense(q[:, :, p], k[:, :, p], torch.ones(2 * [p.stop - p.start]) > 0) for p in parts], 1
    )
    torch.testing.assert_close(_received(q, k, None, None, torch.tensor([0, 8, 24])), expected)
    block = torch.block_diag(torch.ones(8, 8), torch.ones(16, 16)).bool()[None, None]
    for mask in (block, as_numbers(block)):
        torch.testing.assert_close(_received(q, k, None, mask, None), expected)


def test_key_padding_is_no_border_between_pictures():
    """Padding inside a picture, as of a tile with a ``pixel_attention_mask``, is seen by nobody and counts nowhere."""
    q, k = torch.randn(2, 1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    shown = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0]).bool()
    padded = shown.expand(1, 1, 12, 12)
    expected = mean_of_dense(q, k, padded[0, 0])
    for mask in (padded, as_numbers(padded), shown[None]):
        torch.testing.assert_close(_received(q, k, None, mask, None), expected)
        assert (_exists(mask) == shown).all()
    both = padded & torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()
    halves = [mean_of_dense(q[:, :, p], k[:, :, p], padded[0, 0, p, p]) for p in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(_received(q, k, None, both, None), torch.cat(halves, 1))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_one_padded_tile(name, monkeypatch):
    model, eager = build(name, "sdpa", torch.float32), build(name, "eager", torch.float32)
    inputs = batch(name, model, rows=1, images=1)
    shown = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    shown[..., 16:] = False
    inputs["pixel_attention_mask"] = shown
    reader = Reader(Needs(vision_received=(-1,)))
    with torch.no_grad():
        with visiontok.compress(model, reader):
            model(**inputs)
        calls = spy_on_eager(monkeypatch, eager, eager.model.vision_model)
        eager(**inputs)
        for method in ("hiprune", "idpruner"):
            with visiontok.compress(model, method, keep=3) as compression:
                model(**inputs)
                assert compression.report.images[0].kept == (3,) * 4
    (p,) = calls[attention_modules(eager.model.vision_model)[-1]]
    exist = (p.sum((1, 2)) > 0).float()
    assert 0 < exist.mean() < 1
    patches = (p.mean(1) * exist[..., None]).sum(1) / exist.sum(1, keepdim=True)
    expected = find(eager.model).group(None, [patches[..., None]])[0].mean(1)[:, 0]
    torch.testing.assert_close(reader.seen["received-1"][0], expected, rtol=1e-4, atol=1e-6)


def made(**changes):
    """A random LLaVA whose config differs from the zoo's, and a prompt maker."""
    settings = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": config("llava").vision_config}
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config(
        T.LlavaConfig(**settings | {"vision_feature_layer": -2} | IMAGE_IDS | changes)
    ).eval()

    def inputs(*tokens, **more):
        ids = torch.tensor([[1, 5, *(t for n in tokens for t in (*[IMAGE] * n, 6)), 7]])
        pixels = torch.randn(len(tokens), 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}

    return model, inputs


def test_a_cls_token_that_is_kept_has_no_patch():
    """``vision_feature_select_strategy="full"``: scores stand at their patches, the CLS token gets none."""
    full, inputs = made(vision_feature_select_strategy="full")
    default, _ = made()
    seen = []
    for model, n in ((full, 17), (default, 16)):
        reader = Reader(Needs(vision_cls=(-2,), vision_received=(-2,), encoder_features=True))
        with visiontok.compress(model, reader), torch.no_grad():
            model(**inputs(n, n))
        seen.append(reader.seen)
    for stat in ("cls-2", "received-2"):
        assert seen[0][stat].shape == (2, 17)
        assert torch.equal(seen[0][stat][:, 1:], seen[1][stat])
        assert (seen[0][stat][:, 0] == -1).all()
    with_cls, without = seen[0]["ctx"], seen[1]["ctx"]
    assert torch.equal(with_cls.grid[:, 1:], without.grid)
    assert (with_cls.grid[:, 0] == -1).all()
    assert torch.equal(with_cls.encoder_features[:, 1:], without.encoder_features)
    for method in ("hiprune", "cls_topk", "idpruner", "grid"):
        with visiontok.compress(full, method, keep=3) as compression, torch.no_grad():
            full(**inputs(17, 17))
            assert [image.kept for image in compression.report.images] == [(3,) * 4] * 2


def test_pixtral_as_llava_keeps_rows_and_columns_of_each_picture():
    vision = {"model_type": "pixtral", **VIT, "num_hidden_layers": 2}
    model, inputs = made(vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full")
    sizes = torch.tensor([[16, 32], [32, 24]])
    reader = Reader(Needs(vision_received=(-1,), encoder_features=True))
    with visiontok.compress(model, reader), torch.no_grad():
        model(**inputs(8, 12, image_sizes=sizes))
        features = model.model.multi_modal_projector(reader.seen["ctx"].encoder_features)
    ctx = reader.seen["ctx"]
    torch.testing.assert_close(features[ctx.valid], ctx.features[ctx.valid])
    assert ctx.grid[0, :8].amax(0).tolist() == [0, 1, 3]
    assert ctx.grid[1].amax(0).tolist() == [0, 3, 2]
    received = reader.seen["received-1"]  # per picture a mean over queries of a softmax
    torch.testing.assert_close(torch.stack([received[0, :8].sum(), received[1].sum()]), torch.ones(2))


def test_values_that_do_not_fit_the_tokens_are_refused(monkeypatch):
    """A SigLIP tower under ``"default"`` loses its first patch; an adapter may be wrong; neither is cut to fit."""
    model, inputs = made(vision_config=SIGLIP)
    with (
        visiontok.compress(model, Reader(Needs(vision_received=(-1,)))),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="16 patches became 15 tokens"),
    ):
        model(**inputs(15))
    stock = PaliGemmaAdapter.group
    monkeypatch.setattr(PaliGemmaAdapter, "group", lambda *a, **k: [g[1:] for g in stock(*a, **k)])
    model = build("paligemma")
    with (
        visiontok.compress(model, Reader(Needs(vision_received=(-1,)))),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="15 values of the vision tower stand against an image of 16 tokens"),
    ):
        model(**batch("paligemma", model))


@pytest.mark.parametrize(("layer", "index"), [(2, 1), (1, 0), (0, 0), (-1, 2), (-2, 1), (-4, 0), ([2, -1], 1)])
def test_the_feature_layer_is_the_one_the_features_come_from(layer, index):
    model, inputs = made(vision_feature_layer=layer)
    tower = describe_tower(find(model.model))
    assert tower.feature_layer == index
    if layer == 0:  # the embeddings, nearest to layer 0; transformers 5.23 itself cannot run it
        return
    with visiontok.compress(model, "cls_topk", keep=3) as compression, torch.no_grad():
        model(**inputs(16))
        assert compression.report.images[0].kept == (3,) * 4
    if isinstance(layer, int) and layer != -4:
        outputs = []
        hook = model.model.vision_tower.encoder.layers[index].register_forward_hook(
            lambda module, args, output: outputs.append(output if torch.is_tensor(output) else output[0])
        )
        reader = Reader(Needs(encoder_features=True))
        with visiontok.compress(model, reader), torch.no_grad():
            model(**inputs(16))
        hook.remove()
        assert torch.equal(reader.seen["ctx"].encoder_features[0], outputs[0][0, 1:])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_last_row_is_that_of_the_last_token_behind_which_padding_may_come(name):
    model = build(name)
    inputs = batch(name, model, images=[1, 2])
    shift = [int((row == 0).sum()) for row in inputs["attention_mask"]]
    right = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            right[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift, strict=True)])
    seen = []
    for padded in (inputs, right):
        reader = Reader(Needs(decoder_last_row=(-1,)))
        cut = visiontok.Recipe(stages=(Stage(kind="cut", method=reader, layer=2),))
        with visiontok.compress(model, cut), torch.no_grad():
            model(**padded)
        seen.append(reader.seen["last-1"])
    torch.testing.assert_close(*seen)
