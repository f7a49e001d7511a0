"""What the demo shows, without its page: answers as they grow, what they cost, and what became of every patch."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from visiontok.demo import examples, page, pareto, session
from visiontok.demo.fate import PROMPT, Fate
from visiontok.demo.session import Answer, Setting, ask, read_picture

import visiontok
from visiontok.errors import ConfigError, VisiontokError
from visiontok.named import load_model
from visiontok.overlay import KEPT_FRAME, draw_kept

PICTURE, PAIRS = next(iter(examples().items()))
QUESTION = PAIRS[0][0]


@functools.cache
def loaded(name: str = "tiny") -> Any:
    return load_model(name, torch.device("cpu"))


def answered(setting: Setting, name: str = "tiny", question: str = QUESTION) -> tuple[list[str], Answer]:
    *texts, answer = ask(loaded(name), read_picture(PICTURE)[0], question, setting, stop=threading.Event())
    assert isinstance(answer, Answer)
    assert all(isinstance(text, str) for text in texts)
    return texts, answer  # type: ignore[return-value]


def plain(question: str = QUESTION) -> str:
    """The stock model's answer, by nothing but transformers."""
    model, processor = loaded().model, loaded().processor
    inputs = loaded().inputs(([Image.open(PICTURE).convert("RGB")], question))
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    text: str = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_no_method_is_the_plain_model() -> None:
    texts, answer = answered(Setting())
    assert answer.text == texts[-1] == plain()
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert answer.kept == (144,) * 4
    assert bool(answer.fate.alive(PROMPT).all())


@pytest.mark.parametrize(("method", "left"), [("pixel_entropy", 36), ("tower_cut", 36), ("ipcv", 144), ("tome", 36)])
def test_stages_before_and_inside_the_tower(method: str, left: int) -> None:
    _, answer = answered(Setting(method, 0.25))
    assert answer.kept == (left,) * 4
    assert int(answer.fate.alive(PROMPT).sum()) == left
    gone = next((int(i) for i in torch.nonzero(~answer.fate.alive(PROMPT)[0])), None)
    heir = None if gone is None else answer.fate.facts((0, gone), PROMPT).heir
    assert (heir is not None) == (method == "tome")  # the others merge into nothing
    drawing = draw_kept(read_picture(PICTURE)[0], answer.crops, answer.fate.alive(0), merged=answer.fate.merged)
    assert len(drawing.cells) == 144


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
@pytest.mark.parametrize(
    "setting", [Setting("visiontok", 0.25), Setting("fastv", 0.25, 2), Setting("divprune", 0.1, 1), Setting("vtw")]
)
def test_the_numbers_are_those_of_the_report(name: str, setting: Setting) -> None:
    _, answer = answered(setting, name)
    recipe = setting.recipe()
    assert recipe is not None
    inputs = loaded(name).inputs(([read_picture(PICTURE)[0]], QUESTION))
    with visiontok.compress(loaded(name).model, recipe) as compression:
        loaded(name).model.generate(**inputs, max_new_tokens=1)
        report, fate = compression.report, Fate(compression.ledger)
    costs = report.account
    assert answer.kept == report.images[0].kept
    assert answer.kv_bytes == costs.kv
    assert costs.vision is not None
    assert costs.decoder is not None
    assert answer.operations == costs.vision.tower + costs.vision.projector + sum(costs.decoder) + costs.lm_head
    assert all(torch.equal(a, b) for a, b in zip(answer.fate.layers, fate.layers, strict=True))
    seconds = answer.seconds
    parts = (seconds.preprocess, seconds.vision, seconds.selection, seconds.prefill, seconds.rest)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(seconds.first_token)
    # every layer's overlay has as many bright patches as the report counts
    for layer, kept in enumerate(answer.kept):
        drawing = draw_kept(read_picture(PICTURE)[0], answer.crops, answer.fate.alive(layer))
        corners = [drawing.image.getpixel((right - 1, bottom - 1)) for _, _, right, bottom in drawing.cells.tolist()]
        assert corners.count(KEPT_FRAME) == (0 if kept == answer.tokens else kept)
        under = page.under(answer, layer, heat=False, drawn=kept)
        assert re.findall(r"data-kept='(\d+)'", under) == [str(kept)]


def test_the_facts_of_a_patch() -> None:
    """Rank by a naive sort; dropped, heir and mass by the ledger's own masks."""
    _, answer = answered(Setting("fastv", 0.25, 2))
    fate, choice = answer.fate, answer.fate.choices[0]
    assert choice.scores is not None
    order = np.lexsort((np.arange(144), -choice.scores[0].numpy()))
    for token in (0, 50, int(order[0]), int(order[143])):
        facts = fate.facts((0, token), 3)
        assert facts.rank == int(np.flatnonzero(order == token)[0]) + 1
        assert facts.score == float(choice.scores[0, token])
        assert facts.place == (0, token // 12, token % 12)
        assert facts.dropped == (None if facts.rank <= 36 else 2)
        assert facts.heir is None
        assert facts.mass == (facts.dropped is None)
    _, answer = answered(Setting("visiontok", 0.25))
    fate, went = answer.fate, torch.zeros(144)
    for token in range(144):
        facts = fate.facts((0, token), 0)
        if facts.dropped is None:
            assert facts.heir is None
            went[token] += 1
        else:
            assert facts.dropped == PROMPT
            assert facts.heir is not None
            assert bool(fate.prompt[facts.heir])
            went[facts.heir[1]] += 1
    kept = fate.prompt[0]
    assert [fate.facts((0, token), 0).mass for token in torch.nonzero(kept).flatten().tolist()] == went[kept].tolist()


def test_methods_without_scores_say_so() -> None:
    _, answer = answered(Setting("divprune", 0.25))
    assert answer.fate.scores() is None
    facts = answer.fate.facts((0, 3), 0)
    assert (facts.score, facts.rank) == (None, None)
    assert page.NO_SCORES in page.facts([(answer, facts), None], 0)
    assert page.NO_SCORES.capitalize() in page.under(answer, 0, heat=True, drawn=36)


@pytest.mark.parametrize(("question", "path", "error"), [
    (" \n", PICTURE, "the question is empty"),
    ("what?", None, "choose a picture first"),
    ("what?", "broken", "Pillow can read|broken or truncated"),
    ("what?", "cut", "broken or truncated"),
    ("what?", "large", "150 megapixels"),
])  # fmt: skip
def test_what_cannot_be_asked(question: str, path: Any, error: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("broken", "cut", "large")}
    files["broken"].write_bytes(b"no picture")
    files["cut"].write_bytes(Path(PICTURE).read_bytes()[:900])
    Image.new("1", (15000, 10000)).save(files["large"])
    with pytest.raises(VisiontokError, match=error) as raised:
        list(ask(loaded(), read_picture(files.get(path, path))[0], question, Setting(), stop=threading.Event()))
    assert str(tmp_path) not in str(raised.value)  # nor where the server keeps its files


@pytest.mark.parametrize("size", [(1, 1), (900, 3), (3000, 2000)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    *_, answer = ask(loaded(), Image.new("RGB", size), "what?", Setting("random", 0.1), stop=threading.Event())
    assert isinstance(answer, Answer)
    drawing = draw_kept(Image.new("RGB", size), answer.crops, answer.fate.alive(0))
    assert max(drawing.image.size) <= 1600


def test_notes() -> None:
    _, answer = answered(Setting("fastv", 0.5), question="what about the xylophone?")
    assert answer.notes == (
        "selection inside the language model is counted as prefill",
        "the question has words that this model's vocabulary lacks",
    )
    assert answered(Setting("visiontok", 0.5), question="what color is the star?")[1].notes == ()


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    picture, note = read_picture(tmp_path / "two.gif")
    assert picture.getpixel((5, 5)) == (254, 0, 0) or picture.getpixel((5, 5)) == (255, 0, 0)
    assert "2 frames" in note


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes on and on, ten tokens a second."""
    put = session._Pieces.put

    def slow(self: Any, value: torch.Tensor) -> None:
        time.sleep(0.1)
        put(self, value)

    monkeypatch.setattr(session._Pieces, "put", slow)
    monkeypatch.setattr(loaded().model.generation_config, "eos_token_id", None)


def working() -> bool:
    return any(thread.name == "visiontok demo" for thread in threading.enumerate())


def test_a_question_can_be_stopped_or_left(endless: None) -> None:
    stop, picture = threading.Event(), read_picture(PICTURE)[0]
    told = ask(loaded(), picture, QUESTION, Setting(), stop=stop, longest=300)
    assert isinstance(next(told), str)
    stop.set()
    assert not any(isinstance(item, Answer) for item in told)
    assert not working()
    told = ask(loaded(), picture, QUESTION, Setting("fastv", 0.3), stop=threading.Event(), longest=300)
    next(told)
    told.close()  # type: ignore[attr-defined]
    assert not working()
    assert visiontok.api.attached(loaded().model) is None


@pytest.mark.parametrize("setting", [Setting(), Setting("visiontok", 0.3), Setting("divprune", 0.2, 1)])
def test_the_lines_that_reproduce_a_view(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, answer = answered(setting)
    (tmp_path / "picture.png").write_bytes(Path(PICTURE).read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(setting.in_python("tiny", QUESTION), "lines", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == answer.text


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting(), Setting("visiontok", 0.3), Setting("divprune", 0.2, 1)])
def test_the_command_that_reproduces_a_view(setting: Setting, tmp_path: Path) -> None:
    _, answer = answered(setting)
    (tmp_path / "picture.png").write_bytes(Path(PICTURE).read_bytes())
    command = setting.in_shell("tiny", QUESTION).replace("    # its column 'stock'", "") + " --json"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)["stock" if setting.method == "none" else "compressed"]
    assert found["answer"] == answer.text
    assert found["visual_tokens"] == list(answer.kept)


def test_nothing_that_is_typed_becomes_markup() -> None:
    assert "<b>x" not in page.answer(0, "<b>x", "<b>x</b>") + page.status("<b>x", error=True)


def test_the_front_is_what_nothing_beats() -> None:
    points = pareto.shipped()
    assert {point.source for point in points} >= {"embedded llava, heldout", "embedded qwen3_vl, heldout"}
    here = [p for p in points if p.source == "embedded llava, heldout"]
    front = pareto.front(here)
    for p in here:
        beaten = any(q.kept <= p.kept and q.score >= p.score and (q.kept, q.score) != (p.kept, p.score) for q in here)
        assert beaten != any((q.kept, q.score) == (p.kept, p.score) for q in front)


def test_curves_of_an_evaluation(tmp_path: Path) -> None:
    for name, kept, score in (("full", None, 0.9), ("random-0.25", 36.0, 0.5), ("blind", None, 0.1)):
        run = tmp_path / "scenes" / name
        run.mkdir(parents=True)
        visual = None if name == "blind" else 144.0
        found = {"scores": {"accuracy": score}, "headline": "accuracy", "layer_average": kept, "visual_tokens": visual}
        (run / "results.json").write_text(json.dumps(found))
        method = name.replace("-", " ")
        (run / "protocol.json").write_text(json.dumps({"method": method}))
    points = pareto.of_eval(str(tmp_path))
    assert [(p.method, p.kept, p.score) for p in points] == [("full", 1.0, 90.0), ("random", 0.25, 50.0)]
    (tmp_path / "scenes" / "full" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no result of"):
        pareto.of_eval(str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no results\.json"):
        pareto.of_eval(str(tmp_path / "scenes" / "nothing"))
