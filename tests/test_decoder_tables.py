"""Prompt stage and decoder stage side by side on an embedded model: what is measured, and the page made of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from visiontok.demo import card, curves, decoder, decoder_card
from visiontok.demo.curves import Cell
from visiontok.demo.decoder import Entry

import visiontok
from visiontok import Recipe
from visiontok.api import Callback
from visiontok.errors import ConfigError
from visiontok.method import Stage
from visiontok.weights import fingerprint

SMALL = ["--questions", "10", "--turns", "7", "--shares", "0.5", "0.25", "--turn-shares", "0.5"]
SMALL += ["--mass", "off", "--methods", "divprune", "fastv", "aim", "vtw", "snapkv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(card.WEIGHTS / "llava", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    return decoder.load(folder)


def run(folder, out, *options, known="none.jsonl"):
    decoder.main([str(folder), "--out", str(out), "--curves", str(out.parent / known), *SMALL, *options])
    return [line for line in curves.read(out) if "model" in line]


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "decoder.jsonl"
    return path, run(folder, path)


def test_both_stages_spend_the_same_average_or_nothing(measured):
    _, lines = measured
    tokens = {(line["method"], line["share"]): line.get("tokens") for line in lines}
    assert tokens == {
        ("stock", None): None, ("vtw", None): 72,
        ("divprune", 0.5): 72, ("fastv", 0.5): 72, ("aim", 0.5): 72,
        ("divprune", 0.25): 36, ("fastv", 0.25): None, ("aim", 0.25): 36,
        ("snapkv", 0.5): 72,
    }  # fmt: skip
    [refused] = [line for line in lines if "refused" in line]
    assert (refused["method"], refused["share"]) == ("fastv", 0.25)
    assert "already 36.75" in refused["refused"]
    assert "bits" not in refused


def test_what_a_cache_keeps_is_asked_of_by_second_questions_alone(measured):
    _, lines = measured
    snapkv, vtw = ({line["exam"] for line in lines if line["method"] == name} for name in ("snapkv", "vtw"))
    assert len(snapkv) == 1
    assert snapkv < vtw
    [costs] = {(line["flops"], line["kv"]) for line in lines if line["method"] == "snapkv"}
    assert costs[0] == 1
    assert 0.5 < costs[1] < 0.6  # text stays


def test_costs_are_those_of_the_report(measured, loaded):
    """Half of the tokens per layer is not half of the FLOPs, and text is in the cache, too."""
    _, lines = measured
    [fastv] = [line for line in lines if line["method"] == "fastv" and "bits" in line and not line["cached"]][:1]
    processor = loaded[1]
    first = curves.write_exam("heldout", 10).asked[0]
    inputs = decoder._inputs(processor, first.pictures, first.chat)
    text = inputs["input_ids"].shape[1] - 144
    assert fastv["kv"] == pytest.approx((72 + text) / (144 + text), abs=1e-4)
    assert fastv["flops"] < fastv["kv"]


def test_a_run_goes_on_and_known_cells_are_not_measured_again(measured, folder, tmp_path):
    path, lines = measured
    out = tmp_path / "decoder.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    out.write_text("".join(kept[:-2]) + kept[-2][:40])
    assert [decoder.key_of(line) for line in run(folder, out)] == [decoder.key_of(line) for line in lines]
    known = [{k: v for k, v in line.items() if k not in ("share", "cached")} for line in lines if not line["cached"]]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    fresh = run(folder, tmp_path / "others.jsonl", known="known.jsonl")
    assert {line["cached"] for line in fresh} == {True}


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_the_second_question_meets_what_the_first_has_left(loaded, method):
    """As if, in a whole prompt, the tokens were kept that the first question alone would keep."""
    model, processor = loaded
    paper = curves.write_exam("turns", 14, turn=2)
    assert {len(one.chat) for one in paper.asked} == {3}
    cell = Cell(method, "layer_average:40")
    said, _, tokens = decoder.ask_later(decoder.Sitting(model, processor, paper, 3), cell)
    assert 39 < tokens <= 40
    expected, anew = [], []
    for one in paper.asked:
        first, whole = (decoder._inputs(processor, one.pictures, one.chat[:end]) for end in (1, None))
        with visiontok.compress(model, cell.recipe, keep=cell.keep) as compression, torch.inference_mode():
            model(**first)
            keep = compression.ledger.alive(3)[compression.ledger.visual][None]
        stage = Stage(kind="cut", layer=1, method=Callback(lambda ctx, keep=keep: keep))
        if method == "divprune":
            stage = Stage(kind="prompt", method=Callback(lambda ctx, keep=keep: keep))
        for recipe, answers in (
            (Recipe(stages=(stage,)), expected),
            (cell.recipe.with_keep(decoder.Budget.parse(cell.keep)), anew),
        ):
            with visiontok.compress(model, recipe):
                ids = model.generate(**whole)
            answers.append(processor.decode(ids[0, whole["input_ids"].shape[1] :], skip_special_tokens=True))
    assert said == expected
    assert (said == anew) == (method == "divprune")  # another question, another choice


def test_sharing_the_tower_changes_no_answer(loaded):
    paper = curves.write_exam("heldout", 20)
    cell = Cell("fastv", "layer_average:50", mass=True)
    assert decoder.blind_to_pixels(cell)
    assert not any(map(decoder.blind_to_pixels, (Cell("aim", 0.5), Cell("divprune", 0.5), Cell("erase", 0.5))))
    one, other = (decoder.measure(kind(*loaded, paper, 7), cell) for kind in (decoder.Sitting, decoder.Seen))
    assert (one["bits"], one["answers"]) == (other["bits"], other["answers"])
    feather = Entry(Cell("feather", "layer_average:72"), 0.5)  # its grid is known with pixels alone
    sittings = [kind(*loaded, paper, 20) for kind in (decoder.Sitting, decoder.Seen)]
    assert decoder.measure_all(*sittings, feather)["tokens"] == 72


def test_every_method_is_asked_for_once_in_every_way_that_it_knows(tmp_path):
    names = decoder.default_methods(tmp_path)
    listed = decoder.entries(names, 144)
    assert len({entry.key("m", "w", "e") for entry in listed}) == len(listed)
    acting = {card.name for card in visiontok.methods() if card.stage == "decoder"} | {"gemfilter", "erase"}
    assert acting <= {entry.cell.method for entry in listed}
    plain = [entry for entry in listed if entry.cell.method == "vtw"]
    assert [(entry.share, entry.cell.keep, entry.cell.mass) for entry in plain] == [(None, None, False)]
    assert not [entry for entry in listed if entry.cell.method == "visiontok" and entry.cell.mass]
    assert [e.cell.seed for e in listed if e.cell.method == "random" and e.share == 0.5 and e.cell.mass] == [0, 1, 2]
    assert {e.cell.keep for e in listed if e.cell.method == "hidrop"} == {
        f"layer_average:{n}" for n in (72, 50, 36, 16, 7)
    }


def test_a_calibration_becomes_options(tmp_path):
    made = {"calibration": "fitprune", "recommended": {"layers": [1, 3], "shares": [0.5, 0.25]}}
    (tmp_path / "fitprune.json").write_text(json.dumps(made))
    (tmp_path / "vtw.json").write_text(json.dumps({"calibration": "vtw", "recommended": None}))
    [method] = decoder.calibrated(tmp_path)
    assert Cell(method).recipe == visiontok.recipe("fitprune", layers=(1, 3), shares=(0.5, 0.25))


@pytest.mark.parametrize("folder", sorted((card.WEIGHTS / "calibrated").iterdir()), ids=lambda path: path.name)
def test_the_committed_calibrations_are_those_of_the_committed_models(folder):
    model, _ = decoder.load(card.WEIGHTS / folder.name)
    for file in folder.glob("*.json"):
        assert json.loads(file.read_text())["model"]["weights"] == fingerprint(model)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_committed_page_is_made_of_the_committed_files():
    text = (card.WEIGHTS.parent / "decoder.md").read_text()
    assert text == decoder_card.render(), "run `python -m visiontok.demo.decoder_card`"


@pytest.fixture
def weights(folder, tmp_path):
    """A model with known answers to eight questions about four scenes."""
    shutil.copytree(folder, tmp_path / "weights" / "one")
    digest = curves.weights_digest(folder)

    def line(exam, method, share, bits, tokens, keep=None, mass=False, cached=False):
        cell = {"model": "one", "weights": digest, "exam": exam, **vars(Cell(method, keep or share, mass))}
        said = {"label": f"{method}!", "tokens": tokens, "bits": curves.to_hex([b == "1" for b in bits])}
        return {**cell, "share": share, "cached": cached, **said, "flops": 0.5, "kv": 0.6, "answers": "a"}

    def exam(name, split):
        return {"exam": name, "split": split, "kinds": ["color"], "kind": "0" * 8, "opens": "aa"}

    share = {"share": 0.5, "keep": "layer_average:72"}
    lines = [
        exam("h", "heldout"),
        line("h", "stock", None, "11111111", None),
        line("h", "random", 0.5, "00001111", 72),
        line("h", "visiontok", 0.5, "11111110", 72),
        line("h", "divprune", 0.25, "11111100", 36),
        line("h", "fastv", **share, bits="01111111", tokens=72),
        line("h", "fastv", **share, bits="11111111", tokens=72, mass=True),
        line("h", "erase", **share, bits="00000000", tokens=40),
        {**line("h", "fastv", 0.25, "", None, "layer_average:36"), "refused": "average=36: out of reach"},
        line("h", "vtw", None, "11100000", 72),
        line("h", "todre_exit", None, "11110000", 100),
        exam("t", "turns"),
        *(line("t", "stock", None, "11111111", None, cached=cached) for cached in (False, True)),
        line("t", "fastv", **share, bits="11111110", tokens=72),
        line("t", "fastv", **share, bits="11000000", tokens=72, cached=True),
    ]
    [refused] = [found for found in lines if "refused" in found]
    del refused["bits"]
    (tmp_path / "weights" / "decoder.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines))
    known = {**lines[4], "keep": 0.5, "tokens": 72, "bits": curves.to_hex([False] * 8)}
    del known["share"], known["cached"]
    elsewhere = [{"positions": "compact"}, {"keep": 1.0}, {"method": "grid"}]
    others = [{**known, "tokens": 9, **change} for change in elsewhere]  # none of the page's business
    (tmp_path / "weights" / "curves.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (*others, known)))
    return tmp_path / "weights"


def test_the_page_says_what_the_files_say(weights):
    text = decoder_card.render(weights)
    first = text.split("### one\n")[1].split("The difference to")[0]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in first.splitlines() if row.startswith("|")}
    assert list(rows)[2:] == ["visiontok!", "random!", "divprune!", "erase!", "fastv!", "vtw!", "todre_exit!"]
    # Scene by scene visiontok is ahead of random by 2, 2, 0 and -1 questions; of eight sign patterns four reach 3.
    assert re.fullmatch(r"87\.5 \(\+37\.5 \[.*\] p=0\.500\)", rows["visiontok!"][1])
    assert rows["random!"][1].startswith("50.0 (-50.0 [")  # to all tokens
    assert rows["divprune!"][1].startswith("0.0 (-50.0 [")  # from curves.jsonl
    assert rows["divprune!"][2] == "75.0"
    assert "100%" not in text
    assert rows["fastv!"][0::2] == ["inside", "–"]
    assert rows["erase!"][1].startswith("0.0 at 40 (-50.0 [")
    assert rows["vtw!"][1].startswith("37.5 (-12.5 [")  # no budget, but this average
    assert rows["todre_exit!"][1:] == ["", "", "50.0 at 100 |"]
    against = text.split("The difference to visiontok")[1].split("What `mass")[0]
    assert "| fastv! | +0.0 [" in against
    assert "random" not in against
    assert "| fastv! | +12.5 [" in text.split("What `mass")[1].split("Per kind")[0]
    assert "| vtw! | 0.500 / 0.600 |" in text
    assert "* one, 25%: fastv!: average=36: out of reach" in text
    second = text.split("### one, second questions")[1]
    assert "| fastv! | inside | 87.5 | 25.0 | -62.5 [" in second
    assert "predicts nothing about large models" in " ".join(text.split())


def test_lines_of_other_weights_are_refused(weights):
    path = weights / "decoder.jsonl"
    path.write_text(path.read_text().replace(curves.weights_digest(weights / "one"), "0" * 12))
    with pytest.raises(ValueError, match="results of weights 000000000000 of 'one'"):
        decoder_card.render(weights)


def test_a_mistake_in_a_name_is_said_before_anything_is_measured(folder, tmp_path):
    with pytest.raises(ConfigError, match="method='fastvv'"):
        decoder.main([str(folder), "--out", str(tmp_path / "x.jsonl"), *SMALL[:-4], "fastvv"])
    assert not [line for line in curves.read(tmp_path / "x.jsonl") if "model" in line]
