"""`visiontok bench`: its rows, its books against independent counts, and what an interruption leaves."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from visiontok.eval.efficiency import measure, rounds
from visiontok.eval.efficiency.job import Bench, bench_job, parse_bytes
from visiontok.eval.efficiency.measure import COMPILED, STATIC, Batch, Variant
from visiontok.eval.efficiency.nearest import nearest
from visiontok.eval.efficiency.requests import Point, pictures, requests, text_tokens, visual

from visiontok import cli
from visiontok.api import remember_vision
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.named import Loaded, load_model, named_recipe
from visiontok.stopwatch import timed

MEMORY = 1 << 30
RUN = Batch.run
NOT_HERE = "decoding is not compiled in this test"
PARTS = {"preprocess", "vision", "selection", "prefill", "other", "first_token", "with_preprocess", "decode_token"}


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as found:
        yield found


@pytest.fixture(scope="module")
def uncompiled(patch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute; and one pair is enough where no time is looked at."""

    def without(self: Batch, variant: Variant, new_tokens: int | None = None) -> Any:
        if variant.configuration == COMPILED:
            raise UnsupportedError(NOT_HERE)
        return RUN(self, variant, new_tokens)

    patch.setattr(Batch, "run", without)
    patch.setattr(rounds, "PAIRS", 1)
    patch.setattr(rounds, "nearest", functools.partial(nearest, tries=1))


@pytest.fixture(scope="module")
def qwen() -> Loaded:
    return load_model("tiny-qwen", torch.device("cpu"))


def asked(file: Path, **changed: Any) -> Bench:
    return Bench(
        **{
            "model": "tiny-qwen", "methods": ("divprune", "fastv"), "batches": (1, 3), "new_tokens": 3, "runs": 1,
            "warm_up": 1, "memory": "1GiB", "static": True, "out": str(file),
        } | changed
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "efficiency.json"
    made = bench_job(asked(out))
    assert json.loads(out.read_text()) == made
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    return made | {"out": out}


def rows(found: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if wanted.items() <= row.items()]


def test_every_row_is_there(found: dict[str, Any]) -> None:
    assert found["schema"] == 1
    for batch in (1, 3):
        baselines = rows(found, batch=batch, method="full", why="baseline")
        assert [row["configuration"] for row in baselines] == ["dynamic", "static", "compiled"]
        assert [row["error"] for row in baselines] == [None, None, NOT_HERE]
        for name in ("divprune", "fastv"):
            assert [row["configuration"] for row in rows(found, batch=batch, method=name)] == ["dynamic", "static"]
        [error] = [row["error"] for row in rows(found, batch=batch, method="fastv", configuration="static")]
        assert "cut stage acts inside the language model" in error
        for name in ("random", "resize"):
            whys = {row["why"] for row in rows(found, batch=batch, method=name)}
            assert whys == {"equal tokens", "equal time of divprune 0.25", "equal time of fastv 0.25"}
    for row in found["rows"]:
        assert (row["seconds"] is None) == (row["error"] is not None) == (row["kv_bytes"] is None)


def test_the_parts_of_a_run_add_up(found: dict[str, Any]) -> None:
    for row in rows(found, error=None):
        seconds = {name: value["median"] for name, value in row["seconds"].items()}
        assert seconds.keys() == PARTS
        whole = seconds["vision"] + seconds["selection"] + seconds["prefill"] + seconds["other"]
        assert seconds["first_token"] == pytest.approx(whole)
        assert seconds["with_preprocess"] == pytest.approx(seconds["preprocess"] + seconds["first_token"])
        assert min(seconds[name] for name in PARTS - {"selection", "other"}) > 0
        assert seconds["other"] > 0
        assert (seconds["selection"] > 0) == (row["method"] in ("divprune", "random", "resize"))


def test_ratios_are_to_the_best_stock_configuration(found: dict[str, Any]) -> None:
    for batch in (1, 3):
        first = {
            row["configuration"]: row["seconds"]["first_token"]["median"]
            for row in rows(found, batch=batch, method="full", error=None)
        }
        for row in rows(found, batch=batch, error=None):
            wanted = min(first.values()) / row["seconds"]["first_token"]["median"]
            assert row["speed_up"]["median"] == pytest.approx(wanted)
            assert (row["cap"] is None) == (row["method"] == "resize")
            assert row["cap"] is None or row["cap"] >= 1


def test_equal_tokens_are_equal(found: dict[str, Any]) -> None:
    """81 tokens, and in a batch 81, 36 and 25 or so; fastv's cut at layer 2 of 4 leaves (81 + 20) / 2."""
    for batch in (1, 3):
        [divprune] = rows(found, batch=batch, method="divprune", configuration="dynamic")
        [fastv] = rows(found, batch=batch, method="fastv", configuration="dynamic")
        [equal, near] = rows(found, batch=batch, method="random", why="equal tokens")
        assert equal["keep"] == "0.25"
        assert equal["layer_average"] == divprune["layer_average"]
        assert near["layer_average"] == pytest.approx(fastv["layer_average"], abs=0.5)
        assert fastv["layer_average"] > divprune["layer_average"]
        for other in rows(found, batch=batch, method="resize", why="equal tokens"):
            [mine] = rows(found, batch=batch, method="random", why="equal tokens", keep=other["keep"])
            assert 0.7 * mine["layer_average"] <= other["layer_average"] <= mine["layer_average"]


def test_the_cache_is_what_the_cost_model_says(found: dict[str, Any]) -> None:
    weights = found["protocol"]["weights"]["bytes"]
    for row in rows(found, error=None):
        assert row["kv_bytes"] == row["kv_model_bytes"] > 0
        each = row["kv_bytes"] / row["batch"]
        assert row["requests"] * each <= MEMORY - weights < (row["requests"] + 1) * each
        assert row["peak_bytes"] is None


def test_mass_attention_keeps_a_bias_beside_keys_and_values(qwen: Loaded) -> None:
    """Four bytes for each slot of the prompt, in every layer."""
    batch = Batch(qwen, requests(qwen, Point(2, None, None), pictures(None, 2, 0)), 3)
    variant = Variant("visiontok", "0.25", named_recipe("visiontok", "0.25", {}, 0))
    with torch.inference_mode():
        timed, _ = batch.run(variant)
    found = measure.books(qwen, variant, timed, 3)
    assert timed.report is not None
    assert found.kv_model is not None
    assert found.kv - found.kv_model == 2 * 4 * sum(timed.report.layer_tokens)


@pytest.mark.parametrize("name", ["full", "random", "resize", "fastv"])
def test_flops_are_what_the_counter_counts(qwen: Loaded, name: str) -> None:
    """fastv reads one row of attention per head in one layer, which is selection."""
    recipe = None if name == "full" else named_recipe(name, "0.25", {}, 0)
    batch = Batch(qwen, requests(qwen, Point(2, None, None), pictures(None, 2, 0)), 1)
    # The counter does not know the CPU's own fused attention.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        timed, _ = batch.run(Variant(name, None, recipe))
    total = measure.books(qwen, Variant(name, None, recipe), timed, 1).flops["total"]
    assert total is not None
    extra = counter.get_total_flops() - total
    assert 0 <= extra < 0.001 * total if name == "fastv" else extra == 0


def test_conventions_count_visual_tokens(found: dict[str, Any]) -> None:
    """A: 4nd² + 2n²d + 2ndm of every layer."""
    config = load_model("tiny-qwen", torch.device("cpu")).model.config.text_config
    d, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    [full] = rows(found, batch=1, method="full", configuration="dynamic")
    n = full["visual_tokens"]
    assert full["conventions"]["A"] == layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    for row in rows(found, error=None):
        assert row["conventions"].keys() == {"A", "B", "C", "D"}
        assert row["conventions"]["C"] == 2 * row["conventions"]["B"]


def test_a_file_goes_on_where_it_was_interrupted(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[int] = []

    def instead(self: rounds.Rounds, runs: int, warm_up: int) -> None:
        if len(self.sizes) == 3 and not measured:
            raise KeyboardInterrupt
        measured.append(len(self.sizes))

    monkeypatch.setattr(rounds.Rounds, "measure", instead)
    point = ("batch", "side", "text", "asked_text")
    plain = [{name: value for name, value in row.items() if name not in point} for row in rows(found, batch=1)]
    monkeypatch.setattr(rounds.Rounds, "rows", lambda *_: plain)
    out = tmp_path / "again.json"
    out.write_text(json.dumps({**found, "rows": rows(found, batch=1), "out": None}))

    with pytest.raises(KeyboardInterrupt):
        bench_job(asked(out))
    assert json.loads(out.read_text())["rows"] == rows(found, batch=1)
    measured.append(0)
    again = bench_job(asked(out))
    assert measured == [0, 3]
    assert again["rows"][: len(rows(found, batch=1))] == rows(found, batch=1)
    assert {row["batch"] for row in again["rows"]} == {1, 3}
    with pytest.raises(ConfigError, match=r"runs was 1 and is 2; give another file"):
        bench_job(asked(out, runs=2))
    out.write_text("{}")
    with pytest.raises(ConfigError, match="holds no efficiency rows"):
        bench_job(asked(out))


def test_a_row_that_fails_costs_no_other(qwen: Loaded, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails at once, one in a later round."""
    batch = Batch(qwen, requests(qwen, Point(1, None, None), pictures(None, 1, 0)), 2)
    random, resize = (Variant(name, "0.5", named_recipe(name, "0.5", {}, 0)) for name in ("random", "resize"))
    run, seen = batch.run, []

    def failing(variant: Variant, new_tokens: int | None = None) -> Any:
        seen.append(variant.method)
        if variant.method == "random" or (variant.method == "resize" and seen.count("resize") == 2):
            raise RuntimeError("no luck")
        return run(variant, new_tokens)

    monkeypatch.setattr(batch, "run", failing)
    made = rounds.Rounds(qwen, batch, [random, resize])
    made.measure(2, 1)
    errors = {row["method"]: row["error"] for row in made.rows(None) if row["configuration"] == "dynamic"}
    assert errors == {"full": None, "random": "RuntimeError: no luck", "resize": "RuntimeError: no luck"}
    assert seen.count("random") == 1


def test_a_vision_memory_is_refused(qwen: Loaded) -> None:
    batch = Batch(qwen, requests(qwen, Point(1, None, None), pictures(None, 1, 0)), 2)
    with remember_vision(qwen.model), pytest.raises(ConfigError, match="a vision memory is on it"):
        rounds.Rounds(qwen, batch, []).measure(1, 1)
    with remember_vision(qwen.model), pytest.raises(ConfigError, match="a vision memory is on it"):
        timed(qwen, batch.asked, max_new_tokens=1)


def test_batches_are_ragged_and_of_the_sizes_asked_for(qwen: Loaded) -> None:
    asked = requests(qwen, Point(3, 288, 64), pictures(None, 3, 0))
    inputs = qwen.inputs(*asked)
    assert [images[0].size for images, _ in asked] == [(288, 288), (216, 216), (144, 144)]
    assert text_tokens(qwen, inputs) == [64, 48, 32]
    tokens = visual(qwen, inputs).sum(1).tolist()
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3
    padding = inputs["attention_mask"] == 0
    assert padding[1:, 0].all()
    assert not padding[:, -1].any()
    with pytest.raises(ConfigError, match=r"--text 2: this model's prompt has \d+ tokens around one word alone"):
        requests(qwen, Point(1, None, 2), pictures(None, 1, 0))


@given(
    st.integers(1, 300),
    st.floats(0.01, 10),
    st.floats(0, 50),
    st.floats(1, 3),
    st.floats(0.1, 2000),
)
def test_the_nearest_budget_is_found(high: int, slope: float, fixed: float, power: float, target: float) -> None:
    """A time that grows: outside of it the nearer end, inside a measured budget no worse than the ends."""
    tried: list[int] = []

    def ratio(k: int) -> float:
        tried.append(k)
        return (fixed + slope * k**power) / target

    k = nearest(ratio, 1, high)
    assert 1 <= k <= high
    assert len(tried) == len(set(tried)) <= 6
    if ratio(1) >= 1 or ratio(high) <= 1:
        assert k == (1 if ratio(1) >= 1 else high)
    if power == 1 and ratio(1) < 1 < ratio(high):
        assert abs(k - (target - fixed) / slope) < 1


@pytest.mark.parametrize(("text", "wanted"), [("24GiB", 24 << 30), ("1.5 kB", 0), ("80GB", 80 * 10**9), ("7", 7)])
def test_memory_is_read(text: str, wanted: int) -> None:
    if wanted:
        assert parse_bytes(text) == wanted
    else:
        with pytest.raises(ConfigError, match="write it as 24GiB"):
            parse_bytes(text)


def test_requests_that_fit() -> None:
    assert rounds.concurrent(1000, 100, 40, 2) == 45
    assert rounds.concurrent(50, 100, 40, 2) == 0
    assert rounds.concurrent(None, 100, 40, 2) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"new_tokens": 1}, "--new-tokens 1: give at least 2"),
        ({"runs": 0}, "--runs 0"),
        ({"batches": (0,)}, "batches=0"),
        ({"methods": ("blind",)}, "--method blind"),
        ({"methods": ("fastvv",)}, "fastv"),
        ({"keeps": ("1",)}, "keep='1' is ambiguous"),
        ({"memory": "much"}, "--memory 'much'"),
        ({"out": "/no/such/folder/x.json"}, "--out"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("visiontok.eval.efficiency.job.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        bench_job(asked(tmp_path / "x.json", **changed))


def test_the_table_is_markdown(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []
    monkeypatch.setattr("visiontok.eval.efficiency.job.bench_job", lambda bench: given.append(bench) or found)
    command = ["bench", "--model", "tiny-qwen", "--method", "divprune", "--method", "fastv", "--batch", "1"]
    command += ["--batch", "3", "--new-tokens", "3", "--runs", "1", "--warm-up", "1", "--memory", "1GiB", "--static"]
    monkeypatch.setattr(sys, "argv", ["visiontok", *command, "--out", "x.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert given == [asked(Path("x.json"))]
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    measured = {(row["batch"], row["method"], row["keep"], row["configuration"]) for row in found["rows"]}
    assert len(lines) == len(measured) + 2 * 2
    assert len({line.count("|") for line in lines}) == 1
    assert printed.count("Later to the first token than stock at its best: ") == 2
    assert f"full compiled: {NOT_HERE}" in printed


@pytest.mark.slow
def test_decoding_is_compiled(qwen: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same answer; and what generate() would not compile does not pass for it."""
    monkeypatch.setattr(Batch, "run", RUN)
    batch = Batch(qwen, requests(qwen, Point(1, None, None), pictures(None, 1, 0)), 4)
    recipe = named_recipe("divprune", "0.25", {}, 0)
    with torch.inference_mode():
        for made in (None, recipe):
            answers = []
            for configuration in (STATIC, COMPILED):
                variant = Variant("x", None, made, configuration)
                batch.first(variant)
                answers.append(batch.run(variant)[0].output.sequences)
            assert torch.equal(*answers)
    monkeypatch.setattr(type(qwen.model), "_valid_auto_compile_criteria", lambda *_: False)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="does not compile decoding"):
        batch.first(Variant("x", None, None, COMPILED))


def test_a_view_of_a_cache_counts_whole() -> None:
    whole = torch.zeros(1, 2, 100, 4)
    layer = SimpleNamespace(keys=whole[:, :, :3], values=whole[:, :, 3:5], mask=torch.ones(9, dtype=torch.bool))
    assert measure.held(SimpleNamespace(layers=[layer])) == whole.nbytes
