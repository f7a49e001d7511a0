"""`visiontok report` and the exports of `visiontok compare`: what is in them is what was found."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from visiontok.eval import measured, report, sheets
from visiontok.eval.compare import compare_job, read
from visiontok.eval.examples import failures
from visiontok.eval.job import Sweep, eval_job
from visiontok.eval.plots import Plot, Point, draw
from visiontok.eval.report import report_job
from visiontok.eval.sheets import Sheet, estimate, flat, latex, written

from visiontok.errors import ConfigError
from visiontok.statistics import Estimate

pytest.importorskip("matplotlib")

AWKWARD = r"50 % of_{a}|b & c\d #1 $ ~^ <x> −1"


class Reader(HTMLParser):
    """Tags with their attributes, cells of tables and other text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    eval_job(Sweep(out=str(folder), methods=("full", "blind", "random", "resize"), keeps=("0.1",), limit=40, batch=20))
    return folder


def bench(sweep: Path, file: Path, **changes: Any) -> Path:
    """A file as `visiontok bench` writes it, with numbers that are made up."""
    model = read(sweep / "scenes" / "full").protocol["model"]
    rows = []
    for configuration, batch in (("compiled", 1), ("dynamic", 1), ("dynamic", 8)):
        for place, (method, keep) in enumerate((("full", None), ("random", "0.1"), ("resize", "0.1"))):
            seconds = {"median": 0.0875 + place, "low": 0.0, "high": 9.0}
            row = {
                "method": method,
                "keep": keep,
                "configuration": configuration,
                "batch": batch,
                "side": 144,
                "text": 9,
            }
            flops = {"total": 1e9 * (3 - place)}
            rows.append(row | {"seconds": {"first_token": seconds}, "flops": flops, "error": None})
    rows[5] |= {"error": "out of memory"}  # dynamic, batch 1, resize
    made = {"schema": 1, "protocol": {"model": model, "device": "cuda:0", "device_name": "a GPU"}, "rows": rows}
    file.write_text(json.dumps(made | changes))
    return file


@pytest.fixture(scope="module")
def made(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    file = bench(sweep, folder / "efficiency.json")
    report_job(str(sweep), bench=str(file), out=str(folder), number_of_examples=1)
    return folder


def test_a_page_needs_nothing_else(made: Path) -> None:
    page = (made / "index.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    found = Reader(page)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not re.search(r"@import|url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/"))
            assert not value.startswith("#") or value[1:] in {"", *ids}, value
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 3
    assert "prefers-color-scheme: dark" in page


def test_a_report_says_what_compare_says(made: Path, sweep: Path) -> None:
    found = compare_job(str(sweep), [])
    text, markdown = Reader((made / "index.html").read_text()).text, (made / "report.md").read_text()
    for line in found.whole:
        for cell in sheets.COLUMNS.values():
            assert f"\n{cell(line)}\n" in text
            assert f"| {cell(line)} |" in markdown
    rows = list(csv.DictReader((made / "comparisons.csv").open()))
    assert [row["method"] for row in rows if row["part"] == "all"][:3] == ["blind", "random 0.1", "resize 0.1"]
    assert float(rows[1]["difference_low"]) == found.whole[1].comparison.difference.low
    halves = compare_job(str(sweep), [], split_by="resize").parts
    assert {(line.part, line.method) for line in halves} == {("difficult", "random 0.1"), ("easy", "random 0.1")}
    for line in halves:
        assert f"\n{line.comparison.questions}\n" in text
        assert f"| {estimate(line.comparison.difference, 100, '+')} |" in markdown


def test_times_come_first_and_what_lacks_is_said(made: Path) -> None:
    plots = [line for line in (made / "report.md").read_text().splitlines() if line.startswith("![Scenes")]
    assert [re.search(r"-(\w+)\.png", line)[1] for line in plots] == ["time", "tokens", "flops"]  # type: ignore[index]
    text = (made / "report.md").read_text()
    # All of compiled, batch 1, were measured; one of dynamic, batch 1, was not.
    assert "dynamic generation, batch 8, pictures of 144 pixels, 9 text tokens; a GPU" in text
    assert "Answers come from cpu, times from cuda" in text
    assert "| full | 144.0 | 87.5 |" in text
    assert sorted(file.suffix for file in (made / "plots").iterdir()) == [".png"] * 3 + [".svg"] * 3


def test_failures_are_shown_with_what_was_kept(made: Path, sweep: Path) -> None:
    page = Reader((made / "index.html").read_text())
    full = read(sweep / "scenes" / "full")
    for method in ("random 0.1", "resize 0.1"):
        other = read(sweep / "scenes" / method.replace(" ", "-"))
        (place,) = failures(full, other, 1)
        assert (full.rows[place]["score"], other.rows[place]["score"]) == (1, 0)
        assert f"\n{full.rows[place]['id']}\n" in page.text
        assert "14 of 144 visual tokens kept" in page.text
    assert len([1 for tag, _ in page.tags if tag == "img"]) == len(list((made / "examples").iterdir())) == 2
    assert failures(full, full, 3) == []
    assert len(set(failures(full, read(sweep / "scenes" / "blind"), 5))) == 5


def test_the_same_sweep_gives_the_same_files(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "examples", lambda *_: pytest.fail("it needs no model"))
    for name in ("one", "other"):
        report_job(str(sweep), out=str(tmp_path / name), number_of_examples=0)
    files = [{str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
             for name in ("one", "other")]  # fmt: skip
    assert files[0] == files[1]
    text = files[0]["report.md"].decode()
    assert "No plot of times and none of FLOPs: no measurements were given" in text
    assert "resize was not evaluated" not in text


def test_without_resize_a_report_says_so_first(sweep: Path, tmp_path: Path) -> None:
    less = tmp_path / "less" / "scenes"
    for name in ("full", "random-0.1"):
        (less / name).mkdir(parents=True)
        for file in (sweep / "scenes" / name).iterdir():
            (less / name / file.name).write_bytes(file.read_bytes())
    report_job(str(less.parent), out=str(tmp_path / "out"), number_of_examples=0)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index("resize was not evaluated on scenes") < page.index("<section>")


def test_pictures_of_another_model_are_not_drawn(sweep: Path, tmp_path: Path) -> None:
    for name in ("full", "random-0.1"):
        folder = tmp_path / "scenes" / name
        folder.mkdir(parents=True)
        for file in (sweep / "scenes" / name).iterdir():
            changed = file.read_bytes()
            if file.name == "protocol.json":
                made = json.loads(changed)
                made["protocol"]["model"]["weights"] = "others"
                changed = json.dumps(made).encode()
            (folder / file.name).write_bytes(changed)
    with pytest.raises(ConfigError, match=r"model\.weights was \"others\".*--examples 0"):
        report_job(str(tmp_path), out=str(tmp_path / "out"), number_of_examples=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "no efficiency.json of schema 1"),
        ({"protocol": {"model": {"name": "other"}}}, "measured model.name='other'"),
        ({"rows": []}, "holds no measurement"),
    ],
)
def test_measurements_of_something_else_are_refused(
    sweep: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = bench(sweep, tmp_path / "efficiency.json", **changes)
    with pytest.raises(ConfigError, match=message):
        measured.read(file, read(sweep / "scenes" / "full").protocol["model"])


def test_what_a_report_cannot_be_made_of_is_said(tmp_path: Path, sweep: Path) -> None:
    for arguments, message in (
        ({"folder": str(tmp_path)}, "no run is in it"),
        ({"folder": str(sweep), "number_of_examples": -1}, "--examples -1"),
        ({"folder": str(sweep), "against": "fulll"}, "has no run 'fulll'; it has 'blind', 'full'"),
        ({"folder": str(sweep), "bench": "none.json"}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            report_job(**arguments, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_front_is_what_nothing_outdoes() -> None:
    points = {"a": (1, 0.5), "b": (2, 0.4), "c": (2, 0.9), "d": (3, 0.9), "e": (4, 1.0)}
    curves = {name: [Point(name, x, Estimate(y, y, y))] for name, (x, y) in points.items()}
    assert Plot("plot", "", "", "", curves, {}).front() == {"a", "c", "e"}


def test_a_plot_has_the_same_bytes_every_time() -> None:
    curves = {
        "resize": [Point("resize 1", 16, Estimate(0.5, 0.4, 0.6)), Point("resize 2", 36, Estimate(0.7, 0.6, 0.8))]
    }
    plot = Plot("name", "Title <&>", "x", "y", curves, {"full": Estimate(0.9, 0.8, 1.0)}, ticks=True)
    svg, png = draw(plot)
    assert (svg, png) == draw(plot)
    assert png.startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- exports


def unescaped(text: str) -> str:
    """What LaTeX prints, by its own rules."""
    named = {
        r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
        r"\textgreater{}": ">", r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_", r"\{": "{", r"\}": "}",
        "$-$": "−",
    }  # fmt: skip
    pattern = "|".join(map(re.escape, named))
    return re.sub(pattern, lambda found: named[found[0]], text)


def test_tables_are_read_back_as_they_were() -> None:
    sheet = Sheet("A title", ["name", "value"], [[AWKWARD, "1.0 [0.5, 1.5]"], ["plain", "−2.0"]], ["A note."])
    lines = [line for line in sheet.markdown().splitlines() if line.startswith("|")]
    cells = [[cell.replace(r"\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[1] == ["---", "---:"]
    assert [cells[0], *cells[2:]] == [sheet.head, *sheet.rows]
    tex = sheet.latex()
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].splitlines()[1:]
    back = [[unescaped(cell) for cell in re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))] for line in body]
    assert back == [list(row) for row in sheet.rows]
    assert re.sub(r"\\[&%$#_{}]|\$-\$|\\text\w+\{\}", "", latex(AWKWARD)).isascii()
    assert not re.search(r"(?<!\\)[&%#_]", latex(AWKWARD))
    assert Reader(sheet.html()).text.count(AWKWARD) == 1
    file = io.StringIO()
    sheet.print(Console(file=file, width=120))
    assert AWKWARD in file.getvalue()


def test_comparisons_are_exported_unrounded(sweep: Path) -> None:
    found = compare_job(str(sweep), [], by="kind")
    rows = list(csv.DictReader(io.StringIO(written(found, "csv"))))
    assert len(rows) == len(found.whole) + len(found.kinds)
    for line, row in zip(found.whole, rows, strict=False):
        for name, value in flat(line).items():
            assert row[name] == ("" if value is None else str(value)), name
    kinds = {row["part"] for row in rows[len(found.whole) :]}
    assert kinds == {"perception"}
    data = json.loads(written(found, "json"))
    assert data["whole"][0]["comparison"]["difference"]["p"] == found.whole[0].comparison.difference.p
    for form, start in (("latex", "% needs"), ("markdown", "**scenes"), ("text", "scenes: against full")):
        text = written(found, form)
        assert text.startswith(start)
        assert (
            estimate(found.whole[0].comparison.difference, 100, "+").replace("−", "$-$" if form == "latex" else "−")
            in text
        )
