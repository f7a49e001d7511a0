"""The support table says what the marked tests found, about the cells there are tests for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "support.md"

MARKED = """
import pytest


@pytest.mark.support
@pytest.mark.parametrize("mode", ["greedy"])
@pytest.mark.parametrize("schedule", ["inject, cut, exit"])
@pytest.mark.parametrize("name", ["gemma3"])
def test_parameters(name, schedule, mode):
    pass


@pytest.mark.support(architecture="llava", stage="prompt")
class TestMarkers:
    @pytest.mark.support(mode="closer", stage=("mass", "cut"))
    def test_the_closer_counts(self):
        pass

    @pytest.mark.support(mode="skipped")
    @pytest.mark.skipif(True, reason="a mark")
    def test_skipped_by_a_mark(self):
        pass

    @pytest.mark.support(mode="skipped")
    def test_skipped_inside(self):
        pytest.skip("a call")

    @pytest.mark.support(mode="refused")
    def test_refused(self, record_property):
        record_property("refused", "llava: because; do else")

    @pytest.mark.support(mode="known")
    @pytest.mark.xfail(reason="known")
    def test_expected_to_fail(self):
        assert False

    @pytest.mark.support(mode="failing")
    def test_failing(self):
        assert False

    @pytest.mark.support(mode="failing")
    def test_failing_before_it_starts(self, no_such_fixture):
        pass


def test_unmarked():
    pass
"""


def test_a_run_is_written_down(tmp_path: Path) -> None:
    """By the main process; the tests run in a worker."""
    (tmp_path / "test_marked.py").write_text(MARKED)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = -p support\npythonpath = {TESTS}\nmarkers = support")
    file = tmp_path / "deep" / "run.json"
    command = [sys.executable, "-m", "pytest", "-n", "1", "--support", file, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    run = json.loads(file.read_text())
    found = sorted([cells, outcome, reason] for _, cells, outcome, reason in run["results"])
    prompt = {mode: [[mode, "llava", "prompt"]] for mode in ("skipped", "refused", "known", "failing")}
    assert found == sorted(
        [
            [[["greedy", "gemma3", stage] for stage in ("cut", "inject", "exit")], "passed", ""],
            [[["closer", "llava", "cut"], ["closer", "llava", "mass"]], "passed", ""],
            [prompt["skipped"], "skipped", "a mark"],
            [prompt["skipped"], "skipped", "a call"],
            [prompt["refused"], "refused", "llava: because; do else"],
            [prompt["known"], "skipped", "known"],
            [prompt["failing"], "failed", ""],
            [prompt["failing"], "failed", ""],
        ]
    )


def run_of(version: str, *results: tuple[str, str, str, str, str]) -> dict:
    """A run, of (mode, architecture, stage, outcome, reason)."""
    return {"transformers": version, "results": [["t", [r[:3]], *r[3:]] for r in results]}


def test_what_the_table_says() -> None:
    old = run_of(
        "5.9.0",
        ("greedy", "a", "prompt", "passed", ""),
        ("greedy", "a", "cut", "skipped", "a bug of 5.9"),
        ("greedy", "a", "mass", "refused", "a: none; try b"),
        ("chunks", "a", "prompt", "passed", ""),
    )
    new = run_of(
        "5.10.1",
        ("greedy", "b", "prompt", "passed", ""),
        ("greedy", "a", "prompt", "passed", ""),
        ("greedy", "a", "cut", "passed", ""),
        ("greedy", "a", "mass", "refused", "a: none; try b"),
        ("chunks", "a", "prompt", "passed", ""),
        ("chunks", "a", "prompt", "refused", "half an image"),
    )
    text = support.table([new, old])
    assert "transformers 5.9.0, 5.10.1." in text
    rows = text.splitlines()
    assert rows[rows.index("| | a | b |") :] == [
        "| | a | b |",
        "|---|---|---|",
        "| chunks | P<sup>1</sup> |  |",
        "| greedy | P C<sup>2</sup> (M)<sup>3</sup> | P |",
        "",
        "1. transformers 5.10.1: half an image",
        "2. transformers 5.9.0: a bug of 5.9",
        "3. none",
    ]
    assert set(support.read(text)) == support.merged([old, new]).keys()


def test_there_is_no_table_of_failures() -> None:
    passed, failed = (run_of(v, ("greedy", "a", "cut", o, "")) for v, o in (("5.9.0", "passed"), ("5.8.0", "failed")))
    with pytest.raises(SystemExit, match=r"5\.8\.0: t failed"):
        support.table([passed, failed])


@pytest.fixture
def cells(request: pytest.FixtureRequest) -> set[support.Cell]:
    """Those of the tests of this session."""
    properties = (dict(item.user_properties) for item in request.session.items)
    return {tuple(cell) for found in properties for cell in found.get("support", ())}


def test_every_marked_test_is_in_the_table(cells: set[support.Cell]) -> None:
    assert cells <= set(support.read(TABLE.read_text()))


def test_every_cell_of_the_table_has_a_test(request: pytest.FixtureRequest, cells: set[support.Cell]) -> None:
    marked = {file for file in TESTS.glob("test_*.py") if "mark.support" in file.read_text()} - {Path(__file__)}
    chosen = request.config.option.keyword or any("::" in name for name in request.config.args)
    if chosen or not marked <= {item.path for item in request.session.items}:
        pytest.skip("only a part of the tests runs")
    assert cells == set(support.read(TABLE.read_text()))
