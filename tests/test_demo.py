"""The embedded model: same seed, same world; questions with one right answer; weights that give it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from visiontok.demo import measure, scenes, train
from visiontok.demo import model as vlm
from visiontok.demo.packing import question_ids
from visiontok.demo.scenes import COLOR_NAMES, GLYPHS, KINDS, PLURALS, SHAPES, SIZE, SPLITS, questions, render

from visiontok import demo

# Of pixels and questions of 12 scenes. A change here is a new version of every number measured on these scenes.
WORLD = "1938971df08cc7835db2c45479dc744c2381758e688c208e51ee20db1a01a2ae"


@pytest.fixture(scope="module")
def heldout():
    return [render("heldout", index) for index in range(48)]


@pytest.fixture(scope="module")
def asked(heldout):
    return [questions(scene, 12) for scene in heldout]


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


# ------------------------------------------------------------------------------------------------------------ scenes


def test_a_seed_gives_the_same_world_everywhere():
    digest = hashlib.sha256()
    for split, index in itertools.product(SPLITS, range(4)):
        scene = render(split, index)
        digest.update(scene.pixels.tobytes())
        digest.update(repr(questions(scene, 12)).encode())
    assert digest.hexdigest() == WORLD


def test_splits_share_no_seed_and_no_picture():
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start
    pictures = {render(split, index).pixels.tobytes() for split in SPLITS for index in range(20)}
    assert len(pictures) == 20 * len(SPLITS)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1), ("train", 2**40)])
def test_a_scene_outside_the_splits_is_refused(split, index):
    with pytest.raises(ValueError, match="must be"):
        render(split, index)


def test_objects_keep_apart_and_glyphs_are_legible(heldout):
    smallest = min(height for height, _ in scenes.GLYPH_SIZES) + 2, min(width for _, width in scenes.GLYPH_SIZES) + 2
    for scene in heldout:
        for owner, thing in enumerate(scene.things, start=1):
            assert (scene.thing_map == owner).sum() > 60
            if thing.glyph is None:
                continue
            rows, columns = np.nonzero(scene.glyph_map == owner)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert height >= smallest[0]
            assert width >= (smallest[1] if GLYPHS[thing.glyph] not in "1j" else 8)
            grey = scene.pixels[rows, columns].mean(-1)
            assert np.percentile(grey, 85) - np.percentile(grey, 15) > 120
            distance = min(
                (np.hypot(thing.x - other.x, thing.y - other.y) for other in scene.things if other is not thing),
                default=SIZE,
            )
            assert distance > thing.radius + 7


def test_no_two_glyphs_look_alike():
    bodies = [scenes._glyph_stencil(glyph, 0)[0] for glyph in range(len(GLYPHS))]
    for one, other in itertools.combinations(bodies, 2):
        assert (one != other).sum() >= 12  # three cells of the 5x7 grid


# --------------------------------------------------------------------------------------------------------- questions


def _answers(scene: scenes.Scene, text: str) -> set[str]:
    """All answers a reader who sees the objects could give."""
    things = scene.things

    def named(words: str) -> list[scenes.Thing]:
        return [thing for thing in things if thing.name == words]

    if found := re.fullmatch(r"what color is the (\w+)\?", text):
        return {COLOR_NAMES[thing.color] for thing in things if SHAPES[thing.shape] == found[1]}
    if found := re.fullmatch(r"what shape is the (\w+) object\?", text):
        return {SHAPES[thing.shape] for thing in things if COLOR_NAMES[thing.color] == found[1]}
    if found := re.fullmatch(r"is there an? (\w+ \w+)\?", text):
        return {"yes" if named(found[1]) else "no"}
    if text == "how many objects are there?":
        return {str(len(things))}
    if found := re.fullmatch(r"how many (\w+) objects are there\?", text):
        return {str(sum(COLOR_NAMES[thing.color] == found[1] for thing in things))}
    if found := re.fullmatch(r"how many (\w+) are there\?", text):
        return {str(sum(PLURALS[thing.shape] == found[1] for thing in things))}
    if found := re.fullmatch(r"is the (\w+ \w+) in the (left|top) or (right|bottom) half\?", text):
        places = [thing.x if found[2] == "left" else thing.y for thing in named(found[1])]
        return {found[2] if place < SIZE / 2 else found[3] for place in places}
    if found := re.fullmatch(r"is the (\w+ \w+) left or right of the (\w+ \w+)\?", text):
        pairs = itertools.product(named(found[1]), named(found[2]))
        return {"left" if one.x < other.x else "right" for one, other in pairs}
    if found := re.fullmatch(r"is the (\w+ \w+) above or below the (\w+ \w+)\?", text):
        pairs = itertools.product(named(found[1]), named(found[2]))
        return {"above" if one.y < other.y else "below" for one, other in pairs}
    if found := re.fullmatch(r"what (digit|letter) is (on|next to) the (\w+ \w+)\?", text):
        (thing,) = named(found[3])
        assert (found[1] == "digit") == GLYPHS[thing.glyph].isdigit()
        assert (found[2] == "on") == thing.glyph_is_on
        return {GLYPHS[thing.glyph]}
    assert text == "what is the background pattern?"
    return {scenes.BACKGROUNDS[scene.background]}


def test_every_question_has_exactly_one_answer(heldout, asked):
    for scene, row in zip(heldout, asked, strict=True):
        assert len({question.text for question in row}) == len(row) > 8
        for question in row:
            assert _answers(scene, question.text) == {question.answer}, question


def test_answers_are_balanced():
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for index in range(250):
        for question in questions(render("heldout", index), 12):
            answers[question.kind][question.answer] += 1
    for kind, least, most in (("count", 0.08, 0.20), ("exist", 0.45, 0.55), ("background", 0.18, 0.32)):
        total = answers[kind].total()
        assert all(least < times / total < most for times in answers[kind].values()), (kind, answers[kind])
    assert sorted(answers["count"]) == [str(number) for number in range(scenes.MAX_COUNT + 1)]
    assert set(answers["read"]) == set(GLYPHS)
    share = {kind: answers[kind].total() / sum(map(Counter.total, answers.values())) for kind in KINDS}
    assert all(0.05 < value < 0.25 for value in share.values()), share


def test_scene_gives_one_question_of_each_kind():
    picture, row = demo.scene(5)
    again, same = demo.scene(5)
    assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
    assert picture.tobytes() == again.tobytes()
    assert row == same
    assert sorted(question.kind for question in row) == sorted(KINDS)
    assert row[0].kind == "read"
    assert demo.scene(6)[0].tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match="seed must be between 0 and"):
        demo.scene(-1)


# ----------------------------------------------------------------------------------------------- tokenizer, processor


def test_generated_questions_are_tokenised_as_in_training(asked):
    tokenizer = vlm.build_tokenizer()
    for question in itertools.chain.from_iterable(asked):
        assert tokenizer(question.text, add_special_tokens=False).input_ids == question_ids(question)
        assert tokenizer(question.answer, add_special_tokens=False).input_ids == [vlm.TOKEN_ID[question.answer]]


def test_users_may_write_as_they_like():
    tokenizer = vlm.build_tokenizer()
    plain = tokenizer("what color is the circle").input_ids
    assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", "what", "color", "is", "the", "circle"]
    assert tokenizer("What COLOUR is the circle?").input_ids == plain
    assert tokenizer('  what color is\n"the" circle ?!').input_ids == plain
    assert tokenizer("what flavour is the circle").input_ids.count(tokenizer.unk_token_id) == 1


def _chat(text: str, picture: Image.Image) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def _inputs(processor, chats):
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (144, 144)), ("RGBA", (311, 97)), ("L", (20, 500)), ("P", (64, 64))]
)
def test_any_picture_becomes_144_tokens(loaded, mode, size):
    _, processor = loaded
    inputs = _inputs(processor, _chat("What shape is the red object?", Image.new(mode, size)))
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    text = ["what", "shape", "is", "the", "red", "object"]
    assert tokens == ["<s>", "<user>", *["<image>"] * vlm.TOKENS, *text, "<assistant>"]


def test_a_chat_may_go_on(loaded):
    _, processor = loaded
    chat = [
        *_chat("how many stars are there?", Image.new("RGB", (9, 9))),
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": "is there a red star?"},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == ("<user><image>how many stars are there?<assistant>2</s><user>is there a red star?<assistant>")


# ------------------------------------------------------------------------------------------------------- the weights


def test_load_needs_no_network(monkeypatch):
    def refuse(*_):
        raise OSError("the network is off limits")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, processor = demo.load()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"


def test_auto_classes_read_the_same_folder(loaded):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = loaded
    again = AutoModelForImageTextToText.from_pretrained(demo.WEIGHTS, dtype=torch.float32)
    assert type(again) is type(model)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert type(AutoProcessor.from_pretrained(demo.WEIGHTS)) is type(processor)


def test_missing_weights_name_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"visiontok\.demo\.train"):
        vlm.load(tmp_path)


def test_generate_answers_as_the_packed_forward_and_stops(loaded, heldout, asked):
    model, processor = loaded
    chats = [
        _chat(question.text, Image.fromarray(scene.pixels))
        for scene, row in zip(heldout[:2], asked, strict=False)
        for question in row
    ]
    inputs = _inputs(processor, chats)
    output = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert output.shape[1] == 2  # every answer is one word and the end of the sequence
    assert set(output[:, 1].tolist()) == {model.generation_config.eos_token_id}
    answers = processor.batch_decode(output, skip_special_tokens=True)
    wanted = [question.answer for row in asked[:2] for question in row]
    packed = list(itertools.chain.from_iterable(measure.predict(model, heldout[:2], asked[:2])))
    assert [answer == wish for answer, wish in zip(answers, wanted, strict=True)] == packed
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=4)[:, -2:])


def test_the_picture_is_what_answers(loaded):
    """Bounds a few points below what `weights/accuracy.json` says of 160 scenes, for 48 of them."""
    model, _ = loaded
    recorded = demo.measured()
    now = measure.accuracy(model, scenes=48)
    assert now["full"]["all"] >= 75
    assert abs(now["full"]["all"] - recorded["full"]["all"]) < 6
    assert max(now["blind"]["all"], now["swapped"]["all"]) < 45
    for kind in KINDS:
        assert now["full"][kind] > now["majority"][kind] + 10, kind
        assert recorded["full"][kind] > recorded["blind"][kind] + 10, kind


def test_the_weights_are_small_and_say_where_they_come_from():
    assert (demo.WEIGHTS / "model.safetensors").stat().st_size < 4_000_000
    recorded = demo.measured()
    assert recorded["steps"] == recorded["steps_planned"] == train.Plan().steps
    assert recorded["commit"] != "unknown"
    assert "visiontok.demo.train" in recorded["command"]


# ---------------------------------------------------------------------------------------------------------- training


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    plan = train.Plan(patch_steps=1, patch_batch=2, joint_steps=2, joint_batch=2, per_picture=4)
    whole = train.Trainer(plan, tmp_path / "whole")
    losses = [whole.advance() for _ in range(plan.steps)]
    again = []
    for _ in range(plan.steps):
        part = train.Trainer(plan, tmp_path / "parts")
        again.append(part.advance())
        part.log(again[-1:])
        part.save()
    assert again == losses
    assert part.step == plan.steps
    for one, other in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(one, other)
    steps = [json.loads(line)["step"] for line in Path(tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    with pytest.raises(ValueError, match="another plan"):
        train.Trainer(train.Plan(), tmp_path / "parts")


def test_training_teaches(tmp_path):
    plan = train.Plan(patch_steps=6, patch_batch=2, patch_rate=2e-2)
    trainer = train.Trainer(plan, tmp_path)
    losses = [trainer.advance()["patch_loss"] for _ in range(plan.patch_steps)]
    assert np.mean(losses[-3:]) < 0.96 * np.mean(losses[:3])
