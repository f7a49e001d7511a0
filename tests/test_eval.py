"""`visiontok eval`: what is asked, written, counted and refused; killed runs, and several processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from visiontok.adapters.llava import LlavaAdapter
from visiontok.eval import job, runner
from visiontok.eval.compare import ALL, Answered, check_alike, compare_job, grouped, lines, read, score
from visiontok.eval.compare import split as split_by
from visiontok.eval.job import Sweep, eval_job
from visiontok.eval.protocol import canonical_image, pixels, protocol, short
from visiontok.eval.records import PROTOCOL, TIMES, Records, differences, keep_protocol, split
from visiontok.eval.runner import Block, Cell, answer, run
from visiontok.eval.task import find

from visiontok import Budget, compress, recipe
from visiontok.api import as_recipe, remember_vision
from visiontok.errors import ConfigError, ImageError, UnsupportedError
from visiontok.named import Loaded, load_model
from visiontok.recipes import find as find_method
from visiontok.recipes import names

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
            together = answer(Block(tiny, items), None, 5)
            alone = [answer(Block(tiny, [item]), None, 5)[0] for item in items]
        else:
            with compress(tiny.model, method, keep=0.25) as compression:
                together = answer(Block(tiny, items), compression, 5)
                alone = [answer(Block(tiny, [item]), compression, 5)[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.tokens, one.visual, one.kept) == (other.text, other.tokens, 144, other.kept)
        assert (one.kept is None) == (method is None)
        assert (one.together, other.together) == (7, 1)


def test_a_picture_that_cannot_be_read_is_one_error(tiny: Loaded, tmp_path: Path) -> None:
    items = sample(6)
    broken = items[2].__class__(**{**vars(items[2]), "images": (Torn(),)})
    task, cell = find("scenes"), Cell.named("full", None, {}, 0)
    [whole] = run(tiny, task, items, {tmp_path / "whole": cell}, batch=3).values()
    torn = [*items[:2], broken, *items[3:]]
    [found] = run(tiny, task, torn, {tmp_path / "torn": cell}, batch=3).values()
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
        found = answer(Block(tiny, items), None, 5)
    assert [one.error for one in found] == [None, "too long", None, None]
    assert [one.together for one in found] == [3, 0, 3, 3]


def test_out_of_memory_halves_what_is_asked_together(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    items, generate = sample(5), tiny.model.generate

    def small(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(**inputs)

    expected = [one.text for one in answer(Block(tiny, items), None, 5)]
    monkeypatch.setattr(tiny.model, "generate", small)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    found = answer(Block(tiny, items), None, 5)
    assert [one.together for one in found] == [2, 2, 1, 2, 2]  # 5 are 2 and 3, and 3 are 1 and 2
    assert [one.text for one in found] == expected
    monkeypatch.setattr(tiny.model, "generate", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        answer(Block(tiny, items), None, 5)


def test_the_blind_see_no_picture(tiny: Loaded) -> None:
    items = sample(3)
    found = answer(Block(tiny, items, blind=True), None, 5)
    assert [one.visual for one in found] == [0, 0, 0]
    torn = [item.__class__(**{**vars(item), "images": (Torn(),)}) for item in items]
    assert [one.text for one in answer(Block(tiny, torn, blind=True), None, 5)] == [one.text for one in found]


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


# --------------------------------------------------------------------------------------------------------- vision cache


def prompt_methods() -> list[str]:
    """Methods that choose before the language model."""
    return [name for name in names() if find_method(name).card.stage == "prompt"]


def cells(methods: Sequence[str], keeps: Sequence[str | None]) -> dict[str, Cell]:
    made = [Cell.named(method, keep, {}, 0) for method in methods for keep in keeps]
    return {str(cell): cell for cell in made}


def answered(loaded: Loaded, methods: dict[str, Cell], items: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of all cells but for their times and the protocol they are stamped with."""
    run(loaded, find("scenes"), items, {folder / name: cell for name, cell in methods.items()}, batch=5)
    return [{k: v for k, v in row.items() if k != "protocol"} for row in without_times(folder)]


@contextlib.contextmanager
def towers(loaded: Loaded) -> Iterator[list[int]]:
    """How many pictures go through the stock tower, in each of its runs."""
    base, found = loaded.base, []
    llava = hasattr(base, "vision_tower")

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(len(args[0] if llava else kwargs["grid_thw"]))

    handle = (base.vision_tower if llava else base.visual).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
def test_a_sweep_shows_every_picture_to_the_tower_once(tmp_path: Path, model: str) -> None:
    loaded = load_model(model, torch.device("cpu"))
    items = sample(60)[::6]  # in two blocks, which share a picture
    pictures = len({image.name for item in items for image in item.images})
    methods = cells(["full"], [None]) | cells(["visionzip", "divprune", "fastv", "visiontok"], ["0.25", "9"])
    expected = answered(loaded, methods, items, tmp_path / "stock")
    recipes = [cell.recipe for cell in methods.values() if cell.recipe is not None]
    with towers(loaded) as seen, remember_vision(loaded.model, recipes) as memory:
        assert answered(loaded, methods, items, tmp_path / "shared") == expected
    assert len(items) > pictures > 2
    assert seen == [1] * pictures
    assert (memory.runs, memory.pictures) == (pictures, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
def test_every_prompt_method_answers_the_same_from_memory(tmp_path: Path, model: str) -> None:
    loaded = load_model(model, torch.device("cpu"))
    items, methods = sample(60)[::6], cells(prompt_methods(), ["0.25", "9"])
    for name, cell in list(methods.items()):  # methods that need what one of the models lacks
        try:
            with compress(loaded.model, cell.recipe), torch.inference_mode():
                answer(Block(loaded, items[:1]), None, 1)
        except (UnsupportedError, ConfigError):
            del methods[name]
    assert len(methods) > 40
    expected = answered(loaded, methods, items, tmp_path / "stock")
    with towers(loaded) as seen, remember_vision(loaded.model, [cell.recipe for cell in methods.values()]):
        assert answered(loaded, methods, items, tmp_path / "shared") == expected
    assert seen == [1] * len({image.name for item in items for image in item.images})


def test_a_row_has_the_times_of_what_was_done_for_it(tmp_path: Path, tiny: Loaded) -> None:
    with remember_vision(tiny.model):
        folders = {tmp_path / name: Cell.named("full", None, {}, 0) for name in ("first", "second")}
        run(tiny, find("scenes"), sample(2), folders)
    times = [json.loads((folder / "answers-0-of-1.jsonl").read_text().splitlines()[0])[TIMES] for folder in folders]
    assert [set(one) for one in times] == [{"preprocess", "tower", "generate"}, {"generate"}]


def test_the_cache_is_part_of_how_answers_came_about(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"out": str(tmp_path), "methods": ("full", "resize"), "limit": 4, "batch": 4}
    eval_job(Sweep(**sweep))
    with pytest.raises(ConfigError, match=r'model\.tower was "a picture at a time" and is "a call at a time"'):
        eval_job(Sweep(**sweep, vision_cache=False))


def test_a_model_without_a_way_to_the_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlavaAdapter, "inseparable", "this test says so")
    said = Console(file=io.StringIO(), width=200)
    eval_job(Sweep(out=str(tmp_path), methods=("full",), limit=4), said)
    assert "without the vision cache: llava: a vision memory cannot serve it, because this test says so" in (
        said.file.getvalue()  # type: ignore[attr-defined]
    )
    made = json.loads((tmp_path / "scenes" / "full" / PROTOCOL).read_text())
    assert made["protocol"]["model"]["tower"] == "a call at a time"


def test_the_sweep_of_the_readme_can_be_asked() -> None:
    sweep = Sweep.of(Sweep.read(str(Path(job.__file__).parent / "sweeps" / "readme.yaml")))
    assert len(sweep.cells()) == 8 * 4 + 2


def test_recipes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name, keep in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        as_recipe("random").with_keep(Budget.parse(keep)).save(tmp_path / name / "mine.json")
    methods = tuple(str(tmp_path / name / "mine.json") for name in "ab")
    with pytest.raises(ConfigError, match=r"two are called 'mine 0\.25'"):
        eval_job(Sweep(out=str(tmp_path), methods=methods))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vision_cache": "no"}, "vision_cache='no'; give true or false"),
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
    full, blind, random_ = (read(runs / name) for name in ("full", "blind", "random-0.1"))
    found = compare_job(str(full.folder), [str(blind.folder), str(random_.folder)], by="category")
    assert [one.method for one in found.whole] == ["blind", "random 0.1"]
    assert [one.tokens for one in found.whole] == [0, 14]
    for one, other in zip(found.whole, (blind, random_), strict=True):
        gain = [a["score"] - b["score"] for a, b in zip(other.rows, full.rows, strict=True)]
        assert one.comparison.difference.value == pytest.approx(sum(gain) / 60)
        test = stats.binomtest(gain.count(1), gain.count(1) + gain.count(-1))
        assert one.comparison.mcnemar is not None
        assert (one.comparison.mcnemar.gained, one.comparison.mcnemar.lost) == (gain.count(1), gain.count(-1))
        assert one.comparison.mcnemar.p == pytest.approx(test.pvalue)
        assert one.comparison.relative is not None
        share = sum(row["score"] for row in other.rows) / sum(row["score"] for row in full.rows)
        assert one.comparison.relative.value == pytest.approx(share)
        longer = [a["answer_tokens"] - b["answer_tokens"] for a, b in zip(other.rows, full.rows, strict=True)]
        assert one.length.value == pytest.approx(sum(longer) / 60)
        assert one.length.low <= one.length.value <= one.length.high
        assert (one.flips.gained, one.flips.lost) == (gain.count(1), gain.count(-1))
        assert (one.p_holm >= one.comparison.difference.p, one.family) == (True, 2)
        assert one.comparison.noninferiority.shown is False
        mine = [part for part in found.parts if part.method == one.method]
        assert sum(part.comparison.questions for part in mine) == 60
    with pytest.raises(ConfigError, match="no such group; they have category"):
        grouped(full, [blind], "mood")


def test_a_margin_is_what_may_be_lost(runs: Path) -> None:
    full, random_ = str(runs / "full"), str(runs / "random-0.1")
    bounds = [compare_job(full, [random_], margin=margin).whole[0].comparison for margin in (1, 99)]
    assert [one.noninferiority.shown for one in bounds] == [False, True]
    with pytest.raises(ConfigError, match="--margin 0"):
        compare_job(full, [random_], margin=0)


def test_a_split_parts_the_questions_by_what_the_judge_gets_right(runs: Path) -> None:
    full, blind, random_ = (read(runs / name) for name in ("full", "blind", "random-0.1"))
    parts = split_by(full, [blind, random_], random_)
    assert [(part, one.name) for part, _, one in parts] == [("difficult", "blind"), ("easy", "blind")]
    for part, first, other in parts:
        assert [row["id"] for row in first.rows] == [row["id"] for row in other.rows]
        expected = [row["id"] for row in random_.rows if (row["score"] == 1) == (part == "easy")]
        assert [row["id"] for row in other.rows] == expected
    (easy,) = [line for line in lines(parts) if line.part == "easy"]
    assert easy.comparison.questions == sum(random_.scores)
    sweep = compare_job(str(runs.parent), [], split_by="random 0.1")
    assert [(line.part, line.method, line.comparison.questions) for line in sweep.parts] == [
        (part, other.name, len(other.rows)) for part, _, other in parts
    ]
    with pytest.raises(ConfigError, match="no run has this name"):
        compare_job(str(runs.parent), [], split_by="resize")


def test_questions_that_count_as_one_are_easy_as_one(runs: Path) -> None:
    full = read(runs / "full")
    made = json.loads(json.dumps(full.made))
    made["protocol"]["task"] |= {"metric": "mme", "dialect": "official"}
    rows = [
        {**row, "score": float(number != 1), "groups": {"category": "count", "image": str(number // 2)},
         "cluster": str(number // 2)}
        for number, row in enumerate(full.rows)
    ]  # fmt: skip
    judge, other = (Answered(full.folder, made | {"method": name}, full.result, rows) for name in ("judge", "other"))
    (hard, _, few), (easy, _, many) = split_by(other, [other], judge)
    assert (hard, len(few.rows), easy, len(many.rows)) == ("difficult", 2, "easy", 58)


def test_what_is_compared_is_the_headline_of_the_task(runs: Path) -> None:
    """The same answers as MME's: pairs count, and scores are no shares."""
    full, blind = read(runs / "full"), read(runs / "blind")
    both = []
    for one in (full, blind):
        made = json.loads(json.dumps(one.made))
        made["protocol"]["task"] |= {"metric": "mme", "dialect": "official"}
        rows = [
            {**row, "groups": {"category": "count", "image": str(number // 2)}, "cluster": str(number // 2)}
            for number, row in enumerate(one.rows)
        ]
        both.append(Answered(one.folder, made, one.result, rows))
    (found,) = lines([(ALL, *both)])
    expected = [
        100 * np.mean(one.scores) + 100 * np.mean(one.scores.reshape(-1, 2).min(1)) for one in (both[1], both[0])
    ]
    assert (found.comparison.score.value, found.comparison.reference.value) == pytest.approx(tuple(expected))
    assert found.comparison.difference.value == pytest.approx(expected[0] - expected[1])
    assert found.points == 1


def test_runs_that_came_about_differently_are_not_compared_unless_told(runs: Path, tmp_path: Path) -> None:
    full = read(runs / "full")
    for path in leaves(full.protocol):
        changed = json.loads(json.dumps(full.made))
        inner = changed["protocol"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = "something else"
        other = Answered(full.folder, changed, full.result, full.rows)
        if path[0] == "seed":  # of a method's draws
            check_alike(full, [other])
            continue
        with pytest.raises(ConfigError, match=rf"{'.'.join(path)} was .* or give --anyhow"):
            check_alike(full, [other])
    check_alike(full, [other], anyhow=True)
    with pytest.raises(ConfigError, match="has other questions"):
        check_alike(full, [Answered(full.folder, full.made, full.result, full.rows[:-1])], anyhow=True)


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
    (tmp_path / "sweep" / "scenes").mkdir(parents=True)
    (tmp_path / "sweep" / "scenes" / "full").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not finished"):
        compare_job(str(tmp_path / "sweep"), [])
    (tmp_path / "results.json").write_bytes((runs / "full" / "results.json").read_bytes())
    assert read(tmp_path).rows == read(runs / "full").rows
    answers = tmp_path / "answers-0-of-1.jsonl"
    answers.write_bytes(b"".join(answers.read_bytes().splitlines(keepends=True)[:40]))
    with pytest.raises(ConfigError, match="has not the 60 answers it should"):
        read(tmp_path)
