"""`visiontok recommend` follows its rule on the evidence, and the evidence is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from visiontok.demo import evidence
from visiontok.demo import recommend as module
from visiontok.demo.card import Curves
from visiontok.demo.curves import STOCK, read
from visiontok.demo.recommend import recommend

from visiontok import recipes
from visiontok.cli import app
from visiontok.errors import ConfigError

EVIDENCE = json.loads(module.EVIDENCE.read_text())


def row(method, keep, low, change, model="llava", workload="photo", mass=False):
    return {
        "workload": workload, "model": model, "method": method, "mass": mass, "keep": keep, "tokens": 1.0,
        "questions": 100, "score": 90.0, "full": 91.0, "change": [change, low, 0.0], "source": "here",
    }  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    def set_rows(*rows, times=None):
        monkeypatch.setattr(module, "_evidence", lambda: {"rows": list(rows), "times": times or {}})

    return set_rows


def test_the_fewest_tokens_that_are_safe(known):
    known(row("divprune", 0.5, -1.0, -0.5), row("divprune", 0.25, -1.9, -1.0), row("divprune", 0.11, -2.1, -1.0))
    assert (recommend("llava", "photo").chosen.keep, recommend("llava", "photo", margin=0.9).chosen) == (0.25, None)
    assert recommend("llava", "photo", "loss").chosen.keep == 0.5


def test_safe_means_on_every_model(known):
    known(
        row("divprune", 0.25, -1.0, -0.5),
        row("divprune", 0.25, -9.0, -8.0, model="llava-seed1"),
        row("hiprune", 0.5, -1.0, -0.5),
        row("hiprune", 0.5, -1.0, -0.5, model="llava-seed1"),
        row("todre", 0.05, 0.0, 0.0),
        row("todre", 0.05, -9.0, -9.0, model="qwen3_vl"),
    )
    found = recommend("llava", "photo")
    assert found.chosen.method == "hiprune"
    assert "not measured on every model" in found.excluded["todre"]
    assert recommend("gemma3", "photo").chosen is None


def test_nothing_is_an_answer_with_what_loses_least(known):
    known(row("divprune", 0.5, -5.0, -4.0), row("hiprune", 0.5, -4.0, -3.0))
    found = recommend("llava", "photo")
    assert found.chosen is None
    assert [one.method for one in found.others] == ["hiprune", "divprune"]


def test_equals_go_to_the_default_and_worse_ones_do_not(known):
    known(row("hiprune", 0.25, 0.0, 0.0), row("visiontok", 0.25, -1.0, -0.9))
    assert recommend("llava", "photo").chosen.method == "visiontok"
    known(row("hiprune", 0.25, 0.0, 0.0), row("visiontok", 0.25, -1.5, -1.1))
    assert recommend("llava", "photo").chosen.method == "hiprune"


def test_what_saves_no_time_or_reads_the_question_is_left_out(known):
    slow = {"zoo_prune": {"first_token": 1.35, "cache": 0.4}}
    known(row("zoo_prune", 0.05, 0.0, 0.0), row("divprune", 0.5, 0.0, 0.0), times=slow)
    assert recommend("llava", "photo").chosen.method == "divprune"
    assert recommend("llava", "photo", "memory").chosen.method == "zoo_prune"
    known(row("mmtok", 0.05, 0.0, 0.0, workload="chat"), row("cdpruner", 0.05, 0.0, 0.0, workload="chat"))
    found = recommend("llava", "chat")
    assert found.chosen is None
    assert set(found.excluded) == {"mmtok", "cdpruner"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("llava", "sound"), "--workload"),
        (("llava", "photo", "fun"), "--goal"),
        (("llava", "photo", "loss", -1), "--margin"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        recommend(*arguments)


@pytest.mark.parametrize("workload", module.workloads())
@pytest.mark.parametrize("goal", module.GOALS)
@pytest.mark.parametrize("model", ["tiny", "tiny-qwen", "internvl"])
def test_every_answer_has_its_evidence(workload, goal, model):
    run = CliRunner().invoke(app, ["recommend", "--model", model, "--workload", workload, "--goal", goal, "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    shown = [found["chosen"], *found["others"]] if found["chosen"] else found["others"]
    for one in shown:
        assert one["measured"]
        assert all(line in EVIDENCE["rows"] for line in one["measured"])
    if found["chosen"]:
        recipes.find(found["chosen"]["method"].split()[0])


def test_the_readme_names_what_is_recommended():
    text = (Path(__file__).parent.parent / "README.md").read_text().split("## Which one should I use?")[1]
    rows = [line.strip("| ").split(" | ") for line in text.split("## ")[0].splitlines() if line.startswith("| ")][2:]
    named = {name.split(" (")[0]: found for name, *found in rows}
    assert {"several images" if name == "multi-image" else name for name in module.workloads()} == set(named)
    for name, found in named.items():
        for model, cell in zip(("llava", "qwen3_vl"), found, strict=True):
            chosen = recommend(model, "multi-image" if name == "several images" else name).chosen
            wanted = (
                "nothing is safe: use none" if chosen is None else f"`{chosen.method}`, keep {100 * chosen.keep:g} %"
            )
            assert cell == wanted


def test_the_evidence_is_what_was_measured():
    measured = {}
    for workload, (file, split, _) in evidence.WORKLOADS.items():
        lines = read(evidence.WEIGHTS / file)
        for exam in (line for line in lines if line.get("split") == split):
            cells = [line for line in lines if "model" in line and line["exam"] == exam["exam"]]
            if workload == "chat":
                cells = [{**cell, "keep": cell["share"]} for cell in cells if cell["cached"]]
            measured[workload] = Curves(exam, [cell for cell in cells if cell["positions"] == "original"])
    assert {one["workload"] for one in EVIDENCE["rows"]} == set(measured)
    for one in EVIDENCE["rows"]:
        curves = measured[one["workload"]]
        hits = curves.hits(one["model"], one["method"], one["keep"], one["mass"])
        stock = curves.hits(one["model"], STOCK, None)
        assert one["score"] == round(100 * float(hits.mean()), 1)
        assert one["full"] == round(100 * float(stock.mean()), 1)
        assert one["change"][0] == round(100 * float(np.mean(hits.mean(0) - stock.mean(0))), 1) + 0.0
    assert evidence.times() == EVIDENCE["times"]
