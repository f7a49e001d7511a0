"""The selecting methods against plain loops written from their published rules (naive.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from naive import (
    agile_naive,
    cos,
    cover_table_naive,
    dart_naive,
    eadp_naive,
    greedy,
    holov_naive,
    mmtok_naive,
    prunesid_naive,
    scope_naive,
    sieve_naive,
    todre_naive,
    zoo_prune_naive,
)
from torch import Tensor

from visiontok.functional import coverage
from visiontok.recipes.agile import agile
from visiontok.recipes.cdpruner import cdpruner, text_relevance
from visiontok.recipes.dart import dart
from visiontok.recipes.eadp import eadp, importance
from visiontok.recipes.erase import level, median
from visiontok.recipes.holov import holov
from visiontok.recipes.mmtok import cover_table, mmtok
from visiontok.recipes.prunesid import prunesid
from visiontok.recipes.scope import scope
from visiontok.recipes.sieve import sieve
from visiontok.recipes.todre import todre
from visiontok.recipes.zoo_prune import zoo_prune

Array = np.ndarray


def draw(*shape: int, seed: int = 0, positive: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g) + 0.01 if positive else torch.randn(*shape, generator=g)


def numbers(*tensors: Tensor) -> list[Array]:
    return [t.double().numpy() for t in tensors]


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
@pytest.mark.parametrize("objective", ["maxsum", "maxmin"])
def test_todre(seed: int, objective: str) -> None:
    x, attention = draw(16, 6, seed=seed), draw(16, seed=seed, positive=True)
    naive = todre_naive(*numbers(x, attention), 7, objective)
    assert todre(x, attention, 7, objective=objective).order.tolist() == naive  # type: ignore[arg-type]


@SEEDS
def test_zoo_prune(seed: int) -> None:
    x, scores = draw(16, 6, seed=seed), draw(16, seed=seed, positive=True)
    assert zoo_prune(x, scores, 7).order.tolist() == zoo_prune_naive(*numbers(x, scores), 7)


def test_zoo_prune_behind_a_linear_projector_starts_at_the_longest_token() -> None:
    x, order = draw(16, 6), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    rounding = 1 + 1e-6 * draw(16)
    picks = zoo_prune(x, rounding, 5)
    assert picks.order[0] == x.norm(dim=1).argmax()
    assert order[zoo_prune(x[order], rounding, 5).order].tolist() == picks.order.tolist()


@SEEDS
@pytest.mark.parametrize(("combine", "alpha"), [("multiply", 1.0), ("multiply", 0.5), ("add", 2.0)])
def test_scope(seed: int, combine: Any, alpha: float) -> None:
    x, attention = draw(15, 5, seed=seed), draw(15, seed=seed, positive=True)
    naive = scope_naive(*numbers(x, attention), 6, alpha, combine)
    assert scope(x, attention, 6, alpha=alpha, combine=combine).order.tolist() == naive


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
@pytest.mark.parametrize("missing", [[], [3, 8]])
def test_mmtok(seed: int, missing: list[int]) -> None:
    text, x, encoder = draw(3, 5, seed=seed), draw(14, 5, seed=seed + 9), draw(14, 4, seed=seed + 5)
    encoder[missing] = 0
    table = cover_table(text[None], x[None], encoder[None], text_temperature=0.1)[0]
    np.testing.assert_allclose(table, cover_table_naive(*numbers(text, x, encoder), 0.1), rtol=1e-4, atol=1e-7)
    mine = mmtok(text[None], x[None], encoder[None], 6, text_temperature=0.1).order[0].tolist()
    assert mine == mmtok_naive(*numbers(text, x, encoder), 6, 0.1)
    padded = torch.cat([text, torch.full((2, 5), 9.0)])[None]
    asked = torch.arange(5)[None] < 3
    assert mmtok(padded, x[None], encoder[None], 6, text_temperature=0.1, text_valid=asked).order[0].tolist() == mine


def grid_of(height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))


@SEEDS
def test_eadp(seed: int) -> None:
    text, x = draw(7, 6, seed=seed), draw(20, 6, seed=seed + 9)
    options = {"telling": 0.5, "spread": 0.2, "mix": 0.3, "power": 1.5}
    weight, naive = eadp_naive(*numbers(x, text[:6]), 4, 6, **options)
    asked = torch.arange(7)[None] < 6
    mine = importance(x[None], text[None], grid_of(4, 5)[None], text_valid=asked, **options)
    np.testing.assert_allclose(mine[0], weight, rtol=1e-4)
    assert eadp(x[None], mine, 6).order[0].tolist() == naive


@SEEDS
def test_eadp_is_coverage_of_half_one_plus_cosine_over_real_tokens(seed: int) -> None:
    x, weight = draw(2, 20, 6, seed=seed), draw(2, 20, seed=seed + 1).abs()
    valid = torch.arange(20) < torch.tensor([[20], [13]])
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    table = torch.where(valid[..., None], (1 + unit @ unit.mT) / 2, 0.0)
    mine = eadp(x.masked_fill(~valid[..., None], torch.nan), weight, 8, valid=valid)
    theirs = coverage(table, 8, weight=weight, valid=valid)
    assert torch.equal(mine.order, theirs.order)
    torch.testing.assert_close(mine.gain, theirs.gain, rtol=1e-5, atol=1e-5)


def test_eadp_under_autocast_weighs_in_full_precision() -> None:
    x, text = draw(1, 20, 6), draw(1, 7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = importance(x.float(), text.float(), grid_of(4, 5)[None])
    assert torch.equal(weight, importance(x.float(), text.float(), grid_of(4, 5)[None]))


def test_eadp_without_a_question_is_plain_coverage() -> None:
    x, text = draw(1, 12, 5), draw(1, 3, 5)
    weight = importance(x, text, grid_of(3, 4)[None], text_valid=torch.zeros(1, 3, dtype=torch.bool))
    assert weight.eq(1).all()


@SEEDS
@pytest.mark.parametrize("k", [1, 3, 9, 14])
def test_dart(seed: int, k: int) -> None:
    x, scores, text, loud = (draw(*s, seed=seed) for s in ((18, 5), (18,), (6, 5), (6,)))
    rows = x[None], scores[None], text[None], loud[None]
    keep = dart(*rows, k, image_pivots=2, text_pivots=3)
    assert keep[0].nonzero()[:, 0].tolist() == dart_naive(*numbers(x, scores, text, loud), k, 2, 3)
    assert keep.sum() == k
    pivots = min(2, k) + 3
    assert dart(*rows, k, image_pivots=2, text_pivots=3, official=True).sum() == min(2, k) + pivots * (k // pivots)


def test_dart_with_little_text_or_none_still_keeps_k() -> None:
    x, scores, text = draw(3, 10, 4), draw(3, 10), draw(3, 5, 4)
    asked = torch.arange(5) < torch.tensor([[0], [1], [5]])
    valid = torch.arange(10) < torch.tensor([[10], [7], [2]])
    keep = dart(x, scores, text, draw(3, 5), torch.tensor([6, 5, 2]), text_valid=asked, valid=valid)
    assert keep.sum(1).tolist() == [6, 5, 2]
    assert not (keep & ~valid).any()


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
def test_sieve(seed: int) -> None:
    x, text, attention = draw(14, 20, seed=seed), draw(4, 20, seed=seed + 9), draw(14, seed=seed, positive=True)
    v, t, a = numbers(x, text, attention)
    assert sieve(x, text, attention, 6).order.tolist() == sieve_naive(v, t, a, 6)
    assert sieve(x, text, None, 6).order.tolist() == sieve_naive(v, t, np.ones(14), 6)


def test_erase_levels() -> None:
    entropy = torch.tensor([[2.0, 1.0, 3.0, 9.0], [1.0, 2.0, 9.0, 9.0], [0.2, 0.1, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert median(entropy, valid).tolist() == pytest.approx([2.0, 1.5, 0.25, 0.0])
    assert level(entropy, valid, (1.9, 1.5, 0.2)).tolist() == [0, 2, 2, 3]  # at a threshold: the simpler level


@SEEDS
@pytest.mark.parametrize(("rate", "most"), [(0.0, 0.5), (1.0, 0.4), (2.0, 2.0), (9.0, 0.7)])
def test_agile(seed: int, rate: float, most: float) -> None:
    x, attention = draw(20, 9, seed=seed), draw(20, seed=seed, positive=True)
    options = {"rate": rate, "most": most, "typical": 60.0}
    assert agile(x, attention, 8, **options).order.tolist() == agile_naive(*numbers(x, attention), 8, **options)


def test_agile_is_attention_on_a_plain_picture_and_diversity_on_a_rich_one() -> None:
    """The same nine attended look-alikes among nine others; the rest of the picture is plain, or rich."""
    alike, others, attention = draw(1, 30) + 0.3 * draw(9, 30, seed=1), draw(9, 30, seed=2), torch.linspace(1, 0, 58)
    plain, rich = (torch.cat([alike, others, rest]) for rest in (draw(1, 30).expand(40, -1), draw(40, 30, seed=3)))
    options = {"rate": 0.025, "typical": 20.0, "most": 0.6}
    kept = [int(agile(x, attention, 9, **options).keep[:9].sum()) for x in (plain, rich)]
    assert kept[0] > kept[1]
    assert agile(rich, attention, 9, rate=0.0).keep[:9].all()
