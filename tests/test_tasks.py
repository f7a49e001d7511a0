"""Tasks: every benchmark from rows in its data set's schema to questions, in every form that rows come in."""

from __future__ import annotations

import base64
import csv
import dataclasses
import importlib
import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from task_rows import EXPECTED, ROWS, Expected, Picture
from visiontok.demo import measure
from visiontok.eval import tables, task
from visiontok.eval.items import Item

from visiontok.errors import ConfigError, ImageError

SCENES = {"scenes": "heldout"} | {f"scenes-{name}": name for name in ("validation", "composition", "detail", "pairs")}
HAS_ARROW = importlib.util.find_spec("pyarrow") is not None
HAS_DATASETS = importlib.util.find_spec("datasets") is not None


def png(number: int, side: int = 16) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (side - 4, side + number, 3), generator=generator, dtype=torch.uint8)
    return encode(Image.fromarray(pixels.numpy()))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def filled(rows: list[dict[str, Any]], show: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{k: show(v.number) if isinstance(v, Picture) else v for k, v in row.items()} for row in rows]


def text(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def saved(folder: Path, number: int) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{number}.png").write_bytes(png(number))
    return f"{number}.png"


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_separated(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name, "") for name in names]
            writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def json_lines_with_paths(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_json_lines(folder / "questions.jsonl", filled(rows, lambda n: saved(folder, n)))


def folder_with_images(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_separated(folder / "questions.csv", filled(rows, lambda n: saved(folder / "images", n)))
    return folder


def json_with_structs(folder: Path, rows: list[dict[str, Any]]) -> Path:
    shown = filled(rows, lambda n: {"bytes": None, "path": saved(folder, n)})
    path = folder / "questions.json"
    path.write_text(json.dumps({"data": shown}), encoding="utf-8")
    return path


def json_lines_with_urls(folder: Path, rows: list[dict[str, Any]]) -> Path:
    shown = filled(rows, lambda n: [f"data:image/png;base64,{text(n)}"])
    return write_json_lines(folder / "questions.jsonl", shown)


def tsv_with_base64(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_separated(folder / "questions.tsv", filled(rows, text))


def parquet_shards(folder: Path, rows: list[dict[str, Any]]) -> Path:
    shown = filled(rows, lambda n: {"bytes": png(n), "path": None})
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "test-00000-of-00002.parquet", shown[:2])
    write_parquet(folder / "data" / "test-00001-of-00002.parquet", shown[2:])
    return folder


needs_arrow = pytest.mark.skipif(not HAS_ARROW, reason="needs pyarrow")
FORMS = [
    json_lines_with_paths,
    folder_with_images,
    json_with_structs,
    json_lines_with_urls,
    tsv_with_base64,
    pytest.param(parquet_shards, marks=needs_arrow),
]


def check(items: list[Item], expected: list[Expected]) -> None:
    said = [
        Expected(item.id, item.prompt, dict(item.target), item.cluster, dict(item.groups), one.pictures)
        for item, one in zip(items, expected, strict=True)
    ]
    assert said == expected
    json.dumps([item.target for item in items])
    for item, one in zip(items, expected, strict=True):
        opened = [image.open() for image in item.images]
        wanted = [Image.open(io.BytesIO(png(number))) for number in one.pictures]
        assert [(image.mode, image.tobytes()) for image in opened] == [
            (image.mode, image.tobytes()) for image in wanted
        ]


# ------------------------------------------------------------------------------------------------------------ all tasks


def test_every_task_has_rows_here() -> None:
    assert set(task.names()) == {*ROWS, *SCENES}
    assert set(EXPECTED) == set(ROWS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_become_questions(name: str, form: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path) -> None:
    items = task.find(name).items(str(form(tmp_path, ROWS[name])))
    check(list(items), EXPECTED[name])


@pytest.mark.parametrize("name", task.names())
def test_ids_are_unique_and_limits_cut(name: str, tmp_path: Path) -> None:
    one, source = task.find(name), None
    if name in SCENES:
        one = dataclasses.replace(one, scenes=task.Scenes(SCENES[name], 20))
    else:
        source = str(json_lines_with_paths(tmp_path, ROWS[name]))
    items = one.items(source)
    assert len({item.id for item in items}) == len(items)
    assert tuple(one.items(source, limit=2)) == tuple(items)[:2]
    with pytest.raises(ConfigError, match="limit=0"):
        one.items(source, limit=0)


@pytest.mark.parametrize(
    ("name", "family", "prompt"),
    [
        ("mmstar", "qwen3_vl", "Question: Who?Answer with the option letter only."),
        ("hallusionbench", "qwen2_5_vl", "Is it there? Please answer yes or no."),
        ("hallusionbench", "llava", "Is it there?"),
    ],
)
def test_families_may_have_their_own_prompts(name: str, family: str, prompt: str, tmp_path: Path) -> None:
    source = str(json_lines_with_paths(tmp_path, ROWS[name]))
    assert task.find(name).items(source, family)[-1].prompt == prompt


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[tuple, list[dict[str, Any]]]:
    """Data sets by (id, config, split, revision), in place of the hub; pictures may be asked for row by row only."""
    known: dict[tuple, list[dict[str, Any]]] = {}

    class Batch:
        def __init__(self, rows: list[dict[str, Any]]):
            self.rows = rows

        def to_pylist(self) -> list[dict[str, Any]]:
            return self.rows

        def column(self, index: int) -> list[Any]:
            return [types.SimpleNamespace(as_py=lambda row=row: list(row.values())[index]) for row in self.rows]

    class Table:
        def __init__(self, rows: list[dict[str, Any]]):
            self.rows, self.column_names = rows, list(rows[0])

        def with_format(self, name: str) -> Table:
            assert name == "arrow"
            return self

        def select_columns(self, names: list[str]) -> Table:
            return Table([{name: row[name] for name in names} for row in self.rows])

        def iter(self, batch_size: int) -> Iterator[Batch]:
            assert not any(isinstance(value, dict) and "bytes" in value for row in self.rows for value in row.values())
            yield Batch(self.rows)

        def __getitem__(self, rows: slice) -> Batch:
            return Batch(self.rows[rows])

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> Any:
        if (name, config, split, revision) not in known:
            raise FileNotFoundError(f"Couldn't find {name} anywhere\nby trying hard")
        rows = known[name, config, split, revision]
        if not HAS_DATASETS:
            return Table(rows)
        file = write_parquet(tmp_path / f"{config}.parquet", rows)
        table = real("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        for column in {name for row in rows for name, value in row.items() if isinstance(value, dict)}:
            table = table.cast_column(column, module.Image())
        return table

    if HAS_DATASETS:
        module = importlib.import_module("datasets")
    else:
        module = types.ModuleType("datasets")
        monkeypatch.setitem(sys.modules, "datasets", module)
    real = getattr(module, "load_dataset", None)
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    return known


@pytest.mark.parametrize("name", ROWS)
def test_rows_come_from_the_hub(name: str, hub: dict[tuple, list[dict[str, Any]]]) -> None:
    one = task.find(name)
    rows = filled(ROWS[name], lambda n: {"bytes": png(n), "path": f"{n}.png"})
    if one.hub.pictures is not None:
        join = one.hub.pictures
        pictures = {row[join["key"]]: row.pop(join["column"]) for row in rows}
        hub[one.hub.id, join["config"], join["split"], "main"] = [
            {join["id"]: key, join["column"]: picture} for key, picture in reversed(pictures.items())
        ]
    hub[one.hub.id, one.hub.config, one.hub.split, one.hub.revision] = rows
    check(list(one.items()), EXPECTED[name])


def test_what_the_hub_lacks_is_said(hub: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"echo840/OCRBench: .*Couldn't find echo840/OCRBench anywhere\); check the netw"
    ):
        task.find("ocrbench").items()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"echo840/OCRBench: .*pip install 'visiontok\[data\]'.*local copy"):
        task.find("ocrbench").items()


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"a\.parquet: .*pip install 'visiontok\[data\]'.*JSON Lines"):
        task.find("gqa").items(str(tmp_path / "a.parquet"))


# ------------------------------------------------------------------------------------------------------------- pictures


def gqa(folder: Path, **changes: Any) -> Path:
    """One question of GQA, changed; None removes a column."""
    row = {"id": "1", "imageId": "n1", "question": "Is it?", "answer": "no", "image": text(0)} | changes
    return write_json_lines(folder / "q.jsonl", [{name: value for name, value in row.items() if value is not None}])


def opened(path: Path) -> Image.Image:
    (item,) = task.find("gqa").items(str(path))
    (image,) = item.images
    return image.open()


def test_pixels_are_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    turned = encode(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif)
    assert opened(gqa(tmp_path, image=base64.b64encode(turned).decode())).size == (6, 4)
    glass = encode(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    image = opened(gqa(tmp_path, image=base64.b64encode(glass).decode()))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (10, 20, 30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gone.png", r"image '.*gone\.png' does not exist"),
        (
            base64.b64encode(png(0)[:80]).decode(),
            r"q\.jsonl, line 1, image: the image .*broken or truncated",
        ),
        (base64.b64encode(bytes(100)).decode(), r"q\.jsonl, line 1, image: .*no image format"),
        ("A" * 65, r"q\.jsonl, line 1, image: its base64 is broken"),
        (7, r"q\.jsonl, line 1, image: holds 7 instead of one picture"),
    ],
)
def test_a_broken_picture_raises_when_it_is_opened(content: Any, message: str, tmp_path: Path) -> None:
    (item,) = task.find("gqa").items(str(gqa(tmp_path, image=content)))
    with pytest.raises(ImageError, match=message):
        item.images[0].open()


def test_a_broken_picture_of_a_box_has_no_size(tmp_path: Path) -> None:
    rows = [ROWS["refcoco"][1] | {"image": "gone.png"}]
    (item,) = task.find("refcoco").items(str(write_json_lines(tmp_path / "q.jsonl", rows)))
    assert "size" not in item.target
    with pytest.raises(ImageError, match="gone"):
        item.images[0].open()


def test_no_picture_is_no_image(tmp_path: Path) -> None:
    for content in ("", []):
        (item,) = task.find("gqa").items(str(gqa(tmp_path, image=content)))
        assert item.images == ()


def test_vlmevalkit_rows_share_pictures_by_index(tmp_path: Path) -> None:
    rows = filled(ROWS["mmbench-en"], text)
    rows[1]["image"] = "241"
    first, second, third = task.find("mmbench-en").items(str(write_separated(tmp_path / "a.tsv", rows)))
    assert first.images == second.images != third.images
    assert second.images[0].open().tobytes() == Image.open(io.BytesIO(png(0))).tobytes()


@pytest.mark.parametrize("write", [write_separated, write_json_lines])
def test_long_cells_are_read_when_opened(write: Callable, tmp_path: Path) -> None:
    path = tmp_path / ("q.tsv" if write is write_separated else "q.jsonl")
    large = [base64.b64encode(png(number, side=60)).decode() for number in (0, 100)]
    cut = min(map(len, large)) // 4 * 4
    rows = [
        {"id": str(n), "imageId": "ä", "question": 'a\t"quoted"\nÜ\u2028?', "answer": "no", "image": large[0][:cut]}
        for n in range(3)
    ]
    write(path, rows)
    items = task.find("gqa").items(str(path))
    rows[1]["image"] = large[1][:cut]
    write(path, rows)
    data = [item.images[0].data() for item in items]
    assert data == [base64.b64decode(row["image"]) for row in rows]
    assert len({item.images[0].name for item in items}) == 3


# ----------------------------------------------------------------------------------------------------------- wrong data


def changed(name: str, folder: Path, **changes: Any) -> str:
    rows = filled(ROWS[name], text)
    rows[1] = {key: value for key, value in (rows[1] | changes).items() if value != "REMOVED"}
    return str(write_json_lines(folder / "q.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gqa",
            {"question": "REMOVED"},
            r"q\.jsonl, line 2: there is no column 'question', .*'gqa' takes its question; the",
        ),
        ("gqa", {"image": "REMOVED"}, r"line 2: there is no column 'image'.*there are 'id', 'imageId'"),
        ("gqa", {"question": " "}, r"line 2: the question \('question'\) is empty"),
        ("gqa", {"id": "07333408"}, r"line 2: the id '07333408' .*was there before; remove"),
        ("gqa", {"answer": None}, r"line 2: the answer is empty; this split may have none"),
        (
            "scienceqa-img",
            {"answer": 2},
            r"line 2: the answer '2' is none of the 2 options; give a letter up to B or an",
        ),
        ("mmbench-en", {"answer": "D"}, r"line 2: the answer 'D' is none of the 3 options"),
        ("mmbench-en", {"answer": "ant"}, r"line 2: the answer 'ant' is none of the 3 options"),
        ("mmbench-en", {"B": ""}, r"line 2: an option before the last is missing; fill A, B, C, D, E"),
        ("mmbench-en", {"index": "x"}, r"line 2: index='x' is no number, which task 'mmbench-en' needs for cluster"),
        ("ai2d", {"options": "ant, bee"}, r"line 2: options='ant, bee' is no list of options; write it as JSON"),
        ("hallusionbench", {"gt_answer": "2"}, r"line 2: the answer '2' is not one of 0, 1"),
        ("refcoco", {"bbox": [1, 2, 3]}, r"line 2: the box \[1, 2, 3\] is not \[x, y, width, height\]"),
        ("mmmu", {"question": "<image 8>?"}, r"line 2: <image 8> is not among image_1, .*image_7"),
    ],
)
def test_wrong_rows_are_named(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        task.find(name).items(changed(name, tmp_path, **changes))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("q.jsonl", "", r"data='.*q\.jsonl': holds no question"),
        ("q.json", "[]", "holds no question"),
        ("q.tsv", "id\tquestion\n", "holds no question"),
        ("q.jsonl", '{"id": "1"}\n{"id"\n', r"q\.jsonl, line 2: is not JSON \("),
        ("q.jsonl", "[1]\n", r"line 1: is a list, not an object"),
        ("q.json", "{", r"q\.json: is not JSON"),
        ("q.json", '{"rows": []}', r"q\.json: is neither a list of objects nor"),
        ("q.csv", "id,question\n1,a,b\n", r"q\.csv, line 2: has 3 cells under 2 headings; quote the separators"),
        ("q.csv", 'id,question\n1,"a\n', r"q\.csv, line 2: .*check its quotes"),
        ("q.csv", b"id,question\n1,\xff\n", r"q\.csv: is not UTF-8"),
        ("q.xlsx", "", r"cannot read \.xlsx; give \.jsonl, "),
    ],
)
def test_wrong_files_are_named(file: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        task.find("gqa").items(str(tmp_path / file))


def test_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data='nowhere': there is no such file or folder"):
        task.find("gqa").items("nowhere")
    with pytest.raises(ConfigError, match="nothing that could be; give the path of the file"):
        task.find("gqa").items(str(tmp_path))
    for name in ("a.csv", "b.tsv"):
        (tmp_path / name).write_text("id\n")
    with pytest.raises(ConfigError, match=r"but has a\.csv, b\.tsv; give the path"):
        task.find("gqa").items(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no row has \{'data_type': 'image'\}; task 'seed' asks only about those"):
        task.find("seed").items(str(write_json_lines(tmp_path / "v.jsonl", filled(ROWS["seed"][1:2], text))))


# ---------------------------------------------------------------------------------------------------------- task files

PLAIN = """
title: Mine
version: 1
metric: gqa
dialect: lmms-eval
max_new_tokens: 4
fields: {id: id, image: image, question: question, answer: answer}
prompts: {default: "{question}"}
"""


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PLAIN)
    mine = task.find(str(tmp_path / "mine.yaml"))
    (item,) = mine.items(str(gqa(tmp_path)))
    assert (mine.name, item.prompt, item.target, item.cluster) == ("mine", "Is it?", {"answers": ["no"]}, "1")
    with pytest.raises(ConfigError, match="task 'mine' has no data set on the hub; give the path"):
        mine.items()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Mine", "title: Mine\ncolour: red", r"mine\.yaml: unknown key 'colour'; a task has base, name, title"),
        ("metric: gqa", "", r"mine\.yaml: the key 'metric' is missing"),
        ("version: 1", "version: '1'", "version='1': must be a whole number from 1"),
        ("max_new_tokens: 4", "max_new_tokens: 0", "max_new_tokens=0: must be a whole number"),
        ("title: Mine", "title: 3", "title=3: must be a text"),
        ("id: id", "id: id, colour: red", "unknown key 'colour' in fields; it has id, cluster"),
        ("id: id, ", "", "fields lacks 'id'"),
        ("id: id", "id: 3", "id=3: must be a column, a template in quotes, or a list of these"),
        ('"{question}"', '"What?"', r"prompts\.default='What\?': must be a text with \{question\}"),
        ('"{question}"', '"{question} {hint}"', r"prompts\.default has \{hint\}; it may have question"),
        ('default: "{question}"', 'llava: "{question}"', "prompts lacks 'default'"),
        ("id: id", "id: id, hint: hint", "'hint' must be both in fields and in wrap"),
        ("title: Mine", "title: Mine\ntarget: letter", "target='letter': must be one of text, texts, choice, box"),
        ("title: Mine", "title: Mine\ntranslate: {0: no}", "translate=.*: must map texts to texts; quote"),
        ("title: Mine", "title: Mine\nhub: {id: a/b, splits: test}", "unknown key 'splits' in hub; it has id, split"),
        ("title: Mine", "title: Mine\nhub: {id: a/b}", "hub=.*split"),
        ("title: Mine", "title: Mine\nhub: {id: a/b, split: 3}", r"hub\.split=3: must be a text"),
        (
            "title: Mine",
            "title: Mine\nhub: {id: a/b, split: t, pictures: {id: x}}",
            r"hub\.pictures=.*must have the keys",
        ),
        ("title: Mine", "title: Mine\nscenes: {split: heldout, number: 2}", "either `fields` .*or `scenes`"),
        ("title: Mine", "title: Mine\nbase: gqq", "task='gqq': unknown; did you mean gqa"),
        (PLAIN, "- a", "must be a mapping of keys"),
        (PLAIN, "a: [", "is not YAML"),
    ],
)
def test_wrong_task_files_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in PLAIN
    (tmp_path / "mine.yaml").write_text(PLAIN.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        task.find(str(tmp_path / "mine.yaml"))


def test_unknown_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task='textvqq': unknown; did you mean textvqa or "):
        task.find("textvqq")
    with pytest.raises(ConfigError, match="task='xyz': unknown; known tasks: ai2d, chartqa"):
        task.find("xyz")
    with pytest.raises(ConfigError, match=r"mine\.yaml': there is no such file"):
        task.find(str(tmp_path / "mine.yaml"))


def test_digests_tell_tasks_apart_by_what_changes_results() -> None:
    tasks = [task.find(name) for name in task.names()]
    assert len({one.digest for one in tasks}) == len(tasks)
    one = task.find("gqa")
    for name in ("title", "kind", "url", "licence", "note"):
        assert dataclasses.replace(one, **{name: "other"}).digest == one.digest
    other: dict[str, Any] = {
        "name": "other", "version": 2, "metric": "anls", "dialect": "llava", "max_new_tokens": 3, "where": {"a": "b"},
        "prompts": {"default": "{question}?"}, "target": "texts", "hub": tables.Hub("a/b", "test"), "each": "answer",
        "fields": {}, "groups": {"a": "b"}, "clean": task.Clean(strip=True), "wrap": {"hint": ""},
        "translate": {"a": "b"}, "scenes": task.Scenes("detail", 2),
    }  # fmt: skip
    left_out = {"title", "kind", "url", "licence", "note"}
    assert {*other, *left_out} == {field.name for field in dataclasses.fields(task.Task)}
    for name, value in other.items():
        assert dataclasses.replace(one, **{name: value}).digest != one.digest, name


# ------------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize(("name", "split"), SCENES.items())
def test_scenes_are_those_that_the_demo_is_measured_with(name: str, split: str) -> None:
    number = 20  # more than the exam and the task draw at a time
    drawn = dataclasses.replace(task.find(name), scenes=task.Scenes(split, number)).items()
    asked, ids = [], []
    for sheet in measure.exam(split, number):
        pixels = sheet.pixels.unflatten(0, (-1, sheet.pictures)).numpy()
        for pictures, row, there in zip(pixels, sheet.questions.rows(), sheet.questions.form >= 0, strict=True):
            ids += [f"{split}-{len(asked)}-{place}" for place in there.nonzero()[:, 0].tolist()]
            asked.append([(question.text, [question.answer], question.kind, pictures) for question in row])
    assert [(item.prompt, item.target["answers"], item.groups["category"]) for item in drawn] == [
        one[:3] for row in asked for one in row
    ]
    clusters = list(dict.fromkeys(item.cluster for item in drawn))
    assert clusters == [f"{split}-{scene}" for scene, row in enumerate(asked) if row]
    for item, (*_, pictures) in zip(drawn, (one for row in asked for one in row), strict=True):
        assert [image.open().tobytes() for image in item.images] == [picture.tobytes() for picture in pictures]
    assert [item.id for item in drawn] == ids


def test_scenes_take_no_data() -> None:
    with pytest.raises(ConfigError, match=r"data='x': task 'scenes' draws its questions"):
        task.find("scenes").items("x")
    for split, number in (("turns", 2), ("heldout", 3), ("heldout", 0)):
        with pytest.raises(ConfigError, match="scenes"):
            task.Scenes(split, number)


def test_every_built_in_task_has_a_kind_and_others_must_name_one_there_is(tmp_path: Path) -> None:
    assert {task.find(name).kind for name in task.names()} == {"ocr", "perception", "reasoning"}
    own = tmp_path / "own.yaml"
    own.write_text("base: scenes\nkind: magic\n")
    with pytest.raises(ConfigError, match="kind='magic': must be one of ocr"):
        task.find(str(own))
    own.write_text("base: scenes\nprompts: {default: {choice: '{question}', open: '{question}'}}\n")
    with pytest.raises(ConfigError, match="scenes have no options"):
        task.find(str(own)).items()
