"""visiontok as a model of lmms-eval: the same answers as `visiontok eval`, offline, from the command line of either.

Runs where lmms-eval is installed: `tests/lmms-environment` makes such a place.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from visiontok.demo import scene
from visiontok.eval.task import find

from visiontok.errors import ConfigError, UnsupportedError

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: tests/lmms-environment runs these tests")
from lmms_eval.api.instance import Instance
from visiontok.eval.plugins.lmms import Visiontok

pytestmark = pytest.mark.slow

ANSWERS = "answers-0-of-1.jsonl"
METADATA = {"task": "task", "repeats": 1}
QUESTIONS, BATCH = 24, 8
TASK = """\
task: visiontok_scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function read.pictures
doc_to_text: !function read.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
READ = """\
from PIL import Image

def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
RECIPE = {"stages": [{"kind": "cut", "layer": 1, "method": "fastv", "keep": 0.05}]}
CELLS = {  # model arguments and the folder that `visiontok eval` makes
    "method=full": "full",
    "method=divprune,keep=0.05": "divprune-0.05",
    f"recipe={json.dumps(RECIPE)}": "recipe-0.05",
}


def command(*arguments: str | Path, folder: Path, **environment: str) -> None:
    """A command of this environment, without network."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=offline(folder) | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def offline(folder: Path) -> dict[str, str]:
    hub = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return {**os.environ, **hub, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first questions of `scenes` as a task of lmms-eval, a JSON file with pictures beside it."""
    place = tmp_path_factory.mktemp("lmms")
    with open(place / "questions.jsonl", "w") as file:
        for number, item in enumerate(find("scenes").items(None, "llava", QUESTIONS)):
            pictures = [str(place / f"{number}-{nth}.png") for nth in range(len(item.images))]
            for path, image in zip(pictures, item.images, strict=True):
                image.open().save(path)
            doc = {"pictures": pictures, "question": item.prompt, "answer": item.target["answers"][0]}
            file.write(json.dumps(doc) + "\n")
    (place / "visiontok_scenes.yaml").write_text(TASK.format(folder=place))
    (place / "read.py").write_text(READ)
    return place


@pytest.fixture(scope="module")
def own(folder: Path) -> dict[str, list[str]]:
    """What `visiontok eval` answers to the same questions."""
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    command(
        *(Path(sys.executable).with_name("visiontok"), "eval", "--task", "scenes", "--limit", str(QUESTIONS)),
        *("--method", "full", "--method", "divprune", "--method", "recipe.json", "--keep", "0.05"),
        *("--batch", str(BATCH), "--device", "cpu", "--out", "own"),
        folder=folder,
    )
    found = {
        arguments: [json.loads(line)["answer"] for line in (folder / "own/scenes" / cell / ANSWERS).open()]
        for arguments, cell in CELLS.items()
    }
    assert len({tuple(answers) for answers in found.values()}) == len(CELLS)  # so equality below says something
    return found


def lmms_eval(
    folder: Path, model: str, arguments: str, *more: str, launch: Sequence[str] = (), **environment: str
) -> list[str]:
    """What lmms-eval wrote down, in the order of the questions."""
    command(
        *(*launch, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", "visiontok_scenes"),
        *("--include_path", str(folder), "--batch_size", str(BATCH), "--output_path", "out", "--log_samples", *more),
        folder=folder,
        **environment,
    )
    (file,) = (folder / "out").rglob("*_samples_visiontok_scenes.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    for line in found:
        (counts,) = line["token_counts"]
        assert counts["input_tokens"] > 144
        assert 1 <= counts["output_tokens"] <= 5
    return [line["filtered_resps"] for line in sorted(found, key=lambda line: line["doc_id"])]


@pytest.mark.parametrize("arguments", CELLS)
def test_answers_are_those_of_our_own_runner(folder: Path, own: dict[str, list[str]], arguments: str) -> None:
    """With one response cache for all of them, which must know recipes apart."""
    more = ("--device", "cpu", "--use_cache", "cached")
    assert lmms_eval(folder, "visiontok", f"pretrained=tiny,{arguments}", *more) == own[arguments]


def test_several_processes_share_the_questions(folder: Path, own: dict[str, list[str]]) -> None:
    arguments = "method=divprune,keep=0.05"
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0")
    assert lmms_eval(folder, "visiontok", f"pretrained=tiny,{arguments}", launch=launch) == own[arguments]


def test_its_openai_client_gets_the_same_from_our_server(folder: Path, own: dict[str, list[str]]) -> None:
    arguments = "method=divprune,keep=0.05"
    serve = ("serve", "--model", "tiny", "--method", "divprune", "--keep", "0.05", "--port", "0", "--device", "cpu")
    server = subprocess.Popen(
        [Path(sys.executable).with_name("visiontok"), *serve], env=offline(folder), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/v1", server.stdout.readline())
        assert address
        model = f"model_version=tiny,base_url={address[0]},num_concurrent=2,adaptive_concurrency=false"
        found = lmms_eval(folder, "openai", model, OPENAI_API_KEY="none")
    finally:
        server.terminate()
        server.wait()
    assert found == own[arguments]


# ------------------------------------------------------------------------------------------------ in this process


def model(**arguments: Any) -> Visiontok:
    return Visiontok(**{"pretrained": "tiny", "method": "full", "device": "cpu"} | arguments)


def ask(one: Visiontok, *messages: Any, split: str = "test", **terms: Any) -> list[str]:
    """The answers to conversations, all asked in the same terms."""
    one.task_dict = {"task": {split: [list(message) for message in messages]}}
    requests = [
        Instance(
            "generate_until", ("", lambda doc: doc, terms, number, "task", split), 0, METADATA | {"doc_id": number}
        )
        for number in range(len(messages))
    ]
    return [found.text for found in one.generate_until(requests)]


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return {"role": role, "content": content}


def test_conversations_and_stops() -> None:
    picture = scene(3)[0]
    question, answer = next((one.text, one.answer) for one in scene(3)[1] if len(one.answer) > 2)
    one = model()
    first, second = ask(
        one,
        [turn(picture, question)],
        [turn(picture, question), turn(answer, role="assistant"), turn(question)],
        max_new_tokens=5,
    )
    assert first == answer
    assert second  # another turn of a conversation
    assert ask(one, [turn(picture, question)], max_new_tokens=5, until=[answer[1:]]) == [answer[0]]
    one.clean()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pretrained": ""}, "pretrained: is missing"),
        ({"methd": "divprune"}, "methd='divprune': this model has no such argument"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"method": "divprun"}, "divprun"),
        ({"method": "recipe.json"}, "recipe.json"),
        ({"keep": 0.25}, "keep='0.25': the stock model has none"),
        ({"method": "divprune", "recipe": "{}"}, "recipe: says everything"),
        ({"method": "divprune", "options": "recipe.json"}, "options='recipe.json': is no JSON"),
        ({"method": "fastv", "options": '{"layer": 99}'}, "99"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        model(**arguments)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"temperature": 0.7}, "temperature=0.7: visiontok decodes greedily"),
        ({"do_sample": True}, "do_sample=True: visiontok decodes greedily"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_p": 0.1}, "min_p=0.1: visiontok knows no such generation argument"),
    ],
)
def test_what_it_cannot_honour_is_refused(terms: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ask(model(), [turn("hello")], **terms)


def test_likelihoods_rounds_and_videos_are_refused() -> None:
    one = model()
    with pytest.raises(UnsupportedError, match="loglikelihood"):
        one.loglikelihood([])
    with pytest.raises(UnsupportedError, match="multi_round"):
        one.generate_until_multi_round([])
    with pytest.raises(UnsupportedError, match="task test 0: has video"):
        ask(one, [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}])
