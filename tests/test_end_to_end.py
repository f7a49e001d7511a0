"""From pixels to kept tokens: what methods keep in a model, against their papers' rules computed by hand.

The tower's attention, keys and features are made here from its weights and the inputs of its layers, one image at a
time; the rules are loops over Python lists. Nothing is shared with the library but the stock model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from test_prompt_methods import best, cos, thin_out
from torch import Tensor

import visiontok
from visiontok.conformance.zoo import IMAGE, batch, build

pytestmark = pytest.mark.engine
HEADS = 4


@dataclass
class Image:
    """What the stock model makes of one picture; n tokens in raster order.

    Attributes:
        height, width: of the grid of tokens.
        tokens: (n, D) of the language model.
        patches: (n, E) at the projector's input.
        project: what the model makes tokens of those.
        attention: tower layer → (n,): of the CLS token, or received where there is none; head mean.
        received: tower layer → (n,): mean attention received.
        joined: the same of the last layer with all heads as one; received attention stays as it is.
        keys: of the layer the features come from, (n, H, d).
        last_keys: of the last layer.
    """

    height: int
    width: int
    tokens: Tensor
    patches: Tensor
    project: Callable[[Tensor], Tensor]
    attention: dict[int, Any]
    received: dict[int, Any]
    joined: Any
    keys: Tensor
    last_keys: Tensor


def heads(x: Tensor) -> Tensor:
    """(n, H·d) → (H, n, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def llava(model: Any, inputs: dict[str, Any]) -> list[Image]:
    """CLIP: three layers, features of layer 1, a CLS token in front."""
    tower = model.model.vision_tower
    layers = [m for m in tower.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    images = []
    for pixels in inputs["pixel_values"]:
        states = tower(pixels[None], output_hidden_states=True).hidden_states
        asked, known = [], []
        for layer, state in zip(layers, states, strict=False):
            normed = layer.layer_norm1(state[0])
            asked.append(layer.self_attn.q_proj(normed))
            known.append(layer.self_attn.k_proj(normed))
        maps = [softmax(heads(q), heads(k)).mean(0).numpy() for q, k in zip(asked, known, strict=True)]
        patches = states[-2][0, 1:]
        images.append(
            Image(
                4,
                4,
                model.model.multi_modal_projector(patches[None])[0],
                patches,
                model.model.multi_modal_projector,
                {i: weights[0, 1:] for i, weights in enumerate(maps)},
                {i: weights.mean(0)[1:] for i, weights in enumerate(maps)},
                softmax(asked[-1], known[-1])[0, 1:].numpy(),
                heads(known[1]).transpose(0, 1)[1:],
                heads(known[2]).transpose(0, 1)[1:],
            )
        )
    return images


def window_order(height: int, width: int, side: int) -> list[int]:
    """Raster indices of the tokens of one picture, window by window."""
    return [
        row * width + column
        for top in range(0, height, side)
        for left in range(0, width, side)
        for row in range(top, min(top + side, height))
        for column in range(left, min(left + side, width))
    ]


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(n, H, d) with rotary positions."""
    low, high = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


def qwen(model: Any, inputs: dict[str, Any]) -> list[Image]:
    """Qwen2.5-VL: layer 2 of three sees whole images; windows of 2 × 2 tokens, each of four patches."""
    visual, seen = model.model.visual, {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen[module] = (args, kwargs)

    last = visual.blocks[2]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in (last, visual.merger)]
    grids = inputs["image_grid_thw"]
    tokens = model.model.get_image_features(inputs["pixel_values"], grids, return_dict=True).pooler_output
    for hook in hooks:
        hook.remove()
    args, kwargs = seen[last]
    q, k, _ = last.attn.qkv(last.norm1(args[0])).unflatten(-1, (3, HEADS, -1)).unbind(1)
    q, k = (turned(x, *kwargs["position_embeddings"]) for x in (q, k))
    merged = seen[visual.merger][0][0]
    images, at = [], 0
    for (_, h, w), mine in zip(grids.tolist(), tokens, strict=True):
        part, at = slice(at, at + h * w), at + h * w
        order = torch.tensor(window_order(h // 2, w // 2, 2)).argsort()  # where each token is in the tower
        received = softmax(q[part].transpose(0, 1), k[part].transpose(0, 1)).mean((0, 1))
        scores = received.view(-1, 4).mean(1)[order].numpy()
        keys = k[part].reshape(-1, 4, *k.shape[1:]).mean(1)[order]
        patches = merged[part].reshape(-1, 4 * merged.shape[-1])[order]
        images.append(
            Image(
                h // 2,
                w // 2,
                mine,
                patches,
                lambda x: visual.merger(x.unflatten(-1, (4, -1)).flatten(0, -2)),
                {2: scores},
                {2: scores},
                scores,
                keys,
                keys,
            )
        )
    return images


LAYOUTS: dict[str, tuple[Callable[[Any, dict[str, Any]], list[Image]], int, int, int]] = {
    # how to look inside, tower layer of the features, VScan's shallow layer and window
    "llava": (llava, 1, 3 * 5 // 24, 6),
    "qwen2_5_vl": (qwen, 2, 2, 4),
}
K = 6


def alike(x: Tensor, i: int, j: int) -> float:
    return cos(x[i].numpy(), x[j].numpy())


def divprune(image: Image, *_: int) -> list[int]:
    n, z = len(image.tokens), image.tokens
    kept = [min(range(n), key=lambda i: max(alike(z, i, j) for j in range(n) if j != i))]
    while len(kept) < K:
        rest = [i for i in range(n) if i not in kept]
        kept.append(min(rest, key=lambda i: max(alike(z, i, j) for j in kept)))
    return kept


def hiprune(image: Image, middle: int, deep: int) -> list[int]:
    """All of the budget to anchors and neighbours: one anchor."""
    (anchor,) = best(image.received[middle], 1)
    row, column = divmod(anchor, image.width)
    cross = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    inside = [r * image.width + c for r, c in cross if 0 <= r < image.height and 0 <= c < image.width]
    rest = [i for i in range(len(image.tokens)) if i not in inside]
    return inside + best(image.received[deep], K - len(inside), rest)


def textmonkey(image: Image, *_: int) -> list[int]:
    n, z = len(image.tokens), image.tokens
    later = [max((alike(z, i, j) for j in range(i + 1, n)), default=-2.0) for i in range(n)]
    return best(-np.array(later), K)


def visionzip(image: Image, layer: int) -> dict[int, list[int]]:
    """With half of the budget for contextual tokens: each kept token, and those that it takes."""
    n, keys = len(image.tokens), image.keys.mean(1)
    taken: dict[int, list[int]] = {i: [] for i in best(image.attention[layer], K // 2)}
    rest = [i for i in range(n) if i not in taken]
    targets = rest[:: len(rest) // (K // 2)][: K // 2]
    taken |= {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            taken[max(targets, key=lambda t: alike(keys, i, t))].append(i)
    return taken


def vispruner(image: Image, layer: int) -> list[int]:
    order = best(image.attention[layer], len(image.tokens))
    return order[: K // 2] + thin_out(image.patches.numpy(), order[K // 2 :], K - K // 2)


def vscan(image: Image, layer: int, shallow: int, side: int) -> list[int]:
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(len(image.tokens)):
        windows.setdefault((i // image.width // side, i % image.width // side), []).append(i)
    cap = -(-(K // 2) // len(windows))
    local = [i for members in windows.values() for i in best(image.attention[shallow], cap, members)]
    local = best(image.attention[shallow], K // 2, local)
    rest = [i for i in range(len(image.tokens)) if i not in local]
    return local + best(image.attention[layer], K - len(local), rest)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_tokens_are_those_of_the_papers_rules(name: str) -> None:
    model = build(name, "sdpa", torch.float32)
    inputs = batch(name, model, rows=1, pad=0, images=3)
    look, layer, shallow, side = LAYOUTS[name]
    with torch.no_grad():
        images = look(model, inputs)
    middle = 1 if name == "llava" else 2
    rules: dict[str, tuple[dict[str, Any], Callable[[Image], list[int]]]] = {
        "norm": ({}, lambda im: best(im.tokens.norm(dim=1).numpy(), K)),
        "cls_topk": ({}, lambda im: best(im.attention[layer], K)),
        "divprune": ({}, divprune),
        "hiprune": ({"alpha": 1.0, "object_layer": middle}, lambda im: hiprune(im, middle, layer)),
        "visionzip": ({"share": 0.5}, lambda im: list(visionzip(im, layer))),
        "prumerge": ({}, lambda im: best(im.joined, K)),
        "vispruner": ({}, lambda im: vispruner(im, layer)),
        "vscan": ({}, lambda im: vscan(im, layer, shallow, side)),
        "textmonkey": ({}, textmonkey),
    }
    visual = inputs["input_ids"][0] == IMAGE
    starts = (visual & ~visual.roll(1)).nonzero()[:, 0].tolist()
    for method, (options, rule) in rules.items():
        with visiontok.compress(model, method, keep=K, **options) as compression, torch.no_grad():
            model(**inputs)
            alive = compression.ledger.alive(0)[0]
        for image, start in zip(images, starts, strict=True):
            kept = alive[start : start + len(image.tokens)].nonzero()[:, 0].tolist()
            assert kept == sorted(rule(image)), f"{method} keeps other tokens"


@pytest.mark.parametrize("name", LAYOUTS)
def test_merged_tokens_are_those_of_the_papers_rules(name: str) -> None:
    """What enters the language model, for three methods that merge."""
    model = build(name, "sdpa", torch.float32)
    inputs = batch(name, model, rows=1, pad=0, images=2)
    look, layer, shallow, side = LAYOUTS[name]
    with torch.no_grad():
        images = look(model, inputs)

    def zipped(im: Image) -> dict[int, Tensor]:
        if name != "llava":  # as the Qwen ports do
            return {i: im.tokens[[i, *others]].mean(0) for i, others in visionzip(im, layer).items()}
        return {i: im.project(im.patches[[i, *others]].mean(0)[None])[0] for i, others in visionzip(im, layer).items()}

    def supplemented(im: Image) -> dict[int, Tensor]:
        n, a, order, x = len(im.tokens), torch.tensor(im.joined), best(im.joined, len(im.tokens)), im.patches
        keys = im.last_keys.flatten(1)
        found = {order[K - 1]: torch.stack([a[j] * x[j] for j in order[K - 1 :]]).sum(0)}
        for i in order[: K - 1]:
            near = sorted((j for j in range(n) if j != i), key=lambda j: -alike(keys, i, j))[:3]
            found[i] = x[i] + torch.stack([a[j] * x[j] for j in near]).sum(0)
        return {i: im.project(value[None])[0] for i, value in found.items()}

    def scanned(im: Image) -> dict[int, Tensor]:
        kept = vscan(im, layer, shallow, side)
        members = {i: [i] for i in kept}
        for i in set(range(len(im.tokens))) - set(kept):
            members[max(kept, key=lambda j: alike(im.tokens, i, j))].append(i)
        return {i: im.tokens[mine].mean(0) for i, mine in members.items()}

    rules: dict[str, tuple[dict[str, Any], Callable[[Image], dict[int, Tensor]]]] = {
        "visionzip": ({"share": 0.5}, zipped),
        "prumerge": ({"neighbours": 3}, supplemented),
        "vscan": ({}, scanned),
    }
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    visual = inputs["input_ids"][0] == IMAGE
    starts = (visual & ~visual.roll(1)).nonzero()[:, 0].tolist()
    try:
        for method, (options, rule) in rules.items():
            with visiontok.compress(model, method, keep=K, **options) as compression, torch.no_grad():
                model(**inputs)
                place = compression.ledger.alive(0)[0].cumsum(0) - 1
            states = seen.pop()
            for image, start in zip(images, starts, strict=True):
                for i, value in rule(image).items():
                    torch.testing.assert_close(states[place[start + i]], value, rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
