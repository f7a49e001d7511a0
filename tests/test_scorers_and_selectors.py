"""Scorers and selectors against the loop that obviously is them, written from the formula in plain Python or NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from naive import peaks_naive
from torch import Tensor

import visiontok.functional as F
from visiontok import kernels
from visiontok.errors import ConfigError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- sensitivity


class TestSensitivity:
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 4)).double()
    x, u = normal(3, 6, 5).double(), torch.nn.functional.normalize(normal(9, 5, seed=1), dim=-1)

    def jacobians(self) -> Tensor:
        """(3, 6) by reverse mode, token by token."""
        out = torch.zeros(3, 6)
        for b in range(3):
            for i in range(6):
                jacobian = torch.autograd.functional.jacobian(self.net, self.x[b, i])
                out[b, i] = sum((jacobian @ u.double()).norm() for u in self.u) / len(self.u)
        return out

    @pytest.mark.parametrize("tile", [1 << 24, 1])  # all directions at once, or one by one
    def test_exact_equals_the_jacobian(self, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("visiontok.scorers.sensitivity.TILE", tile)
        torch.testing.assert_close(F.sensitivity(self.net, self.x, self.u), self.jacobians())

    def test_difference_tends_to_it(self) -> None:
        far, near = (
            (F.sensitivity(self.net, self.x, self.u, step=h) - self.jacobians()).abs().max() for h in (0.5, 0.01)
        )
        assert near < 1e-4 < far

    def test_difference_is_the_formula(self) -> None:
        with torch.no_grad():
            one = [
                ((self.net(self.x[1, 2] + 0.3 * u) - self.net(self.x[1, 2] - 0.3 * u)) / 0.6).norm()
                for u in self.u.double()
            ]
        torch.testing.assert_close(
            F.sensitivity(self.net, self.x, self.u, step=0.3)[1, 2], torch.stack(one).mean().float()
        )

    def test_inference_mode_and_numbers_that_are_none(self) -> None:
        x = self.x.clone()
        x[0, 1, 2], x[2, 3, 0] = torch.nan, torch.inf
        with torch.inference_mode():
            scores = F.sensitivity(self.net, x.clone(), self.u)
        expected = self.jacobians()
        expected[0, 1] = expected[2, 3] = torch.nan
        torch.testing.assert_close(scores, expected, equal_nan=True)


# --------------------------------------------------------------------------------------------------- centred, residual


def test_centred_takes_the_mean_of_the_valid_finite_rows_away() -> None:
    x, valid = normal(2, 7, 3), torch.arange(7) < torch.tensor([[7], [4]])
    x[0, 2, 1] = torch.nan
    for b, rows in enumerate(([0, 1, 3, 4, 5, 6], [0, 1, 2, 3])):
        mean = np.mean([x[b, i].numpy() for i in rows], axis=0)
        mine = F.centred(x, valid)[b]
        np.testing.assert_allclose(mine[rows], x[b, rows].numpy() - mean, atol=1e-6)
    assert mine.shape == (7, 3)
    torch.testing.assert_close(F.centred(x[1, :4]), mine[:4])


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_foreground_is_what_the_leading_singular_vectors_leave(shape: tuple[int, int]) -> None:
    x, valid = normal(2, *shape), torch.arange(shape[0]) < torch.tensor([[shape[0]], [5]])
    for rank in (0, 2, 20):
        mine = F.foreground(x.masked_fill(~valid[..., None], 7.0), rank, valid)
        for b, n in enumerate((shape[0], 5)):
            a = x[b, :n].double().numpy()
            u, s, v = np.linalg.svd(a - a.mean(0), full_matrices=False)
            np.testing.assert_allclose(mine[b, :n], u[:, rank:] * s[rank:] @ v[rank:], atol=1e-5)


def residual_naive(x: np.ndarray, t: np.ndarray, energy: float) -> tuple[np.ndarray, np.ndarray]:
    x, t = x - t.mean(0), t - t.mean(0)
    gram = t @ t.T
    values = sorted(np.linalg.eigvalsh(gram), reverse=True)
    total, k = 0.0, 0
    while total < energy * sum(values) * (1 - 1e-9):
        total, k = total + values[k], k + 1
    ridge = values[max(k - 1, 0)]
    explained = x @ t.T @ np.linalg.inv(gram + ridge * np.eye(len(t))) @ t
    return x - explained, np.linalg.norm(x - explained, axis=1) / np.linalg.norm(x, axis=1)


@pytest.mark.parametrize("energy", [0.1, 0.75, 0.99])
def test_residual_equals_the_formula(energy: float) -> None:
    x, t = normal(8, 12).double(), normal(5, 12, seed=3).double()
    rest, share = F.residual(x, t, energy=energy)
    naive, ratio = residual_naive(x.numpy(), t.numpy(), energy)
    np.testing.assert_allclose(rest, naive, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(share, ratio, rtol=1e-4)


def test_residual_does_not_know_the_order_of_the_text_nor_its_padding() -> None:
    x, t = normal(2, 8, 12), normal(2, 5, 12, seed=3)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    rest, share = F.residual(x, t.masked_fill(~valid[..., None], 9.0), valid=valid)
    for b in range(2):
        alone = F.residual(x[b], t[b, valid[b]].flip(0))
        torch.testing.assert_close(rest[b], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(share[b], alone[1], rtol=1e-4, atol=1e-5)


def test_residual_of_no_text_is_the_feature_and_of_its_own_span_little() -> None:
    x, t = normal(4, 40), normal(3, 40, seed=1)
    rest, share = F.residual(x, t, valid=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(rest, x)
    torch.testing.assert_close(share, torch.ones(4))
    inside = F.residual(torch.tensor([[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]) @ t, t, energy=1.0)[1]
    outside = F.residual(x, t, energy=1.0)[1]
    assert inside.max() < outside.min()
    assert F.residual(x, t[:1])[0].isfinite().all()  # one word: its Gram matrix is 0


# -------------------------------------------------------------------------------------------------------- pixel_entropy


def entropy_naive(pixels: np.ndarray) -> float:
    counts: dict[int, int] = {}
    for r, g, b in pixels.T:
        levels = [round(255 * float(c)) for c in (r, g, b)]
        grey = round(0.299 * levels[0] + 0.587 * levels[1] + 0.114 * levels[2])
        counts[grey] = counts.get(grey, 0) + 1
    n = pixels.shape[1]
    return -sum(c / n * math.log(c / n) for c in counts.values())


def test_pixel_entropy_equals_the_histogram() -> None:
    levels = torch.randint(0, 256, (2, 5, 3, 16), generator=torch.Generator().manual_seed(0))
    levels[0, 1] = 7  # flat
    levels[1, 2] = torch.arange(16) * 16  # all different
    scores = F.pixel_entropy(levels / 255)
    expected = [[entropy_naive((levels[b, i] / 255).numpy()) for i in range(5)] for b in range(2)]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert scores[0, 1] == 0
    assert scores[1, 2] == pytest.approx(math.log(16))


def test_pixel_entropy_survives_normalisation_and_back() -> None:
    levels = torch.randint(0, 256, (64, 3, 1024), generator=torch.Generator().manual_seed(0)) / 255
    mean, std = torch.tensor([0.48, 0.46, 0.41])[:, None], torch.tensor([0.27, 0.26, 0.28])[:, None]
    again = (levels - mean) / std * std + mean
    assert torch.equal(F.pixel_entropy(again), F.pixel_entropy(levels))


# ---------------------------------------------------------------------------------------------------------------- blur


def blur_naive(scores: dict[tuple[int, int, int], float], sigma: float) -> dict[tuple[int, int, int], float]:
    """Rows, then columns; a missing neighbour is replaced by the opposite one."""
    for axis in (1, 2):
        out = {}
        for cell, value in scores.items():
            beside = []
            for step in (-1, 1):
                for side in (step, -step):
                    other = tuple(c + side * (i == axis) for i, c in enumerate(cell))
                    if other in scores:
                        beside.append(scores[other])  # type: ignore[index]
                        break
            weight = math.exp(-0.5 / sigma**2)
            out[cell] = (value + weight * sum(beside)) / (1 + weight * len(beside))
        scores = out
    return scores


def test_blur_equals_the_loop_on_planes_of_different_sizes() -> None:
    cells = [*((0, r, c) for r in range(4) for c in range(5)), *((1, r, c) for r in range(2) for c in range(3))]
    cells += [(2, 0, 0), (-1, -1, -1)]  # alone in its plane; on no plane
    scores = uniform(len(cells))
    mine = F.blur(scores, torch.tensor(cells), sigma=0.8)
    naive = blur_naive({c: float(s) for c, s in zip(cells[:-1], scores, strict=False)}, 0.8)
    torch.testing.assert_close(mine[:-1], torch.tensor([naive[c] for c in cells[:-1]]))
    assert mine[-1] == scores[-1]


def test_blur_is_the_convolution_with_reflection_on_a_full_grid() -> None:
    scores, grid = uniform(2, 30), torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(6))
    taps = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    padded = torch.nn.functional.pad(scores.view(2, 1, 5, 6), (1, 1, 1, 1), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, kernel).view(2, 30)
    torch.testing.assert_close(F.blur(scores, grid.expand(2, -1, -1)), expected)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(F.blur(scores[0, order], grid[order]), expected[0, order])


# -------------------------------------------------------------------------------------------------------- least_similar


def test_least_similar_equals_the_loop() -> None:
    for seed in range(4):
        x, pivots, share = normal(20, 6, seed=seed), normal(3, 6, seed=seed + 9), [4, 0, 5]
        keep = torch.zeros(20, dtype=torch.bool)
        keep[[2, 5]] = True
        chosen = {2, 5}
        for pivot, count in zip(pivots, share, strict=True):
            free = [i for i in range(20) if i not in chosen and i != 7]
            free.sort(key=lambda i: (float(torch.cosine_similarity(x[i], pivot, dim=0)), i))
            chosen |= set(free[:count])
        valid = torch.arange(20) != 7
        mine = F.least_similar(x, pivots, torch.tensor(share), keep, valid)
        assert set(mine.nonzero()[:, 0].tolist()) == chosen
        assert keep.sum() == 2  # as it was


# ---------------------------------------------------------------------------------------------------------------- quota


def test_quota_equals_the_loop() -> None:
    scores = torch.tensor([[3.0, 1, 3, torch.nan, 5, 5, 2, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    group = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [2, 2, 2, 2, 0, 0, 0, 0]])
    counts = torch.tensor([[2, 2, 0], [1, 3, 9]])
    valid = torch.tensor([[True] * 8, [True] * 7 + [False]])
    for b in range(2):
        kept = set()
        for g in range(3):
            mine = [i for i in range(8) if group[b, i] == g and valid[b, i]]
            mine.sort(key=lambda i: (math.inf if math.isnan(scores[b, i]) else -float(scores[b, i]), i))
            kept |= set(mine[: int(counts[b, g])])
        assert set(F.quota(scores, group, counts, valid)[b].nonzero()[:, 0].tolist()) == kept
    assert torch.equal(F.quota(scores[0], group[0], counts[0]), F.quota(scores, group, counts, valid)[0])


# ------------------------------------------------------------------------------------------------------- effective rank


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 4)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    values = np.linalg.svd(x.numpy().astype(np.float64), compute_uv=False)
    share = values / values.sum()
    expected = math.exp(-(share * np.log(share)).sum())
    assert float(F.effective_rank(x)) == pytest.approx(expected, rel=1e-5)
    padded = torch.cat([x, torch.full((3, shape[1]), 7.0), torch.full((1, shape[1]), torch.nan)])
    valid = torch.arange(len(padded)) < len(x)
    valid[-1] = True  # NaN does not count either
    assert float(F.effective_rank(padded[None], valid[None])[0]) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_the_extremes() -> None:
    assert float(F.effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(F.effective_rank(torch.ones(7, 3))) == pytest.approx(1, abs=1e-5)
    assert float(F.effective_rank(torch.zeros(7, 3))) == 1


# ------------------------------------------------------------------------------------------------------------- suppress


def test_suppress_equals_the_loop() -> None:
    for seed in range(5):
        close = uniform(2, 15, 15, seed=seed) > 0.7
        close, scores = close | close.mT, uniform(2, 15, seed=seed).mul(6).round()  # with ties
        valid = torch.arange(15) < torch.tensor([[15], [9]])
        mine = F.suppress(close, scores, valid)
        for b in range(2):
            standing: list[int] = []
            for i in sorted(range(15), key=lambda i: (-float(scores[b, i]), i)):
                if valid[b, i] and not any(close[b, i, j] for j in standing):
                    standing.append(i)
            assert sorted(standing) == mine[b].nonzero()[:, 0].tolist()


# ----------------------------------------------------------------------------------------------------------- components


def components_naive(x: np.ndarray, count: int) -> list[int]:
    """Largest coordinate of each token in the right singular vectors of the centred (D, N) matrix."""
    a = 1 / (1 + np.exp(-x.astype(np.float64)))
    a = (a - a.mean(1, keepdims=True)).T
    v = np.linalg.svd(a, full_matrices=False)[2].T
    return np.abs(v[:, :count]).argmax(1).tolist()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_components_equal_the_singular_vectors(shape: tuple[int, int]) -> None:
    x = 3 * normal(*shape)
    for count in (1, 3, 7):
        assert F.components(x, count).tolist() == components_naive(x.numpy(), count)


def test_components_of_a_padded_batch_are_those_of_its_rows() -> None:
    x, valid = 3 * normal(2, 14, 40), torch.arange(14) < torch.tensor([[14], [9]])
    groups = F.components(x.masked_fill(~valid[..., None], torch.nan), torch.tensor([3, 2]), valid)
    assert groups[0].tolist() == components_naive(x[0].numpy(), 3)
    assert groups[1, :9].tolist() == components_naive(x[1, :9].numpy(), 2)


# ------------------------------------------------------------------------------------------------------------- coverage


def test_the_gains_of_coverage_are_those_computed_anew() -> None:
    """They are only updated from the rows a pick changed."""
    x, weight = normal(2, 40, 5), uniform(2, 40)
    state = kernels.Coverage(kernels.cosine(x), weight, None, None)
    table = kernels.cosine(x).clamp_min(0).double()
    best = torch.zeros(2, 40, dtype=torch.float64)
    for pick in F.facility(x, 15, weight=weight).order.T:
        fresh = ((table - best[..., None]).clamp_min(0) * weight.double()[..., None]).sum(1)
        torch.testing.assert_close(state.gain(), fresh, rtol=1e-9, atol=1e-9)
        state.add(pick)
        best = torch.maximum(best, table[torch.arange(2), :, pick])


# ----------------------------------------------------------------------------------------------- states and transitions


def test_transition_equals_the_loop() -> None:
    """Rows of different sizes, padded with values that would matter."""
    x, y = normal(3, 7, 5), normal(3, 7, 5, seed=1)
    sizes = (7, 4, 1)
    valid = torch.arange(7) < torch.tensor(sizes)[:, None]
    got = F.transition(x.masked_fill(~valid[..., None], 9.0), y.masked_fill(~valid[..., None], -9.0), valid)
    for b, n in enumerate(sizes):
        before, after = x[b].double().numpy(), y[b].double().numpy()
        cosines = [before[i] @ after[i] / np.linalg.norm(before[i]) / np.linalg.norm(after[i]) for i in range(n)]
        whole = sum(math.exp(1 - c) for c in cosines)
        expected = [
            np.linalg.norm(after[i]) / np.linalg.norm(before[i]) * math.exp(1 - cosines[i]) / whole for i in range(n)
        ] + [0.0] * (7 - n)
        torch.testing.assert_close(got[b], torch.tensor(expected).float())


def test_a_module_that_changes_nothing_moves_all_tokens_alike() -> None:
    x = normal(6, 4)
    torch.testing.assert_close(F.transition(x, x), torch.full((6,), 1 / 6))
    torch.testing.assert_close(F.transition(x, 3 * x), torch.full((6,), 3 / 6))
    assert F.transition(torch.zeros(6, 4), x).isfinite().all()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (6, 3)])  # fewer heads than channels, and more
def test_head_entropy_is_that_of_the_covariance_of_channels(
    shape: tuple[int, int], normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other Gram matrix, of the width of a head, with zeros for what the smaller one lacks."""
    monkeypatch.setattr("visiontok.scorers.heads._TILE", 3)
    heads = normal(2, 5, *shape)
    expected = []
    for z in heads.flatten(0, 1).double().numpy():
        z = z - z.mean(0)
        values = np.linalg.eigvalsh(z.T @ z / shape[0]).clip(min=0)
        values = values / values.sum() if normalise else values
        expected.append(-sum(v * math.log(v) for v in values if v > 1e-12) / math.log(shape[0]))
    got = F.head_entropy(heads, normalise=normalise)
    torch.testing.assert_close(got.flatten(), torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)
    turn = torch.linalg.qr(normal(shape[1], shape[1], seed=1))[0]
    torch.testing.assert_close(F.head_entropy(heads @ turn, normalise=normalise), got, rtol=1e-4, atol=1e-5)


def test_variation_is_the_length_of_the_difference() -> None:
    x, y = normal(2, 6, 5), normal(2, 6, 5, seed=1)
    expected = [
        [math.dist(a.tolist(), b.tolist()) for a, b in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(F.variation(x, y), torch.tensor(expected))


# ------------------------------------------------------------------------------------------------------- density peaks


class TestDensityPeaks:
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (9, 1), (12, 3), (20, 6), (7, 7), (5, 9)])
    def test_groups_are_those_of_the_loop(self, n: int, k: int) -> None:
        x = normal(n, 5, seed=n + k)
        group = F.density_peaks(x, k)
        expected = peaks_naive(x.double().numpy(), min(k, n))
        assert {c: (group == c).nonzero()[:, 0].tolist() for c in group.unique().tolist()} == expected

    def test_rows_with_other_sizes_and_numbers_do_not_touch_each_other(self) -> None:
        x, valid = normal(3, 12, 5), torch.arange(12) < torch.tensor([12, 6, 0])[:, None]
        group = F.density_peaks(x.masked_fill(~valid[..., None], 99.0), torch.tensor([4, 2, 1]), valid)
        for b, (n, k) in enumerate(((12, 4), (6, 2))):
            assert torch.equal(group[b, :n], F.density_peaks(x[b, :n], k))
        assert (group[~valid] == -1).all()


# ------------------------------------------------------------------------------------------------------ attention flow


def test_attention_flow_is_a_walk_over_the_sharpened_map(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(4, 9, 6), normal(2, 9, 6, seed=1)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    walks = []
    for h in range(4):
        p = np.full(9, 1 / 9)
        for _ in range(3):
            rows = [
                np.exp([float(q[h, i] @ k[h // 2, j]) * 0.4 / 0.2 if j <= i else -np.inf for j in range(9)])
                for i in range(9)
            ]
            p = sum(p[i] * row / row.sum() for i, row in enumerate(rows))
        walks.append(p)
    options = {"scale": 0.4, "visible": seen, "temperature": 0.2, "rounds": 3}
    expected = torch.tensor(np.sqrt(np.square(walks).mean(0))).float()
    torch.testing.assert_close(F.attention_flow(q, k, **options), expected)
    torch.testing.assert_close(F.attention_flow(q, k, causal=True, **options | {"visible": None}), expected)
    monkeypatch.setattr("visiontok.kernels.reference.TILE", 80)  # several tiles of query rows
    torch.testing.assert_close(F.attention_flow(q, k, **options), expected)
    torch.testing.assert_close(F.attention_flow(q, k, start=seen[8], **options), expected)
    assert not F.attention_flow(q, k, start=seen[4], **options)[5:].any()  # nobody starts there, nobody sees them


# ---------------------------------------------------------------------------------------------------- soft_topk


class TestSoftTopK:
    @pytest.mark.parametrize("k", [1, 4, 9, 10, 20])
    def test_the_mask_is_above_a_half_for_the_best(self, k: int) -> None:
        scores = normal(2, 10).requires_grad_()
        valid = torch.arange(10) < torch.tensor([10, 6])[:, None]
        keep, mask = F.soft_topk(scores, k, valid)
        assert torch.equal(keep, F.topk(scores.detach(), k, valid))
        assert torch.equal(mask > 0.5, keep)
        assert not mask[~valid].any()
        assert torch.equal(mask.detach(), F.soft_topk(scores.detach(), k, valid)[1])

    def test_equal_scores_keep_k(self) -> None:
        assert F.soft_topk(torch.ones(8), 3)[0].tolist() == [True] * 3 + [False] * 5

    def test_the_gradient_is_that_of_the_places(self) -> None:
        """By finite differences of the smooth places, at the mask's slope."""
        scores = normal(7).double().requires_grad_()
        F.soft_topk(scores, 3, sharpness=0.5, temperature=0.7)[1][2].backward()
        width = 0.7 * float(scores.detach().std(correction=0))

        def place(s: Tensor) -> float:
            return sum(1 / (1 + math.exp(-float(s[2] - s[j]) / width)) for j in range(7))

        rank = float((scores <= scores[2]).sum())
        m = 1 / (1 + math.exp(-0.5 * (rank - 4)))
        for i in range(7):
            step = torch.zeros(7).double()
            step[i] = 1e-5
            slope = (place(scores.detach() + step) - place(scores.detach() - step)) / 2e-5
            assert scores.grad is not None
            assert float(scores.grad[i]) == pytest.approx(m * (1 - m) * 0.5 * slope, rel=1e-3, abs=1e-7)

    def test_learning_changes_which_tokens_are_kept(self) -> None:
        """A scorer learns, through the kept values alone, to keep what the loss wants."""
        values = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
        scores = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], requires_grad=True)
        optimiser = torch.optim.Adam([scores], lr=0.05)
        for _ in range(60):
            keep, mask = F.soft_topk(scores, 2)
            gate = keep + mask - mask.detach()
            optimiser.zero_grad()
            (-(gate * values * keep).sum() + (gate * (1 - values) * keep).sum()).backward()
            optimiser.step()
        assert F.soft_topk(scores, 2)[0].nonzero()[:, 0].tolist() == [3, 4]

    @pytest.mark.parametrize("options", [{"sharpness": 0.0}, {"temperature": -1.0}])
    def test_bad_options(self, options: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match="must be positive"):
            F.soft_topk(torch.ones(3), 1, **options)
