"""The prompt methods and the operators they are made of, against plain loops written from the papers' rules.

The loops share nothing with the library: Python lists, NumPy in float64, one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import visiontok.functional as F
from visiontok import kernels
from visiontok.recipes.aim_merge import aim_merge
from visiontok.recipes.globalcom2 import crops, globalcom2, globalcom2_official
from visiontok.recipes.kmeans import kmeans
from visiontok.recipes.m3_pool import m3_pool
from visiontok.recipes.prumerge import outliers, prumerge
from visiontok.recipes.prumerge_plus import prumerge_plus
from visiontok.recipes.textmonkey import textmonkey
from visiontok.recipes.visionzip import visionzip
from visiontok.recipes.vispruner import vispruner
from visiontok.recipes.vscan import vscan

Array = np.ndarray[Any, Any]


def case(n: int, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, keys and scores of one image, in float64."""
    g = torch.Generator().manual_seed(seed)
    x, keys = torch.randn(2, n, d, generator=g, dtype=torch.float64)
    return x, keys, torch.rand(n, generator=g, dtype=torch.float64) / n


def raster(height: int, width: int, t: int = 0) -> Tensor:
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(height), torch.arange(width))


def cos(a: Array, b: Array) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def best(scores: Array, k: int, among: list[int] | None = None) -> list[int]:
    candidates = range(len(scores)) if among is None else among
    return sorted(candidates, key=lambda i: (-scores[i], i))[:k]


def indices(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_spaced_takes_equal_steps(n: int) -> None:
    able = torch.ones(2 * n, dtype=torch.bool)
    able[1::2] = False
    for k in range(n + 3):
        expected = sorted({i * n // min(k, n) for i in range(min(k, n))}) if k else []
        assert indices(F.spaced(able, k)) == [2 * i for i in expected]
        for step in (1, 2, 5):
            assert indices(F.spaced(able, k, step)) == [2 * i for i in range(0, n, step)][:k]


def test_rank_within_counts_the_better_ones_of_the_group() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (3, 20), generator=g).float()
    scores[0, 3] = torch.nan
    group, valid = torch.randint(-1, 4, (3, 20), generator=g), torch.rand(3, 20, generator=g) < 0.8
    mine = F.rank_within(scores, group, valid)
    for b in range(3):
        key = [(not valid[b, i], -float(scores[b, i].nan_to_num(nan=-torch.inf)), i) for i in range(20)]
        for i in range(20):
            assert mine[b, i] == sum(key[j] < key[i] for j in range(20) if group[b, j] == group[b, i])


def test_uniqueness_looks_at_later_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.reference, "TILE", 60)  # several tiles
    x, *_ = case(17)
    x[4] = 3 * x[11]
    valid = torch.ones(17, dtype=torch.bool)
    valid[[2, 16]] = False
    mine = F.uniqueness(x, valid)
    for i in indices(valid):
        later = [cos(x[i].numpy(), x[j].numpy()) for j in range(i + 1, 17) if valid[j]]
        assert float(mine[i]) == pytest.approx(-max(later, default=-np.inf), abs=1e-6)
    assert mine[4] == -1
    assert indices(textmonkey(x, 1, valid=valid)) == [15]


def thin_out(x: Array, order: list[int], goal: int, step: int = 8) -> list[int]:
    """VisPruner's removal of duplicates, as its paper tells it."""
    while len(order) > goal:
        even, odd = order[::2], order[1::2]
        m = min(step, len(order) - goal, len(even))
        likeness = [max((cos(x[a], x[b]) for b in odd), default=-np.inf) for a in even]
        ranked = sorted(range(len(even)), key=lambda i: (-likeness[i], i))
        order = [even[i] for i in ranked[m:]] + odd
    return sorted(order)


@pytest.mark.parametrize(("n", "k", "step"), [(20, 4, 8), (21, 6, 8), (33, 1, 8), (9, 8, 2), (16, 5, 3)])
def test_thinned_equals_the_loop(n: int, k: int, step: int) -> None:
    for seed in range(3):
        x, _, s = case(n, seed=seed)
        order = best(s.numpy(), n)
        assert indices(F.thinned(x, s, k, per_round=step)) == thin_out(x.numpy(), order, k, step)


def test_thinned_where_the_nearest_are_all_at_even_places() -> None:
    """Forty-five tokens that resemble each other stand at even places, others between them."""
    x, *_ = case(90)
    x[:45] = x[0] + 0.05 * x[:45]
    order = [i for pair in zip(range(45), range(45, 90), strict=True) for i in pair]
    s = torch.empty(90)
    s[order] = torch.linspace(1, 0, 90)
    for k in (86, 60, 10):
        assert indices(F.thinned(x, s, k)) == thin_out(x.numpy(), order, k)


def test_thinned_rows_see_nothing_but_their_own_list() -> None:
    """Padding that duplicates tokens, and lists of other lengths beside."""
    x, _, s = (torch.stack(parts) for parts in zip(*(case(30, seed=seed) for seed in range(4)), strict=True))
    sizes, goals = [30, 19, 8, 3], torch.tensor([21, 2, 7, 1])
    valid = torch.arange(30) < torch.tensor(sizes)[:, None]
    for b, n in enumerate(sizes):
        x[b, n:] = x[b, torch.arange(30 - n) % n]
    batch = F.thinned(x, s, goals, valid, per_round=4)
    for b, n in enumerate(sizes):
        order = best(s[b, :n].numpy(), n)
        assert indices(batch[b]) == thin_out(x[b].numpy(), order, int(goals[b]), 4)


def test_thinned_to_nothing() -> None:
    x, _, s = case(11)
    assert not F.thinned(x, s, 0).any()


def test_neighbours_gather_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.reference, "TILE", 30)  # one or two kept tokens at a time
    x, keys, s = case(15)
    keep = F.topk(s, 6)
    valid = torch.ones(15, dtype=torch.bool)
    valid[1] = False
    mine = F.neighbours(x, keys, s, keep & valid, 4, valid)
    for i in range(15):
        expected = x[i].clone()
        if keep[i] and valid[i]:
            others = [j for j in range(15) if j != i and valid[j]]
            for j in sorted(others, key=lambda j: -cos(keys[i].numpy(), keys[j].numpy()))[:4]:
                expected += s[j] * x[j]
        torch.testing.assert_close(mine[i], expected)


def test_attention_logits_are_head_means_before_the_softmax() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 3, 8, generator=g), torch.randn(2, 3, 10, 8, generator=g)
    expected = torch.stack([q[:, h] @ k[:, h // 2].mT for h in range(6)]).mean(0) / 8**0.5
    torch.testing.assert_close(F.attention_logits(q, k), expected)
    torch.testing.assert_close(F.attention_logits(q[0], k[0], scale=1.0), expected[0] * 8**0.5)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 9), (1, 7), (5, 3)])
def test_cells_are_a_partition_into_parts_of_equal_mass(height: int, width: int) -> None:
    n, grid = height * width, raster(height, width)
    for k in range(1, n + 1):
        group = F.cells(grid, k)
        sizes = group.bincount(minlength=n)
        assert (sizes > 0).sum() == k
        assert int(sizes[sizes > 0].max()) <= 2 * -(-n // k)
        assert torch.equal(group[group], group)  # the middle of a cell lies in it
        for centre in group.unique().tolist():
            rows = grid[group == centre, 1]
            assert len(rows.unique()) == int(rows.max() - rows.min()) + 1


@pytest.mark.parametrize(("side", "scale"), [(24, 9), (24, 36), (24, 144), (12, 16), (6, 36), (6, 1)])
def test_cells_of_dividing_squares_are_average_pooling(side: int, scale: int) -> None:
    x, *_ = case(side * side)
    keep, merged, _ = m3_pool(x, raster(side, side), scale)
    pooled = torch.nn.functional.avg_pool2d(x.T.view(1, -1, side, side), side // round(scale**0.5))
    torch.testing.assert_close(merged[keep], pooled[0].flatten(1).T)
    # a cell stands in its middle
    where = raster(side, side)[keep][:, 1:] // (side // round(scale**0.5))
    assert torch.equal(where, raster(*[round(scale**0.5)] * 2)[:, 1:])


def test_cells_split_over_planes_and_leave_newlines_to_the_end() -> None:
    grid = torch.cat([raster(4, 4), raster(2, 4, t=1), torch.full((3, 3), -1)])
    group = F.cells(grid, 6)
    assert (group[24:] == -1).all()
    assert [len(group[part].unique()) for part in (slice(16), slice(16, 24))] == [4, 2]
    assert [len(F.cells(grid, k).unique()) - bool((F.cells(grid, k) < 0).any()) for k in (24, 26, 27)] == [24, 26, 27]


def cluster(x: Array, k: int, draws: list[float], rounds: int) -> tuple[list[list[int]], int]:
    """Spherical k-means++, one token at a time: the groups, and how many of them had run empty."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    n, seeds = len(x), []
    for draw in draws:
        weight = [1.0 if not seeds else 1 - max(float(unit[i] @ unit[j]) for j in seeds) for i in range(n)]
        weight = [0.0 if w < 1e-6 else w for w in weight]
        reach, pick = 0.0, None
        for i in range(n):
            reach += weight[i]
            if pick is None and reach > draw * sum(weight):
                pick = i
        seeds.append(pick if pick is not None else next(i for i in range(n) if i not in seeds))
    centres = unit[seeds]
    for _ in range(rounds):
        group = (unit @ centres.T).argmax(1)
        for c in range(k):
            if (group == c).any():
                mean = unit[group == c].mean(0)
                centres[c] = mean / np.linalg.norm(mean)
    group = (unit @ centres.T).argmax(1)
    likeness = (unit @ centres.T).max(1)
    groups = [np.nonzero(group == c)[0].tolist() for c in range(k)]
    middle = [max(g, key=lambda i: likeness[i]) for g in groups if g]
    empty = k - len(middle)
    lone = sorted(set(range(n)) - set(middle), key=lambda i: likeness[i])[:empty]
    return [left for g in groups if (left := [i for i in g if i not in lone])] + [[i] for i in lone], empty


def test_a_cluster_that_ran_empty_takes_the_token_that_is_worst_off() -> None:
    x, *_ = case(12, 2, seed=161)
    draws = torch.rand(6, generator=torch.Generator().manual_seed(161))
    groups, empty = cluster(x.numpy(), 6, draws.tolist(), 6)
    assert empty == 1
    home = F.clusters(x, 6, [draws], rounds=6)
    assert sorted(indices(home == c) for c in home.unique()) == sorted(groups)


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_clusters_equal_the_loop(rounds: int) -> None:
    for seed in range(4):
        x, *_ = case(30, seed=seed)
        draws = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        groups, _ = cluster(x.numpy(), 5, draws.tolist(), rounds)
        assert len(groups) == 5
        home = F.clusters(x, 5, [draws], rounds=rounds)
        assert sorted(sorted(indices(home == c)) for c in home.unique()) == sorted(groups)
        keep, merged, _ = kmeans(x, 5, [draws], rounds=rounds)
        for centre in indices(keep):
            torch.testing.assert_close(merged[centre], x[home == centre].mean(0))


def test_the_seeds_of_clusters_are_drawn_by_distance() -> None:
    """Two tight bunches and one far token: the far one is nearly always a seed, and its own cluster."""
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([[1.0, 0, 0]] * 10 + [[0, 1.0, 0]] * 10 + [[0, 0, 1.0]]) + 0.01 * torch.randn(21, 3, generator=g)
    found = 0
    for _ in range(50):
        home = F.clusters(x, 3, [torch.rand(3, generator=g)], rounds=0)
        found += int((home == home[20]).sum() == 1)
    assert found >= 45


def test_clusters_of_duplicates_still_are_k() -> None:
    x, *_ = case(4)
    copies = x[torch.arange(20) % 4]
    home = F.clusters(copies, 9, [torch.rand(9, generator=torch.Generator().manual_seed(0))])
    assert len(home.unique()) == 9
    keep, merged, _ = kmeans(copies, 9, [torch.rand(9)])
    torch.testing.assert_close(merged[keep], copies[keep])


# ------------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize(("k", "contextual"), [(10, 3), (20, 12), (5, 0), (36, 5), (2, 1)])
@pytest.mark.parametrize("official", [False, True])
def test_visionzip_equals_the_loop(k: int, contextual: int, official: bool) -> None:
    x, keys, s = case(36)
    dominant = best(s.numpy(), k - contextual)
    rest = [i for i in range(36) if i not in dominant]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    expected = {i: x[i] for i in dominant}
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if targets and i not in targets:
            members[max(targets, key=lambda t: (cos(keys[i].numpy(), keys[t].numpy()), -t))].append(i)
    for t, mine in members.items():
        together = x[[t, *mine]].mean(0)
        expected[t] = (x[t] + x[mine].mean(0) if mine else x[t]) if official else together
    keep, merged, into = visionzip(x, keys, s, k, contextual, official=official)
    assert indices(keep) == sorted(expected)
    for i, value in expected.items():
        torch.testing.assert_close(merged[i], value)
    homes = {i: t for t, mine in members.items() for i in (t, *mine)}
    assert into.tolist() == [homes.get(i, -1) for i in range(36)]


def test_visionzip_does_not_merge_what_has_no_patch() -> None:
    x, keys, s = case(12)
    s[8:], keys[8:] = -1, 0
    keep, merged, _ = visionzip(x, keys, s, 4, 2)
    assert not keep[8:].any()
    x[8:] = 1e6
    torch.testing.assert_close(visionzip(x, keys, s, 4, 2)[1][keep], merged[keep])
    assert indices(visionzip(x, keys, s, 10, 3)[0]) == list(range(10))


def test_outliers_lie_beyond_the_whiskers() -> None:
    g = torch.Generator().manual_seed(0)
    s = torch.rand(4, 50, generator=g) ** torch.tensor([1.0, 3, 8, 20])[:, None]
    valid = torch.rand(4, 50, generator=g) < 0.8
    for b in range(4):
        mine = s[b, valid[b]].numpy()
        low, high = np.percentile(mine, [25, 75])
        assert outliers(s, valid)[b] == (mine > high + 1.5 * (high - low)).sum()
    assert outliers(torch.ones(9)) == 0


@pytest.mark.parametrize("k", [1, 4, 9])
def test_prumerge_equals_the_loop(k: int) -> None:
    x, keys, s = case(25)
    s = s * 20
    centres = F.rank(s) < k - 1
    keep, merged = prumerge(x, keys, s, centres, neighbours=5)
    order = best(s.numpy(), 25)
    assert indices(keep) == sorted(order[:k])
    for i in order[: k - 1]:
        near = sorted((j for j in range(25) if j != i), key=lambda j: -cos(keys[i].numpy(), keys[j].numpy()))[:5]
        torch.testing.assert_close(merged[i], x[i] + sum(s[j] * x[j] for j in near))
    torch.testing.assert_close(merged[order[k - 1]], sum(s[j] * x[j] for j in order[k - 1 :]))
    whole, same = prumerge(x, keys, s, torch.ones(25, dtype=torch.bool))
    assert whole.all()
    assert torch.equal(same, x)


def test_prumerge_leaves_what_has_no_patch_as_it_is() -> None:
    x, keys, s = case(8)
    s[6:], keys[6:] = -1, 0
    centres = torch.arange(8) != 6
    keep, merged = prumerge(x, keys, s, centres, neighbours=2)
    assert keep.all()
    assert torch.equal(merged[6:], x[6:])
    assert not torch.isclose(merged[:6], x[:6]).all(-1).any()


def test_prumerge_plus_stands_everywhere() -> None:
    s = torch.zeros(64)
    s[:8] = torch.linspace(1, 0.5, 8)  # attention in one corner
    centres = indices(prumerge_plus(s, 16, outstanding=0.25))
    assert centres[:4] == [0, 1, 2, 3]
    assert centres[4:] == [4 + i * 60 // 12 for i in range(12)]
    s[60:] = -1  # no patch
    assert indices(prumerge_plus(s, 62)) == list(range(62))


@pytest.mark.parametrize(("k", "important"), [(12, 0.5), (7, 0.3), (5, 1.0), (1, 0.5)])
def test_vispruner_equals_the_loop(k: int, important: float) -> None:
    x, _, s = case(31)
    order = best(s.numpy(), 31)
    first, rest = order[: int(k * important)], order[int(k * important) :]
    expected = first + (thin_out(x.numpy(), rest, k - len(first)) if k > len(first) else [])
    assert indices(vispruner(x, s, k, important=important)) == sorted(expected)


@pytest.mark.parametrize("rounded_down", [False, True])
@pytest.mark.parametrize(("height", "width", "k"), [(12, 12, 20), (12, 12, 33), (7, 8, 9), (3, 3, 1)])
def test_vscan_equals_the_loop(height: int, width: int, k: int, rounded_down: bool) -> None:
    n = height * width
    x, _, deep = case(n)
    shallow = case(n, seed=1)[2]
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(n):
        windows.setdefault((i // width // 4, i % width // 4), []).append(i)
    half = k // 2
    cap = half // len(windows) if rounded_down else -(-half // len(windows))
    local = [i for members in windows.values() for i in best(shallow.numpy(), cap, members)]
    if not rounded_down:
        local = best(shallow.numpy(), half, local)
    rest = [i for i in range(n) if i not in local]
    kept = sorted(local + best(deep.numpy(), k - (half if rounded_down else len(local)), rest))
    keep, merged, into = vscan(x, shallow, deep, raster(height, width), k, window=4, rounded_down=rounded_down)
    assert indices(keep) == kept
    members = {i: [i] for i in kept}
    for i in set(range(n)) - set(kept):
        members[max(kept, key=lambda j: cos(x[i].numpy(), x[j].numpy()))].append(i)
    for i, mine in members.items():
        torch.testing.assert_close(merged[i], x[mine].mean(0))
        assert into[mine].eq(i).all()


def test_vscan_fills_up_where_windows_are_too_small() -> None:
    x, _, s = case(10)
    keep, *_ = vscan(x, s, s, raster(2, 5), 9, window=4)
    assert keep.sum() == 9


def match(x: list[Array], r: int) -> list[list[int]]:
    """One round of bipartite matching: groups of list positions, in the published order."""
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    to = {a: max(odd, key=lambda b: (cos(x[a], x[b]), -b)) for a in even}
    ranked = sorted(even, key=lambda a: (-cos(x[a], x[to[a]]), a))
    return [[a] for a in ranked[r:]] + [[b, *(a for a in ranked[:r] if to[a] == b)] for b in odd]


@pytest.mark.parametrize(("n", "k"), [(16, 4), (16, 5), (15, 1), (9, 8), (6, 6)])
@pytest.mark.parametrize("official", [False, True])
def test_aim_merge_equals_the_loop(n: int, k: int, official: bool) -> None:
    x, *_ = case(n)
    places, sources, values = list(range(n)), [[i] for i in range(n)], [x[i].numpy() for i in range(n)]
    while len(places) > k:
        groups = match(values, min(len(places) // 2, len(places) - k))
        values = [np.mean([values[i] for i in g], 0) for g in groups]
        sources = [[s for i in g for s in sources[i]] for g in groups]
        places = [places[g[0]] for g in groups]
        if not official:
            values = [x[s].numpy().mean(0) for s in sources]
            order = sorted(range(len(places)), key=places.__getitem__)
            values, sources, places = ([part[i] for i in order] for part in (values, sources, places))
    tokens, place, into = aim_merge(x[None], k, official=official)
    assert place[0].tolist() == places
    assert into[0].tolist() == [next(p for p, s in zip(places, sources, strict=True) if i in s) for i in range(n)]
    torch.testing.assert_close(tokens[0], torch.tensor(np.array(values)), rtol=1e-6, atol=1e-6)


def tiled(rows: int, columns: int, height: int, width: int, side: int = 6) -> tuple[Tensor, Tensor]:
    """Grid and crop of each token of a picture of ``height`` × ``width`` tokens on rows × columns crops, newlines last
    in each row; crop 0 is the thumbnail."""
    grid, crop = [raster(side, side)], [torch.zeros(side * side, dtype=torch.long)]
    top, left = (rows * side - height) // 2, (columns * side - width) // 2
    for r in range(height):
        line = raster(1, width, t=1) + torch.tensor([0, r, 0])
        grid += [line, torch.full((1, 3), -1)]
        crop += [1 + (r + top) // side * columns + (line[:, 2] + left) // side, torch.tensor([-1])]
    return torch.cat(grid), torch.cat(crop)


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(2, 2, 12, 12), (2, 2, 8, 12), (1, 3, 6, 14), (2, 1, 12, 4)]
)
def test_globalcom2_equals_the_loop(rows: int, columns: int, height: int, width: int) -> None:
    side, grid_crop = 6, tiled(rows, columns, height, width)
    grid, crop = grid_crop
    logits = torch.randn(len(grid), generator=torch.Generator().manual_seed(0))
    thumb = logits[:36].view(6, 6)
    step = side // rows, side // columns
    sums = np.zeros((rows, columns))
    for r in range(side):
        for c in range(side):
            sums[min(r // step[0], rows - 1), min(c // step[1], columns - 1)] += float(thumb[r, c])
    weight = np.exp(sums.flatten() / 10)
    weight = 1 + weight / weight.sum() - 1 / weight.size
    stretched = torch.nn.functional.interpolate(thumb[None, None], (height, width), mode="bilinear")[0, 0]
    scores = torch.where(crop == 0, logits, 0.0)
    for j in range(1, rows * columns + 1):
        mine = crop == j
        there = torch.stack([stretched[r, c] for _, r, c in grid[mine].tolist()])
        scores[mine] = logits[mine] / logits[mine].norm() + there / there.norm()

    parts = crops(logits[None], grid[None])
    assert torch.equal(parts.group[0], crop)
    torch.testing.assert_close(parts.weight[0, 1:].double(), torch.tensor(weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.score[0][crop >= 0], scores[crop >= 0], rtol=1e-4, atol=1e-5)

    ratio, expected = 0.3, indices(crop < 0)
    for j in range(rows * columns + 1):
        members = indices(crop == j)
        number = int(len(members) * min(1.0, ratio * (weight[j - 1] if j else 1.0)))
        expected += best(scores.numpy(), number, members)
    assert indices(globalcom2_official(logits[None], grid[None], torch.tensor([ratio]))[0]) == sorted(expected)

    on = int((crop >= 0).sum())
    for k in (1, 17, on - 1, on, on + 2):
        keep = globalcom2(logits[None], grid[None], torch.tensor([k]))[0]
        assert keep.sum() == k
        assert not keep[crop < 0].any() or k > on
        for j in range(rows * columns + 1):
            members = indices(crop == j)
            kept = [i for i in members if keep[i]]
            assert sorted(kept) == sorted(best(scores.numpy(), len(kept), members))
            if k == 17:  # shares in proportion, to less than one token
                share = len(members) * (weight[j - 1] if j else 1.0)
                total = 36 + sum(int((crop == i + 1).sum()) * w for i, w in enumerate(weight))
                assert abs(len(kept) - 17 * share / total) < 1


# --------------------------------------------------------------------------------------- batches, padding, other dtypes

DRAWS = [torch.rand(9, generator=torch.Generator().manual_seed(b)) for b in range(3)]
Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, slice], tuple[Tensor, ...]]


def only(keep: Tensor) -> tuple[Tensor, Tensor]:
    return keep, torch.zeros(*keep.shape, 1)


CALLS: dict[str, Call] = {
    "visionzip": lambda x, m, s, g, k, ok, u: visionzip(x, m, s, k, k // 2, valid=ok),
    "prumerge": lambda x, m, s, g, k, ok, u: prumerge(x, m, s, prumerge_plus(s, k - 1, valid=ok), valid=ok),
    "vispruner": lambda x, m, s, g, k, ok, u: only(vispruner(x, s, k, valid=ok)),
    "vscan": lambda x, m, s, g, k, ok, u: vscan(x, s, m[..., 0], g, k, window=2, valid=ok),
    "m3_pool": lambda x, m, s, g, k, ok, u: m3_pool(x, g, k, valid=ok),
    "textmonkey": lambda x, m, s, g, k, ok, u: only(textmonkey(x, k, valid=ok)),
    "kmeans": lambda x, m, s, g, k, ok, u: kmeans(
        x, k, [d[:n] for d, n in zip(DRAWS[u], k.tolist(), strict=True)], valid=ok
    ),
    "globalcom2": lambda x, m, s, g, k, ok, u: only(globalcom2(s, g, k, valid=ok)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("poison", [1e4, torch.nan, -torch.inf])
def test_a_batch_with_padding_equals_its_rows(name: str, poison: float) -> None:
    shapes, budgets = ((5, 6), (4, 4), (2, 3)), torch.tensor([9, 5, 2])
    width = 31
    x, m = torch.full((2, 3, width, 6), poison)
    s, ok = torch.full((3, width), poison), torch.zeros(3, width, dtype=torch.bool)
    g = torch.full((3, width, 3), -1)
    for b, (height, breadth) in enumerate(shapes):
        n = height * breadth
        features, keys, scores = (part.float() for part in case(n, seed=b))
        x[b, :n], m[b, :n], s[b, :n], g[b, :n], ok[b, :n] = features, keys, scores, raster(height, breadth), True
    keep, merged, *_ = CALLS[name](x, m, s, g, budgets, ok, slice(0, 3))
    assert torch.equal(keep.sum(1), budgets)
    assert not (keep & ~ok).any()
    for b in range(3):
        n, row = int(ok[b].sum()), slice(b, b + 1)
        part = (t[row, :n] for t in (x, m, s, g))
        single, alone, *_ = CALLS[name](*part, budgets[row], ok[row, :n], row)
        assert torch.equal(keep[b, :n], single[0])
        torch.testing.assert_close(merged[b, :n][single[0]], alone[0][single[0]])


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    x, m, s = (t[None].bfloat16() for t in case(30))
    g, ok, k = raster(5, 6)[None], torch.ones(1, 30, dtype=torch.bool), torch.tensor([9])
    keep, merged, *_ = CALLS[name](x, m, s, g, k, ok, slice(0, 1))
    exact, values, *_ = CALLS[name](x.float(), m.float(), s.float(), g, k, ok, slice(0, 1))
    assert torch.equal(keep, exact)
    torch.testing.assert_close(merged.float(), values, rtol=1e-2, atol=1e-2)
