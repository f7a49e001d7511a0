"""The conformance kit on all that is registered: every method and every adapter, as `visiontok check` runs it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from test_pmod import some_routers
from visiontok.adapters.base import adapter_class, find

import visiontok
from visiontok import Card, Recipe
from visiontok.conformance.adapter_checks import ADAPTER_CHECKS, AdapterCase
from visiontok.conformance.checks import CHECKS, Case
from visiontok.conformance.matrix import DEFAULT, run, try_check
from visiontok.conformance.zoo import ARCHITECTURES, batch, build
from visiontok.errors import UnsupportedError
from visiontok.recipes import find as find_method

pytestmark = pytest.mark.engine

# Options that take another way through a method than its defaults do.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cls_topk[received]": ("cls_topk", {"scorer": "received", "layer": 0}),
    "idpruner[norm]": ("idpruner", {"scorer": "norm", "balance": 0.3}),
    "divprune[centred]": ("divprune", {"background": 0}),
    "divprune[residual]": ("divprune", {"background": 2}),
    "norm[merger_in]": ("norm", {"features": "merger_in"}),
    "divprune[merger_in]": ("divprune", {"features": "merger_in"}),
    "idpruner[norm, merger_in]": ("idpruner", {"scorer": "norm", "features": "merger_in"}),
    "todre[merger_in]": ("todre", {"features": "merger_in"}),
    "hiprune, all anchors": ("hiprune", {"alpha": 1.0}),
    "todre, max-min": ("todre", {"objective": "maxmin", "scorer": "received"}),
    "zoo_prune, exact": ("zoo_prune", {"derivative": "exact", "directions": 8}),
    "scope, sum": ("scope", {"combine": "add", "alpha": 0.5, "scorer": "received"}),
    "holov, two stretches": ("holov", {"stretches": 2, "scorer": "received"}),
    "agile, quickly": ("agile", {"rate": 0.6}),
    "fastv, late": ("fastv", {"layer": 3}),
    "v2drop, three cuts": ("v2drop", {"layers": (1, 2, 3), "shares": (0.8, 0.5, 0.2)}),
    "transprune, three cuts": ("transprune", {"layers": (1, 2, 3), "shares": (0.8, 0.5, 0.2), "since": 0}),
    "entropyprune[keys]": ("entropyprune", {"of": "keys", "layer": 2}),
    "entropyprune[normalised]": ("entropyprune", {"normalise": True}),
    "entropyprune[values]": ("entropyprune", {"of": "values"}),
    "entropyprune[states]": ("entropyprune", {"of": "states"}),
    "fitprune, three cuts": ("fitprune", {"layers": (1, 2, 3), "shares": (0.8, 0.5, 0.2)}),
    "transprune[ttv]": ("transprune", {"guided": False}),
    "visionzip, mostly contextual": ("visionzip", {"share": 0.7, "scorer": "received", "layer": 0}),
    "prumerge, adaptive": ("prumerge", {"adaptive": True}),
    "prumerge_plus, adaptive": ("prumerge_plus", {"adaptive": True}),
    "vscan, small windows": ("vscan", {"window": 2}),
    "vscan, both stages": ("vscan", {"cut": 0.5}),
    "urag, late": ("urag", {"layer": 2}),
    "urag, frames": ("urag", {"of": "frame", "tail": 2}),
    "todre_exit, at once": ("todre_exit", {"threshold": 1.0}),
    "h2o, one choice per layer": ("h2o", {"joined": True}),
    "snapkv, one choice per layer": ("snapkv", {"joined": True, "window": 2}),
    "sparsevlm, one cut": ("sparsevlm", {"layers": (2,), "shares": (0.5,)}),
    "shortv, two layers": ("shortv", {"layers": (0, -1)}),
    "yopo, a third": ("yopo", {"shrink": 3, "layer": 3}),
}


def inapplicable(recipe: Recipe, card: Card) -> set[str]:
    """The checks that the cards of a recipe's methods, and its stages, excuse it from."""
    excused, stages = set(), recipe.stages
    methods = [stage.method.card for stage in stages if stage.method]
    if not methods:
        excused |= {"image alone", "permutation", "NaN", "padding", "inputs untouched", "question"}
    if len(methods) < len(stages):  # layers without visual tokens, whatever the budget
        excused |= {"identity"}
    if len(stages) > 1:  # then a budget is an average over layers
        excused |= {"K = 1"}
    if not card.budget:
        excused |= {"identity", "budget", "K = 1"}
    if card.stochastic:
        excused |= {"permutation"}
    if card.name in ("temporal", "ipcv"):  # images have one frame; what left is back before it could be asked about
        excused |= {"image alone", "permutation", "NaN", "padding", "inputs untouched", "question"}
    if card.name == "temporal":
        excused |= {"no silent no-op"}
    for claims in (mine.contract for mine in (card, *methods)):
        named = {
            "image alone": claims.per_image, "question": claims.question_independent,
            "count": claims.count_from_grid, "permutation": claims.order_free, "no silent no-op": claims.keeps_some,
        }  # fmt: skip
        excused |= {check for check, claimed in named.items() if not claimed}
    return excused


OTHERWISE: dict[tuple[str, str], set[str]] = {
    # a token of every tile stays, so that small budgets are refused
    **{(name, "llava_next"): {"budget", "K = 1"} for name in ("tome", "tinychart", "auroracap")},
    **{(name, "llava_onevision"): {"budget", "K = 1"} for name in ("tome", "tinychart", "auroracap")},
    ("resize", "mistral3"): {"K = 1"},  # stock cannot encode a picture so small
    ("aim", "gemma3"): {"image alone", "question"},  # merging leaves one of 4 tokens, so that no cut is asked
}
"""Checks of which the card does not tell whether they apply on an architecture."""


def assert_conforms(recipe: Recipe, card: Card, architecture: str, otherwise: Collection[str] = ()) -> None:
    results = run(recipe.label, {architecture: Case(recipe, architecture)}).results
    assert [r for r in results if r.outcome == "fail"] == []
    assert {r.check for r in results if r.outcome == "n/a"} == inapplicable(recipe, card) ^ set(otherwise)
    assert len(results) == len(CHECKS)


def cases() -> list[Any]:
    """Every method on every architecture; those that `visiontok check` leaves out by default are slow."""
    return [
        pytest.param(card, name, id=f"{card.name}-{name}", marks=() if name in DEFAULT else (pytest.mark.slow,))
        for card in visiontok.methods()
        for name in ARCHITECTURES
    ]


def refusal(card: Card, architecture: str) -> str:
    """Why an architecture cannot have a method; empty if it can."""
    if card.name == "yopo" and architecture == "qwen3_vl_moe":
        return "Qwen3VLMoeTextSparseMoeBlock of decoder layer 0 has experts"
    adapter = find(build(architecture).model)
    if card.stage == "merge":
        try:
            adapter.encoder()
        except UnsupportedError as error:
            return str(error)
    if card.stage == "encoder":
        return adapter.fixed_layers or (adapter.no_rebuild if card.name == "ipcv" else "")
    if card.stage == "pixel":
        return adapter.fixed_units if card.gives == "units" else adapter.fixed_pictures
    return ""


@pytest.mark.parametrize(("card", "architecture"), cases())
def test_every_method(card: Card, architecture: str) -> None:
    options = {"pmod": {"weights": some_routers()}, "dymu": {"thresholds": 0.3}}.get(card.name, {})
    reason = refusal(card, architecture)
    if reason:
        results = run(card.name, {architecture: Case(visiontok.recipe(card.name), architecture)}).results
        excused = inapplicable(visiontok.recipe(card.name), card)
        assert all(r.outcome == "n/a" and (reason in r.sentence or r.check in excused) for r in results)
        return
    recipe = visiontok.recipe(card.name, **options)
    assert_conforms(recipe, card, architecture, OTHERWISE.get((card.name, architecture), ()))


# The default suite takes one architecture for what the defaults of a method do not reach.
ONE_AND_ANOTHER = ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", ONE_AND_ANOTHER)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, architecture: str) -> None:
    name, options = VARIANTS[variant]
    recipe = visiontok.recipe(name, **options)
    assert_conforms(recipe, find_method(name).card, architecture)


@pytest.mark.parametrize("architecture", ONE_AND_ANOTHER)
@pytest.mark.parametrize("method", ["divprune", "visionzip", "fastv"])
def test_with_coordinate_tokens_reserved(method: str, architecture: str) -> None:
    """A choice, a merging, and a cut in the decoder."""
    recipe = visiontok.recipe(method).with_reserve(0.3)
    assert_conforms(recipe, recipe.stages[0].method.card, architecture)  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", [*DEFAULT, pytest.param("internvl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("card", [card for card in visiontok.methods() if card.budget], ids=lambda card: card.name)
def test_the_published_behaviour_keeps_its_budget(card: Card, architecture: str) -> None:
    """Exactly, but where the card says of the published code that fewer or more remain, or another number."""
    if refusal(card, architecture) or (card.stage == "merge" and architecture == "llava_next"):  # 3 for its 5 tiles
        pytest.skip("refused")
    average = len(visiontok.recipe(card.name).stages) > 1
    recipe = visiontok.recipe(card.name, keep=0.6 if average else 3, fidelity="official")
    told = f"{card.official} {card.bugs}"
    fewer, more, other = (f"{word} than K remain" in told for word in ("fewer", "more", "another number"))
    for image in Case(recipe, architecture).plain.report.images:
        if average:
            assert image.average <= 0.6 * image.tokens
            continue
        if card.contract.whole_groups:
            assert image.kept[-1] in (0, image.tokens)
            continue
        least, most = (1 if fewer or other else 3), (image.tokens if more or other else 3)
        assert least <= image.cached[-1] <= most
        assert image.kept[0] == (image.tokens if card.stage in ("decoder", "cache") else image.kept[-1])


@pytest.mark.parametrize("check", [name for name in ADAPTER_CHECKS if name != "schedules"])  # test_engine.py has these
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapter(architecture: str, check: str) -> None:
    model = build(architecture)
    case = AdapterCase(adapter_class(architecture), model, batch(architecture, model))
    result = try_check(check, architecture, ADAPTER_CHECKS[check], case)
    own = {"units": case.own.fixed_units, "layers": case.own.fixed_layers}
    reason = own.get(check, "")
    assert (result.outcome, result.sentence) == ("n/a" if reason else "pass", reason)
