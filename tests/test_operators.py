"""The operators against independent oracles: the obvious loop, brute force, and what must hold for any input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from device import OnDevice, Watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visiontok.functional as F
from visiontok import kernels
from visiontok.errors import ConfigError


def random_case(n: int, d: int = 6, seed: int = 0, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Features and positive scores."""
    g = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return torch.randn(*lead, n, d, generator=g), torch.rand(*lead, n, generator=g) + 0.05


def cosines(features: Tensor) -> Tensor:
    x = features.double()
    return (x @ x.T) / (x.norm(dim=1)[:, None] * x.norm(dim=1)).clamp_min(1e-12)


# ------------------------------------------------------------- every greedy selector and the loop that obviously is it

Gain = Callable[[Tensor, Tensor, int, list[int]], float]


def gain_maxmin(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    others = chosen or [j for j in range(len(x)) if j != i]
    return 1 - max((float(cosines(x)[i, j]) for j in others), default=-1.0)


def gain_mmr(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    if not chosen:
        return float(s[i])
    return 0.3 * float(s[i]) - 0.7 * max(float(cosines(x)[i, j]) for j in chosen)


def gain_product(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    return float(s[i]) * (1 - max((float(cosines(x)[i, j]) for j in chosen), default=0.0))


def gain_maxsum(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    return -sum(float(cosines(x)[i, j]) for j in chosen) if chosen else float(s[i])


def covered(x: Tensor, chosen: list[int]) -> Tensor:
    return cosines(x)[:, chosen].clamp_min(0).amax(1) if chosen else torch.zeros(len(x), dtype=torch.float64)


def gain_facility(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    return float(s[i] * (s * (covered(x, [*chosen, i]) - covered(x, chosen))).sum())


def gain_dpp(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    kernel = s[:, None].double() * cosines(x) * s.double()
    with_i = torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])
    return float(with_i / torch.linalg.det(kernel[chosen][:, chosen])) if chosen else float(with_i)


def gain_discount(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    return math.log(float(s[i])) + sum(math.log1p(-(float(cosines(x)[i, j]) ** 2)) for j in chosen)


def gain_widening(x: Tensor, s: Tensor, i: int, chosen: list[int]) -> float:
    place = sum((float(s[j]), -j) <= (float(s[i]), -i) for j in range(len(x)))
    stands = all(1 - float(cosines(x)[i, j]) >= min(0.2 * t, 0.9) for t, j in enumerate(chosen, 1))
    return place + len(x) * stands


GREEDY: dict[str, tuple[Callable[..., kernels.Picks], Gain]] = {
    "maxmin": (lambda x, s, k, valid=None: F.maxmin(x, k, valid), gain_maxmin),
    "mmr": (lambda x, s, k, valid=None: F.mmr(x, s, k, balance=0.3, valid=valid), gain_mmr),
    "product": (lambda x, s, k, valid=None: F.product(x, s, k, valid), gain_product),
    "maxsum": (lambda x, s, k, valid=None: F.maxsum(x, s, k, valid), gain_maxsum),
    "facility": (lambda x, s, k, valid=None: F.facility(x, k, scale=s, weight=s, valid=valid), gain_facility),
    "dpp": (lambda x, s, k, valid=None: F.dpp(x, s, k, valid), gain_dpp),
    "widening": (lambda x, s, k, valid=None: F.widening(x, s, k, 0.2, most=0.9, valid=valid), gain_widening),
    "discount": (lambda x, s, k, valid=None: F.discount(x, s, k, valid), gain_discount),
}
every_selector = pytest.mark.parametrize("name", GREEDY)


@every_selector
def test_equals_the_naive_loop(name: str) -> None:
    select, gain = GREEDY[name]
    for seed in range(3):
        x, s = random_case(14, seed=seed)
        chosen: list[int] = []
        best: list[float] = []
        for _ in range(6):
            gains = {i: gain(x, s, i, chosen) for i in range(14) if i not in chosen}
            pick = max(gains, key=lambda i: (gains[i], -i))
            chosen.append(pick)
            best.append(gains[pick])
        picks = select(x, s, 6)
        assert picks.order.tolist() == chosen
        torch.testing.assert_close(picks.gain.double(), torch.tensor(best, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_a_discount_beyond_the_smallest_number_still_ranks() -> None:
    """Tokens in one narrow cone: the products fall below 10⁻²⁰⁰, where float32 has nothing left to compare."""
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(32, generator=g) + 0.1 * torch.randn(200, 32, generator=g), torch.rand(200, generator=g) + 0.1
    left = torch.log1p(-cosines(x).fill_diagonal_(0.0).square())
    gains = s.double().log()
    order = F.discount(x, s, 150).order.tolist()
    for number, pick in enumerate(order):
        assert gains[pick] > gains.max() - 1e-3
        gains = gains + left[pick]
        gains[order[: number + 1]] = -torch.inf
    assert gains.max() < -460
    assert gains[gains.isfinite()].std() > 1


@every_selector
def test_exact_count_order_and_mask_agree(name: str) -> None:
    x, s = random_case(40)
    for k in (1, 7, 39):
        picks = GREEDY[name][0](x, s, k)
        assert picks.keep.sum() == k
        assert sorted(picks.order.tolist()) == picks.keep.nonzero()[:, 0].tolist()


@every_selector
def test_shorter_budgets_are_prefixes(name: str) -> None:
    x, s = random_case(60)
    order = GREEDY[name][0](x, s, 30).order
    for k in (3, 12):  # a few picks make do without the whole matrix
        assert torch.equal(GREEDY[name][0](x, s, k).order, order[:k])


@every_selector
def test_a_budget_of_all_or_more_is_the_identity(name: str) -> None:
    x, s = random_case(9)
    for k in (9, 100):
        assert GREEDY[name][0](x, s, k).keep.all()


@every_selector
def test_permuting_the_tokens_permutes_the_answer(name: str) -> None:
    x, s = random_case(25)
    p = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    assert torch.equal(p[GREEDY[name][0](x[p], s[p], 10).order], GREEDY[name][0](x, s, 10).order)


@every_selector
def test_a_batch_with_its_own_budgets_and_padding_equals_the_single_rows(name: str) -> None:
    select = GREEDY[name][0]
    x, s = random_case(20, batch=4)
    sizes, budgets = [20, 13, 5, 1], [6, 13, 9, 1]
    valid = torch.arange(20) < torch.tensor(sizes)[:, None]
    padded = x.masked_fill(~valid[..., None], 7.0), s.masked_fill(~valid, 9.0)
    batch = select(*padded, torch.tensor(budgets), valid)
    for b, (n, k) in enumerate(zip(sizes, budgets, strict=True)):
        single = select(x[b, :n], s[b, :n], k)
        assert torch.equal(batch.keep[b, :n], single.keep)
        assert batch.order[b][batch.order[b] >= 0].tolist() == single.order.tolist()
        assert not batch.keep[b, n:].any()


@every_selector
def test_duplicates_still_give_exactly_k(name: str) -> None:
    x, s = random_case(5)
    copies = torch.arange(30) % 5
    picks = GREEDY[name][0](x[copies], s[copies], 12)
    assert picks.keep.sum() == 12


@every_selector
def test_all_tokens_equal(name: str) -> None:
    picks = GREEDY[name][0](torch.ones(10, 4), torch.ones(10), 4)
    assert picks.order.tolist() == [0, 1, 2, 3]


@every_selector
def test_tokens_with_nan_come_last(name: str) -> None:
    x, s = random_case(12)
    x[3], x[7, 1] = torch.nan, torch.inf
    assert not GREEDY[name][0](x, s, 10).keep[[3, 7]].any()
    assert GREEDY[name][0](x, s, 12).keep.all()


@pytest.mark.parametrize("name", ["mmr", "product", "dpp", "discount"])
def test_scores_that_are_nan_come_last(name: str) -> None:
    x, s = random_case(12)
    s[4] = torch.nan
    picks = GREEDY[name][0](x, s, 12)
    assert picks.keep.all()
    assert picks.order[-1] == 4


@every_selector
def test_half_precision_is_computed_in_float32(name: str) -> None:
    x, s = random_case(30)
    x, s = x.bfloat16(), s.bfloat16()
    assert torch.equal(GREEDY[name][0](x, s, 9).order, GREEDY[name][0](x.float(), s.float(), 9).order)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GREEDY[name][0](x, s, 9).order, GREEDY[name][0](x.float(), s.float(), 9).order)


@every_selector
def test_autocast_changes_nothing(name: str) -> None:
    """Among as many candidates, rounding to bfloat16 anywhere would change the order."""
    x, s = random_case(200, 64)
    plain = GREEDY[name][0](x + 0.5, s, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GREEDY[name][0](x + 0.5, s, 60).order, plain.order)


@every_selector
def test_selection_builds_no_graph(name: str) -> None:
    x, s = random_case(9)
    assert not GREEDY[name][0](x.requires_grad_(), s.requires_grad_(), 3).gain.requires_grad


@every_selector
def test_bad_budgets_are_refused_with_a_remedy(name: str) -> None:
    x, s = random_case(6, batch=2)
    for k in (0, -3, torch.tensor([2, 0])):
        with pytest.raises(ConfigError, match=r"k=.*at least one token"):
            GREEDY[name][0](x, s, k)


class Largest(TorchDispatchMode):
    """Notes the most elements that any new tensor has; views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("k", [2, 20])
@every_selector
def test_no_temporary_is_larger_than_a_matrix(name: str, k: int) -> None:
    """No (B, N, N, D), no (B, K, N, D): the largest is the features or a table of N × N."""
    x, s = random_case(60, d=40, batch=2)
    with Largest() as largest:
        GREEDY[name][0](x, s, k)
    assert largest.elements <= 2 * 60 * 60


@pytest.mark.parametrize("k", [2, 20])
@every_selector
def test_no_pick_waits_for_a_device(name: str, k: int) -> None:
    """With a budget that the host knows nothing is read back, and the way without reading picks the same."""
    x, s = random_case(60, d=40, batch=2)
    with Watch() as watch:
        order = GREEDY[name][0](OnDevice(x), OnDevice(s), k).order
        assert watch.reads == []
    assert torch.equal(order.inner, GREEDY[name][0](x, s, k).order)  # type: ignore[attr-defined]


def test_waiting_inside_an_operator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = kernels.reference.pick

    def waiting(state: kernels.reference.State, bound: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        assert bound.isinf().any()
        assert bound.tolist()
        return pick(state, bound, *rest)

    monkeypatch.setattr(kernels.reference, "pick", waiting)
    x, _ = random_case(6, batch=2)
    with Watch() as watch:
        F.maxmin(OnDevice(x), 2)
    assert [read.split()[-1] for read in watch.reads] == ["aten._local_scalar_dense.default", "tolist"]


def test_the_largest_tensor_is_seen() -> None:
    x, _ = random_case(10, d=4, batch=2)
    with Largest() as largest:
        (x[:, :, None] - x[:, None]).norm(dim=-1)
    assert largest.elements == 2 * 10 * 10 * 4


def test_cosines_of_more_rows_than_a_block() -> None:
    """The matrix is made in blocks of 192 rows and mirrored."""
    x, _ = random_case(450, d=24, batch=2)
    x[0, 440], x[1, 3] = 3 * x[0, 7], 0.0  # duplicates in different blocks; a row without direction
    x[0, 100, 5], x[1, 300, 1], x[1, 301, 2] = torch.nan, torch.inf, -torch.inf
    table, known = kernels.cosines(x)
    assert (~known).nonzero().tolist() == [[0, 100], [1, 300], [1, 301]]
    for b in range(2):
        there = known[b] & x[b].nan_to_num().any(-1)
        expected = cosines(x[b].nan_to_num(posinf=0, neginf=0))
        torch.testing.assert_close(table[b][there][:, there].double(), expected[there][:, there], rtol=0, atol=1e-6)
        assert torch.equal(table[b].diagonal(), torch.ones(450))
        none = ~there
        assert (table[b][none][:, none] == 1).all()
        assert (table[b][none][:, there] == 0).all()
    assert table[0, 440, 7] == table[0, 7, 440] == 1
    torch.testing.assert_close(kernels.cosine(x, x), table, rtol=0, atol=1e-6)


def test_a_wrong_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"features has shape \(5,\)"):
        F.maxmin(torch.ones(5), 2)


def test_maxmin_radii_never_grow_and_distinct_rows_come_first() -> None:
    x, _ = random_case(8)
    picks = F.maxmin(x[torch.arange(40) % 8], 20)
    assert (picks.gain[1:].diff() <= 1e-6).all()
    assert {int(i) % 8 for i in picks.order[:8]} == set(range(8))
    rest = picks.order[8:].tolist()
    assert rest == sorted(set(range(40)) - set(picks.order[:8].tolist()))[:12]  # lowest index first


def test_maxmin_zero_rows_are_duplicates_of_each_other() -> None:
    x, _ = random_case(6)
    picks = F.maxmin(torch.cat([x, torch.zeros(10, 6)]), 7)
    assert (picks.order >= 6).sum() == 1


def test_dpp_variances_never_grow_and_equal_determinants() -> None:
    x, s = random_case(30, d=20)
    picks = F.dpp(x, s, 12)
    assert (picks.gain.diff() <= 1e-6).all()
    kernel = (s[:, None] * s).double() * cosines(x)
    chosen = picks.order
    torch.testing.assert_close(
        picks.gain.double().log().sum(), torch.linalg.slogdet(kernel[chosen][:, chosen]).logabsdet, rtol=1e-4, atol=1e-4
    )


def test_dpp_of_low_rank_fills_up_by_relevance() -> None:
    x, s = random_case(40, d=5)
    picks = F.dpp(x, s, 15)
    assert picks.keep.sum() == 15
    assert (picks.gain[:5] > 0).all()
    assert (picks.gain[5:] < 0).all()
    assert (s[picks.order[5:]].diff() <= 0).all()


def test_dpp_finds_the_best_set_of_two() -> None:
    """Greedy is no optimum in general; with orthogonal groups it is."""
    x = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    s = torch.tensor([1.0, 0.9, 0.8, 0.7])
    kernel = (s[:, None] * s).double() * cosines(x)
    best = max(itertools.combinations(range(4), 2), key=lambda p: float(torch.linalg.det(kernel[list(p)][:, list(p)])))
    assert F.dpp(x, s, 2).keep.nonzero()[:, 0].tolist() == list(best)


def test_coverage_equals_the_naive_loop_to_the_end() -> None:
    g = torch.Generator().manual_seed(0)
    table, weight = torch.rand(9, 25, generator=g) - 0.2, torch.rand(9, generator=g)
    table[:, 20:] = table[:, :5]  # duplicates end with a gain of exactly 0
    best, order = torch.zeros(9, dtype=torch.float64), []
    for _ in range(25):
        gains = ((table.double() - best[:, None]).clamp_min(0) * weight[:, None]).sum(0)
        gains[order] = -1
        order.append(int(gains.argmax()))
        best = torch.maximum(best, table[:, order[-1]].double())
    assert F.coverage(table, 25, weight=weight).order.tolist() == order


def test_facility_bonus_alone_is_top_k() -> None:
    x, s = random_case(20)
    assert torch.equal(F.facility(x, 6, scale=torch.zeros(20), bonus=s).keep, F.topk(s, 6))


def test_mmr_with_all_weight_on_importance_is_top_k() -> None:
    x, s = random_case(20)
    assert torch.equal(F.mmr(x, s, 6, balance=1.0).keep, F.topk(s, 6))


# ------------------------------------------------------------------------------------------------------ top-k and rank

scores_with_ties = st.lists(
    st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=12
)


@given(scores_with_ties, st.data())
@settings(max_examples=60, deadline=None)
def test_rank_is_the_order_by_valid_score_index(values: list[float], data: st.DataObject) -> None:
    valid = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    key = [(not ok, math.inf if math.isnan(v) else -v, i) for i, (v, ok) in enumerate(zip(values, valid, strict=True))]
    expected = sorted(range(len(values)), key=key.__getitem__)
    place = F.rank(torch.tensor(values), torch.tensor(valid))
    assert place.argsort().tolist() == expected
    k = data.draw(st.integers(1, len(values) + 2))
    keep = F.topk(torch.tensor(values), k, torch.tensor(valid))
    assert keep.nonzero()[:, 0].tolist() == sorted(i for i in expected[:k] if valid[i])


def test_topk_of_integers_and_per_row_budgets() -> None:
    scores = torch.tensor([[3, 1, 2], [1, 1, 1]])
    assert F.topk(scores, torch.tensor([1, 2])).tolist() == [[True, False, False], [True, True, False]]


def test_minmax() -> None:
    scores = torch.tensor([[2.0, 4.0, 3.0, 9.0], [5.0, 5.0, math.nan, 5.0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    scaled = F.minmax(scores, valid)
    torch.testing.assert_close(scaled[0], torch.tensor([0.0, 1.0, 0.5, 0.0]), atol=1e-5, rtol=0)
    assert scaled[1, [0, 1, 3]].tolist() == [0, 0, 0]
    assert scaled[1, 2].isnan()


# ---------------------------------------------------------------------------------------------------------- attention


def dense_attention(q: Tensor, k: Tensor, causal: bool, valid: Tensor | None) -> Tensor:
    """(B, H, M, N) in float64, masked by hand."""
    groups = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 1).mT / q.shape[-1] ** 0.5
    m, n = logits.shape[-2:]
    if causal:
        logits = logits.masked_fill(~torch.ones(m, n).tril(n - m).bool(), -torch.inf)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_columns_equal_the_dense_softmax(
    causal: bool, heads: tuple[int, int], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.reference, "TILE", 400)  # several tiles of query rows
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads[0], 19, 8, generator=g), torch.randn(2, heads[1], 19, 8, generator=g)
    valid = torch.arange(19) >= torch.tensor([[0], [4]]) if padded else None  # left padding
    weights = dense_attention(q, k, causal, valid)
    rows = torch.ones(2, 19, dtype=torch.bool) if valid is None else valid
    expected = torch.stack([weights[b][:, rows[b]].mean((0, 1)) for b in range(2)])
    mine = F.attention_columns(q, k, causal=causal, valid=valid)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mine.sum(-1), torch.ones(2))
    torch.testing.assert_close(
        F.attention_columns(q[0], k[0], causal=causal), F.attention_columns(q, k, causal=causal)[0]
    )


def test_attention_columns_of_some_queries() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8, generator=g), torch.randn(1, 2, 12, 8, generator=g)
    for causal in (False, True):
        expected = dense_attention(q, k, causal, None).mean((1, 2))
        torch.testing.assert_close(F.attention_columns(q, k, causal=causal).double(), expected, rtol=1e-5, atol=1e-7)


def test_attention_rows_equal_the_dense_softmax() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 10, 8, generator=g), torch.randn(2, 3, 10, 8, generator=g)
    visible = torch.ones(10, 10, dtype=torch.bool).tril()[[4, 9]].expand(2, -1, -1)
    expected = dense_attention(q, k, True, None)[:, :, [4, 9]].mean(1)
    torch.testing.assert_close(
        F.attention_rows(q[:, :, [4, 9]], k, visible=visible).double(), expected, rtol=1e-5, atol=1e-7
    )
    assert F.attention_rows(q[:, :, :1], k, visible=torch.zeros(2, 1, 10, dtype=torch.bool)).eq(0).all()
    each = dense_attention(q, k, True, None)[:, :, [4, 9]]
    torch.testing.assert_close(
        F.attention_heads(q[:, :, [4, 9]], k, visible=visible).double(), each, rtol=1e-5, atol=1e-7
    )


# ------------------------------------------------------------------------------------------------------------ merging


@given(st.integers(1, 24), st.integers(-2, 30), st.integers(0, 3), st.booleans(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_bipartite_groups_are_complete_and_mass_is_conserved(
    n: int, r: int, prefix: int, raster: bool, seed: int
) -> None:
    x, size = random_case(n, seed=seed)
    group = F.bipartite(x, r, prefix=prefix, raster=raster)
    count = n - max(0, min(r, (n - prefix) // 2))
    assert group.unique().tolist() == list(range(count))
    merged, mass = F.merge(x, group, count, size)
    torch.testing.assert_close((merged * mass[:, None]).sum(0), (x * size[:, None]).sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass.sum(), size.sum())
    back = F.unmerge(merged, group)
    torch.testing.assert_close(back, torch.stack([merged[i] for i in group.tolist()]))
    if r <= 0:
        torch.testing.assert_close(merged, x)
    assert group[:prefix].tolist() == list(range(min(prefix, n)))
    assert torch.equal(group[:prefix].sort().values, group[group < prefix].sort().values)


def test_bipartite_merges_the_most_similar_pairs() -> None:
    x, _ = random_case(12)
    similarity = cosines(x)[::2, 1::2]
    best, partner = similarity.max(1)
    expected = {(2 * int(i), 2 * int(partner[i]) + 1) for i in best.argsort(descending=True)[:3]}
    group = F.bipartite(x, 3).tolist()
    joined = {(i, 2 * int(partner[i // 2]) + 1) for i in range(0, 12, 2) if group.count(group[i]) > 1}
    assert joined == expected
    assert all(group[i] == group[j] for i, j in joined)


def test_bipartite_rows_with_padding_and_their_own_r_equal_single_rows() -> None:
    x, _ = random_case(11, batch=3)
    sizes, r = [11, 6, 1], torch.tensor([3, 2, 4])
    valid = torch.arange(11) < torch.tensor(sizes)[:, None]
    for raster in (False, True):
        batch = F.bipartite(x, r, raster=raster, valid=valid)
        for b, n in enumerate(sizes):
            assert batch[b, :n].tolist() == F.bipartite(x[b, :n], int(r[b]), raster=raster).tolist()
            assert (batch[b, n:] == -1).all()


def test_merge_leaves_out_what_has_no_group_and_refuses_wrong_groups() -> None:
    x = torch.tensor([[1.0], [2.0], [10.0]])
    merged, mass = F.merge(x, torch.tensor([0, 0, -1]), 2)
    assert merged.tolist() == [[1.5], [0.0]]
    assert mass.tolist() == [2.0, 0.0]
    assert F.unmerge(merged, torch.tensor([0, 0, -1])).tolist() == [[1.5], [1.5], [0.0]]
    with pytest.raises(ConfigError, match="count=2"):
        F.merge(x, torch.tensor([0, 1, 2]), 2)


def test_merge_has_gradients_and_keeps_the_dtype() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    F.merge(x, torch.tensor([0, 0, 1, 1, 2, 2]), 3)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full((6, 3), 0.5))
    assert F.merge(x.detach().bfloat16(), torch.zeros(6, dtype=torch.long), 1)[0].dtype is torch.bfloat16


def test_nearest_kept_equals_brute_force_and_masses_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.reference, "TILE", 50)
    x, s = random_case(18, batch=3)
    valid = torch.arange(18) < torch.tensor([18, 10, 4])[:, None]
    keep = F.topk(s, torch.tensor([5, 3, 4]), valid)
    target = F.nearest_kept(x, keep, valid)
    for b in range(3):
        chosen = keep[b].nonzero()[:, 0].tolist()
        for i in range(18):
            expected = i if i in chosen else max(chosen, key=lambda j: float(cosines(x[b])[i, j]))
            assert int(target[b, i]) == (expected if valid[b, i] else -1)
    _, mass = F.merge(x, target, 18)
    assert torch.equal(mass > 0, keep)
    assert mass.sum(-1).tolist() == [18, 10, 4]


# --------------------------------------------------------------------------------------------------------------- grid


def raster(frames: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))


def test_anchors_take_the_four_neighbours_and_never_wrap() -> None:
    grid = raster(2, 4, 5)
    for anchor in range(40):
        scores = torch.zeros(40)
        scores[anchor] = 1
        found, neighbours = F.anchors(scores, 1, grid)
        assert found.nonzero()[:, 0].tolist() == [anchor]
        (t, r, c) = grid[anchor].tolist()
        expected = [i for i, (u, v, w) in enumerate(grid.tolist()) if u == t and abs(v - r) + abs(w - c) == 1]
        assert neighbours.nonzero()[:, 0].tolist() == expected


def test_anchors_skip_tokens_off_the_grid_and_padding() -> None:
    grid = torch.cat([raster(1, 3, 3), torch.full((3, 3), -1)])
    valid = torch.arange(12) != 1
    scores = torch.arange(12.0).flip(0)
    found, neighbours = F.anchors(scores, 1, grid, valid)
    assert (found.nonzero()[:, 0].tolist(), neighbours.nonzero()[:, 0].tolist()) == ([0], [3])
    found, neighbours = F.anchors(scores.flip(0), 2, grid, valid)
    assert (found.nonzero()[:, 0].tolist(), neighbours.any().item()) == ([10, 11], False)
    assert not F.anchors(scores, 0, grid)[0].any()


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 120))
@settings(max_examples=80, deadline=None)
def test_uniform_keeps_exactly_k_and_spreads_them(frames: int, height: int, width: int, k: int) -> None:
    grid = raster(frames, height, width)
    keep = F.uniform(grid, k)
    assert keep.sum() == min(k, len(grid))
    per_frame = keep.view(frames, -1).sum(1)
    assert per_frame.max() - per_frame.min() <= 1


def test_uniform_is_a_lattice_where_one_exists() -> None:
    keep = F.uniform(raster(1, 8, 8), 16).view(8, 8)
    assert torch.equal(keep, torch.arange(8)[:, None].remainder(2).bool() & torch.arange(8).remainder(2).bool())


def test_uniform_takes_tokens_off_the_grid_last() -> None:
    grid = torch.cat([torch.full((2, 3), -1), raster(1, 2, 2)])
    assert F.uniform(grid, 4).tolist() == [False, False, True, True, True, True]
    assert F.uniform(grid, 5).tolist() == [True, False, True, True, True, True]
    padded = torch.stack([grid, raster(1, 2, 3)])
    valid = torch.tensor([[False, True, True, True, False, False], [True] * 6])
    assert F.uniform(padded, torch.tensor([2, 6]), valid).sum(-1).tolist() == [2, 6]


# --------------------------------------------------------------------------------------------------------- allocators


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=8), st.data())
@settings(max_examples=150, deadline=None)
def test_apportion_meets_total_caps_and_minima(groups: list[tuple[float, int, int]], data: st.DataObject) -> None:
    weights, caps, minima = zip(*groups, strict=True)
    low = [min(a, b) for a, b in zip(caps, minima, strict=True)]
    total = data.draw(st.integers(sum(low), sum(caps)))
    got = F.apportion(
        torch.tensor(weights, dtype=torch.float64), total, torch.tensor(caps), torch.tensor(minima)
    ).tolist()
    assert sum(got) == total
    assert all(a <= g <= b for a, g, b in zip(low, got, caps, strict=True))
    free = [i for i in range(len(got)) if low[i] < got[i] < caps[i]]
    for i, j in itertools.product(free, free):  # among the unconstrained, more weight never gets less
        if weights[i] > max(weights[j], 1e-9 * max(weights)) * (1 + 1e-6):
            assert got[i] >= got[j]


def test_apportion_is_hamiltons_method_without_caps() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.randint(1, 50, (7,), generator=g)
        quota = [Fraction(int(w) * 40, int(weights.sum())) for w in weights]
        whole = [math.floor(q) for q in quota]
        order = sorted(range(7), key=lambda i: (-(quota[i] - whole[i]), i))
        for i in order[: 40 - sum(whole)]:
            whole[i] += 1
        assert F.apportion(weights, 40, torch.tensor(40)).tolist() == whole


def test_apportion_gives_what_the_full_cannot_take_to_the_others_in_proportion() -> None:
    weights = torch.tensor([[0.9, 0.06, 0.03, 0.01], [0.0, 0.0, 0.0, 0.0]])
    got = F.apportion(weights, torch.tensor([40, 6]), torch.tensor(20))
    assert got.tolist() == [[20, 12, 6, 2], [2, 2, 1, 1]]
    with pytest.raises(ConfigError, match="sum of caps"):
        F.apportion(weights, 81, torch.tensor(20))


@given(st.integers(2, 40), st.integers(1, 600), st.data())
@settings(max_examples=100, deadline=None)
def test_layer_average_never_exceeds_the_average_and_comes_close(depth: int, n: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    start = data.draw(st.integers(0, cuts[0]))
    stop = data.draw(st.integers(cuts[-1] + 1, depth))
    shape = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=len(cuts), max_size=len(cuts))), reverse=True)
    least = Fraction((cuts[0] - start) * n + stop - cuts[0], depth)
    average = data.draw(st.integers(math.ceil(least), max(n, math.ceil(least))))
    counts = F.layer_average(n, average, depth=depth, cuts=cuts, shape=shape, start=start, stop=stop)
    lengths = [b - a for a, b in itertools.pairwise([*cuts, stop])]
    spent = (cuts[0] - start) * n + sum(c * length for c, length in zip(counts, lengths, strict=True))
    assert all(1 <= c <= n for c in counts)
    assert all(a >= b for a, b in itertools.pairwise(counts))
    assert spent <= average * depth
    if counts[-1] < min([n, *counts[:-1]]):  # nothing but the last segment's length is left over
        assert average * depth - spent < lengths[-1]


def test_layer_average_of_one_cut_is_the_closed_form() -> None:
    assert [F.layer_average(576, a, depth=32, cuts=[2]) for a in (192, 128, 64)] == [[166], [98], [29]]
    assert F.layer_average(576, 192, depth=32, cuts=[2], stop=24) == [226]  # TwigVLM rounds this up, to 227
    with pytest.raises(ConfigError, match=r"average=36: .* already 36.94"):
        F.layer_average(576, 36, depth=32, cuts=[2])
    assert F.layer_average(576, 64, depth=32, cuts=[0, 0, 16], shape=[4, 2, 1]) == [170, 85, 43]
    with pytest.raises(ConfigError, match="cuts must ascend"):
        F.layer_average(576, 64, depth=32, cuts=[8, 4])
    with pytest.raises(ConfigError, match="non-increasing"):
        F.layer_average(576, 64, depth=32, cuts=[4, 8], shape=[1, 2])
