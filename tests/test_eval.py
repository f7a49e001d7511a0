"""`visiontok eval`: what is asked, written, counted and refused; killed runs, and several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from visiontok.eval import runner
from visiontok.eval.compare import Answered, by_group, compared, plain, read, score
from visiontok.eval.job import Sweep, eval_job
from visiontok.eval.protocol import canonical_image, pixels, protocol, short
from visiontok.eval.records import PROTOCOL, TIMES, Records, differences, keep_protocol, split
from visiontok.eval.runner import Cell, answer, run
from visiontok.eval.task import find

from visiontok import compress, recipe
from visiontok.errors import ConfigError, ImageError
from visiontok.named import Loaded, load_model

IDS = [f"q{number}" for number in range(10)]
BLOCKS = split(IDS, 4)


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", torch.device("cpu"))


def rows(number: int) -> list[dict[str, Any]]:
    return [{"id": one, "answer": f"an “answer” to {one}\n", TIMES: {"all": 0.25}} for one in BLOCKS[number]]


def results(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("results.json"))}


# -------------------------------------------------------------------------------------------------------------- records


def test_whatever_byte_a_file_is_cut_at_whole_blocks_stay(tmp_path: Path) -> None:
    with Records(tmp_path, BLOCKS, 0) as records:
        for number in range(len(BLOCKS)):
            records.append(number, rows(number))
    file = tmp_path / "answers-0-of-1.jsonl"
    content = file.read_bytes()
    ends = [0]
    for block in BLOCKS:
        ends.append(ends[-1] + sum(len(line) + 1 for line in content[ends[-1] :].split(b"\n")[: len(block)]))
    assert ends[-1] == len(content)
    for cut in range(len(content) + 1):
        file.write_bytes(content[:cut])
        with Records(tmp_path, BLOCKS, 0) as records:
            whole = sum(end <= cut for end in ends) - 1
            assert sorted(records.done) == list(range(whole))
            assert file.stat().st_size == ends[whole]
            for number in records.missing():
                records.append(number, rows(number))
        assert file.read_bytes() == content


def test_processes_share_the_blocks_and_a_later_run_takes_all_of_them(tmp_path: Path) -> None:
    with Records(tmp_path, BLOCKS, 0, 2) as one, Records(tmp_path, BLOCKS, 1, 2) as other:
        assert (one.missing(), other.missing()) == ([0, 2], [1])
        one.append(0, rows(0))
        other.append(1, rows(1))
    with pytest.raises(ConfigError, match="1 of 3 blocks are not answered yet"):
        Records(tmp_path, BLOCKS).rows()
    with Records(tmp_path, BLOCKS, 0) as alone:
        assert alone.missing() == [2]
        alone.append(2, rows(2))
    assert [row["id"] for row in Records(tmp_path, BLOCKS).rows()] == IDS


def test_two_runs_do_not_write_in_one_file(tmp_path: Path) -> None:
    with Records(tmp_path, BLOCKS, 0), pytest.raises(ConfigError, match="another run is writing here"):
        Records(tmp_path, BLOCKS, 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"{broken", *[b"{}"] * 4], "line 1 is corrupt"),
        ([b"7"], "line 1 is no record"),
        ([b'{"block": 9}'], "is of block 9, which there is not"),
        ([json.dumps({"block": 0, "id": name}).encode() for name in ("q0", "q2", "q1", "q3")], "another question"),
        ([json.dumps({"block": 0, "id": name}).encode() for name in IDS[:4]] * 2, "block 0 is answered in two places"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, lines: list[bytes], message: str) -> None:
    file = tmp_path / "answers-0-of-1.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ConfigError, match=message) as error:
        Records(tmp_path, BLOCKS, 0)
    assert str(file) in str(error.value)


def test_blocks_of_nothing_and_ids_that_repeat_are_refused() -> None:
    for ids, size, message in (
        (IDS, 0, "at least 1"),
        ([], 4, "no questions"),
        (["a", "b", "a"], 2, "have the id 'a'"),
    ):
        with pytest.raises(ConfigError, match=message):
            split(ids, size)


# ------------------------------------------------------------------------------------------------------------- protocol


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, dict) and data:
        for name, value in data.items():
            yield from leaves(value, (*path, name))
    else:
        yield path


def made(tiny: Loaded, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"task": {"name": "scenes"}, "ids": IDS, "block": 4, "seed": 0, "max_new_tokens": 5}
    return protocol(tiny, **given | changes)


def test_a_folder_refuses_answers_that_come_about_otherwise_in_any_one_field(tmp_path: Path, tiny: Loaded) -> None:
    before = made(tiny)
    keep_protocol(tmp_path, before)
    keep_protocol(tmp_path, made(tiny))
    fields = list(leaves(before))
    assert len(fields) > 20
    for path in fields:
        changed = json.loads(json.dumps(before))
        inner = changed
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = "something else"
        assert short(changed) != short(before)
        with pytest.raises(ConfigError, match=rf"made otherwise: {'.'.join(path)} was .* and is \"something else\""):
            keep_protocol(tmp_path, changed)


def test_the_pixels_of_a_processor_tell_its_settings_apart(tiny: Loaded) -> None:
    processor = tiny.processor.image_processor
    before = pixels(processor)
    assert pixels(processor) == before
    for name, value in (("image_mean", [0.5, 0.5, 0.5]), ("resample", 0)):
        old = getattr(processor, name)
        setattr(processor, name, value)
        try:
            assert pixels(processor) != before, name
        finally:
            setattr(processor, name, old)
    assert canonical_image().size == (97, 61)


def test_differences_name_fields_that_one_side_lacks() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b was 1 and is null", "a.c was null and is 2"]


# --------------------------------------------------------------------------------------------------------------- runner


class Torn:
    """A picture that cannot be read."""

    name = "torn.png"

    def open(self) -> Image.Image:
        raise ImageError("torn.png: cannot be read")


def sample(number: int) -> list[Any]:
    return list(find("scenes").items(limit=number))


@pytest.mark.parametrize("method", [None, "divprune", "fastv"])
def test_answers_together_are_those_one_by_one(tiny: Loaded, method: str | None) -> None:
    items = sample(7)
    with torch.inference_mode():
        if method is None:
            together = answer(tiny, items, None, 5)
            alone = [answer(tiny, [item], None, 5)[0] for item in items]
        else:
            with compress(tiny.model, method, keep=0.25) as compression:
                together = answer(tiny, items, compression, 5)
                alone = [answer(tiny, [item], compression, 5)[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.tokens, one.visual, one.kept) == (other.text, other.tokens, 144, other.kept)
        assert (one.kept is None) == (method is None)
        assert (one.together, other.together) == (7, 1)


def test_a_picture_that_cannot_be_read_is_one_error(tiny: Loaded, tmp_path: Path) -> None:
    items = sample(6)
    broken = items[2].__class__(**{**vars(items[2]), "images": (Torn(),)})
    task, cell = find("scenes"), Cell.named("full", None, {}, 0)
    whole = run(tiny, task, items, cell, tmp_path / "whole", batch=3)
    found = run(tiny, task, [*items[:2], broken, *items[3:]], cell, tmp_path / "torn", batch=3)
    assert whole is not None
    assert found is not None
    assert (whole["errors"], found["errors"], found["questions"]) == (0, 1, 6)
    lines = [json.loads(line) for line in (tmp_path / "torn" / "answers-0-of-1.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [None, None, "torn.png: cannot be read", None, None, None]
    assert lines[2]["score"] == 0
    assert found["scores"]["accuracy"] == pytest.approx(sum(line["score"] for line in lines) / 6)


def test_what_the_processor_refuses_is_one_error(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    items = sample(4)
    inputs = Loaded.inputs

    def refusing(self: Loaded, *asked: Any) -> Any:
        if any(question == items[1].prompt for _, question in asked):
            raise ConfigError("too long")
        return inputs(self, *asked)

    monkeypatch.setattr(Loaded, "inputs", refusing)
    with torch.inference_mode():
        found = answer(tiny, items, None, 5)
    assert [one.error for one in found] == [None, "too long", None, None]
    assert [one.together for one in found] == [3, 0, 3, 3]


def test_out_of_memory_halves_what_is_asked_together(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    items, generate = sample(5), tiny.model.generate

    def small(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(**inputs)

    expected = [one.text for one in answer(tiny, items, None, 5)]
    monkeypatch.setattr(tiny.model, "generate", small)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    found = answer(tiny, items, None, 5)
    assert [one.together for one in found] == [2, 2, 1, 2, 2]  # 5 are 2 and 3, and 3 are 1 and 2
    assert [one.text for one in found] == expected
    monkeypatch.setattr(tiny.model, "generate", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        answer(tiny, items, None, 5)


def test_the_blind_see_no_picture(tiny: Loaded) -> None:
    items = sample(3)
    found = answer(tiny, items, None, 5, blind=True)
    assert [one.visual for one in found] == [0, 0, 0]
    torn = [item.__class__(**{**vars(item), "images": (Torn(),)}) for item in items]
    assert [one.text for one in answer(tiny, torn, None, 5, blind=True)] == [one.text for one in found]


# ---------------------------------------------------------------------------------------------------- the whole command


def command(out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-c", "from visiontok.cli import main; main()", "eval", "--out", str(out), "--limit", "40",
        "--batch", "4", "--method", "full", "--method", "visiontok", *more,
    ]  # fmt: skip


def without_times(folder: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.rglob("answers-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            del row[TIMES]
            found.append({"file": str(file.parent.name), **row})
    return sorted(found, key=lambda row: (row["file"], row["block"], row["id"]))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_results(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    draw = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(3, 9))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), env=environment, check=True, capture_output=True)
    assert results(tmp_path / "killed") == results(tmp_path / "whole") != {}
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "one"), env=environment, check=True, capture_output=True)
    both = [
        subprocess.Popen(command(tmp_path / "two"), env=environment | {"RANK": rank, "WORLD_SIZE": "2"})
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert results(tmp_path / "two") == results(tmp_path / "one") != {}


def test_a_sweep_goes_on_and_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(out=str(tmp_path), methods=("full", "blind", "random", "vtw"), keeps=("0.5", "12"), limit=12, batch=4)
    found = eval_job(sweep)
    assert [one["cell"] for one in found] == ["full", "blind", "random 0.5", "random 12", "vtw"]
    assert [one["layer_average"] for one in found[2:4]] == [72, 12]
    assert found[0]["scores"]["accuracy"] > found[1]["scores"]["accuracy"]
    monkeypatch.setattr(runner, "answer", lambda *_: pytest.fail("all of it was answered"))
    assert eval_job(sweep) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "divprune"}, "there is no 'method'; its keys are model, tasks, methods"),
        ({"methods": []}, r"methods=\[\] is empty"),
        ({"limit": "ten"}, "limit='ten'; give a whole number"),
        ({"batch": True}, "batch=True; give a whole number"),
        ({"data": "x.jsonl"}, "give a mapping of tasks to files"),
    ],
)
def test_a_sweep_names_what_is_wrong_with_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sweep.of(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("sceness",)}, "sceness"),
        ({"methods": ("divprun",)}, "divprun"),
        ({"data": {"gqa": "x"}}, "'gqa' is none of the tasks"),
        ({"batch": 0}, "batch=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_what_is_wrong_is_said_before_any_answer(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eval_job(Sweep(**{"out": str(tmp_path / "new"), **changes}))
    assert not list(tmp_path.rglob("answers-*"))


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    eval_job(Sweep(out=str(tmp_path), methods=("full",), limit=4, batch=4))
    with pytest.raises(ConfigError, match=r"questions\.block was 4 and is 2"):
        eval_job(Sweep(out=str(tmp_path), methods=("full",), limit=4, batch=2))
    assert (tmp_path / "scenes" / "full" / PROTOCOL).exists()


# ---------------------------------------------------------------------------------------------------- compare and score


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    eval_job(Sweep(out=str(folder), methods=("full", "blind", "random"), keeps=("0.1",), limit=60, batch=20))
    return folder / "scenes"


def test_a_comparison_is_that_of_the_answers(runs: Path) -> None:
    full, blind, random_ = (read(str(runs / name)) for name in ("full", "blind", "random-0.1"))
    found = plain(full, [blind, random_], compared(full, [blind, random_]))
    assert [one["method"] for one in found] == ["blind", "random 0.1"]
    assert [one["tokens"] for one in found] == [0, 14]
    for one, other in zip(found, (blind, random_), strict=True):
        gain = [a["score"] - b["score"] for a, b in zip(other.rows, full.rows, strict=True)]
        assert one["difference"]["value"] == pytest.approx(sum(gain) / 60)
        assert (one["flips"]["gained"], one["flips"]["lost"]) == (gain.count(1), gain.count(-1))
        assert one["p_holm"] >= one["difference"]["p"]
        assert one["not_worse"] is False
    groups = by_group(full, blind, "category")
    assert sum(one.questions for one in groups.values()) == 60
    with pytest.raises(ConfigError, match="no such group; they have category"):
        by_group(full, blind, "mood")


def test_runs_that_came_about_differently_are_not_compared_unless_told(runs: Path, tmp_path: Path) -> None:
    full = read(str(runs / "full"))
    for path in leaves(full.protocol):
        changed = json.loads(json.dumps(full.protocol))
        inner = changed
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = "something else"
        other = Answered(full.folder, "other", changed, full.rows)
        if path[0] == "seed":  # of a method's draws
            compared(full, [other])
            continue
        with pytest.raises(ConfigError, match=rf"{'.'.join(path)} was .* or give --anyhow"):
            compared(full, [other])
    assert compared(full, [other], anyhow=True)[0].difference.value == 0
    with pytest.raises(ConfigError, match="has other questions"):
        compared(full, [Answered(full.folder, "other", full.protocol, full.rows[:-1])], anyhow=True)


def test_marks_in_another_dialect_need_no_model(runs: Path) -> None:
    first = json.loads((runs / "full" / "results.json").read_text())
    assert score(str(runs / "full"), None, None)["scores"] == first["scores"]
    assert score(str(runs / "full"), None, "vlmevalkit")["dialect"] == "vlmevalkit"
    with pytest.raises(ConfigError, match="dialect='none' does not exist"):
        score(str(runs / "full"), None, "none")


def test_a_recipe_file_without_a_budget_is_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "fixed.json"
    recipe("vtw").save(path)
    assert len(Sweep(methods=(str(path),), keeps=("0.5", "12")).cells()) == 1
    recipe("divprune").save(path)
    assert len(Sweep(methods=(str(path),), keeps=("0.5", "12")).cells()) == 2


def test_what_is_no_finished_run_is_said(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is here"):
        read(str(tmp_path))
    for file in (runs / "full").iterdir():
        if file.name != "results.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="not finished"):
        read(str(tmp_path))
