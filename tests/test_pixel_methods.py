"""Methods before the tower: which units they let through, against loops that say the rule once more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visiontok import recipes
from visiontok.errors import ConfigError
from visiontok.functional import background, predictive, runs
from visiontok.method import Kept, Picture, UnitMethod
from visiontok.scorers.entropy import GREY


def naive(x: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """The predictive rule, unit by unit in raster order: what stays, its reconstruction, and whence."""
    rows, columns, _ = x.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    made, source = x.clone(), torch.arange(rows * columns).view(rows, columns)

    def similar(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs() <= tau).all())

    for i in range(rows):
        for j in range(columns):
            if i == j == 0:
                continue
            if i == 0:
                at = (i, j - 1)
            elif j == 0:
                at = (i - 1, j)
            else:
                a, b, c = made[i, j - 1], made[i - 1, j], made[i - 1, j - 1]
                at = (i - 1, j) if similar(c, a) and not similar(c, b) else (i, j - 1)
            if similar(x[i, j], made[at]):
                keep[i, j], made[i, j], source[i, j] = False, made[at], source[at]
    return keep, made, source


@st.composite
def grids(draw: Any) -> tuple[Tensor, float]:
    """A small picture of few different units, some of them near each other."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    levels = torch.randint(0, draw(st.integers(1, 4)), (rows, columns, 1), generator=g) / 4
    noise = torch.randint(0, 2, (rows, columns, 2), generator=g) / 64
    return levels + noise * draw(st.booleans()), draw(st.sampled_from([0.0, 1 / 64, 1 / 32, 0.25]))


@settings(max_examples=150, deadline=None)
@given(grids())
def test_anti_diagonals_decide_as_one_unit_after_the_other(case: tuple[Tensor, float]) -> None:
    x, tau = case
    keep, source = predictive(x[None].expand(2, -1, -1, -1), tau)
    expected, made, whence = naive(x, tau)
    for mine, mine_source in zip(keep, source, strict=True):
        assert torch.equal(mine, expected)
        again = x.flatten(0, 1)[mine_source]
        assert torch.equal(again, made)
        assert mine.flatten()[mine_source].all()  # the sources stay, so the picture can be made again
        assert bool(((again - x).abs() <= tau).all())
        if tau:  # at 0 the source is a unit of the same pixels, and there may be two
            assert torch.equal(mine_source, whence)


def test_a_ramp_is_not_followed_into_the_dark() -> None:
    """Anchored: 0 … 1 in steps of 0.01 needs a unit for every 0.02; a chain of neighbours would keep one."""
    ramp = (torch.arange(101.0) / 100).view(1, 101, 1)
    keep, source = predictive(ramp, 0.0201)
    assert int(keep.sum()) == math.ceil(101 / 3)
    assert bool(((ramp[0, source[0]] - ramp[0]).abs() <= 0.0202).all())
    assert int(runs(ramp[0, :, None], 0.0201)[0].sum()) == 34
    assert int(runs(ramp[0, :, None], 0.0201, anchored=False)[0].sum()) == 1


def picture(pixels: Tensor, count: int | None = None) -> Picture:
    """(t, 3, H, W) in 0 … 1 → units of 2 × 2 patches of 4 × 4 pixels."""
    t, _, h, w = pixels.shape
    x = pixels.view(t, 3, h // 8, 2, 4, w // 8, 2, 4).permute(0, 2, 5, 1, 3, 6, 4, 7).flatten(6).flatten(4, 5)
    n = t * h * w // 64
    return Picture(pixels=x, count=n if count is None else count, budgeted=count is not None)


def ask(name: str, shown: Picture, **options: Any) -> Kept:
    method = recipes.find(name)(**options)
    assert isinstance(method, UnitMethod)
    return method.units(shown)


def page() -> Tensor:
    """A white page with a few strokes, padded with grey below."""
    x = torch.ones(1, 3, 64, 48)
    x[:, :, 17, 9:40] = 0.0
    x[:, :, 24:31, 21] = 0.2
    x[:, :, 33, 10:30] = 0.5
    x[:, :, 48:] = 0.3
    return x


def test_pixelprune_loses_no_pixel() -> None:
    shown = picture(page())
    kept = ask("pixelprune", shown)
    assert kept.source is not None
    assert 1 < int(kept.keep.sum()) < 24
    assert torch.equal(shown.pixels.flatten(0, 2)[kept.source.flatten()], shown.pixels.flatten(0, 2))


def test_pixelprune_takes_every_frame_by_itself() -> None:
    moving = torch.cat([page(), page(), page().roll(8, 3)])
    kept = ask("pixelprune", picture(moving))
    assert kept.source is not None
    for frame in range(3):
        alone = ask("pixelprune", picture(moving[frame : frame + 1]))
        assert alone.source is not None
        assert torch.equal(kept.keep[frame], alone.keep[0])
        assert torch.equal(kept.source[frame] - frame * 48, alone.source[0])


def test_background_keeps_what_is_not() -> None:
    shown, near, share = picture(page()), 0.1, 0.9
    grey = (shown.pixels * torch.tensor(GREY).view(3, 1, 1)).sum(3)  # (t, rows, columns, m, P)
    levels = (grey * 255).round()
    mode = max(range(256), key=lambda level: (int((levels == level).sum()), -level))
    assert mode == 255
    kept = ask("background", shown, near=near, share=share).keep
    for place in torch.cartesian_prod(*map(torch.arange, shown.shape)).tolist():
        patches = levels[tuple(place)]
        ratios = [float(((p - mode).abs() < near * 255).float().mean()) for p in patches]
        assert bool(kept[tuple(place)]) == any(ratio <= share for ratio in ratios)
    assert ask("background", picture(torch.ones(2, 3, 16, 16))).keep.sum() == 1
    assert background(torch.tensor([[[0.0, 1.0]] * 3, [[1.0, 1.0]] * 3]), 0.1).tolist() == [0.5, 1.0]


def test_pixel_entropy_takes_the_busiest_units() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.full((1, 3, 32, 32), 0.5)
    busy = [(0, 3), (2, 1), (3, 3)]
    for row, column in busy:
        x[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = torch.rand(3, 8, 8, generator=g)
    kept = ask("pixel_entropy", picture(x, 3)).keep
    assert kept[0].nonzero().tolist() == [list(at) for at in busy]
    assert int(ask("pixel_entropy", picture(torch.ones(1, 3, 32, 32), 5)).keep.sum()) == 5


def test_temporal_keeps_what_changes() -> None:
    x = page().repeat(5, 1, 1, 1)
    x[2:, :, :8, :8] = 0.0
    x[4, :, 8:16, 40:] = 0.9
    kept = ask("temporal", picture(x), tau=0.01)
    changed = torch.zeros(5, 8, 6, dtype=torch.bool)
    changed[0] = changed[2, 0, 0] = changed[4, 1, 5] = True
    changed[1, 0, 0] = changed[3, 0, 0] = True  # no frame is empty
    assert torch.equal(kept.keep, changed)
    assert kept.source is not None
    assert torch.equal(picture(x).pixels.flatten(0, 2)[kept.source.flatten()], picture(x).pixels.flatten(0, 2))
    assert ask("temporal", picture(page())).keep.all()  # an image has one frame


@pytest.mark.slow  # torchvision, which the processor imports, takes seconds
@pytest.mark.parametrize("seed", range(8))
def test_without_anchors_temporal_is_the_mask_of_videollama3(seed: int) -> None:
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    g = torch.Generator().manual_seed(seed)
    t, rows, columns = 6, 4, 3
    # each unit drifts by a level now and then, and each is like its neighbours elsewhere
    moves = torch.rand(t, rows * columns, 1, generator=g) < 0.4
    drift = (torch.rand(t, rows * columns, 3 * 4 * 16, generator=g) * 3 * moves).cumsum(0)
    if seed % 2:
        drift[3] = drift[2]  # a frame in which nothing changes
    levels = (100 + drift).clamp(0, 255)  # 8-bit levels, of which 0.1 / 2 on average is the threshold
    normalised = levels / 127.5 - 1
    mask = VideoLlama3VideoProcessor._get_compression_mask(
        None,
        normalised.view(-1, 3 * 16),
        torch.tensor([[t, 2 * rows, 2 * columns]]),
        torch.tensor([2]),
    )
    pixels = (levels / 255).view(t, rows, columns, 3, 4, 16)
    shown = Picture(pixels=pixels, count=t * rows * columns, budgeted=False)
    kept = ask("temporal", shown, tau=0.1 / 510, anchored=False).keep
    assert torch.equal(kept.flatten(), mask)
    assert not kept.all()


def test_trim_drops_margins_and_nothing_inside() -> None:
    kept = ask("trim", picture(page())).keep[0]
    # the first row and column are white, the last rows grey; the white right edge ends in another colour
    assert kept.nonzero().amin(0).tolist() == [2, 0]
    x = page()
    x[:, :, 48:] = 1.0
    kept = ask("trim", picture(x)).keep[0]
    box = torch.zeros(8, 6, dtype=torch.bool)
    box[2:5, 1:5] = True
    assert torch.equal(kept, box)
    padded = torch.full((1, 3, 32, 32), 0.4)
    padded[:, :, 8:24] = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(0))
    assert ask("trim", picture(padded)).keep[0].any(1).tolist() == [False, True, True, False]
    assert int(ask("trim", picture(torch.zeros(2, 3, 16, 16))).keep.sum()) == 1
    noisy = padded + 0.01 * torch.rand(padded.shape, generator=torch.Generator().manual_seed(1))
    assert ask("trim", picture(noisy)).keep.all()
    assert int(ask("trim", picture(noisy), tau=0.02).keep.sum()) == 8


@pytest.mark.parametrize("name", ["pixelprune", "temporal", "trim"])
@pytest.mark.parametrize("tau", [-0.1, 1.0, math.nan])
def test_thresholds_out_of_range_are_refused(name: str, tau: float) -> None:
    with pytest.raises(ConfigError, match="tau="):
        recipes.find(name)(tau=tau)


def test_operators_refuse_them_too() -> None:
    for operator in (lambda: predictive(torch.zeros(2, 2, 1), -1.0), lambda: runs(torch.zeros(2, 2, 1), math.nan)):
        with pytest.raises(ConfigError, match="tau="):
            operator()
