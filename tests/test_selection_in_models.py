"""The selecting methods in a model: image and tiny weights in, kept tokens out, as the loops of naive.py choose them.

Features, projector inputs and hidden states are taken from the stock model. On LLaVA so is the attention, from its
eager twin; on Qwen2.5-VL it comes from the taps, which tests/test_taps.py compares with eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import naive
import numpy as np
import pytest
import torch
from naive import Array, softmax
from torch import Tensor
from transformers import DynamicCache
from visiontok.adapters.base import find

import visiontok
from visiontok import Method, Needs
from visiontok.conformance.zoo import IMAGE, batch, build, visual
from visiontok.context import Context
from visiontok.method import Card

pytestmark = pytest.mark.engine
K = 5


@dataclass(frozen=True)
class Reader(Method):
    """Keeps one token and remembers the attention it saw."""

    seen: dict[str, Context] = field(default_factory=dict)
    card = Card(name="reader", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def needs(self) -> Needs:
        return Needs(vision_received=(-1,), projector=True)

    def select(self, ctx: Context) -> Tensor:
        self.seen["ctx"] = ctx
        return ctx.valid & (torch.arange(ctx.valid.shape[1]) == 0)


@dataclass(frozen=True)
class Image:
    """What one image is to the methods, as NumPy arrays."""

    features: Array  # (N, D)
    encoder: Array  # (N, E)
    last: Array  # (N,) CLS or received attention of the last tower layer
    deep: Array  # (N,) the same of the layer the features come from
    text: Array  # (T, D) the question
    height: int
    project: Callable[[Array], Array]


def images(name: str) -> tuple[Any, dict[str, Any], list[Image]]:
    model = build(name)
    inputs = batch(name, model)
    base, found = model.model, {}
    projector = base.get_submodule("multi_modal_projector" if name == "llava" else "visual.merger")
    hook = projector.register_forward_pre_hook(lambda m, a: found.update(x=a[0]))
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        features = base.get_image_features(**pixels, return_dict=True).pooler_output
    hook.remove()
    if name == "llava":
        tower = build(name, "eager", torch.float32).model.vision_tower
        with torch.no_grad():
            maps = tower(inputs["pixel_values"].float(), output_attentions=True).attentions
        last, deep = (maps[layer].mean(1)[:, 0, 1:] for layer in (-1, -2))
        encoder, heights = list(found["x"]), [4] * len(features)
    else:
        reader = Reader()
        with visiontok.compress(model, reader), torch.no_grad():
            model(**inputs)
        received = reader.seen["ctx"].attention.received(-1)
        last = deep = [received[u][reader.seen["ctx"].valid[u]] for u in range(len(features))]
        order = window_order(model, inputs["image_grid_thw"])
        encoder = list(found["x"].view(len(order), -1)[order.argsort()].split([len(f) for f in features]))
        heights = [int(h) // 2 for _, h, _ in inputs["image_grid_thw"]]

    def project(x: Array) -> Array:
        with torch.no_grad():
            return projector(torch.from_numpy(x).view(-1, found["x"].shape[-1])).numpy()

    special = {0, 1, IMAGE} | ({101, 102, 103} if name == "qwen2_5_vl" else set())
    out = []
    for b, row in enumerate(inputs["input_ids"].tolist()):
        behind = row[max(i for i, token in enumerate(row) if token == IMAGE) + 1 :]
        words = torch.tensor([token for token in behind if token not in special])
        text = model.get_input_embeddings()(words).detach().double().numpy()
        for u in (2 * b, 2 * b + 1):
            rows = (features[u], encoder[u], last[u], deep[u])
            out.append(Image(*(x.double().numpy() for x in rows), text, heights[u], project))
    return model, inputs, out


def window_order(model: Any, grids: Tensor) -> Tensor:
    """(units,) raster index of each unit in the order of the windows, which is also how Qwen2.5-VL undoes it."""
    tower = model.model.visual
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size
    order, start = [], 0
    for _, h, w in (grids // torch.tensor([1, 2, 2])).tolist():
        place = start + torch.arange(h * w).view(h, w)
        order += [
            i for r in range(0, h, side) for c in range(0, w, side) for i in place[r : r + side, c : c + side].flatten()
        ]
        start += h * w
    return torch.stack(order)


def sensitivity(image: Image) -> Array:
    drawn = torch.randn(64, image.encoder.shape[1], generator=torch.Generator().manual_seed(0)).double().numpy()
    total = np.zeros(len(image.encoder))
    for u in drawn / np.linalg.norm(drawn, axis=1, keepdims=True):
        total += np.linalg.norm(
            (image.project(image.encoder + 0.01 * u) - image.project(image.encoder - 0.01 * u)), axis=1
        )
    return total / 64 / 0.02


def cdpruner(image: Image) -> list[int]:
    z, n = image.features, len(image.features)
    relevance = np.array([np.mean([naive.cos(v, t) for t in image.text]) for v in z])
    r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = np.array([[r[i] * naive.cos(z[i], z[j]) * r[j] for j in range(n)] for i in range(n)])
    return naive.greedy(n, K, lambda i, chosen: float(np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))


RULES: dict[str, Callable[[Image, bool], list[int]]] = {
    "todre": lambda image, _: naive.todre_naive(image.features, image.last, K),
    "zoo_prune": lambda image, _: naive.zoo_prune_naive(image.features, sensitivity(image), K),
    "scope": lambda image, _: naive.scope_naive(image.encoder, image.deep, K),
    "cdpruner": lambda image, _: cdpruner(image),
    "mmtok": lambda image, clip: naive.mmtok_naive(
        image.text, image.features, image.encoder, K, 0.02 if clip else 0.01
    ),
    "eadp": lambda image, _: naive.eadp_naive(
        image.features, image.text, image.height, K, telling=0.2, spread=0.01, mix=0.5, power=2.0
    )[1],
    "dart": lambda image, _: naive.dart_naive(
        image.features, np.abs(image.features).sum(1), image.text, np.abs(image.text).sum(1), K, 4, 4
    ),
    "holov": lambda image, clip: naive.holov_naive(
        image.features, image.deep, K, 16 if clip else max(1, 1024 * len(image.deep) // (576 * K)), official=False
    ),
    "agile": lambda image, _: naive.agile_naive(image.encoder, image.deep, K, rate=0.6),
    "prunesid": lambda image, clip: naive.prunesid_naive(
        image.encoder, image.deep, K, K / 32 if clip else max(18 * K / len(image.deep), 1), official=False
    ),
}


OPTIONS: dict[str, dict[str, Any]] = {"agile": {"rate": 0.6}}  # few tokens: the radius must grow quickly

# Methods whose vectors may come from before the merger: rules of these vectors and of the image.
VECTOR_RULES: dict[str, tuple[dict[str, Any], Callable[[Array, Image], list[int]]]] = {
    "norm": ({}, lambda z, image: list(np.argsort(-np.linalg.norm(z, axis=1))[:K])),
    "divprune": ({}, lambda z, image: naive.divprune_naive(z, K)),
    "idpruner": ({"scorer": "norm"}, lambda z, image: naive.idpruner_naive(z, np.linalg.norm(z, axis=1), K)),
    "todre": ({}, lambda z, image: naive.todre_naive(z, image.last, K)),
}


def kept_of(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> list[list[int]]:
    """The tokens that each image of a batch keeps."""
    with visiontok.compress(model, method, keep=K, **options) as compression, torch.no_grad():
        model(**inputs)
        alive, units = compression.ledger.alive(0), compression.ledger.units
    assert alive[visual(inputs)].sum() == 4 * K
    places = zip(units.row, units.slots, units.valid, strict=True)
    return [alive[row][slots][valid].nonzero()[:, 0].tolist() for row, slots, valid in places]


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_kept_tokens_are_those_of_the_published_rule(name: str, method: str) -> None:
    model, inputs, pictures = images(name)
    assert kept_of(model, inputs, method, **OPTIONS.get(method, {})) == [
        sorted(RULES[method](image, name == "llava")) for image in pictures
    ]


@pytest.mark.parametrize("method", VECTOR_RULES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_vectors_may_come_from_before_the_merger(name: str, method: str) -> None:
    model, inputs, pictures = images(name)
    options, rule = VECTOR_RULES[method]
    before = kept_of(model, inputs, method, features="merger_in", **options)
    assert before == [sorted(rule(image.encoder, image)) for image in pictures]
    assert before != kept_of(model, inputs, method, **options) == [sorted(rule(i.features, i)) for i in pictures]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_sieve_cuts_by_the_published_rule(name: str) -> None:
    """Hidden states and attention of an eager twin, in its middle."""
    model, inputs = build(name, "eager", torch.float32), batch(name, build(name))
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with visiontok.compress(model, "sieve", keep=K) as compression, torch.no_grad():
        model(**inputs)
        alive, units = compression.ledger.alive(2), compression.ledger.units
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    special = {0, 1, IMAGE} | ({101, 102, 103} if name == "qwen2_5_vl" else set())
    for u in range(4):
        b, places = int(units.row[u]), units.slots[u][units.valid[u]]
        ids = inputs["input_ids"][b].tolist()
        behind = list(range(max(j for j, t in enumerate(ids) if t == IMAGE) + 1, len(ids)))
        words = [i for i in behind if ids[i] not in special]
        hidden, attention = out.hidden_states[2][b].double().numpy(), out.attentions[1][b].mean(0)[behind].mean(0)
        kept = naive.sieve_naive(hidden[places], hidden[words], attention[places].double().numpy(), K)
        assert alive[b][places].nonzero()[:, 0].tolist() == sorted(kept)


@dataclass(frozen=True)
class Cut:
    """What one image is to a cut on the input of layer 2 of an eager model, as NumPy arrays."""

    hidden: Array  # (N, D)
    own: Array  # (H, N) the last token in layer 2
    words: Array  # (H, Q, N) the question in layer 1
    visual: Array  # (N, D) embeddings
    text: Array  # (Q, D)
    unturned: Array  # (H, N) products of the last token in layer 1, without rotary positions, over all images
    mine: list[int]  # which of these columns are of this image
    pull: Array  # (Q, N)
    places: list[tuple[int, int]]


def of_cut(name: str) -> tuple[Any, dict[str, Any], list[Cut]]:
    model, inputs = build(name, "eager", torch.float32), batch(name, build(name))
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    text, seen = model.model.language_model, {}
    hooks = [
        text.register_forward_pre_hook(lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True),
        text.layers[1].input_layernorm.register_forward_hook(lambda m, a, out: seen.update(normed=out)),
        text.layers[2].input_layernorm.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0])),
    ]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        reader = Reader()
        with visiontok.compress(model, reader):
            model(**inputs)
        module = text.layers[1].self_attn
        q, k = (w(seen["normed"]).unflatten(-1, (-1, module.head_dim)) for w in (module.q_proj, module.k_proj))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    special, ctx, found = find(model.model).special_ids(), reader.seen["ctx"], []
    mask = inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).double().numpy()
    angle = 10000.0 ** -(np.arange(0, module.head_dim, 2) / module.head_dim)
    for u, b in enumerate(ctx.row.tolist()):
        ids, here = inputs["input_ids"][b].tolist(), ctx.place[u][ctx.valid[u]].tolist()
        everyone = visual(inputs)[b].nonzero()[:, 0].tolist()
        words = [i for i in range(everyone[-1] + 1, len(ids)) if ids[i] not in special]
        apart = position[b][words][:, None] - position[b][here]
        arrays = (
            seen["hidden"][b][here], maps[2][b][:, -1, here], maps[1][b][:, words][..., here],
            seen["embeds"][b][here], seen["embeds"][b][words],
            torch.einsum("hd,nhd->hn", q[b, -1], k[b, everyone]) * module.scaling,
        )  # fmt: skip
        places = [(int(r), int(c)) for _, r, c in ctx.grid[u][ctx.valid[u]].tolist()]
        pull = np.cos(apart[..., None] * angle).mean(-1)
        found.append(Cut(*(x.double().numpy() for x in arrays), [everyone.index(i) for i in here], pull, places))
    return model, inputs, found


def unturned(cut: Cut) -> Array:
    return np.array([softmax(row) for row in cut.unturned]).mean(0)[cut.mine]


def plus(cut: Cut) -> Array:
    return naive.sparsevlm_plus_naive(cut.words, naive.raters_naive(cut.visual, cut.text), cut.pull, 14 / 32)


def best(scores: Array, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def sparse(cut: Cut, k: int) -> list[int]:
    scores = cut.words.mean(0)[naive.raters_naive(cut.visual, cut.text)].mean(0)
    kept, groups = naive.sparsevlm_naive(cut.hidden, scores, k)
    return kept + list(groups)


CUTS: dict[str, tuple[dict[str, Any], Callable[[Cut, int], list[int]]]] = {
    "pyramiddrop": ({}, lambda cut, k: best(cut.own.mean(0), k)),
    "sparsevlm": ({}, sparse),
    "sparsevlm_plus": ({}, lambda cut, k: best(plus(cut), k)),
    "feather": ({"stride": 2}, lambda cut, k: naive.feather_naive(unturned(cut), cut.places, k, 2)),
}


@pytest.mark.parametrize("method", CUTS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_cuts_follow_the_published_rule(name: str, method: str) -> None:
    """One cut at layer 2: hidden states and attention of an eager model without it, and the rule in plain loops."""
    if method == "sparsevlm_plus" and name != "llava":
        pytest.skip("the twin knows rotary positions on one axis, of one base")
    model, inputs, cuts = of_cut(name)
    options, rule = CUTS[method]
    k = 2 if name == "gemma3" else K  # of 4 tokens
    with (
        visiontok.compress(model, method, keep=k, layers=(2,), shares=(0.5,), **options) as compression,
        torch.no_grad(),
    ):
        model(**inputs)
        alive, units = compression.ledger.alive(2), compression.ledger.units
    for u, cut in enumerate(cuts):
        kept = alive[units.row[u]][units.slots[u][units.valid[u]]].nonzero()[:, 0].tolist()
        assert kept == sorted(rule(cut, k))


@pytest.mark.parametrize("method", ["pyramiddrop", "feather", "sparsevlm"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_cuts_count_what_is_cached_already(name: str, method: str) -> None:
    """The first words in a turn of their own: keys of a layer that is asked beforehand include the stored ones."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    shape, cache = inputs["input_ids"].shape, DynamicCache(config=model.config.get_text_config())
    words = {k: v[:, :2] for k, v in inputs.items() if v.shape[:2] == shape}
    rest = {k: v[:, 2:] if v.shape[:2] == shape and k != "attention_mask" else v for k, v in inputs.items()}
    with visiontok.compress(model, method) as compression, torch.no_grad():
        whole, alive = model(**inputs).logits, compression.ledger.alive
        expected = [alive(layer)[:, 2:] for layer in range(4)]
        model(**words, past_key_values=cache)
        logits = model(**rest, past_key_values=cache).logits
        assert all(torch.equal(compression.ledger.alive(layer), expected[layer]) for layer in range(4))
    torch.testing.assert_close(logits[:, -1], whole[:, -1])


def test_what_has_no_patch_is_kept_last() -> None:
    """Newline tokens between the rows of a tiled picture go before any patch does."""
    model = build("llava_next")
    inputs = batch("llava_next", model, rows=1, images=1, pad=0)
    reader = Reader()
    with visiontok.compress(model, reader), torch.no_grad():
        model(**inputs)
    patches = (reader.seen["ctx"].grid[0] >= 0).all(-1)
    assert not patches.all()
    spaces = [(method, {"features": "merger_in"}) for method in VECTOR_RULES]
    for method, options in [(m, {}) for m in ("zoo_prune", "scope", "holov", "prunesid", "agile")] + spaces:
        with visiontok.compress(model, method, keep=int(patches.sum()), **options) as compression, torch.no_grad():
            model(**inputs)
            alive = compression.ledger.alive(0)[visual(inputs)]
        assert torch.equal(alive, patches), method


def test_what_has_no_patch_has_no_say_in_the_scale_of_sensitivity() -> None:
    model = build("llava_next")
    inputs = batch("llava_next", model, rows=1, images=1, pad=0)
    reader = Reader()
    with visiontok.compress(model, reader), torch.no_grad():
        model(**inputs)
    ctx = reader.seen["ctx"]
    patches = (ctx.grid[0] >= 0).all(-1).nonzero()[:, 0]
    assert ctx.encoder_features is not None
    z, x = ctx.features[0, patches].numpy(), ctx.encoder_features[0, patches].numpy()

    def project(rows: Array) -> Array:
        return model.model.multi_modal_projector(torch.from_numpy(rows)).detach().numpy()

    image = Image(z, x, x, x, x, 0, project)
    with visiontok.compress(model, "zoo_prune", keep=K) as compression, torch.no_grad():
        model(**inputs)
        kept = compression.ledger.alive(0)[visual(inputs)].nonzero()[:, 0].tolist()
    assert kept == sorted(patches[naive.zoo_prune_naive(z, sensitivity(image), K)].tolist())
