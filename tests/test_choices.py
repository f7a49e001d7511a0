"""The ledger's choices: who was there, who stayed, by which scores, and who took over whom."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import visiontok
from visiontok.conformance.zoo import batch, build
from visiontok.ledger import Choice

BY_RANK = ("norm", "cls_topk", "fastv", "pyramiddrop", "explain", "sparsevlm_plus", "gemfilter")


def ledger_of(method: Any, name: str = "llava", **options: Any) -> Any:
    model = build(name)
    with torch.no_grad(), visiontok.compress(model, method, **options) as compression:
        model(**batch(name, model))
        return compression.ledger


@pytest.mark.parametrize("method", BY_RANK)
def test_the_best_scores_stay(method: str) -> None:
    """Methods that rank and nothing else: no candidate that went has a better score than one that stayed."""
    options: dict[str, Any] = {"width": 1} if method == "gemfilter" else {}
    choices: list[Choice] = ledger_of(method, keep=0.4, **options).choices
    assert choices
    for choice in choices:
        assert choice.scores is not None
        assert bool((choice.kept <= choice.candidates).all())
        for scores, kept, there in zip(choice.scores, choice.kept, choice.candidates, strict=True):
            gone = scores[there & ~kept].tolist()
            assert float(scores[kept].min()) >= max(gone, default=-torch.inf)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("visiontok", {"keep": 0.4}),
        ("divprune", {"keep": 0.4, "mass": True}),
        ("pyramiddrop", {"keep": 0.5, "mass": True}),
        ("visionzip", {"keep": 0.4, "mass": True}),
        ("kmeans", {"keep": 0.3, "mass": True}),
    ],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_masses_are_the_sizes_of_what_was_taken_over(method: str, options: dict[str, Any], name: str) -> None:
    """Followed from choice to choice, everyone ends in a kept token or in nobody; mass counts those who end in it."""
    ledger = ledger_of(method, name, **options)
    units = ledger.units
    home = torch.where(units.valid, torch.arange(units.valid.shape[1]), -1)
    for choice in ledger.choices:
        assert bool(((choice.into >= 0) <= choice.candidates).all())
        assert bool(choice.kept.gather(1, choice.into.clamp_min(0))[choice.into >= 0].all())
        home = torch.where(home >= 0, choice.into.gather(1, home.clamp_min(0)), -1)
    count = torch.zeros(home.shape).scatter_add(1, home.clamp_min(0), (home >= 0).float())
    last = ledger.depth - 1
    alive = units.gather(ledger.alive(last)[..., None])[..., 0] & units.valid
    mass = units.gather(ledger.mass(last)[..., None])[..., 0] * alive
    assert torch.equal(mass, count * alive)
    assert torch.equal(ledger.choices[-1].kept, alive)


def test_what_methods_do_not_say_is_none() -> None:
    [choice] = ledger_of("divprune", keep=5).choices
    assert (choice.label, choice.layer, choice.scores, choice.into) == ("divprune", None, None, None)
    assert choice.kept.sum(1).tolist() == [5] * 4
    choices = ledger_of("pyramiddrop", keep=0.5).choices
    assert [choice.layer for choice in choices] == sorted({choice.layer for choice in choices})
    for earlier, later in itertools.pairwise(choices):
        assert torch.equal(later.candidates, earlier.kept)


def test_images_without_candidates_have_no_scores() -> None:
    """What an earlier cut dropped whole is no part of the later question."""
    recipe = visiontok.recipe("urag", groups=1, layer=1) + visiontok.recipe("fastv", keep=0.25, layer=2)
    choice = ledger_of(recipe).choices[-1]
    there = choice.candidates.any(1)
    assert choice.scores is not None
    assert not bool(there.all())
    assert bool(choice.scores[~there].isnan().all())
    assert bool(choice.scores[there][choice.candidates[there]].isfinite().all())


def test_a_function_can_tell_its_scores() -> None:
    def lengths(ctx: visiontok.Context) -> torch.Tensor:
        scores = ctx.scored(ctx.features.float().norm(dim=-1))
        return visiontok.functional.topk(scores, torch.full_like(ctx.count, 3), ctx.valid)

    [choice], [known] = ledger_of(lengths).choices, ledger_of("norm", keep=3).choices
    assert torch.equal(choice.kept, known.kept)
    torch.testing.assert_close(choice.scores, known.scores.float())
