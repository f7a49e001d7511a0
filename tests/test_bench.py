"""The benchmark's own arithmetic, on a model small enough for a unit test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY = ["--layers", "2", "--hidden", "32", "--heads", "2", "--tower-layers", "3", "--tower-hidden", "32"]
TINY += ["--image-size", "56", "--text", "6", "--keep", "4", "--runs", "2"]


@pytest.fixture(scope="module")
def prefill() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "bench" / "prefill.py"
    spec = importlib.util.spec_from_file_location("bench_prefill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_case_runs_at_the_length_it_names(prefill: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert prefill.main([*TINY, "--json", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    average = {name: row["visual_layer_average"] for name, row in result["cases"].items()}
    assert average == {
        prefill.FULL: 16, prefill.KEPT: 4, prefill.TEXT: 0, prefill.IDENTITY: 16, "divprune": 4,
        "cls_topk": 4, "hiprune": 4, "idpruner": 4, "fastv": 10, "vtw": 8,
    }  # fmt: skip
    flops = {name: row["flops_ratio"] for name, row in result["cases"].items()}
    assert flops["divprune"] == flops[prefill.KEPT] < flops[prefill.FULL] == 1
    for row in result["cases"].values():
        assert 0 < row["prefill"]["min"] <= row["prefill"]["median"] <= row["prefill"]["max"]
        assert row["selection"] is None or 0 <= row["selection"] < row["prefill"]["max"]
    assert result["command"].startswith("python bench/prefill.py --layers 2")
    text = prefill.table(result)
    assert all(name in text for name in average)


def test_the_two_ratios(prefill: ModuleType) -> None:
    assert prefill.ratio([1.0, 2.0, 9.0], [1.0, 4.0, 3.0]) == {"medians": 2 / 3, "paired": 1.0}


@pytest.mark.parametrize(("seconds", "code"), [(1.05, 0), (1.2, 1)])
def test_check_fails_where_a_bar_is_missed(
    prefill: ModuleType, monkeypatch: pytest.MonkeyPatch, seconds: float, code: int
) -> None:
    def measured(model, todo, runs):
        samples = {case.name: prefill.Samples([1.0], [4.0], [], (10, 10)) for case in todo}
        samples[prefill.KEPT] = prefill.Samples([1.0], [1.0], [], (10, 10))
        samples["divprune"] = prefill.Samples([1.0], [seconds], [0.1], (10, 10))
        return samples

    monkeypatch.setattr(prefill, "rounds", measured)
    assert prefill.main([*TINY, "--check"]) == code
