"""The selecting methods against plain loops written from their published rules; nothing is shared with the library."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from visiontok.recipes.cdpruner import cdpruner, text_relevance
from visiontok.recipes.dart import dart
from visiontok.recipes.eadp import eadp, importance
from visiontok.recipes.erase import level, median
from visiontok.recipes.holov import holov
from visiontok.recipes.mmtok import mmtok
from visiontok.recipes.prunesid import prunesid
from visiontok.recipes.scope import scope
from visiontok.recipes.sieve import sieve
from visiontok.recipes.todre import todre
from visiontok.recipes.zoo_prune import zoo_prune

Array = np.ndarray


def draw(*shape: int, seed: int = 0, positive: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g) + 0.01 if positive else torch.randn(*shape, generator=g)


def cos(x: Array, y: Array) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def numbers(*tensors: Tensor) -> list[Array]:
    return [t.double().numpy() for t in tensors]


def greedy(n: int, k: int, gain) -> list[int]:  # type: ignore[no-untyped-def]
    """The largest gain(i, chosen), lowest index first, k times."""
    chosen: list[int] = []
    for _ in range(k):
        gains = {i: gain(i, chosen) for i in range(n) if i not in chosen}
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return chosen


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
@pytest.mark.parametrize("objective", ["maxsum", "maxmin"])
def test_todre(seed: int, objective: str) -> None:
    x, attention = draw(16, 6, seed=seed), draw(16, seed=seed, positive=True)
    z, a = numbers(x, attention)
    fold = sum if objective == "maxsum" else max

    def gain(i: int, chosen: list[int]) -> float:
        return -fold(cos(z[i], z[j]) for j in chosen) if chosen else a[i]

    assert todre(x, attention, 7, objective=objective).order.tolist() == greedy(16, 7, gain)  # type: ignore[arg-type]


@SEEDS
def test_zoo_prune(seed: int) -> None:
    x, scores = draw(16, 6, seed=seed), draw(16, seed=seed, positive=True)
    z, s = numbers(x, scores)
    s = (s - s.min()) / (s.max() - s.min() + 1e-6)

    def gain(i: int, chosen: list[int]) -> float:
        return s[i] * (1 - max((cos(z[i], z[j]) for j in chosen), default=0.0))

    assert zoo_prune(x, scores, 7).order.tolist() == greedy(16, 7, gain)


def test_zoo_prune_behind_a_linear_projector_starts_at_the_longest_token() -> None:
    x, order = draw(16, 6), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    rounding = 1 + 1e-6 * draw(16)
    picks = zoo_prune(x, rounding, 5)
    assert picks.order[0] == x.norm(dim=1).argmax()
    assert order[zoo_prune(x[order], rounding, 5).order].tolist() == picks.order.tolist()


@SEEDS
@pytest.mark.parametrize(("combine", "alpha"), [("multiply", 1.0), ("multiply", 0.5), ("add", 2.0)])
def test_scope(seed: int, combine: str, alpha: float) -> None:
    x, attention = draw(15, 5, seed=seed), draw(15, seed=seed, positive=True)
    z, a = numbers(x, attention)

    def gain(i: int, chosen: list[int]) -> float:
        covers = sum(max(0.0, cos(z[i], z[j]) - max([0.0] + [cos(z[c], z[j]) for c in chosen])) for j in range(15))
        return covers * a[i] ** alpha if combine == "multiply" else covers + a[i] ** alpha

    assert scope(x, attention, 6, alpha=alpha, combine=combine).order.tolist() == greedy(15, 6, gain)  # type: ignore[arg-type]


def test_scope_keeps_what_has_no_patch_last() -> None:
    attention = draw(12, positive=True)
    attention[[2, 7]] = -1
    for alpha in (0.0, 0.5, 2.0):
        assert sorted(scope(draw(12, 4), attention, 12, alpha=alpha).order[-2:].tolist()) == [2, 7]


@SEEDS
@pytest.mark.parametrize("official", [False, True])
def test_cdpruner(seed: int, official: bool) -> None:
    """The determinant itself, of every set; official: relevance is scaled over the batch."""
    x, relevance = draw(2, 10, 12, seed=seed), draw(2, 10, seed=seed)
    picks = cdpruner(x, relevance, 4, official=official)
    z, rel = numbers(x, relevance)
    for b in range(2):
        low, high = (rel.min(), rel.max()) if official else (rel[b].min(), rel[b].max())
        r = (rel[b] - low + 1e-6) / (high - low)
        kernel = np.array([[r[i] * cos(z[b, i], z[b, j]) * r[j] for j in range(10)] for i in range(10)])

        def gain(i: int, chosen: list[int], kernel: Array = kernel) -> float:
            rows = [*chosen, i]
            return float(np.linalg.det(kernel[np.ix_(rows, rows)]))

        assert picks.order[b].tolist() == greedy(10, 4, gain)


def test_cdpruner_relevance_is_the_mean_cosine_to_the_words() -> None:
    x, text, valid = draw(1, 6, 5), draw(1, 4, 5, seed=1), torch.tensor([[True, False, True, True]])
    expected = [np.mean([cos(x[0, i].numpy(), text[0, t].numpy()) for t in (0, 2, 3)]) for i in range(6)]
    np.testing.assert_allclose(text_relevance(x, text, valid)[0], expected, rtol=1e-5)
    nobody = cdpruner(x, text_relevance(x, text, valid & False), 3)
    assert nobody.order.tolist() == cdpruner(x, torch.ones(1, 6), 3).order.tolist()
    assert nobody.gain[0, 0] == 1


@SEEDS
def test_mmtok(seed: int) -> None:
    text, x, encoder = draw(3, 5, seed=seed), draw(14, 5, seed=seed + 9), draw(14, 4, seed=seed + 5)
    t, z, e = numbers(text, x, encoder)
    words = [softmax(np.array([cos(w, v) for v in z]) / 0.1) / 3 for w in t]
    patches = [0.5 * softmax(np.array([cos(p, q) for q in e]) / 0.2) / 14 for p in e]
    table = np.array(words + patches)

    def gain(i: int, chosen: list[int]) -> float:
        return sum(max(0.0, row[i] - max([0.0] + [row[c] for c in chosen])) for row in table)

    mine = mmtok(text[None], x[None], encoder[None], 6, text_temperature=0.1).order[0].tolist()
    assert mine == greedy(14, 6, gain)
    padded = torch.cat([text, torch.full((2, 5), 9.0)])[None]
    asked = torch.arange(5)[None] < 3
    assert mmtok(padded, x[None], encoder[None], 6, text_temperature=0.1, text_valid=asked).order[0].tolist() == mine


def grid_of(height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))


@SEEDS
def test_eadp(seed: int) -> None:
    """The published rule on a full grid, where smoothing is a convolution with reflected borders."""
    text, x, asked = draw(7, 6, seed=seed), draw(20, 6, seed=seed + 9), 6
    t, z = numbers(text, x)
    single = np.array([[-cos(w, v) for v in z] for w in t[:asked]])
    entropies = []
    for row in single:
        p = softmax(100 * row)
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    telling = sorted(range(asked), key=lambda i: entropies[i])[: max(1, int(0.5 * asked))]
    weights = softmax(-np.array([entropies[i] for i in telling]) / 0.2)
    local = sum(w * single[i] for w, i in zip(weights, telling, strict=True))
    whole = np.array([-cos(t[:asked].mean(0), v) for v in z])
    fused = 0.3 * whole + 0.7 * local
    scores = (fused - fused.min() + 1e-6) / (fused.max() - fused.min() + 1e-6)
    padded, taps = np.pad(scores.reshape(4, 5), 1, mode="reflect"), np.exp(-np.array([1, 0, 1]) / 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    smooth = [(padded[r : r + 3, c : c + 3] * kernel).sum() for r in range(4) for c in range(5)]
    weight = np.array(smooth) ** 1.5
    mine = importance(
        x[None], text[None], grid_of(4, 5)[None], telling=0.5, spread=0.2, mix=0.3, power=1.5,
        text_valid=torch.arange(7)[None] < asked,
    )  # fmt: skip
    np.testing.assert_allclose(mine[0], weight, rtol=1e-4)

    def gain(i: int, chosen: list[int]) -> float:
        best = [max([0.0] + [(1 + cos(z[c], v)) / 2 for c in chosen]) for v in z]
        return sum(w * max(0.0, (1 + cos(z[i], v)) / 2 - b) for w, v, b in zip(weight, z, best, strict=True))

    assert eadp(x[None], mine, 6).order[0].tolist() == greedy(20, 6, gain)


def test_eadp_without_a_question_is_plain_coverage() -> None:
    x, text = draw(1, 12, 5), draw(1, 3, 5)
    weight = importance(x, text, grid_of(3, 4)[None], text_valid=torch.zeros(1, 3, dtype=torch.bool))
    assert weight.eq(1).all()


@SEEDS
@pytest.mark.parametrize("k", [1, 3, 9, 14])
def test_dart(seed: int, k: int) -> None:
    x, scores, text, loud = (draw(*s, seed=seed) for s in ((18, 5), (18,), (6, 5), (6,)))
    z, t = numbers(x, text)

    def best(s: Tensor, number: int) -> list[int]:
        return sorted(range(len(s)), key=lambda i: (-float(s[i]), i))[:number]

    mine = best(scores, min(2, k))
    pivots = [z[i] for i in mine] + [t[i] for i in best(loud, 3)]
    rest, kept = k - len(mine), list(mine)
    for p, pivot in enumerate(pivots):
        share = rest // len(pivots) + (p < rest % len(pivots))
        free = sorted((i for i in range(18) if i not in kept), key=lambda i: (cos(z[i], pivot), i))
        kept += free[:share]
    rows = x[None], scores[None], text[None], loud[None]
    keep = dart(*rows, k, image_pivots=2, text_pivots=3)
    assert keep[0].nonzero()[:, 0].tolist() == sorted(kept)
    assert keep.sum() == k
    official = dart(*rows, k, image_pivots=2, text_pivots=3, official=True)
    assert official.sum() == len(mine) + (len(mine) + 3) * (k // (len(mine) + 3))


def test_dart_with_little_text_or_none_still_keeps_k() -> None:
    x, scores, text = draw(3, 10, 4), draw(3, 10), draw(3, 5, 4)
    asked = torch.arange(5) < torch.tensor([[0], [1], [5]])
    valid = torch.arange(10) < torch.tensor([[10], [7], [2]])
    keep = dart(x, scores, text, draw(3, 5), torch.tensor([6, 5, 2]), text_valid=asked, valid=valid)
    assert keep.sum(1).tolist() == [6, 5, 2]
    assert not (keep & ~valid).any()


def holov_naive(z: Array, attention: Array, k: int, number: int, *, official: bool) -> list[int]:
    n = len(z)
    sizes = [n // number + (p < n % number) for p in range(number)]
    chunks, start = [], 0
    for size in sizes:
        chunks.append(list(range(start, start + size)))
        start += size
    chunks = [c for c in chunks if c]
    scores = []
    for chunk in chunks:
        a = np.array([1e3 * attention[i] for i in chunk])
        if len(chunk) == 1:
            scores.append(float(a[0]) / (1e3 if official else 1))
            continue
        s = np.array([[0.0 if i == j else cos(z[i], z[j]) for j in chunk] for i in chunk])
        mean = s.sum(1) / (len(chunk) - 1)
        var = ((s - mean[:, None]) ** 2).sum(1) / (len(chunk) - 1)
        scores.append(float((a + 0.09 * var * np.abs(a).mean() / (np.abs(var).mean() + 1e-6)).mean()))
    quotas = [s / (sum(scores) + (1e-6 if official else 0)) * k for s in scores]
    share = [math.floor(q) for q in quotas]
    left = k - sum(share)
    if official:
        for p in sorted(range(len(chunks)), key=lambda p: -scores[p])[:left]:
            share[p] += 1
    else:
        assert all(s + 1 <= len(c) for s, c in zip(share, chunks, strict=True))  # the example has no full chunk
        for p in sorted(range(len(chunks)), key=lambda p: -(quotas[p] - share[p]))[:left]:
            share[p] += 1
    kept = []
    for chunk, count in zip(chunks, share, strict=True):
        kept += sorted(chunk, key=lambda i: (-attention[i], i))[:count]
    return sorted(kept)


@SEEDS
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("n", "number", "k"), [(24, 4, 9), (23, 5, 7), (6, 6, 3)])
def test_holov(seed: int, official: bool, n: int, number: int, k: int) -> None:
    x, attention = draw(n, 6, seed=seed), draw(n, seed=seed, positive=True) / n
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))  # tokens need not stand in raster order
    keep = holov(
        x[order][None], attention[order][None], order[None], k, stretches_of=torch.tensor([number]),
        valid=torch.ones(1, n, dtype=torch.bool), official=official,
    )  # fmt: skip
    kept = sorted(order[keep[0]].tolist())
    if not official and n == number:  # chunks of one token: the caps bind
        assert len(kept) == k
        return
    assert kept == holov_naive(*numbers(x, attention), k, number, official=official)


def test_holov_gives_what_a_full_stretch_cannot_take_to_the_others() -> None:
    x, attention = draw(1, 12, 4), torch.full((1, 12), 1e-3)
    attention[0, :3] = 1.0  # one stretch of three outweighs all
    options = {"stretches_of": torch.tensor([4]), "valid": torch.ones(1, 12, dtype=torch.bool)}
    fixed = holov(x, attention, torch.arange(12)[None], 8, **options)  # type: ignore[arg-type]
    official = holov(x, attention, torch.arange(12)[None], 8, **options, official=True)  # type: ignore[arg-type]
    assert fixed.sum() == 8
    assert official.sum() < 8
    assert (fixed & official)[0, :3].all()


def prunesid_naive(x: Array, attention: Array, k: int, factor: float, *, official: bool) -> list[int]:
    n = len(x)
    a = 1 / (1 + np.exp(-x))
    v = np.linalg.svd((a - a.mean(1, keepdims=True)).T, full_matrices=False)[2].T
    group = np.abs(v[:, : max(1, k // 4)]).argmax(1)
    c = np.array([[cos(x[i], x[j]) for j in range(n)] for i in range(n)])
    mean = np.mean([c[i, j] for i in range(n) for j in range(i + 1, n)])
    picked: dict[int, list[int]] = {}
    fallen: dict[int, list[int]] = {}
    for g in sorted(set(group)):
        for i in sorted((i for i in range(n) if group[i] == g), key=lambda i: -attention[i]):
            near = any(c[i, j] > factor * mean for j in picked.get(g, []))
            (fallen if near else picked).setdefault(g, []).append(i)
    groups = sorted(picked)
    size = {g: len(picked[g]) + len(fallen.get(g, [])) for g in groups}
    cap = {g: min(5 * math.ceil(k / 64), len(picked[g]), size[g]) for g in groups}
    while sum(cap.values()) < k:
        cap = {g: min(cap[g] + 1, size[g]) for g in groups}
    rest = max(k - len(groups) - official, 0)
    total = sum(len(picked[g]) for g in groups)
    if official:
        share, at, before = {}, 0, 0
        for g in groups:
            at += len(picked[g])
            end = round(at / total * rest)
            share[g] = min(1 + end - before, cap[g])
            before = end
        for g in sorted(groups, key=lambda g: -len(picked[g])):
            share[g] += min(cap[g] - share[g], rest + len(groups) - sum(share.values()))
    else:  # largest remainders; what does not fit under a cap goes to the others in proportion
        full: set[int] = set()
        while True:
            open_ = sum(len(picked[g]) for g in groups if g not in full)
            left = rest - sum(cap[g] - 1 for g in full)
            exact = {g: Fraction(cap[g] - 1) if g in full else Fraction(left * len(picked[g]), open_) for g in groups}
            over = {g for g in groups if exact[g] > cap[g] - 1}
            if not over:
                break
            full |= over
        share = {g: 1 + math.floor(exact[g]) for g in groups}
        spare = [g for g in groups if share[g] < cap[g]]
        for g in sorted(spare, key=lambda g: -(exact[g] % 1))[: k - sum(share.values())]:
            share[g] += 1
    return sorted(i for g in groups for i in (picked[g] + fallen.get(g, []))[: share[g]])


@SEEDS
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("k", "factor"), [(8, 0.4), (16, 1.2), (24, 50.0)])
def test_prunesid(seed: int, official: bool, k: int, factor: float) -> None:
    x, attention = draw(36, 20, seed=seed) + 1.0, draw(36, seed=seed, positive=True)
    keep = prunesid(
        x[None], attention[None], k, valid=torch.ones(1, 36, dtype=torch.bool), factor=torch.tensor([factor]),
        official=official,
    )  # fmt: skip
    naive = prunesid_naive(*numbers(x, attention), k, factor, official=official)
    kept = keep[0].nonzero()[:, 0].tolist()
    assert len(kept) == len(naive) == k - official
    assert kept == naive


@SEEDS
@pytest.mark.parametrize("with_attention", [True, False])
def test_sieve(seed: int, with_attention: bool) -> None:
    x, text, attention = draw(14, 20, seed=seed), draw(4, 20, seed=seed + 9), draw(14, seed=seed, positive=True)
    v, t, a = numbers(x, text, attention)
    v, t = v - t.mean(0), t - t.mean(0)
    gram = t @ t.T
    values = sorted(np.linalg.eigvalsh(gram), reverse=True)
    k = next(k for k in range(1, 5) if sum(values[:k]) >= 0.75 * sum(values))
    r = v - v @ t.T @ np.linalg.inv(gram + values[k - 1] * np.eye(4)) @ t
    share = np.linalg.norm(r, axis=1) / np.linalg.norm(v, axis=1)
    score = (share * a if with_attention else share) ** 2
    order = []
    for _ in range(6):
        pick = int(np.argmax([-1 if i in order else s for i, s in enumerate(score)]))
        order.append(pick)
        score = score * np.array([1 - cos(r[i], r[pick]) ** 2 for i in range(14)])
    assert sieve(x, text, attention if with_attention else None, 6).order.tolist() == order


def test_erase_levels() -> None:
    entropy = torch.tensor([[2.0, 1.0, 3.0, 9.0], [1.0, 2.0, 9.0, 9.0], [0.2, 0.1, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert median(entropy, valid).tolist() == pytest.approx([2.0, 1.5, 0.25, 0.0])
    assert level(entropy, valid, (1.9, 1.5, 0.2)).tolist() == [0, 2, 2, 3]  # at a threshold: the simpler level
