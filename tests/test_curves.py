"""Pruning curves of embedded models, and the card that is made of them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from visiontok.demo import card, curves
from visiontok.demo.curves import Cell
from visiontok.demo.llava import Llava
from visiontok.demo.measure import accuracy, exam
from visiontok.demo.model import load
from visiontok.demo.questions import KINDS

import visiontok
from visiontok.conformance import zoo
from visiontok.errors import ConfigError

SMALL = ["--questions", "10", "--methods", "random", "grid", "--keeps", "1", "0.05", "--seeds", "3", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(card.WEIGHTS / "llava", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def paper():
    return curves.write_exam("heldout", 10)


@pytest.fixture(scope="module")
def prompts(loaded, paper):
    return curves.batches(loaded[1], paper, 5)


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """A small file of curves."""
    path = tmp_path_factory.mktemp("curves") / "curves.jsonl"
    curves.main([str(folder), "--out", str(path), *SMALL])
    return path


def cells_of(path):
    return [line for line in curves.read(path) if "model" in line]


# -------------------------------------------------------------------------------------------------------------- exams


@pytest.mark.parametrize(
    ("split", "kinds"), [("heldout", 10), ("composition", 8), ("detail", 2), ("pairs", 1), ("turns", 10)]
)
def test_an_exam_asks_as_much_of_every_kind_and_once_about_a_scene(split, kinds):
    asked = curves.write_exam(split, 21).asked
    number = Counter(one.question.kind for one in asked)
    assert len(number) == kinds
    assert set(number.values()) == {-(-21 // kinds)}
    assert max(Counter((one.scene, one.question.kind) for one in asked).values()) == 1
    assert [one.scene for one in asked] == sorted(one.scene for one in asked)
    assert {len(one.pictures) for one in asked} == {2 if split == "pairs" else 1}


def test_questions_come_with_their_own_pictures_and_earlier_turns():
    for split in ("pairs", "turns"):
        (sheet,) = exam(split, 4)
        asked = curves._questions(split, 4)
        for scene, row in enumerate(sheet.questions.rows()):
            talks = sheet.talk[scene][sheet.questions.form[scene] >= 0].tolist()
            for number, question in enumerate(row):
                one = next(asked)
                assert (one.question, one.scene) == (question, scene)
                first = scene * sheet.pictures
                assert [np.array_equal(p, sheet.pixels[first + i]) for i, p in enumerate(one.pictures)] == (
                    [True] * sheet.pictures
                )
                earlier = [row[i] for i in range(number) if talks[i] == talks[number]]
                texts = [turn["content"][-1]["text"] for turn in one.chat[::2]]
                assert texts == [*(before.text for before in earlier), question.text]
                assert [turn["content"] for turn in one.chat[1::2]] == [before.answer for before in earlier]
        assert next(asked, None) is None


@pytest.mark.parametrize("split", ["heldout", "pairs", "turns"])
def test_prompts_are_those_of_training_without_the_answer(loaded, split):
    processor = loaded[1]
    paper = curves.write_exam(split, 10)
    made, order = curves.batches(processor, paper, 4)
    assert sorted(order) == list(range(len(paper.asked)))
    rows = [row for inputs in made for row in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    for index, (ids, mask) in zip(order, rows, strict=True):
        one = paper.asked[index]
        assert (mask.diff() >= 0).all()  # padding is on the left
        words = " ".join(processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()]))
        turns = [turn["content"] for turn in one.chat[1::2]]
        texts = [turn["content"][-1]["text"].rstrip("?").replace(" an ", " a ") for turn in one.chat[::2]]
        picture = " ".join(["<image>"] * 144)
        said = f"<s> <user> {' and '.join([picture] * len(one.pictures))} {texts[0]} <assistant>"
        for answer, text in zip(turns, texts[1:], strict=True):
            said += f" {answer} </s> <user> {text} <assistant>"
        assert words == said


def test_the_digest_is_of_questions_answers_and_pixels(paper):
    first, *others = paper.asked
    assert curves.write_exam("heldout", 10).digest == paper.digest
    for other in (
        replace(first, question=replace(first.question, answer="nothing")),
        replace(first, pictures=(first.pictures[0].rotate(180),)),
        replace(first, chat=(*first.chat, *first.chat)),
    ):
        assert replace(paper, asked=(other, *others)).digest != paper.digest


# -------------------------------------------------------------------------------------------------------------- cells


def test_the_default_cells_are_every_prompt_method_in_every_way():
    methods = curves.prompt_methods()
    assert {"random", "grid", "cls_topk", "divprune", "idpruner", "hiprune"} <= set(methods)
    assert "fastv" not in methods
    todo = curves.cells(methods)
    assert len(todo) == len(set(todo))
    runs = sum(3 if visiontok.recipes.find(name).card.stochastic else 1 for name in methods)  # of three seeds
    # Stock; nothing dropped; plain, mass and compact at four budgets, but visiontok has masses of its own.
    assert len(todo) == 1 + len(methods) + 3 * 4 * (runs - 1) + 4
    assert not any(cell.mass and cell.positions == "compact" for cell in todo)
    assert all(cell.positions == "original" and not cell.mass and cell.seed is None for cell in todo if cell.keep == 1)


def test_answers_are_compared_word_for_word(loaded, paper):
    model, processor = loaded
    paper = replace(paper, asked=paper.asked[::-1])  # not in the order of the batches
    made, order = curves.batches(processor, paper, 5)
    words, label, _ = curves.respond(model, processor, made, Cell())
    assert label == "stock"
    said = dict(zip(order, words, strict=True))
    assert len(set(words)) > 3
    right = {0, 3, 4, 8}
    # Elsewhere the wanted answer has one letter more than the model's.
    wanted = [
        replace(one, question=replace(one.question, answer=said[i] if i in right else said[i] + "x"))
        for i, one in enumerate(paper.asked)
    ]
    line = curves.measure(curves.Sitting(model, processor, replace(paper, asked=tuple(wanted)), 5), Cell())
    assert set(np.flatnonzero(curves.from_hex(line["bits"], 10)).tolist()) == right
    number = Counter(paper.asked[i].question.kind for i in right)
    assert line["hits"] == [number[kind] for kind in paper.kinds]


def test_a_batch_answers_as_its_prompts_alone(loaded, paper, prompts):
    model, processor = loaded
    made, order = prompts
    asked = paper.asked[order[0]], paper.asked[order[4]]  # of different lengths
    alone, _ = curves.batches(processor, replace(paper, asked=asked), 1)
    for cell in (Cell("random", 0.25, seed=2), Cell("random", 0.25, positions="compact", seed=2)):
        together, apart = (curves.respond(model, processor, part, cell)[0] for part in (made[:1], alone))
        assert [together[0], together[4]] == apart


_WEIGHED = Cell("divprune", 0.03, mass=True)


@pytest.mark.parametrize(
    ("split", "cell"),
    [
        ("composition", Cell()),
        ("heldout", Cell("divprune", 0.1)),
        ("heldout", Cell("grid", 0.25, positions="compact")),
        *[(split, _WEIGHED) for split in ("heldout", "pairs", "turns")],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_questions_about_a_picture_are_answered_at_once_as_one_by_one(name, split, cell):
    model, processor = load(card.WEIGHTS / name)
    paper = curves.write_exam(split, 30)
    made, order = curves.batches(processor, paper, 30)
    words, label, tokens = curves.respond(model, processor, made, cell)
    alone = [said == paper.asked[i].question.answer for i, said in zip(order, words, strict=True)]
    parts = curves.Sitting(model, processor, paper, 30).parts
    together = curves.respond_picturewise(model, parts, cell)
    assert together[0][order].tolist() == alone
    assert 0 < sum(alone) < len(alone)
    assert together[1] == label
    assert together[2] == pytest.approx(tokens, nan_ok=True)


def test_seeds_choose_differently_picture_by_picture():
    model, processor = load(card.WEIGHTS / "llava")
    sitting = curves.Sitting(model, processor, curves.write_exam("heldout", 30), 30)
    bits = [curves.respond_picturewise(model, sitting.parts, Cell("random", 0.11, seed=seed))[0] for seed in (3, 3, 4)]
    assert (bits[0] == bits[1]).all()
    assert (bits[0] != bits[2]).any()


def test_options_stand_behind_the_name(folder, tmp_path):
    path = tmp_path / "options.jsonl"
    few = ["--questions", "10", "--keeps", "0.25", "--mass", "off", "--positions", "original"]
    curves.main([str(folder), "--out", str(path), *few, "--methods", "idpruner scorer=norm balance=0.25", "idpruner"])
    _, chosen, plain = cells_of(path)
    assert (chosen["method"], chosen["label"]) == ("idpruner scorer=norm balance=0.25", "idpruner[norm]")
    assert plain["label"] == "idpruner[cls]"
    faults = {
        "idpruner scorer=no": "--option scorer=no: this option takes",
        "idprune": "did you mean",
        "grid x=1": "grid has no such option",
    }
    for wrong, message in faults.items():
        with pytest.raises(ConfigError, match=message):
            curves.main([str(folder), "--out", str(tmp_path / "wrong.jsonl"), *few, "--methods", wrong])
    assert not (tmp_path / "wrong.jsonl").exists()


def test_only_what_the_question_leaves_alone_goes_picture_by_picture():
    assert curves.shares_pictures(Cell("divprune", 0.25))
    assert not curves.shares_pictures(Cell("fastv", 0.25))


def test_the_report_says_what_ran(loaded, prompts):
    model, processor = loaded
    for positions in curves.POSITIONS:
        _, label, tokens = curves.respond(model, processor, prompts[0][:1], Cell("idpruner", 0.25, positions=positions))
        assert (label, tokens) == ("idpruner[cls]", 36)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compact_positions_number_what_is_left(name):
    """Against the bare language model over the embeddings that are left, which counts from 0."""
    model = copy.deepcopy(zoo.build(name))
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 4  # attention that is sharp enough to tell positions apart
    rows = [zoo.batch(name, model, pad=0, images=1, only=row) for row in range(2)]
    model.generation_config.max_new_tokens = 5
    reader = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ids.tolist())
    cell = Cell("divprune", 0.25, positions="compact")
    found, _, _ = curves.respond(model, reader, [zoo.batch(name, model, images=1)], cell)
    plain, _, _ = curves.respond(model, reader, [zoo.batch(name, model, images=1)], replace(cell, positions="original"))
    wanted = []
    for row in rows:
        ids = row["input_ids"]
        alive = visiontok.compress_inputs(model, row, "divprune", keep=0.25).ledger.alive(0)[0]
        with torch.no_grad():
            pixels = {k: v for k, v in row.items() if k in ("pixel_values", "image_grid_thw")}
            features = torch.cat(list(model.get_image_features(**pixels, return_dict=True).pooler_output))
            embeds = model.get_input_embeddings()(ids.where(ids != zoo.IMAGE, 0))
            embeds[ids == zoo.IMAGE] = features.flatten(0, -2)
            left, said = embeds[:, alive], []
            for _ in range(5):
                places = torch.arange(left.shape[1])[None]
                places = places.expand(3, 1, -1) if name == "qwen2_5_vl" else places
                hidden = model.model.language_model(inputs_embeds=left, position_ids=places).last_hidden_state
                said.append(int(model.lm_head(hidden[:, -1]).argmax()))
                left = torch.cat([left, model.get_input_embeddings()(torch.tensor([said[-1:]]))], 1)
        wanted.append(said)
    assert found == wanted
    assert plain != wanted


# ----------------------------------------------------------------------------------------------------------- the file


def test_every_cell_has_its_line(measured, folder, loaded, paper, prompts):
    exams = [line for line in curves.read(measured) if "split" in line]
    assert exams == [json.loads(json.dumps(paper.line()))]
    lines = cells_of(measured)
    assert len(lines) == 1 + 2 + 3 * 3
    assert {(line["model"], line["weights"], line["exam"]) for line in lines} == {
        ("tiny", curves.weights_digest(folder), paper.digest)
    }
    for line in lines:
        bits = curves.from_hex(line["bits"], 10)
        of_kind = [bits[[one.question.kind == kind for one in paper.asked]].sum() for kind in paper.kinds]
        assert line["hits"] == of_kind
        assert line["tokens"] == {None: None, 1.0: 144, 0.05: 7}[line["keep"]]
    whole = {line["answers"] for line in lines if line["keep"] in (None, 1)}
    assert len(whole) == 1
    # What is in the file is what the public way gives.
    model, processor = loaded
    made, order = prompts
    words = []
    with visiontok.compress(model, "grid", keep=0.05, mass=True):
        for inputs in made:
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            words += processor.batch_decode(output, skip_special_tokens=True)
    said = dict(zip(order, words, strict=True))
    bits = curves.to_hex(said[i] == one.question.answer for i, one in enumerate(paper.asked))
    (line,) = [line for line in lines if (line["method"], line["mass"]) == ("grid", True)]
    assert line["bits"] == bits
    # Whole answers are compared only where they are generated one by one.
    assert all((line["answers"] is None) == (line["keep"] == 0.05) for line in lines)


def test_a_run_is_taken_up_where_it_was_torn_off(measured, folder, tmp_path, monkeypatch):
    path = tmp_path / "torn.jsonl"
    data = measured.read_bytes()
    path.write_bytes(data[:-30])
    ran = []
    real = curves.measure
    monkeypatch.setattr(curves, "measure", lambda *a: ran.append(a[-1]) or real(*a))
    curves.main([str(folder), "--out", str(path), *SMALL])
    assert ran == [Cell("grid", 0.05, positions="compact")]
    timeless = [re.sub(rb'"seconds":[\d.]+', b"", text) for text in (data, path.read_bytes())]
    assert timeless[0] == timeless[1]
    curves.main([str(folder), "--out", str(path), *SMALL])
    assert len(ran) == 1


def test_what_the_toolkit_refuses_is_written_down_with_its_reason(folder, tmp_path, capsys):
    path = tmp_path / "refused.jsonl"
    few = ["--questions", "10", "--methods", "vtw", "fastv", "--keeps", "0.25", "--mass", "off"]
    curves.main([str(folder), "--out", str(path), *few])
    stock, budgetless, cut, *compact = cells_of(path)
    assert "refused" not in stock
    assert "has no budget" in budgetless["refused"]
    assert cut["tokens"] == (144 + 3 * 36) / 4  # cut before the second of four layers
    assert all("refused" in line for line in compact)
    assert len(compact) == 2
    printed = capsys.readouterr().out
    left = [card.name for card in visiontok.methods() if card.name not in ("vtw", "fastv")]
    assert f"not measured: {', '.join(left)}; name them" in printed
    assert budgetless["refused"] in printed


def test_results_of_other_weights_or_questions_are_not_mixed(measured, folder, tmp_path):
    path = tmp_path / "curves.jsonl"
    shutil.copy(measured, path)
    with pytest.raises(ConfigError, match="other questions of split 'heldout'"):
        curves.main([str(folder), "--out", str(path), "--questions", "20"])
    other = tmp_path / "tiny"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="other weights of 'tiny'"):
        curves.main([str(other), "--out", str(path), *SMALL])
    assert path.read_bytes() == measured.read_bytes()


def test_answers_that_differ_picture_by_picture_are_an_error(folder, tmp_path, monkeypatch):
    real = curves.respond_picturewise
    monkeypatch.setattr(curves, "respond_picturewise", lambda *a: (~real(*a)[0], *real(*a)[1:]))
    with pytest.raises(RuntimeError, match="are not those to the questions one by one"):
        curves.main([str(folder), "--out", str(tmp_path / "wrong.jsonl"), *SMALL])
    assert cells_of(tmp_path / "wrong.jsonl") == []


def test_a_model_that_changes_where_nothing_is_dropped_is_an_error(folder, tmp_path, monkeypatch):
    real = curves.respond

    def wrong(model, processor, prompts, cell):
        words, *rest = real(model, processor, prompts, cell)
        return ([*words[:-1], words[-1] + "x"] if cell.keep == 1 else words, *rest)

    monkeypatch.setattr(curves, "respond", wrong)
    with pytest.raises(RuntimeError, match="not those of the stock model"):
        curves.main([str(folder), "--out", str(tmp_path / "wrong.jsonl"), *SMALL])
    assert len(cells_of(tmp_path / "wrong.jsonl")) == 1


# ----------------------------------------------------------------------------------------------------------- the card


def test_the_committed_card_is_made_of_the_committed_files():
    for path, text in card.render().items():
        assert path.read_text() == text, f"{path}: run `python -m visiontok.demo.card`"


@pytest.fixture(scope="module")
def weights(folder, loaded, tmp_path_factory):
    """Two models with curves that are known: six scenes, a question about a color and one about a position each."""
    path = tmp_path_factory.mktemp("card") / "weights"
    bits = {
        "stock": "111111111111",
        "random": ("100000000000", "101000000000"),  # 1 and 2 of 12
        "grid": "111111000000",  # 6 of 12
        "divprune": "111111111100",  # 10 of 12
    }
    lines = [{"exam": "e", "split": "heldout", "kinds": ["color", "position"], "kind": "01" * 6, "opens": "aaa0"}]
    splits = {split: accuracy(Llava(), loaded[0], split, scenes=2) for split in ("heldout", "detail", "pairs")}
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(folder, path / name)
        facts = {"command": f"train --seed {seed}", "commit": "c0ffee", "processor": "abacus", "architecture": "llava"}
        numbers = {"seed": seed, "steps_done": 9, "minutes": 8.0, "parameters": 1_700_000, "splits": splits}
        (path / name / "accuracy.json").write_text(json.dumps(facts | numbers))
        log = [
            {"step": 50, "color": 0.2},
            {"step": 100, "color": 25.0, "all": 50.0},
            {"step": 200, "color": 75.0, "all": 100.0},
        ]
        (path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        for method, answers in bits.items():
            # The second model ranks grid and divprune the other way round.
            swapped = {"grid": bits["divprune"], "divprune": bits["grid"]} if seed else {}
            answers = swapped.get(method, answers)
            for run, digits in enumerate(answers if isinstance(answers, tuple) else (answers,)):
                for mass, positions in ((False, "original"), (True, "original"), (False, "compact")):
                    cell = {
                        "model": name,
                        "weights": curves.weights_digest(path / name),
                        "exam": "e",
                        "method": method,
                        "keep": None if method == "stock" else 0.25,
                        "mass": mass,
                        "positions": positions,
                        "seed": run if method == "random" else None,
                        "label": f"{method}!",
                        "answers": None if method == "divprune" else "a1",
                        "bits": curves.to_hex([d == "1" for d in digits]),
                        "seconds": 3.0,
                    }
                    if positions == "compact":  # every question about a position goes wrong
                        cell["bits"] = curves.to_hex([d == "1" and i % 2 == 0 for i, d in enumerate(digits)])
                    if mass:
                        cell["bits"] = curves.to_hex([True] * 12)
                    if method != "stock" or (not mass and positions == "original"):
                        lines.append(cell)
    lines.append({**cell, "method": "vtw", "refused": "it has no budget"})
    (path / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_card_says_what_the_files_say(weights):
    whole = card.render(weights)[weights.parent / "README.md"]
    text = card.render(weights)[weights.parent / "pruning.md"]
    assert "In 6 of the 26 cells the questions" in " ".join(text.split())
    model = text.split("### one, pruned")[1].split("### two, pruned")[0]
    assert "All tokens: 100.0 [100.0, 100.0]" in model
    assert "| random! | 12.5 (-87.5 [" in model
    # Scene by scene, grid is ahead of random by ½ and 1½ and 2 questions; of eight sign patterns two reach 4.
    assert "| grid! | 50.0 (+37.5 [" in model
    assert re.search(r"\| grid! \| 50.0 \(\+37.5 \[.*?\] p=0.250\) \|", model)
    assert re.search(r"\| divprune! \| \*\*83.3 \(\+70.8 \[.*?\] p=0.062\)\*\* \|", model)
    kinds = model.split("Per kind of question at 25%:")[1].split("What `mass")[0]
    assert "| all tokens | 100.0 | 100.0 |" in kinds
    assert "| random! | 25.0 | 0.0 |" in kinds
    assert "| divprune! | **83.3** | **83.3** |" in kinds
    mass = model.split("What `mass=True` adds")[1].split("What compacting")[0]
    assert "| divprune! | +16.7 [" in mass
    pooled = model.split("What compacting")[1].split("The same for each")[0]
    # Of the questions about positions random answers none, grid three of six, divprune five: 8 of 18 on average.
    assert "| tokens | position | all kinds |" in pooled
    assert "| 25% | -44.4 [" in pooled
    assert "| divprune! | -83.3 [" in model.split("The same for each")[1]
    assert "| one | 25% | divprune > grid > random |" in whole
    assert "| one, two | +0.33 | +0.33 |" in whole  # two of three pairs agree
    assert "| grid | 66.7 (50.0 to 83.3) |" in whole
    assert "vtw 0.25 compact: it has no budget" in text
    for part in (whole, text):
        assert "predicts nothing about large models" in " ".join(part.split())


def test_the_card_compares_with_a_reference_and_names_who_does_not_beat_random(weights):
    measured, *_ = card.curves(weights, card.shipped(weights))
    # divprune answers the four questions about the last but one and the one before that grid does not.
    rows = card._against(measured, "one", "grid")[1].splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| random!", "| divprune!"]
    assert "| +33.3 [" in rows[1]
    assert card._against(measured, "one", "resize") == []
    # In the second model every scene's divprune answers are grid's of the first: half of the scenes, no worse.
    assert card._no_better(measured, "one")[1] == "* 25%: none"
    equal = card.Curves.__new__(card.Curves)
    equal.__dict__ |= {**measured.__dict__, "methods": ["random", "same"]}
    equal.__dict__["_bits"] = {("one", name, 0.25, False, "original"): np.ones((1, 12), bool) for name in equal.methods}
    assert card._no_better(equal, "one")[1] == "* 25%: same"


def test_the_search_lists_compositions_best_first():
    line = {"exam": "e", "split": "validation", "kinds": ["color"], "kind": "0000", "opens": "80"}
    rows = [
        ("grid", False, 0.25, "f0"),
        ("grid", False, 0.05, "80"),
        ("divprune", True, 0.25, "f0"),
        ("divprune", True, 0.05, "e0"),
        ("divprune", "merge=0.7", 0.25, "f0"),
        ("divprune", "merge=0.7", 0.05, "f0"),
        ("random", False, 0.25, "f0"),  # not measured at the other budget
    ]
    names = ("method", "mass", "keep", "bits")
    cells = [{"model": "m", "positions": "original", **dict(zip(names, row, strict=True))} for row in rows]
    title, asked, table = card._search(card.Curves(line, cells))
    assert (title, asked) == ("## m", "4 questions about 1 scenes, accuracy in percent:")
    assert table.splitlines()[0] == "| method and options | mass | 25% | 5% | mean |"
    assert table.splitlines()[2:] == [
        "| `divprune` | merge=0.7 | 100.0 | 100.0 | 100.0 |",
        "| `divprune` | yes | 100.0 | 75.0 | 87.5 |",
        "| `grid` |  | 100.0 | 25.0 | 62.5 |",
    ]


def test_what_choosing_before_the_merger_adds():
    line = {"exam": "e", "split": "heldout", "kinds": ["color", "read"], "kind": "0101", "opens": "a0"}
    rows = [("norm", "c0"), ("norm features=merger_in", "50"), ("divprune features=merger_in", "f0")]
    names = ("method", "bits", "label")
    cells = [
        {"model": "m", "positions": "original", "mass": False, "keep": 0.25}
        | dict(zip(names, (*row, f"{row[0]}!"), strict=True))
        for row in rows
    ]
    # norm answers the first two questions, norm[merger_in] the two about text.
    _, table = card._merger_in(card.Curves(line, cells), "m")
    rows = [row.split(" [")[0] for row in table.splitlines()[2:]]
    assert rows == ["| norm! | read, sign | +50.0", "| norm! | all | +0.0"]


def test_fields_of_mass_attention_come_as_text():
    assert str(Cell("divprune", 0.25, mass="beta=2 merge=0.7")) == "divprune 0.25 mass beta=2 merge=0.7"
    assert Cell("divprune", 0.25, mass="merge=0.7").weighing == visiontok.Mass(merge=0.7)
    assert [Cell("divprune", 0.25, mass=mass).weighing for mass in (False, True)] == [None, visiontok.Mass()]
    for wrong in ("merge", "merge=much", "size=1", "merge=2"):
        with pytest.raises(ConfigError, match="mass"):
            _ = Cell("divprune", 0.25, mass=wrong).weighing


def test_recipes_with_masses_of_their_own_run_in_one_way():
    ways = [(cell.mass, cell.positions) for cell in curves.cells(["visiontok"], [0.5]) if cell.keep == 0.5]
    assert ways == [(False, "original")]


def test_the_card_lists_data_and_models(weights):
    text = card.render(weights)[weights.parent / "README.md"]
    for kind in KINDS:
        assert re.search(rf"^\| {kind} \| [a-z ]+\? \| \w+", text, re.MULTILINE), kind
    full = json.loads((weights / "one" / "accuracy.json").read_text())["splits"]["detail"]
    low, high = full["interval"]["read"]
    assert f" {full['full']['read']:.1f} [{low:.1f}, {high:.1f}] |" in text.split("| read |")[2].split("\n")[0]
    for column in ("questions", "full", "prior", "blind", "swapped"):
        row = next(line for line in text.splitlines() if line.startswith("| detail all |"))
        assert f" {full[column]['all']} |" in row
    for fact in ("train --seed 1", "c0ffee", "abacus", "1.70 M", "3.4 MB", "red circle", "weights/two/curve.svg"):
        assert fact in text


def test_a_card_of_other_weights_is_refused(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "weights")
    file = tmp_path / "weights" / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="'two', which are not in"):
        card.render(tmp_path / "weights")


def test_the_curve_draws_validation_accuracies(weights):
    root = ET.fromstring(card.render(weights)[weights / "one" / "curve.svg"])
    lines = root.findall("{*}polyline")
    # The picture is 560 wide from x = 40, and 280 high from y = 30 (100 %) down to y = 310; the last step is 200.
    assert [line.get("points") for line in lines] == ["320.0,240.0 600.0,100.0", "320.0,170.0 600.0,30.0"]
    assert {"color", "all", "0", "100", "200"} <= {text.text for text in root.findall("{*}text")}
    assert len({line.get("stroke") for line in lines}) == 2


def test_a_method_that_runs_on_one_model_only_is_no_part_of_tau():
    exam_line = {"exam": "e", "split": "heldout", "kinds": ["color"], "kind": "000", "opens": "e0"}
    rows = [
        ("a", "random", "80"),
        ("a", "grid", "c0"),
        ("a", "cls_topk", "e0"),
        ("b", "random", "80"),
        ("b", "grid", "c0"),
    ]
    same = {"keep": 0.5, "mass": False, "positions": "original", "seconds": 1}
    cells = [{"model": model, "method": method, "label": method, "bits": bits, **same} for model, method, bits in rows]
    parts = card._rankings(card.Curves(exam_line, cells))
    assert "| a, b | +1.00 | +1.00 |" in parts[-1]
