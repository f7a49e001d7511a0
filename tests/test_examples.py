"""The scripts of demo/examples run on tiny models, and what they say of them is so."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import visiontok
from visiontok import recipes
from visiontok.conformance import matrix
from visiontok.named import load_model

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "demo" / "examples").glob("*.py"))}
REAL = {
    "custom_recipe": "llava-hf/llava-1.5-7b-hf",
    "custom_scorer": "llava-hf/llava-1.5-7b-hf",
    "documents": "Qwen/Qwen2.5-VL-7B-Instruct",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "lora": "llava-hf/llava-1.5-7b-hf",
    "sweep_qwen": "Qwen/Qwen2.5-VL-7B-Instruct",
    "timm_tome": "vit_base_patch16_384",
}
METHOD = {"timm_tome": "tome", "documents": "pixelprune"}  # scripts of methods that may not be there
PAGE = (ROOT / "docs" / "examples.md").read_text()


def need(name: str) -> None:
    if name in METHOD and METHOD[name] not in recipes.names():
        pytest.skip(f"no method {METHOD[name]!r} is registered, which {name}.py is about")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", SCRIPTS[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_script_is_tested() -> None:
    assert set(SCRIPTS) == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_commands_name_options_that_there_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ast.get_docstring(ast.parse(SCRIPTS[name].read_text())) or ""
    with pytest.raises(SystemExit) as done:
        script(name).main(["--help"])
    assert done.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert "--model" in known
    for text in (said, PAGE):
        lines = [line for line in text.splitlines() if line.strip().startswith(f"python demo/examples/{name}.py")]
        commands = [shlex.split(line, comments=True) for line in lines]
        assert [words for words in commands if len(words) == 2], "the command that runs offline is not there"
        assert [words for words in commands if REAL[name] in words], f"no command has --model {REAL[name]}"
        assert {word for words in commands for word in words if word.startswith("--")} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_it_runs_from_the_shell_as_it_is(name: str, tmp_path: Path) -> None:
    need(name)
    done = subprocess.run([sys.executable, SCRIPTS[name]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3


def test_llava_next(capsys: pytest.CaptureFixture[str]) -> None:
    main = script("llava_next").main
    [image] = main(["--keep", "12", "--device", "cpu"]).report.images
    assert set(image.kept) == {12}
    assert image.tokens > 4 * 12
    capsys.readouterr()
    assert not main(["--keep", "1.0", "--device", "cpu"]).ledger.dropped
    answers = [line.split(" s ", 1)[1] for line in capsys.readouterr().out.splitlines()[:2]]
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", "random", "resize", "--keeps", "1.0", "0.25", "--limit", "12", "--out", str(tmp_path)]
    main = script("sweep_qwen").main
    lines = {line.method: line for line in main(arguments)}
    assert set(lines) == {"random 1.0", "random 0.25", "resize 1.0", "resize 0.25"}
    assert lines["random 1.0"].flips.agreement.value == 1  # every answer is the stock model's
    assert (lines["random 1.0"].tokens, lines["random 0.25"].tokens) == (81, 20)
    table = capsys.readouterr().out
    assert main(arguments) == list(lines.values())  # what is answered is not asked again
    assert capsys.readouterr().out == table


def test_lora() -> None:
    pytest.importorskip("peft")
    lora = script("lora")
    asked = lora.questions("heldout", 8)
    tiny = load_model("tiny", torch.device("cpu"))
    labels = lora.labelled(tiny, asked)["labels"]
    learned = [tiny.processor.decode(row[row != -100]) for row in labels]
    assert learned == [f"{answer} </s>" for *_, answer in asked]
    (before, _), (after, right) = lora.main(["--steps", "10", "--limit", "32", "--device", "cpu"])
    assert after < before
    assert right > 0.4  # of stock models, those that see no picture have 27 % right


def test_custom_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    compression = script("custom_recipe").main(["--out", str(file), "--keep", "0.25", "--device", "cpu"])
    assert visiontok.Recipe.load(file) == compression.recipe
    [image] = compression.report.images
    assert image.average == 0.25 * 144
    assert image.kept[0] == 5 * image.kept[-1]


def test_custom_scorer() -> None:
    said = script("custom_scorer").main(["--keep", "1.0", "--device", "cpu"])
    assert set(said) == {"right", "cls_topk", "FILE.py:Rare", "rarity=3"}
    assert said["cls_topk"] == said["FILE.py:Rare"] == said["rarity=3"] == said["right"]


def test_the_custom_scorer_without_rarity_is_attention_alone() -> None:
    model, processor = visiontok.demo.load()
    picture, questions = visiontok.demo.scene()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].text}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture, text=text, return_tensors="pt")

    def alive(method: object) -> torch.Tensor:
        return visiontok.compress_inputs(model, inputs, method, keep=20).ledger.alive(0)

    rare = script("custom_scorer").Rare
    assert torch.equal(alive(rare(rarity=0.0)), alive(visiontok.recipe("cls_topk", layer=-1)))
    assert not torch.equal(alive(rare(rarity=9.0)), alive(rare(rarity=0.0)))
    with pytest.raises(visiontok.errors.ConfigError, match="rarity=-1"):
        rare(rarity=-1.0)


def test_the_custom_scorer_is_certified() -> None:
    budget = visiontok.Budget.parse("0.4")
    found = matrix.check(f"{SCRIPTS['custom_scorer']}:Rare", ("llava", "qwen2_5_vl"), keep=budget, options={})
    assert found.ok


def test_timm(capsys: pytest.CaptureFixture[str]) -> None:
    need("timm_tome")
    (half, some), (few, less) = script("timm_tome").main(["--keeps", "0.5", "0.25", "--device", "cpu"])
    assert (half, few) == (98, 49)  # of 14 x 14 patches
    assert 1 > some > less > 0


def test_documents(capsys: pytest.CaptureFixture[str]) -> None:
    need("documents")
    whole, exact, close, both = script("documents").main(["--side", "192", "--device", "cpu"]).values()
    units = (192 // 16) ** 2
    assert whole.account.patches == exact.account.patches_stock == 4 * units
    assert exact.account.patches == 4 * exact.images[0].kept[0] < 2 * units  # most of the page is blank
    assert close.account.patches <= exact.account.patches
    assert both.images[0].kept[0] == round(0.1 * units) < exact.images[0].kept[0]
    assert both.account.patches == exact.account.patches
