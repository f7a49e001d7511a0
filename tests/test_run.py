"""`visiontok run`: what it measures, what it reports, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from rich.console import Console

import visiontok
from visiontok import cli, overlay, run
from visiontok.errors import ConfigError
from visiontok.options import read_value

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `visiontok run ARGUMENTS` in this process; gives code, out and err."""

    def command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["visiontok", "run", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        streams = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=streams.out, err=streams.err)

    return command


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture file, not square."""
    path = tmp_path / "photo.png"
    visiontok.demo.scene(3)[0].resize((300, 200)).save(path)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is loaded."""

    def load(*arguments: object) -> None:
        pytest.fail("the model was loaded before the arguments were checked")

    monkeypatch.setattr(run, "load_model", load)


# tokens per decoder layer at keep = 25 % of 144
LAYERS = {
    **{card.name: [36] * 4 for card in visiontok.methods() if card.stage != "decoder"},
    **{card.name: [144] * 4 for card in visiontok.methods() if card.stage == "cache"},
    # the noise of the scenes is in every patch; what leaves the tower with ipcv is back behind it
    **dict.fromkeys(("pixelprune", "background", "temporal", "trim", "ipcv"), [144] * 4),
    "dymu": [49] * 4,  # what is alike in a picture as plain as this
    "erase": [57, 36, 36, 36],  # its own share for a picture as plain as this
    "sieve": [144, 144, 36, 36],
    "fastv": [144, 36, 36, 36],
    "pyramiddrop": [144, 72, 36, 18],
    "sparsevlm": [144, 51, 28, 28],
    "sparsevlm_plus": [144, 50, 29, 29],
    "feather": [144, 54, 5, 5],
    "hidrop": [0, 3, 1, 0],
    "aim": [36, 36, 9, 0],
    "urag": [144, 144, 144, 144],  # the only page
    "todre_exit": [144, 144, 144, 144],  # random weights look everywhere
    "vtw": [144, 144, 0, 0],
    "shortv": [144] * 4,
    "yopo": [144, 144, 0, 0],
    "entropyprune": [144, 36, 36, 36],
    "v2drop": [144, 142, 1, 1],
    "transprune": [144, 48, 48, 48],
    "fitprune": [144, 70, 37, 37],
}
# What a cache holds, where that is not what its layer computes.
CACHED = {"snapkv": [36] * 4, "h2o": [36] * 4, "dycoke_cache": [144, 36, 36, 36]}
# What several cuts keep on average; the layers in front of the first one have all.
KEEPS = {"v2drop": 0.5, "transprune": 0.5, "fitprune": 0.5}


@pytest.mark.parametrize("method", [card.name for card in visiontok.methods() if card.name != "pmod"])  # has no weights
def test_every_method(method: str, tmp_path: Path) -> None:
    path = tmp_path / "overlay.png"
    keep = KEEPS.get(method)
    budget = {} if keep is None else {"keep": keep}
    result = run.run_job(method=method, overlay=str(path), max_new_tokens=3, repeats=1, **budget)
    data = result.to_dict()
    assert data["compressed"]["visual_tokens"] == LAYERS[method]
    assert data["stock"]["visual_tokens"] == [144] * 4
    assert data["compressed"]["layer_average"] == sum(LAYERS[method]) / 4
    text = result.report.layer_tokens[0] - LAYERS[method][0]
    assert data["stock"]["kv_bytes"] / data["compressed"]["kv_bytes"] == pytest.approx(
        4 * (144 + text) / (sum(CACHED.get(method, LAYERS[method])) + 4 * text)
    )
    assert data["overlay"]["kept"] == next(n for n in reversed(LAYERS[method]) if n)
    factor = round(overlay.scale_of((144, 144)))
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width == 144 * factor
        kept = data["overlay"]["kept"]
        assert _frames(drawn, 12 * factor) == (0 if kept == 144 else kept)  # no frames where nothing is dropped
        assert drawn.info["Description"] == data["overlay"]["caption"]


def _frames(drawn: Image.Image, cell: int) -> int:
    """How many cells of the 12 × 12 grid have the frame of a kept one."""
    corners = [drawn.getpixel((x * cell - 1, y * cell - 1)) for x in range(1, 13) for y in range(1, 13)]
    return corners.count(overlay.KEPT_FRAME)


def test_the_stock_side_is_the_stock_model() -> None:
    model, processor = visiontok.demo.load()
    picture, questions = visiontok.demo.scene(0)
    result = run.run_job(max_new_tokens=4, repeats=2)
    inputs = run.Loaded("tiny", model, processor, torch.device("cpu")).inputs(([picture], result.question))
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result.stock.answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert result.stock.generated == len(ids)
    assert (result.question, result.expected) in [(question.text, question.answer) for question in questions]


def test_without_arguments_it_asks_what_the_stock_model_can_answer() -> None:
    results = [run.run_job(seed=seed, repeats=1) for seed in range(3)]
    assert any(result.stock.answer == result.expected for result in results)
    assert all("of the scene's questions" in " ".join(result.notes) for result in results)


def test_a_question_of_ones_own_about_a_scene() -> None:
    question = visiontok.demo.scene(2)[1][1]
    asked = run.run_job(ask=question.text, seed=2, max_new_tokens=2, repeats=1)
    assert (asked.question, asked.expected) == (question.text, question.answer)
    other = run.run_job(ask="how many zebras are there?", seed=2, max_new_tokens=2, repeats=1)
    assert other.expected is None
    assert any("vocabulary" in note for note in other.notes)


def test_what_does_not_fit_into_memory(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "_compare", compare)
    _is_one_line(call(), "do not fit into its memory")


def test_a_placeholder_in_the_question(call: Call) -> None:
    _is_one_line(call("--ask", "what is this <image> here?"), "the processor of tiny refuses this picture or question")


def test_all_tokens_kept_changes_nothing() -> None:
    result = run.run_job(keep="100%", repeats=1)
    assert result.stock.answer == result.compressed.answer
    assert any("nothing was dropped" in note for note in result.notes)


def test_mass_attention_can_be_asked_for(call: Call) -> None:
    done = call("--method", "divprune", "--keep", "16", "--mass", "--max-new-tokens", "2", "--json")
    assert json.loads(done.out)["method"] == "divprune[mass]"
    assert "mass" in call("--method", "vtw", "--mass").err


def test_nothing_stays_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = run.load_model("tiny", torch.device("cpu"))
    monkeypatch.setattr(run, "load_model", lambda *_: loaded)
    hooks = []
    for _ in range(2):  # transformers adds one of its own in the first forward
        run.run_job(max_new_tokens=2, repeats=1)
        hooks.append([{**module._forward_hooks, **module._forward_pre_hooks} for module in loaded.model.modules()])
    assert hooks[0] == hooks[1]
    assert "get_image_features" not in loaded.base.__dict__


def test_the_parts_add_up() -> None:
    result = run.run_job(max_new_tokens=3, repeats=1)
    for side in (result.stock, result.compressed):
        parts = side.seconds
        assert min(parts.preprocess, parts.vision, parts.prefill, parts.rest, parts.decode) > 0
        together = parts.preprocess + parts.vision + parts.selection + parts.prefill + parts.rest
        assert together == pytest.approx(parts.first_token)
    assert result.stock.seconds.selection == 0 < result.compressed.seconds.selection
    ratios = result.speed_up
    assert ratios.time_to_first_token == pytest.approx(
        result.stock.seconds.first_token / result.compressed.seconds.first_token
    )
    assert ratios.cap >= 1


def test_seconds_are_medians() -> None:
    runs = [run.Seconds(*[value * scale for scale in range(1, 8)]) for value in (3.0, 1.0, 2.0)]
    assert run.Seconds.median(runs) == runs[2]


def test_json(call: Call, photo: Path) -> None:
    done = call("--image", str(photo), "--ask", "how many objects are there?", "--keep", "10", "--json")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert (data["model"], data["image"], data["expected"]) == ("tiny", str(photo), None)
    assert (data["method"], data["tokens_in"], data["tokens_kept"]) == ("visiontok[mass merge=0.75]", 144, 10)
    for side in ("stock", "compressed"):
        assert data[side].keys() == {
            *("answer", "generated_tokens", "tower_patches", "visual_tokens", "layer_average", "kv_bytes", "flops"),
            "seconds",
        }
        assert data[side]["seconds"].keys() == {
            *("preprocess", "vision", "selection", "prefill", "rest", "first_token", "decode"),
        }
    assert data["stock"]["flops"]["vision"] == data["compressed"]["flops"]["vision"]
    assert data["stock"]["flops"]["language_model"] > data["compressed"]["flops"]["language_model"]
    for kind in ("measured", "flops"):
        assert data["speed_up"][kind].keys() == {"time_to_first_token", "language_model", "cap"}
    assert data["overlay"] is None


def test_the_table() -> None:
    result = run.run_job(method="fastv", keep="36", max_new_tokens=2, repeats=1)
    page = io.StringIO()
    result.render(Console(file=page, width=120))
    lines = [line.split("  ") for line in page.getvalue().splitlines()]
    rows = {
        cells[0] or cells[1]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines if cells != [""]
    }
    assert rows["visual tokens in"] == ["144", "144"]
    assert rows["tokens × layers"][1:] == ["144×4", "144×1 36×3"]
    assert rows["truth"] == [result.expected]
    assert "vision tower included (cap ×" in page.getvalue()
    assert "[/]" not in page.getvalue()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png", "--ask", "what?"], "image 'missing.png' does not exist"),
        (["--image", "PHOTO"], "--ask is missing"),
        (["--ask", " "], "the question is empty"),
        (["--method", "divprun"], "method='divprun': unknown; did you mean divprune "),
        (["--method", "none.json"], "recipe='none.json': cannot be read"),
        (["--keep", "1"], "keep='1' is ambiguous"),
        (["--keep", "0"], "keep=0: tokens is a whole number"),
        (["--keep", "much"], "keep='much'"),
        (["--method", "vtw", "--keep", "0.5"], "has no budget"),
        (["--option", "size=3"], "size='3': visiontok has no such option"),
        (["--method", "fastv", "--option", "layer=two"], "fastv: --option layer=two: this option takes int, float"),
        (
            ["--method", "idpruner", "--option", "scorer=best"],
            "idpruner: --option scorer=best: this option takes cls, ",
        ),
        (["--method", "idpruner", "--option", "balance=7"], "balance=7.0"),
        (["--method", "none.json", "--option", "a=1"], "recipe='none.json'"),
        (["--seed", "-1"], "--seed -1: there is no such scene"),
        (["--device", "tpu9"], "--device 'tpu9': unknown"),
        (["--device", "meta"], "--device 'meta': cannot run models"),
        (["--overlay", "no/such/folder/o.png"], "there is no folder 'no/such/folder'"),
        (["--overlay", "FOLDER.png"], "this is a folder"),
        (["--overlay", "o.jpg"], "the overlay is a PNG"),
    ],
)
def test_wrong_arguments_before_the_model_is_loaded(
    call: Call, photo: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    (photo.parent / "FOLDER.png").mkdir()
    done = call(*(str(photo) if argument == "PHOTO" else argument for argument in arguments))
    _is_one_line(done, message)


def _is_one_line(done: SimpleNamespace, message: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("visiontok: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.usefixtures("no_model")
def test_a_device_that_is_not_there(call: Call) -> None:
    _is_one_line(call("--device", "cuda:1"), "--device 'cuda:1': not available on this machine")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "there is no such folder"),
        ("nobody/nothing", "no folder here, nor loadable by this id"),
        ("empty", "cannot be loaded from this folder"),
        ("text", "a llama is no vision-language model"),
    ],
)
def test_wrong_models(call: Call, model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    _is_one_line(call("--model", model), message)


def test_a_layer_outside_the_model(call: Call) -> None:
    _is_one_line(call("--method", "fastv", "--option", "layer=9"), "layer=9: this model has 4 layers")


def test_a_model_folder(photo: Path) -> None:
    folder = str(visiontok.demo.WEIGHTS / "llava")
    result = run.run_job(
        image=str(photo), ask="how many objects are there?", model=folder, max_new_tokens=2, repeats=1, keep=0.5
    )
    assert (result.model, result.visual_tokens, result.kept) == (folder, 144, [72] * 4)
    assert not any("test bench" in note for note in result.notes)


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (int | float, {"3": 3, "-1": -1, "0.5": 0.5}),
        (float, {"1": 1.0}),
        (bool, {"true": True, "false": False}),
        (str, {"3": "3"}),
        (Literal["a", "b"] | None, {"a": "a", "none": None}),
        (int | None, {"4": 4, "none": None}),
        (tuple[int | float, ...] | None, {"1,0.5": (1, 0.5), "3": (3,), "none": None}),
    ],
)
def test_options_are_read_as_the_type_of_their_field(hint: Any, values: dict[str, Any]) -> None:
    for text, value in values.items():
        read = read_value("o", text, hint)
        assert (read, type(read)) == (value, type(value))
    if hint is not str:
        with pytest.raises(ConfigError, match="this option takes"):
            read_value("o", "what", hint)


def test_options_reach_the_method() -> None:
    result = run.run_job(method="fastv", keep=20, options={"layer": "3"}, max_new_tokens=2, repeats=1)
    assert result.kept == [144, 144, 144, 20]
    assert result.compressed.seconds.selection == 0  # it happens inside the prefill


def test_the_seed_reaches_the_recipe() -> None:
    hashes = {run.run_job(method="random", seed=s, max_new_tokens=1, repeats=1).report.recipe_hash for s in (0, 1)}
    assert len(hashes) == 2


@pytest.mark.parametrize("argument", ["repeats", "max_new_tokens"])
def test_numbers_below_one(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument}=0"):
        run.run_job(**{argument: 0})  # type: ignore[arg-type]
