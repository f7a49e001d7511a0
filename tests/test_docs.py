"""Every block of code in the README and the documentation runs.

The Python of a page runs in order, in one namespace, with an embedded model and a question to it; names on the hub lead
to embedded models. Of a shell block, the commands of `visiontok` run. A block that is not to be run says why, in a
comment `<!-- not run: REASON -->` on the line above; its commands must be ones that the command line knows
all the same. `<!-- file: NAME -->` saves a block instead.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
import yaml

import visiontok
from visiontok import demo
from visiontok.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
HUB = {
    "llava-hf/llava-1.5-7b-hf": "tiny",
    "Qwen/Qwen2.5-VL-7B-Instruct": "tiny-qwen",
    "MODEL": "tiny",
}
SLOW = {"own-method.md", "adapters.md", "eval.md"}  # tens of seconds
OTHERS = ("./setup", "bash .ci/run", ".ci/typecheck", ".venv/bin/pytest", ".venv/bin/ruff", "pip install")
"""Commands that CI runs in steps of their own, or that belong to pip."""


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    note: str

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run:")

    @property
    def file(self) -> str | None:
        return self.note.removeprefix("file: ") if self.note.startswith("file: ") else None


def blocks(page: Path) -> list[Block]:
    return [Block(m["language"], m["code"], m["note"] or "") for m in BLOCK.finditer(page.read_text())]


def commands(code: str) -> list[list[str]]:
    """The words of every command, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


# typer's own click, or the package of that name, by its release.
Usage: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)  # what the parser raises


def parse(words: list[str]) -> None:
    """Raise what the command line would raise about names and values of options."""
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.make_context("visiontok", [], resilient_parsing=True), words)
    if command is None:
        raise Usage(f"no such command: {words[0]}")
    command.make_context(name, rest)


def embedded(name: str) -> str:
    return HUB.get(name, name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that examples speak of, where names on the hub lead to embedded models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    picture, questions = demo.scene()
    (tmp_path / "pictures").mkdir()
    for file in ("cat.jpg", "pictures/0.png", "pictures/1.png"):
        picture.save(tmp_path / file)
    for number in (0, 1):
        (tmp_path / f"pictures/{number}.txt").write_text(questions[number].text)
    found: dict[Any, Any] = {
        name: demo.load({"tiny": "llava", "tiny-qwen": "qwen3_vl"}[model]) for name, model in HUB.items()
    }
    for loader, index in ((transformers.AutoModelForImageTextToText, 0), (transformers.AutoProcessor, 1)):
        stock = loader.from_pretrained

        def load(name, *args, stock=stock, index=index, **kwargs):
            return found[name][index] if name in found else stock(name, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", load)
    return tmp_path


def namespace(place: Path) -> dict[str, object]:
    model, processor = demo.load()
    picture, questions = demo.scene()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].text}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture, text=text, return_tensors="pt")
    return {"visiontok": visiontok, "model": model, "processor": processor, "inputs": inputs, "image": picture}


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=pytest.mark.slow if p.name in SLOW else ()) for p in PAGES]
)
def test_the_examples_of_a_page_run(page, place):
    run(page, place)


def run(page: Path, place: Path) -> None:
    names: dict[str, object] | None = None
    for block in blocks(page):
        if block.file is not None:
            (place / block.file).write_text(block.code)
        elif block.language == "python" and block.runs:
            names = names or namespace(place)
            exec(compile(block.code, page.name, "exec"), names)
        elif block.language == "bash":
            for words in commands(block.code):
                if words[0].endswith("visiontok"):
                    words = [embedded(word) for word in words[1:]]
                    parse(words)
                    if block.runs:
                        assert not app(words, standalone_mode=False), f"{page.name}: {shlex.join(words)} failed"
                else:
                    line = shlex.join(words)
                    assert line.startswith(OTHERS) or not block.runs, f"{page.name}: nothing runs {line!r}"
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "yaml":
            yaml.safe_load(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_says_why(page):
    for block in blocks(page):
        assert block.runs or len(block.note) > 25, f"{page.name}: {block.note}"
        assert block.language in ("", "python", "bash", "toml", "yaml", "text", "json"), (
            f"{page.name}: {block.language}"
        )


FAULTY = """<!-- file: none.py -->
```python
def none(ctx):
    return ctx.valid
```
```bash
visiontok check none.py:none --arch llava
```
"""


def test_a_wrong_example_is_caught(tmp_path, place):
    page = tmp_path / "page.md"
    for wrong, error in (
        ("```python\nmodel.no_such_thing\n```\n", AttributeError),
        ("```bash\nvisiontok run --no-such-option\n```\n", Usage),
        ("<!-- not run: it would take the whole of a day -->\n```bash\nvisiontok nothing\n```\n", Usage),
        ("```bash\nmake everything\n```\n", AssertionError),
        (FAULTY, AssertionError),
    ):
        page.write_text(wrong)
        with pytest.raises(error):
            run(page, place)
