"""The benchmarks' own arithmetic, on models small enough for a unit test."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import visiontok

TINY = ["--layers", "2", "--hidden", "32", "--heads", "2", "--tower-layers", "3", "--tower-hidden", "32"]
TINY += ["--image-size", "56", "--text", "6", "--keep", "4", "--runs", "2"]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The scripts import each other, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
        yield
    for name in ("prefill", "overhead", "batches", "selection", "methods", "bias", "pixels"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def prefill() -> ModuleType:
    return importlib.import_module("prefill")


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    return importlib.import_module("overhead")


@pytest.fixture(scope="module")
def batches() -> ModuleType:
    return importlib.import_module("batches")


@pytest.fixture(scope="module")
def selection() -> ModuleType:
    return importlib.import_module("selection")


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return importlib.import_module("methods")


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


def test_overhead_stands_beside_stock_of_the_stored_length(overhead: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert overhead.main(["--layers", "4", "--runs", "2", "--steps", "1", "--json", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    stored = {name: row["stored"] for name, row in result["cases"].items()}
    text, image = 4, 2  # question, and what stands before each image
    assert {name: rows for name, rows in stored.items() if "alone" in name} == {
        "stock, alone": [text + image + 16],
        "prompt, alone": [text + image + 4],
        "cut, alone": [text + image + (16 + 3 * 4) // 4],
        "pyramid, alone": [text + image + round((16 + 8 + 4 + 2) / 4)],
        "inject and exit, alone": [text + image + 2 * 4 // 4],
        "prompt, mass, alone": [text + image + 4],
        "cut, mass, alone": [text + image + (16 + 3 * 4) // 4],
    }
    assert stored["prompt, ragged"] == [text + 2 * (image + 4), text + image + 4]
    for name, row in result["cases"].items():
        free = name.startswith(("stock", "prompt, alone", "prompt, ragged"))
        assert row["hooked"] == (0 if free else 4), name
        for kind in ("decode", "generate", "prefill"):
            assert row[kind]["low"] <= row[kind]["per_layer"] <= row[kind]["high"]
            assert row[kind]["total"] == pytest.approx(4 * row[kind]["per_layer"])
    assert all(name in overhead.table(result) for name in stored)


def test_what_is_added_is_the_median_of_the_differences(overhead: ModuleType) -> None:
    added = overhead.added([(1e-6, 3e-6), (1e-6, 9e-6), (7e-6, 11e-6)], 2)
    assert added == pytest.approx({"stock": 1.0, "total": 4.0, "per_layer": 2.0, "low": 1.5, "high": 3.0})


@pytest.mark.parametrize(
    ("recipe", "micro", "hooked", "code"),
    [("prompt", 0.9, 0, 0), ("prompt", 1.1, 0, 1), ("prompt", 0.0, 1, 1), ("cut", 4.9, 8, 0), ("cut", 5.1, 8, 1)],
)
def test_overhead_check_fails_where_a_bar_is_missed(
    overhead: ModuleType, monkeypatch: pytest.MonkeyPatch, recipe: str, micro: float, hooked: int, code: int
) -> None:
    def measured(layers, todo, runs, steps):
        nothing = [(1e-3, 1e-3)] * 3
        samples = {case.name: overhead.Samples(nothing, nothing, nothing, (9,), 0) for case in todo}
        slower = [(1e-3, 1e-3 + 8 * micro * 1e-6)] * 3
        samples[f"{recipe}, ragged"] = overhead.Samples(nothing, slower, nothing, (9,), hooked)
        return samples

    monkeypatch.setattr(overhead, "rounds", measured)
    assert overhead.main(["--layers", "8", "--check"]) == code


def test_batches_stand_beside_stock_of_the_kept_length(batches: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    tiny = ["--layers", "2", "--hidden", "32", "--heads", "2", "--image-size", "56", "--rows", "3", "--text", "8"]
    tiny += ["--keep", "4", "--cut", "1", "--runs", "1", "--steps", "1", "--json", "--out", str(out)]
    assert batches.main(tiny) == 0
    result = json.loads(out.read_text())
    seen = {
        batch: {name: (row["tokens"], row["slots"]) for name, row in rows.items() if " as short " not in name}
        for batch, rows in result["batches"].items()
    }
    assert seen == {
        "1 row": {"stock": ([24], 24), "prompt": ([12], 12), "cut at 1": ([18], 18)},
        "1 row, left padded": {"stock": ([24], 32), "prompt": ([12], 12), "cut at 1": ([18], 22)},
        "3 equal rows": {"stock": ([24] * 3, 24), "prompt": ([12] * 3, 12), "cut at 1": ([18] * 3, 18)},
        "3 rows, left padded": {
            "stock": ([18, 24, 30], 30), "prompt": ([6, 12, 18], 18), "cut at 1": ([12, 18, 24], 24),
        },
        "3 rows, ragged counts": {
            "stock": ([24] * 3, 24), "prompt": ([9, 12, 15], 15), "cut at 1": ([16, 18, 20], 19.5),
        },
        "tiny model, 1 row": {"stock": ([24], 24), "prompt": ([12], 12), "cut at 1": ([18], 18)},
    }  # fmt: skip
    for rows in result["batches"].values():
        for name, row in rows.items():
            if (short := rows.get(batches.at_kept_length(name))) is not None:
                assert short["tokens"] == row["tokens"]
    assert all(batch in batches.table(result) for batch in seen)


def test_negatives_are_named(batches: ModuleType) -> None:
    def row(full, kept):
        return {"median": 1.0, "to_full": {"paired": full}, "to_kept_length": {"paired": kept}}

    fine, slow = row(0.5, 1.05), row(1.2, 1.15)
    rows = {"stock": {"prefill": row(1.0, 1.0) | {"to_kept_length": None}, "decode": fine}}
    rows |= {"prompt": {"prefill": fine, "decode": slow}}
    assert batches.negatives({"batches": {"1 row": rows}}) == [
        "1 row, prompt: decode is slower than stock (1.20 ×)",
        "1 row, prompt: decode costs 1.15 × stock at the kept length",
    ]


def test_operators_pick_what_the_literal_loops_pick(selection: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert selection.main(["--tokens", "63", "--width", "48", "--runs", "1", "--json", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [part["kind"] for part in result["parts"]] == ["clustered", "uniform"]
    for part in result["parts"]:
        for row in part["cases"].values():
            assert (row["best"], row["picks"]) == (7, 7)
            assert row["missed"] == 0
    assert all(name in selection.table(result) for name in selection.CASES)


@pytest.mark.parametrize("kind", ["clustered", "uniform"])
def test_the_literal_loops_themselves_pick_the_same(selection: ModuleType, kind: str) -> None:
    data = selection.make(kind, 45, 30)
    for name, case in selection.CASES.items():
        exact = data.double()
        assert selection.loop(case.literal(exact, selection.cosine(exact.x)), 9) == case.run(data, 9).tolist(), name


def test_agreement_counts_what_was_not_the_best(selection: ModuleType) -> None:
    gains = torch.tensor([1.0, 4.0, 3.0, 2.0])
    found = selection.agreement(lambda chosen: gains.clone(), [1, 3, 2])
    assert found == {"picks": 3, "best": 2, "missed": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("changed", "code"),
    [({}, 0), ({"missed": 1e-5}, 1), ({"to_gram": 1.3}, 1), ({"to_gram": 1.2, "faster": 14.0}, 1)],
)
def test_selection_check_fails_where_a_bar_is_missed(
    selection: ModuleType, monkeypatch: pytest.MonkeyPatch, changed: dict[str, float], code: int
) -> None:
    row = {"seconds": 1.0, "to_gram": 0.9, "literal": 20.0, "faster": 20.0, "picks": 9, "best": 9, "missed": 0.0}

    def measured(kind, n, width, runs):
        cases = {name: row | changed if "SCOPE" in name or name == "maxmin" else row for name in selection.CASES}
        return {"kind": kind, "n": n, "k": n // 9, "gram": 1.0, "cases": cases}

    monkeypatch.setattr(selection, "measure", measured)
    assert selection.main(["--check", "--tokens", "2880"]) == code


SMALL = ["--layers", "4", "--hidden", "32", "--heads", "2", "--tower-layers", "3", "--tower-hidden", "32"]
SMALL += ["--image-size", "56", "--text", "6", "--average", "6", "--runs", "2", "--steps", "1"]


def test_methods_are_measured_beside_stock_and_only_once(methods: ModuleType, tmp_path: Path) -> None:
    """What a cache holds is what the report says that each layer keeps; what is out of reach keeps that many."""
    out, lines = tmp_path / "methods.md", tmp_path / "methods.jsonl"
    named = ["--methods", "divprune", "fastv", "sieve", "vtw"]
    assert methods.main([*SMALL, *named, "--out", str(out)]) == 0
    first = {line["method"]: line for line in map(json.loads, lines.read_text().splitlines())}
    average = {name: line["average"] for name, line in first.items() if "average" in line}
    assert average == {"divprune": 6, "fastv": (16 + 3 * 2) / 4, "sieve": (2 * 16 + 2 * 6) / 4, "vtw": 8}
    for name, line in first.items():
        slots = (average.get(name, 16) + 6 + 1) * 4  # all layers, after one decode step
        assert line["kv"] == slots * 2 * 32 * 4
        assert all(len(pairs) == 2 and min(map(min, pairs)) > 0 for pairs in line["seconds"].values())

    lines.write_text(lines.read_text() + '{"method": "torn')
    assert methods.main([*SMALL, *named, "grid", "--out", str(out)]) == 0
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["method"] for line in again] == [*first, "grid"]
    assert {line["method"]: line for line in again} | first == {line["method"]: line for line in again}
    with pytest.raises(SystemExit, match="give another file"):
        methods.main([*SMALL, "--runs", "3", *named, "--out", str(out)])


def test_all_registered_methods_are_measured(
    methods: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(methods, "beside", lambda *_, **__: {"refused": "not here"})
    methods.main([*SMALL, "--out", str(tmp_path / "methods.md")])
    listed = [line.split(":")[0] for line in (tmp_path / "methods.md").read_text().splitlines()]
    assert {f"* {card.name}" for card in visiontok.methods()} <= set(listed)


def test_a_view_counts_as_the_memory_that_it_holds(methods: ModuleType) -> None:
    whole = torch.zeros(1, 2, 100, 4)
    layers = [
        SimpleNamespace(keys=whole[:, :, :3], values=whole[:, :, 3:5]),
        SimpleNamespace(keys=whole.clone(), seen=3),
    ]
    assert methods.held(SimpleNamespace(layers=layers)) == 2 * whole.nbytes


def test_what_saves_nothing_is_said(methods: ModuleType) -> None:
    def line(ratios: list[float], kv: int) -> dict:
        return {"seconds": {part: [[2.0, 2 * x] for x in ratios] for part in methods.PARTS}, "kv": kv, "kv_stock": 10}

    done = {"stock": line([1.0, 1.0], 10), "fast": line([0.5, 0.9], 9), "once": line([0.5, 1.1], 10)}
    assert methods.paired(done["fast"], "first") == pytest.approx(0.7)
    assert [text.rpartition(": ")[2] for text in methods.negatives(done)] == ["once"] * 3
    assert [text.rpartition(": ")[2] for text in methods.negatives({"fast": done["fast"]})] == ["none"] * 3


def test_all_ways_to_attend_with_a_bias_are_timed_and_right(tmp_path: Path) -> None:
    bias = importlib.import_module("bias")
    out = tmp_path / "bias.md"
    assert bias.main(["--tokens", "70", "--rounds", "1", "--out", str(out)]) == 0
    rows = [row for phase in bias.HEADS for row in bias.measure(phase, 70, "float32", 1)]
    assert [row["way"] for row in rows] == ["without a bias", "mask of numbers", "columns"] * 2
    assert all(row["error"] is None or row["error"] < 1e-6 for row in rows)
    assert out.read_text().count("| columns |") == 4


@pytest.mark.slow  # the image processor imports torchvision, which takes seconds
def test_a_page_goes_through_every_case(tmp_path: Path) -> None:
    pixels = importlib.import_module("pixels")
    out = tmp_path / "pixels.md"
    small = ["--side", "256", "--tower", "4", "64", "--text", "2", "128", "--rounds", "1"]
    assert pixels.main([*small, "--out", str(out)]) == 0
    rows = {cells[1].strip(): cells for line in out.read_text().splitlines() if len(cells := line.split("|")) > 9}
    kept = {case.name: int(rows[case.name][2]) for case in pixels.CASES}
    assert kept["stock"] == kept["ipcv"] == 64
    assert kept["pixel_entropy, a quarter"] == kept["resize, a quarter"] == 16
    assert 0 < kept["pixelprune, τ = 0.05"] <= kept["pixelprune, τ = 0"] < 64


def test_what_a_pixel_method_takes_is_held_against_what_it_saves_of_the_tower() -> None:
    pixels = importlib.import_module("pixels")

    def samples(choice: float, tower: float) -> object:
        return pixels.Samples([choice], [tower], [1.0], 9, 2.0)

    lossless, lossy = "pixelprune, τ = 0", "pixelprune, τ = 0.05"
    found = {pixels.STOCK: samples(0, 9.0), pixels.CAP: samples(0, 4.0), lossless: samples(0.5, 3.0)}
    text, missed = pixels.table(found | {lossy: samples(0.09, 4.0)}, "", "")
    assert missed == []
    assert "| 9 | 90.0 | 4.00 | 1.00 | 5.09 | 1.96 | 2.00 | 1.80% |" in text
    _, missed = pixels.table(found | {lossless: samples(0, 4.0), lossy: samples(0.1, 4.0)}, "", "")
    assert [line.split(":")[0] for line in missed] == [lossless, lossy]
