"""`visiontok check`: every planted fault is rejected by the check meant for it, in words, and sound subjects pass."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import visiontok
from visiontok import Recipe, cli
from visiontok.conformance import zoo
from visiontok.conformance.adapter_checks import ADAPTER_CHECKS, AdapterCase
from visiontok.conformance.checks import CHECKS, Case
from visiontok.conformance.matrix import check, try_check
from visiontok.conformance.target import resolve
from visiontok.engine.policy import StagePolicy
from visiontok.engine.vision import Units
from visiontok.errors import UnsupportedError

PLANTED = Path(__file__).parent / "data" / "planted.py"
AYA = PLANTED.with_name("aya.py")


# Faults that break more than one claim.
SEVERAL = {"one_too_many", "against_the_batch", "everything", "global_draw", "pythons_draw", "SecretDraw"}


@functools.cache
def failures(name: str) -> dict[str, str]:
    """Check → sentence, of what fails on LLaVA."""
    return {f.check: f.sentence for f in check(f"{PLANTED}:{name}", ("llava",)).failures}


@pytest.mark.parametrize(
    ("name", "meant", "sentence"),
    [
        ("one_too_many", "budget", "asked for 2 of the 16 tokens of an image (keep=tokens:2) it keeps 3"),
        (
            "shortest_slot",
            "padding",
            "it keeps slots that hold no token once 0.0 stands there: mask",
        ),
        ("against_the_batch", "row versus batch", "prompt 0 keeps other tokens in a batch than alone"),
        ("against_the_batch", "image alone", "though the contract says per_image=True"),
        (
            "everything",
            "no silent no-op",
            "asked for keep=ratio:0.4 it silently keeps and computes every visual token in every layer",
        ),
        ("nothing_hidden", "no silent no-op", "run without a budget it silently keeps and computes every visual token"),
        ("global_draw", "determinism", "it uses torch's global random numbers: draw from ctx.generator(u)"),
        ("pythons_draw", "determinism", "the same call twice keeps different tokens"),
        ("SecretDraw", "determinism", "it draws from ctx.generator, but its card says stochastic=False"),
        ("first", "permutation", "which tokens stay depends on their index in the sequence (in 100% of"),
        ("merge_with_next", "permutation", "what merged tokens become depends on their index"),
        ("quantiles", "K = 1", "it raises ZeroDivisionError"),
        ("relative", "padding", "nan in slots that hold no token changes what it keeps"),
        ("centred_in_place", "inputs untouched", "it changes ctx.features in place"),
        ("through_numpy", "bfloat16", "it raises TypeError: Got unsupported ScalarType BFloat16"),
        ("asked_for", "question", "another question keeps other tokens, though the contract says question_independent"),
        ("AboveAverage", "count", "though the contract says count_from_grid=True"),
    ],
)
def test_a_faulty_method_is_rejected(name: str, meant: str, sentence: str) -> None:
    found = failures(name)
    assert sentence in found[meant]
    if name not in SEVERAL:
        assert set(found) == {meant}


@pytest.mark.parametrize("name", ["longest", "last", "centre", "draw", "merge_into_longest", "Adaptive"])
def test_a_sound_method_passes(name: str) -> None:
    matrix = check(f"{PLANTED}:{name}", ("qwen2_5_vl",))
    assert matrix.failures == []
    assert matrix.ok
    assert [r.check for r in matrix.results] == list(CHECKS)


def test_what_a_method_does_not_claim_is_not_held_against_it() -> None:
    said = {r.check: r.sentence for r in check(f"{PLANTED}:Adaptive", ("llava",)).results if r.outcome == "n/a"}
    assert said == {
        **dict.fromkeys(("identity", "budget", "K = 1"), "it takes no budget"),
        "count": "its contract says count_from_grid=False",
    }
    said = {r.check: r.sentence for r in check("fastv", ("llava",)).results if r.outcome == "n/a"}
    assert said == {
        "image alone": "its contract says per_image=False",
        "question": "its contract says question_independent=False",
    }


@pytest.mark.parametrize(
    ("name", "meant", "sentence"),
    [
        (
            "WrongText",
            "structure",
            "text='text_model' is no language model with decoder layers at .layers; the model has",
        ),
        ("RowsForColumns", "geometry", "becomes the token that it places at [0,"),
        ("OnePlace", "grids", "grids() puts two tokens of image 0 on one place"),
        ("Shifted", "patches to tokens", "group(): disturbed patches change the tokens"),
        ("UnitsTransposed", "units", "made a difference to the features of those that are kept"),
        (
            "WindowsForgotten",
            "layers",
            "where two units of three stay, they are not what they are in the whole picture",
        ),
        ("OtherPlaces", "units", "parts(): all units make other features than the stock tower"),
        ("NoClsToken", "CLS token", "cls_token=False, but the tower's first token is the same for all pixels"),
        ("FalseClsToken", "CLS token", "cls_token=True, but the tower's first token changes with the pixels"),
        ("NoOwnMask", "schedules", "schedule 'prompt': the model raises"),
        ("NoDeepStack", "schedules", "schedule 'prompt': the model raises"),
    ],
)
def test_a_faulty_adapter_is_rejected(name: str, meant: str, sentence: str) -> None:
    subject: Any = resolve(f"{PLANTED}:{name}", {})
    family = subject.model_types[0]
    case = AdapterCase(subject, zoo.build(family), zoo.batch(family, zoo.build(family)))
    result = try_check(meant, family, ADAPTER_CHECKS[meant], case)
    assert (result.outcome, sentence in result.sentence) == ("fail", True), result.sentence


def test_an_adapter_whose_structure_is_wrong_fails_once() -> None:
    matrix = check(f"{PLANTED}:WrongText")
    assert [(f.check, f.architecture) for f in matrix.failures] == [("structure", "llava"), ("structure", "vipllava")]
    assert {r.sentence for r in matrix.results if r.outcome == "n/a"} == {"the parts it names are not there"}


def test_a_sound_adapter_passes() -> None:
    """By its name among the registered ones, and in a file that brings its own tiny model."""
    for target in ("paligemma", f"{AYA}:AyaAdapter"):
        matrix = check(target)
        assert matrix.failures == []
        claims = [name for name in ADAPTER_CHECKS if target == "paligemma" or name not in ("units", "layers")]
        assert [r.check for r in matrix.results if r.outcome == "pass"] == claims


@pytest.mark.parametrize(("broken", "seen"), [("merging", {"identity", "oracle"}), ("nan", {"NaN"})])
def test_a_broken_engine_is_seen(broken: str, seen: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What no method can do wrong by itself: the checks that watch the engine can fail too."""
    ask, gather = StagePolicy.prompt, Units.gather

    def scaled(self: Any, call: Any, embeds: torch.Tensor) -> Any:
        keep, embeds = ask(self, call, embeds)
        return keep, embeds * 1.001

    if broken == "merging":
        monkeypatch.setattr(StagePolicy, "prompt", scaled)
    else:
        monkeypatch.setattr(Units, "gather", lambda self, x: gather(self, x).nan_to_num())
    assert {f.check for f in check("divprune", ("llava",)).failures} == seen


def test_a_recipe_keeps_its_own_budgets(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    recipe = visiontok.recipe("divprune", keep=0.5) + visiontok.recipe("fastv", keep=0.25, layer=2)
    recipe.save(path)
    assert Case(Recipe.load(path), "llava").asking == recipe
    matrix = check(str(path), ("llava",))
    assert matrix.failures == []
    assert {r.check for r in matrix.results if r.outcome == "n/a"} == {"K = 1", "image alone", "question"}
    everything = check(visiontok.recipe("grid", keep=1.0), ("llava",))
    assert {r.sentence for r in everything.results if r.check == "no silent no-op"} == {"its own budget is everything"}


def test_a_method_may_refuse_a_model_but_not_all() -> None:
    def fussy(ctx):
        raise UnsupportedError("this family: no such thing; use another method")

    matrix = check(fussy, ("llava",))
    assert not matrix.ok
    assert {r.check for r in matrix.results if r.outcome == "pass"} == {"identity"}


# ---- the command


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, str, str]:
    """Runs `visiontok check ARGUMENTS` in this process; gives exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["visiontok", "check", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    torch.set_num_threads(threads)
    return stop.value.code, *capsys.readouterr()


def test_the_command_prints_a_matrix_and_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, f"{PLANTED}:first", "--arch", "llava", "--arch", "gemma3")
    assert (code, err) == (1, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:3] == [f"{PLANTED}:first", "check llava gemma3", "identity pass pass"]
    assert "permutation FAIL FAIL" in lines
    assert [line for line in lines if line.startswith("FAIL permutation (llava")] != []
    assert lines[-1].startswith("failed in")


def test_the_command_in_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("cls_topk", "fastv", "--arch", "llava", "--json", "--keep", "5")
    code, out, _ = call(capsys, monkeypatch, *arguments)
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    assert [t["target"] for t in found["targets"]] == ["cls_topk", "fastv"]
    result = found["targets"][0]["results"][0]
    assert {k: v for k, v in result.items() if k != "seconds"} == {
        "check": "identity", "architecture": "llava", "outcome": "pass", "sentence": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "check: name a target"),
        (["divprun"], "method='divprun': unknown; did you mean divprune"),
        (["divprune", "--arch", "lava"], "arch='lava': there is no such tiny model; did you mean llava?"),
        (["missing.py:f"], "recipe=missing.py:f: there is no such Python file"),
        ([f"{PLANTED}:frist"], "the file defines no 'frist'"),
        (
            [f"{PLANTED}:Unknown"],
            "there is no tiny model for model_types=('llava_of_tomorrow',); write",
        ),
        (["llava", "--option", "a=1"], "a='1': an adapter takes no options"),
        (["idpruner", "--option", "balanse=1"], "balanse='1': idpruner has no such option"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_recipe_with_mass_attention_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mass.json"
    visiontok.recipe("divprune", keep=0.5).with_mass(visiontok.Mass()).save(path)
    code, _, _ = call(capsys, monkeypatch, str(path), "--arch", "llava", "--json")
    assert code == 0
