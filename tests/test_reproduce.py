"""`visiontok reproduce` and `verify`: the published tables, the whole path on a small one, and planted faults."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from copy import copy as copy_of
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import CLIPImageProcessor
from visiontok.eval import published, receipt, reproduce, runner
from visiontok.eval.enforce import adapted, departures, entered_size, rendered
from visiontok.eval.published import PROMPT, Published, find
from visiontok.eval.records import digest
from visiontok.eval.reproduce import Request
from visiontok.eval.verify import verify

from visiontok import cli
from visiontok.conventions import bill, decoder_config, parse_schedule
from visiontok.errors import ConfigError
from visiontok.named import Loaded, load_model
from visiontok.statistics import share_at_most

HERE = Path(__file__).parent / "data" / "reproduce"
TABLE = HERE / "scenes-tiny.yaml"
DOCS = Path(__file__).parents[1] / "docs" / "reproduce.md"
QUIET = Console(quiet=True)
MEASURED = [name for name in published.names() if find(name).columns]

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def qwen() -> Loaded:
    return load_model("tiny-qwen", torch.device("cpu"))


@pytest.fixture(autouse=True)
def loaded_once(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "load_model", lambda name, device: {"tiny": tiny}[name])


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_that_were_asked_for_are_there() -> None:
    found = {name: {row.method for row in find(name).rows} for name in published.names()}
    assert len(found) >= 6
    assert {"hiprune", "divprune", "visionzip", "cdpruner"} <= found["eadp-llava-1.5-7b"]
    assert {"fastv", "pyramiddrop"} <= found["pyramiddrop-llava-1.5-7b"] & found["pyramiddrop-llava-next-7b"]
    assert {"hiprune", "divprune", "visionzip", "scope", "vispruner"} <= found["angelslim-qwen2.5-vl-7b"]


@pytest.mark.parametrize("name", published.names())
def test_a_table_says_where_from_how_and_how_near(name: str) -> None:
    table = find(name)
    assert table.citation.paper
    assert table.citation.where
    assert all(row.fidelity == "official" for row in table.rows)
    assert set("".join(row.source + (row.flops.source if row.flops else "") for row in table.rows)) <= set("PSIM")
    if not table.columns:
        return
    assert table.tolerance
    assert table.protocol is not None
    assert table.protocol.note
    assert table.protocol.sizes
    for column in table.columns:
        if column.task is None:
            continue
        assert table.task(column).sample_prompt() == column.asks
        if column.questions is not None and column.scale == 100:  # the rule in the tables' own words
            assert column.tolerance == math.ceil(3000 * math.sqrt(0.05 / column.questions)) / 10, column.name


@pytest.mark.parametrize("name", MEASURED)
def test_published_means_are_those_of_the_published_cells(name: str) -> None:
    """What a slip in copying would break."""
    table = find(name)
    for row in table.rows:
        if row.mean is not None:
            mean = fmean(row.values[column.name] * column.mean for column in table.columns)
            assert abs(mean - row.mean) <= 0.0501, row.id
    rows = [row for row in table.rows if row.flops is not None and row.layer_average is not None]
    for row in rows:
        assert row.flops is not None
        whole = bill(decoder_config(str(table.decoder)), parse_schedule(row.flops.schedule))
        assert whole.layer_average == row.layer_average


def test_flops_come_out_in_every_printed_digit_but_for_four() -> None:
    found = [
        (one["row"], one["agrees"])
        for table in map(find, published.names())
        for one in receipt.flops(table, [row.id for row in table.rows])
    ]
    assert len(found) == 29
    assert {row for row, agrees in found if not agrees} == {"entropyprune-192", "vtw-full", "vtw-16", "ficoco-64"}


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_table_sets_is_what_it_demands(name: str, tiny: Loaded, qwen: Loaded) -> None:
    """Template and image processor of a protocol render its conversation, and its sizes, with the stock classes."""
    table = find(name)
    assert table.protocol is not None
    family = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl" if "qwen" in name else "llava"))
    given = dataclasses.replace(qwen if "qwen" in name else tiny, model=family)
    if "image_processor_type" not in table.protocol.image_processor:
        processor = CLIPImageProcessor(size={"shortest_edge": 224})
        given = dataclasses.replace(given, processor=_with(given.processor, image_processor=processor))
    protocol = dataclasses.replace(table.protocol, dtype=None)
    tasks = {column.name: (column, table.task(column)) for column in table.columns if column.task is not None}
    assert departures(protocol, given, tasks)
    made = adapted(protocol, given)
    assert departures(protocol, made, tasks) == []
    assert given.processor is not made.processor
    assert rendered(made, PROMPT) == protocol.conversation


def test_the_documentation_lists_the_tables() -> None:
    assert reproduce.markdown() in DOCS.read_text(), "put visiontok.eval.reproduce.markdown() there"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("citation"), "the key 'citation' is missing"),
        (lambda t: t.update(modle="tiny"), "unknown key 'modle'; it has name, title"),
        (lambda t: t.update(name="x"), "'name' follows from the file"),
        (lambda t: t["rows"][1].update(keep=36), "keep=36: must be of type str; quote it"),
        (lambda t: t["rows"][1].update(fidelity="exact"), "fidelity='exact': must be one of fixed, official"),
        (lambda t: t["rows"][1].update(method="divprun"), "divprun"),
        (lambda t: t["rows"][1].update(options={"depth": "3"}), "depth"),
        (lambda t: t["rows"][1]["values"].update(GQA=1), "row 'divprune-36': there is no column 'GQA'"),
        (lambda t: t["rows"][1].update(cannot="why"), "both `method` and `cannot`"),
        (lambda t: t["rows"][0].update(method="random"), "one row without `method`"),
        (lambda t: t["rows"].append(t["rows"][1]), "two rows 'divprune-36'"),
        (lambda t: t["columns"][0].pop("task"), "give either its task, or `cannot`"),
        (lambda t: t["columns"][0].update(tolerance=0), "tolerance=0.0: must be above 0"),
        (lambda t: t["columns"][0].update(dialect="mine"), "mine"),
        (lambda t: t.pop("protocol"), "the key 'protocol' is missing"),
        (lambda t: t["protocol"].update(conversation="USER:"), "lacks {prompt}"),
        (lambda t: t["protocol"].update(batch="8"), "batch='8': must be of type int"),
        (lambda t: t["rows"][1].update(flops={"printed": "2", "convention": "E", "schedule": "2x5"}), "convention='E'"),
        (
            lambda t: t["rows"][1].update(flops={"printed": "2", "unit": "left", "convention": "A", "schedule": "2x5"}),
            "needs flops.stock",
        ),
    ],
)
def test_a_wrong_table_is_refused_with_the_key(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(str(altered(tmp_path, change)))
    assert message in str(error.value)


def test_an_unknown_table_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"did you mean eadp-llava-1\.5-7b"):
        find("eadp-llava-1.5")
    with pytest.raises(ConfigError, match="cannot be read"):
        find("nowhere.yaml")


# ----------------------------------------------------------------------------------------------------------- whole path


def altered(folder: Path, change: Change) -> Path:
    """The small table, changed, in a folder with its task."""
    keys = yaml.safe_load(TABLE.read_text())
    change(keys)
    shutil.copy(HERE / "few-scenes.yaml", folder)
    file = folder / "scenes-tiny.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def request(out: Path, table: Path = TABLE, **more: Any) -> Request:
    return Request(table=str(table), out=str(out), **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduction")
    found = reproduce.reproduce(request(out), QUIET)["findings"]
    assert found["departures"] == found["baseline"] == []
    assert (found["reproduction"], found["verdict"], found["complete"]) == (True, "within tolerance", True)
    assert [one["within"] for one in (*found["cells"], *found["means"])] == [True] * 4
    assert [cell["tokens_agree"] for cell in found["cells"]] == [None, True, True]
    assert found["missing"] == [{"row": "fastv", "column": "scenes", "why": "stands for rows that cannot be run"}]
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def failed(folder: Path, sample: int = 8, **more: Any) -> dict[str, str]:
    """Checks that do not hold, and what they say."""
    found = verify(str(folder / "receipt.json"), sample=sample, seed=1, console=QUIET, **more)
    wrong = {check["check"]: check["said"] for check in found["checks"] if not check["ok"]}
    assert found["ok"] == (not wrong)
    return wrong


def reseal(folder: Path, change: Change, table: Published | None = None) -> None:
    """What a forger does: change the facts, and derive all else anew."""
    file = folder / "receipt.json"
    facts = json.loads(file.read_text())["facts"]
    change(facts)
    file.write_text(json.dumps(receipt.seal(table or find(str(TABLE)), facts)))


def forge_answer(folder: Path) -> str:
    """Another wrong answer for a question that was answered wrongly: no score changes."""
    file = folder / "scenes" / "divprune-36" / "answers-0-of-1.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    wrong = next(row for row in rows if row["score"] == 0)
    wrong["answer"] = "blurple"
    assert wrong["parsed"] is not None
    wrong["parsed"] = "blurple"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return digest(rows)


def test_the_same_command_goes_on_and_ends_alike(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((copy / "receipt.json").read_text())
    shutil.rmtree(copy / "scenes" / "pyramiddrop")
    asked: list[int] = []
    answer = runner.answer
    monkeypatch.setattr(runner, "answer", lambda *a, **k: asked.append(len(a[0].items)) or answer(*a, **k))
    after = reproduce.reproduce(request(copy), QUIET)
    assert sum(asked) == 48
    assert after["findings"] == before["findings"]
    for one in (before, after):
        del one["facts"]["request"]["out"]
    assert after["facts"] == before["facts"]


def test_an_honest_receipt_is_verified(copy: Path, tmp_path: Path) -> None:
    found = verify(str(copy / "receipt.json"), sample=12, console=QUIET)
    assert found["ok"]
    assert (found["asked"], found["of"], found["differ"], found["beside_differ"]) == (12, 144, [], 0)
    assert found["forged_at_most"] == pytest.approx(1 - 0.05 ** (1 / 12))


def test_a_changed_receipt_and_changed_answers_are_noticed(copy: Path) -> None:
    file = copy / "receipt.json"
    text = file.read_text()
    file.write_text(text.replace('"measured": 93.75', '"measured": 94.75', 1))
    assert set(failed(copy, model="tiny")) == {"hash", "findings"}
    file.write_text(text)
    forge_answer(copy)
    wrong = failed(copy)
    assert set(wrong) >= {"answers"}
    assert "scenes/divprune-36: the answers are not those of the receipt" in wrong["answers"]


def test_forged_answers_in_a_forged_receipt_are_found_by_asking_again(copy: Path) -> None:
    new = forge_answer(copy)
    reseal(copy, lambda facts: facts["cells"][1].update(digest=new))
    wrong = failed(copy, sample=144)
    assert set(wrong) == {"sample"}
    assert "'blurple' was written" in wrong["sample"]


def test_forged_scores_are_found_by_marking_anew(copy: Path) -> None:
    file = copy / "scenes" / "divprune-36" / "answers-0-of-1.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    next(row for row in rows if row["score"] == 0)["score"] = 1.0
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def change(facts: dict[str, Any]) -> None:
        facts["cells"][1].update(digest=digest(rows), scores={"accuracy": 46 / 48})

    reseal(copy, change)
    assert "scores 0, not 1" in failed(copy)["scores"]


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (
            lambda f: f["cells"][0]["protocol"]["model"].update(name="tiny-qwen"),
            "answers",
            "is not that of the receipt",
        ),
        (lambda f: f["data"].update(scenes="0" * 16), "data", "are others here"),
        (
            lambda f: f.update(differences=["dtype was x and is y"]),
            "protocol",
            "said to depart from the table in dtype",
        ),
        (lambda f: f["cells"][1].update(recipe="0" * 16), "answers", "recipe is not that of the row"),
        (lambda f: f["table"].update(digest="0" * 16), "table", "digest was"),
    ],
)
def test_forged_facts_are_found(copy: Path, change: Change, check: str, message: str) -> None:
    reseal(copy, change)
    assert message in failed(copy)[check]


def test_a_trial_is_no_reproduction_whatever_it_says(tmp_path: Path) -> None:
    found = reproduce.reproduce(request(tmp_path, limit=8, rows=("divprune-36",)), QUIET)["findings"]
    assert (found["reproduction"], found["verdict"], found["complete"]) == (False, None, False)
    assert "only the first 8 questions were asked" in found["departures"]
    assert {one["within"] for one in (*found["cells"], *found["means"])} == {None}
    reseal(tmp_path, lambda facts: facts["request"].update(limit=None))
    sealed = json.loads((tmp_path / "receipt.json").read_text())["findings"]
    assert sealed["departures"] == ["scenes has 48 questions, and 8 were asked"]
    free = altered(tmp_path, lambda t: t["columns"][0].pop("questions"))
    reseal(
        tmp_path,
        lambda f: f["request"].update(table=str(free)) or f["table"].update(digest=find(str(free)).digest),
        find(str(free)),
    )
    assert json.loads((tmp_path / "receipt.json").read_text())["findings"]["reproduction"]
    wrong = failed(tmp_path)
    assert "questions.number was 8 and is 48" in wrong["protocol"]


def test_other_weights_are_no_reproduction(tmp_path: Path) -> None:
    table = altered(tmp_path, lambda t: t.update(weights="0" * 16))
    found = reproduce.reproduce(request(tmp_path / "out", table, limit=4, rows=("full",)), QUIET)["findings"]
    assert "the weights of tiny are not those of tiny" in found["departures"]


def test_a_baseline_that_is_off_stops_the_comparison(copy: Path, tmp_path: Path, capsys: Any) -> None:
    table = altered(tmp_path, lambda t: t["rows"][0]["values"].update(scenes=94.0))
    for row in ("divprune-36", "pyramiddrop"):
        shutil.rmtree(copy / "scenes" / row)
    found = reproduce.reproduce(request(copy, table), Console(width=200))["findings"]
    assert "off by 3.92 points (published 94, here 97.92, tolerance 2.1)" in found["baseline"][0]
    assert found["verdict"] == "outside of tolerance"
    assert [path.name for path in (copy / "scenes").iterdir()] == ["full"]
    said = capsys.readouterr().out
    assert "the comparison stops here" in said
    assert "likely causes" in said
    found = reproduce.reproduce(request(copy, table, anyhow=True, rows=("divprune-36",)), QUIET)["findings"]
    assert [cell["row"] for cell in found["cells"]] == ["full", "divprune-36"]


# ----------------------------------------------------------------------------------------------------- planted protocol


def _with(processor: Any, **changes: Any) -> Any:
    changed = copy_of(processor)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def refused(out: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, table: Path = TABLE, **more: Any) -> str:
    monkeypatch.setattr(reproduce, "load_model", lambda *_: loaded)
    with pytest.raises(ConfigError) as error:
        reproduce.reproduce(request(out, table, **more), QUIET)
    assert not list(out.rglob("answers-*"))
    return str(error.value)


def test_a_planted_wrong_template_is_refused(tmp_path: Path, tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tiny.processor.chat_template.replace("<assistant>", "<assistant> be brief")
    loaded = dataclasses.replace(tiny, processor=_with(tiny.processor, chat_template=template))
    said = refused(tmp_path, loaded, monkeypatch)
    assert 'conversation was "<user> <image> {prompt} <assistant>" and is' in said
    assert "be brief" in said
    shouting = tiny.processor.chat_template.replace("part['text']", "part['text'] | replace('What', 'WHAT')")
    loaded = dataclasses.replace(tiny, processor=_with(tiny.processor, chat_template=shouting))
    assert "scenes prompt was" in refused(tmp_path, loaded, monkeypatch)  # the conversation itself does not show it


def test_a_planted_wrong_question_is_refused(tmp_path: Path, tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    table = altered(tmp_path, lambda t: t["columns"][0].update(prompt="{question} Answer briefly."))
    said = refused(tmp_path / "out", tiny, monkeypatch, table)
    assert 'scenes asks was "What is this?" and is "What is this? Answer briefly."' in said


def test_planted_wrong_pixels_are_refused(tmp_path: Path, tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.processor.image_processor.to_dict()
    for change, message in (
        ({"size": {"height": 96, "width": 96}}, 'size of a 640x480 picture was "144x144" and is "96x96"'),
        ({"resample": 0}, "image_processor.resample was 3 and is 0"),
    ):
        processor = type(tiny.processor.image_processor).from_dict(settings | change)
        loaded = dataclasses.replace(tiny, processor=_with(tiny.processor, image_processor=processor))
        assert message in refused(tmp_path, loaded, monkeypatch)


def test_pixels_that_the_tower_cannot_take_are_not_set(tiny: Loaded) -> None:
    protocol = find("eadp-llava-1.5-7b").protocol
    assert protocol is not None
    with pytest.raises(ConfigError, match="its tower takes pictures of 144 pixels, the table's have 336"):
        adapted(protocol, tiny)


def test_planted_wrong_pixel_limits_are_refused_and_can_be_set(qwen: Loaded) -> None:
    processor = qwen.processor.image_processor
    limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
    sizes = {size: entered_size(processor, size) for size in ("40x40", "1000x500")}
    protocol = published.Protocol(conversation=rendered(qwen, PROMPT), sizes=sizes, **limits)
    assert departures(protocol, qwen, {}) == []
    for name, edge, factor in (("max_pixels", "longest_edge", 2), ("min_pixels", "shortest_edge", 4)):
        planted = type(processor).from_dict(processor.to_dict())
        planted.size = dict(processor.size) | {edge: factor * processor.size[edge]}
        loaded = dataclasses.replace(qwen, processor=_with(qwen.processor, image_processor=planted))
        said = departures(protocol, loaded, {})
        assert said[0] == f"{name} was {limits[name]} and is {factor * limits[name]}"
        assert len(said) == 2  # one of the two pictures enters in another size, too
        assert departures(protocol, adapted(protocol, loaded), {}) == []


# -------------------------------------------------------------------------------------------------------------- command


def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["visiontok", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_the_commands(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, out, _ = command(monkeypatch, capsys, "reproduce")
    assert code == 0
    assert all(name in out for name in published.names())
    assert "We have run none of these tables of large models" in out
    out_folder = str(tmp_path / "flops")
    code, out, _ = command(
        monkeypatch, capsys, "reproduce", "pyramiddrop-llava-1.5-7b", "--flops", "--out", out_folder, "--json"
    )
    assert code == 0
    found = json.loads(out)["findings"]
    assert [row["agrees"] for row in found["flops"]] == [True] * 5
    assert (found["reproduction"], found["verdict"]) == (False, None)
    code, out, _ = command(monkeypatch, capsys, "verify", f"{out_folder}/receipt.json")
    assert (code, "verified" in out) == (0, True)
    file = copy / "receipt.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))
    code, out, _ = command(monkeypatch, capsys, "verify", str(file), "--sample", "1")
    assert (code, "not verified" in out) == (1, True)
    for arguments, message in (
        (("reproduce", "flops", "--row", "none"), "rows: there is no 'none' in flops"),
        (("reproduce", str(TABLE), "--row", "fastv"), "'fastv' cannot be run"),
        (("reproduce", str(TABLE), "--task", "gqa"), "'gqa' is none of those of scenes-tiny, few-scenes"),
        (("reproduce", str(TABLE), "--data", "gqa=x"), "'gqa' is none of the tasks that are run"),
        (("verify", str(TABLE)), "is no receipt"),
    ):
        code, _, err = command(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in err


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("found", "n"), [(0, 1), (0, 50), (1, 50), (7, 20), (19, 20), (20, 20)])
def test_the_exact_bound_on_a_share(found: int, n: int) -> None:
    bound = share_at_most(found, n)
    if found == n:
        assert bound == 1
        return
    share = Fraction(bound)
    chance = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(found + 1))
    assert float(chance) == pytest.approx(0.05, rel=1e-9)
    if found == 0:
        assert bound == pytest.approx(1 - 0.05 ** (1 / n))


def test_there_are_no_such_samples() -> None:
    for found, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="no such samples"):
            share_at_most(found, n)
