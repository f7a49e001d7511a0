"""The embedded models: prompts as in training, weights that answer, training that can be stopped at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from visiontok.demo import measure, packing, questions, raster, scenes, train
from visiontok.demo import model as vlm
from visiontok.demo.architectures import ARCHITECTURES

from visiontok import demo, run

MODELS = demo.models()


def _chat(pictures: list[Image.Image], turns: list[questions.Question]) -> list[dict[str, Any]]:
    """A chat about pictures, up to the last question."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.text}]
        content = content if messages else [*({"type": "image", "image": picture} for picture in pictures), *content]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages[:-1]


def _inputs(processor: Any, chats: list[Any]) -> Any:
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )


def _ask(text: str, picture: Image.Image) -> list[dict[str, Any]]:
    return _chat([picture], [questions.Question(text, "", "")])


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def untrained(request, tmp_path_factory):
    """Architecture, model and processor with random weights, written and read."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[request.param]()
    model = architecture.build()
    architecture.initialise(model, raster.paint(scenes.lay_out(scenes.seeds("train", range(32)))).pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no bias may stay zero
    folder = tmp_path_factory.mktemp(request.param)
    vlm.save(architecture, model, folder)
    return architecture, *vlm.load(folder)


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    """Name, architecture, model and processor of every embedded model."""
    model, processor = demo.load(request.param)
    return request.param, ARCHITECTURES[model.config.model_type](), model, processor


# ------------------------------------------------------------------------------------------------------------ scenes


def test_scene_gives_one_question_of_each_kind():
    picture, row = demo.scene(5)
    again, same = demo.scene(5)
    assert (picture.mode, picture.size) == ("RGB", (scenes.SIDE, scenes.SIDE))
    assert picture.tobytes() == again.tobytes()
    assert row == same
    assert row[0].kind == "read"
    kinds = [question.kind for question in row]
    assert len(set(kinds)) == len(kinds) >= len(questions.USUAL) - 1
    assert demo.scene(6)[0].tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match="seed must be between 0 and"):
        demo.scene(-1)


# ----------------------------------------------------------------------------------------------- tokenizer, processor


def test_users_may_write_as_they_like(untrained):
    architecture, _, processor = untrained
    tokenizer = processor.tokenizer
    plain = tokenizer("is there a orange circle in the center of the picture").input_ids
    assert tokenizer.convert_ids_to_tokens(plain)[:4] == ["<s>", "is", "there", "a"]
    assert tokenizer("Is there an ORANGE circle in the centre of the picture?").input_ids == plain
    assert tokenizer("what colour").input_ids == tokenizer("what color").input_ids
    assert tokenizer('  what color is\n"the" circle ?!').input_ids == tokenizer("what color is the circle").input_ids
    assert tokenizer("what flavour is the circle").input_ids.count(tokenizer.unk_token_id) == 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(architecture.token_id)))


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (144, 144)), ("RGBA", (311, 97)), ("L", (20, 500)), ("P", (64, 64))]
)
def test_any_picture_is_taken(untrained, mode, size):
    architecture, _, processor = untrained
    inputs = _inputs(processor, [_ask("What shape is the red object?", Image.new(mode, size))])
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    visual = tokens.count("<image>")
    if architecture.name == "llava" or size == (144, 144):
        assert visual == (scenes.SIDE // architecture.cell) ** 2
    else:
        assert 9 <= visual <= (2 * scenes.SIDE // architecture.cell) ** 2
    rest = [token for token in tokens if token != "<image>" and token not in architecture.specials]
    assert rest == ["<s>", "<user>", "what", "shape", "is", "the", "red", "object", "<assistant>"]


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_packed_questions_are_separate_chats(untrained, pictures):
    """Logits of many conversations in one forward equal those of the stock processor and model, chat by chat."""
    architecture, model, processor = untrained
    layout = scenes.lay_out(scenes.seeds("turns", range(4)))
    pixels = raster.paint(layout).pixels
    asked, talk = questions.ask_pairs(layout), None
    if pictures < 2:
        asked, talk = questions.converse(questions.ask(layout), layout.seeds, 3, percent=60)
    blind = None
    features = architecture.see(model, pixels)[0].unflatten(0, (-1, max(1, pictures)))
    if pictures == 0:  # with the picture in the prompt of others
        blind = torch.ones_like(asked.form, dtype=torch.bool)
    packed = packing.pack(asked, talk, blind)
    with torch.inference_mode():
        logits, labelled = packing.answer_logits(model, architecture.prefix(model, features), packed)
    worst, compared = 0.0, 0
    labels = packed.labels[labelled]
    places = labelled.nonzero()
    for row, said in enumerate(asked.rows()):
        index = [i for i, form in enumerate(asked.form[row].tolist()) if form >= 0]
        talks = index if talk is None else talk[row].tolist()
        images = [Image.fromarray(one.numpy()) for one in pixels[row * pictures : (row + 1) * pictures]]
        for number, question in enumerate(index):
            turns = [said[k] for k in range(number + 1) if talk is None or talks[index[k]] == talks[question]]
            turns = turns[-1:] if talk is None else turns
            inputs = _inputs(processor, [_chat(images, turns)])
            mine = [i for i, (b, t) in enumerate(places.tolist()) if b == row and packed.question[b, t] == question]
            wanted = [*processor.tokenizer(turns[-1].answer, add_special_tokens=False).input_ids, vlm.TOKEN_ID["</s>"]]
            assert labels[mine].tolist() == wanted
            with torch.inference_mode():
                alone = model(**inputs).logits[0, -1]
            worst = max(worst, (logits[mine[0]] - alone).abs().max().item())
            compared += 1
    assert compared > 6
    assert worst < 2e-5


# ------------------------------------------------------------------------------------------------------- the weights


def test_load_needs_no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("the network is off limits")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, processor = demo.load()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"


def test_missing_weights_name_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"visiontok\.demo\.train"):
        vlm.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedded model 'huge'; there are: llava"):
        demo.load("huge")


def test_generate_answers_as_the_packed_forward_and_stops(trained):
    _, architecture, model, processor = trained
    sheet = next(measure.exam("heldout", 3))
    right = measure.mark(architecture, model, sheet)
    chats, wanted, packed = [], [], []
    for row, said in enumerate(sheet.questions.rows()):
        picture = Image.fromarray(sheet.pixels[row].numpy())
        chats += [_ask(question.text, picture) for question in said]
        wanted += [question.answer for question in said]
        packed += right[row][sheet.questions.form[row] >= 0].tolist()
    inputs = _inputs(processor, chats)
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    ends = (output == model.generation_config.eos_token_id).any(1)
    answers = processor.batch_decode(output, skip_special_tokens=True)
    assert ends.float().mean() > 0.9
    assert [one == wish for one, wish in zip(answers, wanted, strict=True)] == packed


def test_the_picture_is_what_answers(trained):
    """What is recorded of 320 scenes holds of the first 64."""
    name, architecture, model, _ = trained
    recorded = demo.measured(name)["splits"]["heldout"]
    now = measure.accuracy(architecture, model, scenes=64)
    assert abs(now["full"]["all"] - recorded["full"]["all"]) < 5
    assert recorded["full"]["all"] > recorded["prior"]["all"] + 25
    assert abs(recorded["blind"]["all"] - recorded["prior"]["all"]) < 5
    for kind, number in recorded["questions"].items():
        assert recorded["full"][kind] > recorded["prior"][kind], kind
        spread = 196 * (recorded["prior"][kind] * (100 - recorded["prior"][kind]) / 1e4 / number) ** 0.5
        assert recorded["blind"][kind] < recorded["prior"][kind] + max(5, spread), kind


def test_the_weights_are_small_and_say_where_they_come_from(trained):
    name, architecture, model, _ = trained
    assert (demo.WEIGHTS / name / "model.safetensors").stat().st_size < 4_000_000
    recorded = demo.measured(name)
    assert set(recorded["splits"]) == set(measure.EXAMS)
    assert recorded["architecture"] == architecture.name
    assert recorded["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert recorded["commit"] != "unknown"
    assert "visiontok.demo.train" in recorded["command"]


@pytest.mark.parametrize("path", sorted(demo.examples()), ids=lambda path: path.stem)
def test_pictures_that_the_generator_did_not_draw(path):
    for text, answer in demo.examples()[path]:
        result = run.run_job(image=str(path), ask=text, keep=0.5, max_new_tokens=4, repeats=1)
        assert result.stock.answer == answer, text


# ---------------------------------------------------------------------------------------------------------- training

SMALL = {"patch_steps": 2, "patch_batch": 2, "joint_steps": 10, "joint_batch": 2}


def _same(one: train.Trainer, other: train.Trainer) -> bool:
    states = one.learner.state_dict(), other.learner.state_dict()
    return all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_interrupted_run_ends_with_the_same_weights(architecture, tmp_path):
    plan = train.Plan(architecture=architecture, **SMALL)
    whole = train.Trainer(plan, tmp_path / "whole", Accelerator())
    while whole.step < plan.steps:
        whole.advance()
    part = train.Trainer(plan, tmp_path / "parts", Accelerator())
    while part.step < plan.steps:
        part.log([part.advance()])
        if part.step in (1, 2, 7):
            part.save()
            part = train.Trainer(plan, tmp_path / "parts", Accelerator())
    assert _same(whole, part)
    part.save()
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, plan.steps + 1))
    with pytest.raises(ValueError, match="another plan"):
        train.Trainer(train.Plan(), tmp_path / "parts", Accelerator())


def test_only_a_run_that_is_done_may_be_prolonged(tmp_path):
    plan = train.Plan(**SMALL)
    longer = replace(plan, joint_steps=plan.joint_steps + 2)
    run = train.Trainer(plan, tmp_path, Accelerator())
    run.advance()
    run.save()
    with pytest.raises(ValueError, match="another plan"):
        train.Trainer(longer, tmp_path, Accelerator())
    while run.step < plan.steps:
        run.advance()
    run.save()
    with pytest.raises(ValueError, match="another plan"):
        train.Trainer(replace(longer, seed=1), tmp_path, Accelerator())
    more = train.Trainer(longer, tmp_path, Accelerator())
    assert (more.step, more.plans) == (plan.steps, [plan, longer])
    more.advance()
    more.save()
    with pytest.raises(ValueError, match="another plan"):  # what was prolonged is not taken up as it was
        train.Trainer(plan, tmp_path, Accelerator())
    again = train.Trainer(longer, tmp_path, Accelerator())
    assert (again.step, again.plans) == (plan.steps + 1, [plan, longer])
    assert [train.command(one).split("--joint-steps=")[1].split()[0] for one in again.plans] == [
        str(plan.joint_steps),
        str(longer.joint_steps),
    ]


def test_a_killed_run_goes_on(tmp_path):
    """kill -9 in the middle, then the same command: the checkpoint is whole and the run ends."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "joint_steps": 400}.items()]
    command = [sys.executable, "-m", "visiontok.demo.train", "--out", str(tmp_path), "--save-every", "0", *options]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    reached = torch.load(checkpoint, weights_only=True)["step"]
    plan = train.Plan(**{**SMALL, "joint_steps": 400})
    trainer = train.Trainer(plan, tmp_path, Accelerator())
    assert 0 < trainer.step == reached < plan.steps
    trainer.advance()
    shutil.rmtree(tmp_path)


def test_training_teaches(tmp_path):
    plan = train.Plan(patch_steps=8, patch_batch=4, patch_rate=2e-2)
    trainer = train.Trainer(plan, tmp_path, Accelerator())
    losses = [trainer.advance()["patch_loss"].item() for _ in range(plan.patch_steps)]
    assert np.mean(losses[-3:]) < 0.96 * np.mean(losses[:3])


def test_no_scene_is_shown_twice(tmp_path, monkeypatch):
    shown: list[int] = []
    draw = train.lay_out
    monkeypatch.setattr(train, "lay_out", lambda seeds, style: shown.extend(seeds.tolist()) or draw(seeds, style))
    for seed in (0, 1):
        trainer = train.Trainer(train.Plan(seed=seed, **SMALL), Path(tmp_path / str(seed)), Accelerator())
        del shown[-96:]  # for the statistics of the patch embedding
        for _ in range(trainer.plan.steps):
            trainer.advance()
    assert len(shown) == len(set(shown)) == 2 * (2 * 2 + 10 * 2)
    assert all(seed in scenes.SPLITS["train"] for seed in shown)
