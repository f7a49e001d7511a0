"""Scoring against what the peers' code computed, on tricky strings: the golden tables, and those of the specification.

Another folder of the same format as tests/golden is tested with VISIONTOK_GOLDEN=folder.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visiontok.eval.scoring import (
    DIALECTS,
    METRICS,
    Mark,
    Metric,
    Target,
    anls,
    chartqa,
    choice,
    exact,
    grounding,
    letters,
    metric,
    mmmu,
    normalise,
    ocrbench,
    pope,
    vqa,
    yes_no,
)

from visiontok.errors import ConfigError

HERE = Path(__file__).parent / "golden"
FOLDERS = {"repo": HERE, "extra": Path(os.environ.get("VISIONTOK_GOLDEN", HERE))}

Row = dict[str, Any]


def bare(module: Any, dialect: str) -> Callable[..., float]:
    """The scorer of a module's only metric, without what a harness does to predictions before it."""
    (found,) = (m for m in module.METRICS if m.dialect == dialect)
    return lambda prediction, **target: found.score(prediction, Target(**target)).score


def answers(row: Row) -> tuple[str, ...]:
    return (row["answer"],) if isinstance(row["answer"], str) else tuple(row["answer"])


# ------------------------------------------------------------ golden tables: section → column → what we have in the row

Column = Callable[[Row, Row], Any]  # row, section
INPUTS = {"raw", "pred", "answers", "target", "answer", "dataset", "answer_index", "n_choices"}
TABLES: dict[str, dict[str, Column]] = {
    "vqa_normalise": {
        "vqa_official": lambda row, _: normalise.official(row["raw"]),
        "evalai": lambda row, _: normalise.evalai(row["raw"]),
        "vlmevalkit": lambda row, _: normalise.vlmevalkit(row["raw"]),
    },
    "vqa_soft_accuracy": {
        "vqa_official": lambda row, _: vqa.official_accuracy(row["pred"], row["answers"]),
        "lmms_vqav2": lambda row, _: vqa.lmms_vqav2(row["pred"], row["answers"]),
        "lmms_textvqa": lambda row, _: vqa.lmms_textvqa(row["pred"], row["answers"]),
        "lmms_vizwiz": lambda row, _: score("vizwiz", "lmms-eval", row["pred"], answers=tuple(row["answers"])),
        "llava_m4c_textvqa": lambda row, _: vqa.llava_textvqa(row["pred"], row["answers"]),
        "vlmevalkit": lambda row, _: vqa.vlmevalkit(row["pred"], row["answers"]),
    },
    "gqa_exact_match": {
        "score": lambda row, _: bare(exact, "lmms-eval")(row["pred"], answers=(row["target"],)),
    },
    "anls": {
        "lmms_anls": lambda row, _: bare(anls, "lmms-eval")(row["pred"], answers=tuple(row["answers"])),
        "vlmevalkit_anls": lambda row, _: bare(anls, "vlmevalkit")(row["pred"], answers=tuple(row["answers"])),
    },
    "chartqa_relaxed": {
        "lmms": lambda row, _: bare(chartqa, "lmms-eval")(row["pred"], answers=(row["target"],)),
        "vlmevalkit_prediction_stripped": lambda row, _: bare(chartqa, "vlmevalkit")(
            row["pred"], answers=(row["target"],)
        ),
    },
    "yes_no": {
        "lmms_pope_if_gt_yes": lambda row, _: bare(pope, "lmms-eval")(row["pred"], answers=("yes",)),
        "lmms_pope_if_gt_no": lambda row, _: bare(pope, "lmms-eval")(row["pred"], answers=("no",)),
        "vlmevalkit_yorn": lambda row, _: (yes_no.one_of_two(row["pred"]) or "unknown").capitalize(),
        "llava_pope": lambda row, _: yes_no.first_sentence(row["pred"]),
        "lmms_mme": lambda row, _: yes_no.prefix_or_initial(row["pred"]) or "other",
    },
    "ocrbench": {
        "lmms": lambda row, _: bare(ocrbench, "lmms-eval")(
            row["pred"], answers=answers(row), groups={"dataset": row["dataset"]}
        ),
    },
    "option_letter": {
        "vlmevalkit_can_infer": lambda row, table: letters.vlmevalkit(row["pred"], table["choices"]) or False,
        "vlmevalkit_can_infer_option": lambda row, table: (
            letters.vlmevalkit_option(row["pred"], table["choices"]) or False
        ),
        "lmms_mmbench_can_infer": lambda row, table: letters.mmbench(row["pred"], table["choices"]) or False,
        "lmms_mcq_extract": lambda row, table: letters.lmms_shared(row["pred"], list(table["choices"])) or "",
    },
    "scienceqa": {
        "lmms": lambda row, _: letters.lmms_scienceqa(row["pred"]) == "ABCDE"[row["answer_index"]],
        "llava_pred_index": lambda row, _: "ABCDE".find(
            letters.llava_scienceqa(row["pred"], row["n_choices"]) or "none"
        ),
    },
}


def score(name: str, dialect: str, prediction: str, **target: Any) -> float:
    return metric(name, dialect).score(prediction, Target(**target)).score


def summary(found: Metric, predictions: list[str], targets: list[Target]) -> dict[str, float]:
    marks = [found.score(prediction, target) for prediction, target in zip(predictions, targets, strict=True)]
    return found.aggregate(marks, targets)


def pope_table(table: Row) -> None:
    targets = [Target(answers=(answer,)) for answer in table["gt"]]
    theirs = table["lmms"]
    ours = summary(metric("pope", "lmms-eval"), table["pred"], targets)
    names = {"f1_score": "f1", "yes_ratio": "lmms_yes_ratio"}
    assert {key: ours[names.get(key, key)] for key in theirs} == pytest.approx(theirs, abs=1e-12)

    llava = metric("pope", "llava")
    ours = summary(llava, table["pred"], targets)
    line = ", ".join(f"{ours[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio"))
    assert line == table["llava"]["line"]
    assert ours["f1"] == pytest.approx(table["llava"]["f1"], abs=1e-12)
    pairs = [(llava.score(text, target), target) for text, target in zip(table["pred"], targets, strict=True)]
    assert "\t".join(map(str, pope.confusion(pairs, unread_is_no=True))) == table["llava"]["tp_fp_tn_fn"]


def mme_table(table: Row) -> None:
    targets = [
        Target(answers=(item["answer"],), groups={"category": item["category"], "image": item["question_id"]})
        for item in table["items"]
    ]
    ours = summary(metric("mme", "lmms-eval"), [item["pred"] for item in table["items"]], targets)
    assert ours["total"] == pytest.approx(table["total"], abs=1e-9)


WHOLE: dict[str, Callable[[Row], None]] = {"pope_aggregate": pope_table, "mme_aggregate": mme_table}


def tables(folder: Path) -> dict[str, Row]:
    """Section → table, of all files of tables that the manifest lists."""
    methods = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["methods"]
    files = [folder / method["file"] for method in methods if method["file"].endswith(".json")]
    return {section: table for path in files for section, table in json.loads(path.read_text(encoding="utf-8")).items()}


SECTIONS = [
    (label, section, table)
    for label, folder in FOLDERS.items()
    if label == "repo" or folder != HERE
    for section, table in tables(folder).items()
]
GOLDEN_ROWS = [
    pytest.param(section, table, row, id=f"{label}-{section}-{i}")
    for label, section, table in SECTIONS
    for i, row in enumerate(table.get("rows", ()))
]
GOLDEN_WHOLES = [
    pytest.param(section, table, id=f"{label}-{section}") for label, section, table in SECTIONS if "rows" not in table
]


@pytest.mark.parametrize(("section", "table", "row"), GOLDEN_ROWS)
def test_golden_row(section: str, table: Row, row: Row) -> None:
    columns = row.keys() - INPUTS
    assert columns, "nothing compared"
    for column in columns:
        ours = TABLES[section][column](row, table)
        assert ours == (pytest.approx(row[column], abs=1e-9) if isinstance(row[column], float) else row[column]), column


@pytest.mark.parametrize(("section", "table"), GOLDEN_WHOLES)
def test_golden_table(section: str, table: Row) -> None:
    WHOLE[section](table)


def test_every_golden_vector_of_the_repository_is_there() -> None:
    counts = {
        section: len(table.get("rows") or table.get("gt") or table["items"]) for section, table in tables(HERE).items()
    }
    assert counts == {
        "vqa_normalise": 88,
        "vqa_soft_accuracy": 20,
        "gqa_exact_match": 12,
        "anls": 15,
        "chartqa_relaxed": 26,
        "yes_no": 30,
        "pope_aggregate": 60,
        "mme_aggregate": 24,
        "ocrbench": 13,
        "option_letter": 35,
        "scienceqa": 13,
    }


# -------------------------------------------------------------------------------- vectors of the specification, part A4

NORMALISED = [  # raw, EvalAI, EvalAI without its first step, VLMEvalKit
    ("Two dogs.", "2 dogs", "2 dogs", "2 dogs"),
    ("10.", "10", "10", "10."),
    ("1,000", "1000", "1000", "1000"),
    ("3.14", "3.14", "3.14", "3.14"),
    ("5.a", "5a", "5a", "5.a"),
    ("e.g.5", "eg.5", "eg.5", "eg.5"),
    ("u.s.a.", "usa", "usa", "usa"),
    ("mother's", "mother 's", "mother's", "mother's"),
    ("the  Cat's toy", "cat 's toy", "cat's toy", "cat's toy"),
    ("self-service", "self service", "self service", "self service"),
    ("half / half 3,5", "half half 35", "half half 35", "half half 35"),
    ("half/half", "half half", "half half", "half half"),
    ("12:30", "12:30", "12:30", "12:30"),
    ("$5.00", "$5.00", "$5.00", "$5.00"),
    ("yes!", "yes", "yes", "yes"),
    ("dont", "don't", "don't", "don't"),
    ("none", "0", "0", "0"),
    ("two-two", "2 2", "2 2", "2 2"),
    ("?", "", "", ""),
    ("No. 5", "no 5", "no 5", "no 5"),
    ("A red, white, and blue flag", *["red white and blue flag"] * 3),
]


@pytest.mark.parametrize(("raw", "evalai", "untokenised", "vlmevalkit"), NORMALISED)
def test_normalisers(raw: str, evalai: str, untokenised: str, vlmevalkit: str) -> None:
    assert normalise.evalai(raw) == evalai
    assert normalise.evalai_untokenised(raw) == untokenised
    assert normalise.vlmevalkit(raw) == vlmevalkit


AGREEMENT = [  # prediction, ten answers, lmms-eval for VQAv2 and TextVQA, official
    *[("blue", ["blue"] * k + ["red"] * (10 - k), part, part) for k, part in enumerate((0, 0.3, 0.6, 0.9, 1.0))],
    ("Yes", ["yes"] * 10, 1.0, 0.0),
    ("yes.", ["yes"] * 10, 1.0, 0.0),
    ("10.", ["10"] * 10, 1.0, 0.0),
    ("10.", ["10"] * 9 + ["ten"], 1.0, 1.0),
    ("the man", ["man"] * 3 + ["boy"] * 7, 0.9, 0.9),
    ("1,000", ["1000"] * 9 + ["x"], 1.0, 1.0),
    ("mother's", ["mothers"] * 10, 0.0, 0.0),
    ("", [""] * 10, 1.0, 1.0),
]


@pytest.mark.parametrize(("prediction", "ten", "lmms", "official"), AGREEMENT)
def test_agreement_with_annotators(prediction: str, ten: list[str], lmms: float, official: float) -> None:
    assert vqa.lmms_vqav2(prediction, ten) == vqa.lmms_textvqa(prediction, ten) == lmms
    assert vqa.official_accuracy(prediction, ten) == official


def test_vlmevalkit_keeps_the_period_after_ten() -> None:
    assert vqa.vlmevalkit("10.", ["10"] * 10) == 0


Vector = tuple[Any, ...]  # arguments, then what is expected


def lmms_gqa(prediction: str, answer: str) -> float:
    return bare(exact, "lmms-eval")(prediction, answers=(answer,))


def pope_lmms(prediction: str, answer: str) -> float:
    return bare(pope, "lmms-eval")(prediction, answers=(answer,))


def anls_lmms(prediction: str, *accepted: str) -> float:
    return bare(anls, "lmms-eval")(prediction, answers=accepted)


def ocr(prediction: str, answer: str, dialect: str = "lmms-eval", dataset: str = "x") -> float:
    return bare(ocrbench, dialect)(prediction, answers=(answer,), groups={"dataset": dataset})


def named(name: str, dialect: str) -> Callable[..., float]:
    return lambda prediction, answer: score(name, dialect, prediction, answers=(answer,))


PETS = {"A": "cat", "B": "dog", "C": "bird", "D": "zebra"}
LONG = "I can clearly see that this is a big striped zebra"
VECTORS: dict[Callable[..., Any], list[Vector]] = {
    lmms_gqa: [
        ("Yes", "yes", 1),
        ("yes.", "yes", 1),
        ("Yes ", "yes", 0),
        ("t-shirt", "tshirt", 1),
        ("t-shirt", "t shirt", 0),
        ("the left", "left", 0),
    ],
    named("gqa", "lmms-eval"): [("Yes ", "yes", 1)],  # end to end, since the harness strips
    named("gqa", "llava"): [("Yes.", "yes", 1), ("yes ", "yes", 0)],
    named("gqa", "official"): [("yes", "yes", 1), ("Yes", "yes", 0), ("yes.", "yes", 0)],
    named("mme", "official"): [("Yes", "Yes.", 1)],
    named("gqa", "vlmevalkit"): [("Yes.", "yes", 0), ("Yes ", "yes", 1)],
    pope_lmms: [("no", "no", 1), (" No \n", "no", 1), ("No, there is no dog", "no", 0), ("Yes.", "yes", 0)],
    yes_no.first_sentence: [("No, there is no dog", "no"), ("Yes.", "yes"), ("NO", "yes"), ("none", "yes")],
    yes_no.one_of_two: [
        ("Yes", "yes"),
        ("No, there is no dog", "no"),
        ("Not sure", None),
        ("Yes, there is no cat", None),
        ("no-one", "no"),
        ("I think yes", "yes"),
    ],
    yes_no.prefix_or_initial: [
        *[(text, "yes") for text in ("Yes", "yes.", "Y")],
        *[(text, "no") for text in ("n", "No, it is not", "Not sure", "Nope", "know")],
        *[(text, None) for text in ("There is no", "Unknown", "I think yes")],
    ],
    yes_no.prefix: [("yes.", "yes"), ("know", "no"), ("Y", None), ("n", None), ("n.o", None)],
    anls_lmms: [
        ("hello", "hello", 1),
        ("Hello ", "hello", 1),
        ("helo", "hello", 0.8),
        ("abc", "abd", 2 / 3),
        ("ab", "ac", 0.5),
        ("ab", "xyzw", 0),
        ("", "a", 0),
        ("a  b", "a b", 1),
        ("$1,000", "1000", 2 / 3),
        ("1000", "1,000", "1000", 1),
        ("a  c", "a b", 0.75),  # one edit in four characters, of which one is lost in collapsing
    ],
    named("anls", "llava"): [("a  b", "a b", 0.75), (" ab ", "ab", 1)],
    named("anls", "vlmevalkit"): [("a  b", "a b", 1), ("a  c", "a b", 2 / 3)],
    named("chartqa", "vlmevalkit"): [("yes ", "yes", 1)],
    lambda text: bare(chartqa, "vlmevalkit")(text, answers=("4", "5")): [("5", 1), ("6", 0)],
    lambda text: bare(chartqa, "lmms-eval")(text, answers=("yes",)): [("yes ", 0), ("yes", 1)],
    chartqa.relaxed: [
        *[(said, right, True) for said, right in [("10", "10.4"), ("10", "10.5"), ("105", "100"), ("10%", "0.1")]],
        *[(said, right, True) for said, right in [("0", "0"), ("1e2", "100"), ("21.", "21"), ("Yes", "yes")]],
        *[(said, right, False) for said, right in [("10", "10.6"), ("105.1", "100"), ("10%", "10"), ("0.0", "0")]],
        *[(said, right, False) for said, right in [("1,000", "1000"), ("$21", "21"), ("yes.", "yes"), ("-5", "5")]],
        *[(said, right, False) for said, right in [("nan", "5"), ("inf", "5")]],
    ],
    ocr: [
        ("The text is HELLO", "hello", 1),
        ("hel lo", "hello", 0),
        ("ＡＢＣ", "abc", 1),
        ("ＡＢＣ", "abc", "vlmevalkit", 0),
        ("x ^ 2", "x^2", "lmms-eval", "HME100k", 1),
        ("X^2", "x^2", "lmms-eval", "HME100k", 0),
        ("anything", "", 1),
        ("　ａ　ｂ", "a b", 1),
        ("ＡＢ", "AB", "lmms-eval", "HME100k", 0),  # formulas are not folded
    ],
    named("scienceqa", "lmms-eval"): [
        *[(text, "B", 1) for text in ("B", "b", "B.", "B. foo", "B ")],
        *[(text, "B", 0) for text in ("(B)", "B) foo", "The answer is B.")],
    ],
    lambda text: metric("seed", "vlmevalkit").score(text, Target(answers=("B",), choices=("x", "y"))).parsed: [
        ("B", "B"),
        ("Z", None),  # a refusal is nothing read
    ],
    named("seed", "lmms-eval"): [("Because", "B", 1), ("(B)", "B", 0)],
    letters.lmms_shared: [
        ("(B)", "B"),
        ("The answer is C.", "C"),
        ("I think B or C", "C"),
        ("Both A and B. The answer is A", "A"),
        ("A cat is on D", "A"),
        ("D. A book", "D"),
        *[(text, None) for text in ("a", "None", "")],
    ],
    lambda text: mmmu.read_choice(text, PETS): [
        ("A B", "B"),
        ("D. A book", "A"),
        ("(A) or (B)", "B"),
        ("The answer is C", "C"),
        ("b", None),
        (LONG, "D"),
    ],
    lambda text: letters.vlmevalkit(text, PETS): [
        *[(text, "B") for text in ("B", "(B)", "B.", "**B**", "dog")],
        ("A cat", "A"),
        *[(text, None) for text in ("A or B", "a dog and a cat")],
        *[(text + " Sorry.", "Z") for text in letters._REFUSALS],
        ("B two three four five", None),  # not among the last four words
        ("one B three four five", "B"),
        ("A or B? The correct answer is **B**, so much is clear.", "B"),
        ("I see a dog " + "and grass " * 3, None),  # longer than twice all options
    ],
    letters.mmbench_option: [("A big red cat here", None), ("**B**", None)],
    lambda text: letters.mmbench_static(text, PETS): [("**B**", "B"), ("A big red cat here", "A"), ("none", None)],
    letters.first_of_five: [("Both", "B"), ("Cat", "C"), ("Best answer: D", "D"), ("so dog", None)],
    named("mvbench", "lmms-eval"): [
        *[(text, "B", 1) for text in ("Answer: B", "b)", "Option B.")],
        ("A big B", "B", 0),
    ],
    letters.ai2d: [("B. cat", "B"), ("(B)", "(B)")],
    named("ai2d", "lmms-eval"): [("B. cat", "B", 1), ("(B)", "B", 1), ("C", "B", 0)],
    mmmu.open_is_right: [("The answer is 3.14", ("3.14",), True), ("The answer is 2.72", ("3.14",), False)],
}


@pytest.mark.parametrize(
    ("function", "vector"), [(function, vector) for function, vectors in VECTORS.items() for vector in vectors]
)
def test_vector(function: Callable[..., Any], vector: Vector) -> None:
    *arguments, expected = vector
    assert function(*arguments) == (pytest.approx(expected) if isinstance(expected, float) else expected)


# ------------------------------------------------------------------------------------------------------------ summaries


def yes_no_targets(*right: str, **groups: str) -> list[Target]:
    return [Target(answers=(answer,), groups=groups) for answer in right]


def test_pope_of_the_specification() -> None:
    predictions = ["yes", "yes", "no", "no", "yes.", "yes"]
    ours = summary(metric("pope", "lmms-eval"), predictions, yes_no_targets("yes", "no", "no", "yes", "yes", "yes"))
    expected = {"accuracy": 1 / 2, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "lmms_yes_ratio": 2 / 3}
    assert {key: ours[key] for key in expected} == pytest.approx(expected)
    assert ours["yes_ratio"] == 3 / 6  # of what the model said: "yes." is not read
    assert ours["unparsed"] == pytest.approx(1 / 6)


def test_pope_by_category() -> None:
    targets = yes_no_targets("yes", "no", category="random")
    targets += yes_no_targets("yes", "no", category="popular,adversarial")
    ours = summary(metric("pope", "vlmevalkit"), ["Yes.", "No.", "No.", "Unsure"], targets)
    assert [ours[f"f1/{name}"] for name in ("random", "popular", "adversarial")] == [1, 0, 0]
    assert ours["f1/mean"] == pytest.approx(1 / 3)
    # A question of two categories counts twice: 1 true positive, 2 false negatives.
    assert (ours["precision"], ours["recall"], ours["f1"]) == (1, pytest.approx(1 / 3), 0.5)


def mme_targets(category: str, image: str) -> list[Target]:
    return yes_no_targets("Yes", "No", category=category, image=image)


def test_mme_of_the_specification() -> None:
    targets = mme_targets("OCR", "1") + mme_targets("OCR", "2")
    ours = summary(metric("mme", "lmms-eval"), ["Yes", "no", "yes", "yes"], targets)
    assert (ours["score/OCR"], ours["perception"], ours["cognition"]) == (125, 125, 0)


def test_mme_tells_images_of_one_name_apart_by_category() -> None:
    targets = mme_targets("count", "0001") + mme_targets("code_reasoning", "0001")
    ours = summary(metric("mme", "official"), ["Yes", "No", "No", "No"], targets)
    assert (ours["perception"], ours["cognition"], ours["total"]) == (200, 50, 250)


def test_mme_asks_twice() -> None:
    with pytest.raises(ConfigError, match="image '1' of 'OCR' has 1 questions"):
        summary(metric("mme", "official"), ["Yes"], mme_targets("OCR", "1")[:1])


def rotations(**answer_by_index: str) -> list[Target]:
    options = ("cat", "dog", "bird", "zebra")
    return [
        Target(answers=(answer,), choices=options, groups={"index": index.strip("i"), "category": "pets"})
        for index, answer in answer_by_index.items()
    ]


@pytest.mark.parametrize("dialect", METRICS["mmbench"])
def test_circular_of_the_specification(dialect: str) -> None:
    targets = rotations(i1="A", i1000001="D", i2="B", i1000002="A")
    ours = summary(metric("mmbench", dialect), ["A", "D.", "(B)", "B"], targets)
    assert (ours["circular"], ours["vanilla"], ours["circular/pets"]) == (0.5, 1, 0.5)


def test_circular_needs_the_first_rotation() -> None:
    with pytest.raises(ConfigError, match="question 1 has 0 entries"):
        summary(metric("mmbench", "lmms-eval"), ["A"], rotations(i1000001="A"))
    with pytest.raises(ConfigError, match="'one' is no number"):
        summary(metric("mmbench", "lmms-eval"), ["A"], rotations(one="A"))


def test_hallusionbench() -> None:
    # Two sets of two figures with two questions each; what is wrong is question 1 on figure 2 of the first set.
    targets = [
        Target(
            answers=("Yes",),
            groups={"category": "VS", "subcategory": "map", "set": number, "figure": figure, "question": question},
        )
        for number in "01"
        for figure in "12"
        for question in "01"
    ]
    ours = summary(metric("hallusionbench", "vlmevalkit"), ["Yes", "Yes", "Yes", "Perhaps"] + ["Yes"] * 4, targets)
    assert ours == {"aAcc": 7 / 8, "fAcc": 3 / 4, "qAcc": 3 / 4, "unparsed": 1 / 8}


def test_mvbench_counts_the_silent_as_wrong_and_says_what_the_peer_says() -> None:
    ours = summary(metric("mvbench", "lmms-eval"), ["B", ""], [Target(answers=("B",))] * 2)
    assert (ours["accuracy"], ours["lmms_accuracy"]) == (0.5, 1)


def test_mmstar_weighs_categories_equally() -> None:
    targets = [Target(answers=("A",), groups={"category": category}) for category in ("math", "math", "math", "logic")]
    ours = summary(metric("mmstar", "lmms-eval"), ["A", "A", "A", "B"], targets)
    assert (ours["accuracy"], ours["macro_accuracy"]) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("(B)", "B", 1),
        ("It is B.", "B", 1),
        ("C", "B", 0),
        ("Two.", "two", 1),
        ("Blue", "B", 1),
        ("3", "2", 0),
        ("b", "B", 0),
    ],
)
def test_realworldqa(prediction: str, answer: str, right: float) -> None:
    assert score("realworldqa", "lmms-eval", prediction, answers=(answer,)) == right


def test_mmmu_guesses_the_same_for_every_method_and_says_so() -> None:
    targets = [Target(answers=("A",), choices=("cat", "dog"), id=f"validation_Art_{i}") for i in range(200)]
    ours = summary(metric("mmmu", "official"), ["b"] * 200, targets)
    assert ours == summary(metric("mmmu", "lmms-eval"), ["?"] * 200, targets)
    assert ours["unparsed"] == 1
    assert 0.3 < ours["accuracy"] < 0.7
    assert ours["accuracy_without_guesses"] == 0
    with pytest.raises(ConfigError, match="needs an id"):
        score("mmmu", "official", "b", answers=("A",), choices=("cat", "dog"))


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("So the area is 1,234.", "1234", True),
        ("x = 2.5\ny = 3.004", "3", True),  # two decimals, from the last line, in which = leads
        ("x = 2.5\nthis is it", "2.5", False),
        ("Therefore the Bank of England", "bank", True),
        ("it is ?\nso be it", "?", False),  # a mark alone is no answer
        ("it is 5e2", "500", True),
        ("the answer is no bank so river", "bank", False),  # the shortest rest counts
        ("grade a", "a", True),
        ("grade", "a", False),  # one letter needs a space beside it
    ],
)
def test_mmmu_open_answers(prediction: str, answer: str, right: bool) -> None:
    assert mmmu.open_is_right(prediction, (answer,)) is right


# ------------------------------------------------------------------------------------------------------------ grounding

HALF = (0.0, 0.0, 50.0, 100.0)


@pytest.mark.parametrize(
    ("name", "prediction", "seen"),
    [
        ("grounding-pixels", "[0, 0, 50, 100]", None),
        ("grounding-pixels", '{"bbox_2d": [0, 0, 112, 448]}', (224, 448)),
        ("grounding-1000", "<box>(0,0),(500,1000)</box>", None),
        ("grounding-1000", "<box>(0,0),(500,1000)</box>", (224, 448)),  # relative to whatever the model saw
        ("grounding-pixels", "image1 0, 0, 50, 100", None),
        ("grounding-unit", "It is at [0, 0.0, 0.50, 1].", None),
    ],
)
def test_boxes_in_all_units(name: str, prediction: str, seen: tuple[int, int] | None) -> None:
    target = Target(box=HALF, size=(100, 100), seen=seen)
    assert summary(metric(name, "official"), [prediction], [target]) == {"accuracy": 1, "unparsed": 0, "mean_iou": 1}


def test_grounding_at_and_below_one_half() -> None:
    targets = [Target(box=HALF, size=(100, 100))] * 3
    predictions = ["[0,0,25,100]", "[0,0,24,100]", "on the left, at 3"]
    ours = summary(metric("grounding-pixels", "official"), predictions, targets)
    assert ours == pytest.approx({"accuracy": 1 / 3, "unparsed": 1 / 3, "mean_iou": (0.5 + 0.48) / 3})
    with pytest.raises(ConfigError, match="needs box and size"):
        score("grounding-pixels", "official", "[1,2,3,4]")


# ------------------------------------------------------------------------------------------------------------- registry


def test_unknown_names_and_dialects_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="metric='vqa' is unknown; there are ai2d, anls"):
        metric("vqa", "official")
    with pytest.raises(ConfigError, match="'llava' does not exist for metric 'mme'; it has official, lmms-eval"):
        metric("mme", "llava")


ALL = [pytest.param(found, id=f"{name}-{d}") for name, dialects in METRICS.items() for d, found in dialects.items()]
GROUPS = {"category": "count", "image": "1", "index": "1", "dataset": "x"}
GROUPS |= {"subcategory": "ocr", "set": "0", "figure": "1", "question": "1"}


YES_NO = {"pope", "mme", "hallusionbench"}
LETTERS = {"mmbench", "mmmu", *(found.name for found in choice.METRICS)}


def asked(found: Metric, answer: str, **groups: str) -> Target:
    answers = (answer,) * (10 if found.name in {"vqav2", "textvqa", "vizwiz"} else 1)
    choices = ("cat", "dog", "bird", "zebra")
    box = {"box": (0, 0, 1, 1), "size": (1, 1)} if found.name.startswith("grounding") else {}
    return Target(answers=answers, choices=choices, id="7", groups=GROUPS | groups, **box)  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ALL)
def test_every_metric_marks_and_sums_up(found: Metric) -> None:
    assert found.dialect in DIALECTS
    if found.name in YES_NO:
        good, bad = ("yes", "no")
    elif found.name.startswith("grounding"):
        edge = 1000 if found.name.endswith("1000") else 1
        good, bad = f"[0, 0, {edge}, {edge}]", "nowhere"
    elif found.name in LETTERS:
        good, bad = ("B", "C")
    else:
        good, bad = ("dog", "cat")
    targets = [asked(found, good, image=str(i // 2), index=str(i), question=str(i)) for i in range(4)]
    for predictions, expected in ([good] * 4, 1.0), ([bad] * 4, 0.0):
        marks = [found.score(prediction, target) for prediction, target in zip(predictions, targets, strict=True)]
        assert [mark.score for mark in marks] == [expected] * 4
        assert found.aggregate(marks, targets)[found.headline] == expected * (200 if found.name == "mme" else 1)
    with pytest.raises(ConfigError, match="at least one"):
        found.aggregate([], [])


@pytest.mark.parametrize("found", ALL)
def test_the_order_of_questions_never_shows(found: Metric) -> None:
    rng = random.Random(0)
    right = ("yes", "no") if found.name in YES_NO else ("B", "C")
    groups = [{"image": str(i // 2), "index": str(i), "question": str(i), "category": "ab"[i // 6]} for i in range(12)]
    pairs = []
    for each in groups:
        target = asked(found, rng.choice(right), **each)
        pairs.append((Mark(rng.choice((0.0, 0.3, 0.6, 0.9, 1.0)), rng.choice(("yes", "no", None))), target))
    if found.name.startswith("grounding"):
        pairs = [(Mark(mark.score, mark.parsed and "0,0,0.3,1"), target) for mark, target in pairs]
    expected = found.aggregate(*zip(*pairs, strict=True))
    for _ in range(3):
        rng.shuffle(pairs)
        assert found.aggregate(*zip(*pairs, strict=True)) == expected


# ----------------------------------------------------------------------------------------------------------- properties

WORDS = st.sampled_from(["yes", "Yes.", "no", "two", "2", "a dog", "dogs", ""])
TEXT = st.text(alphabet="aB1 .,'-s/?\nß(", max_size=24)


@settings(deadline=None)
@given(prediction=WORDS, ten=st.lists(WORDS, min_size=10, max_size=10), shuffled=st.randoms())
def test_vqa_scores_are_tenths_of_three(prediction: str, ten: list[str], shuffled: random.Random) -> None:
    other = ten.copy()
    shuffled.shuffle(other)
    for name in ("vqav2", "textvqa", "vizwiz"):
        for dialect in METRICS[name]:
            found = score(name, dialect, prediction, answers=tuple(ten))
            assert found in {0, 0.3, 0.6, 0.9, 1}
            assert found == score(name, dialect, prediction, answers=tuple(other))


@settings(deadline=None)
@given(prediction=WORDS, answers=st.lists(WORDS, max_size=12))
def test_soft_accuracy_is_the_mean_over_annotators(prediction: str, answers: list[str]) -> None:
    left_out = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    expected = math.fsum(min(1, others.count(prediction) / 3) for others in left_out) / max(1, len(answers))
    assert vqa.soft_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(prediction=TEXT, accepted=st.lists(TEXT, max_size=4))
def test_anls_is_zero_or_at_least_one_half(prediction: str, accepted: list[str]) -> None:
    for dialect in METRICS["anls"]:
        found = score("anls", dialect, prediction, answers=tuple(accepted))
        assert found == 0 or 0.5 <= found <= 1
        assert found == score("anls", dialect, prediction, answers=tuple(reversed(accepted)))
        assert score("anls", dialect, prediction, answers=(*accepted, prediction)) == 1


def recursive_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return recursive_distance(a[1:], b[1:])
    return 1 + min(recursive_distance(a[1:], b), recursive_distance(a, b[1:]), recursive_distance(a[1:], b[1:]))


@settings(deadline=None)
@given(a=st.text(alphabet="abc", max_size=5), b=st.text(alphabet="abc", max_size=5))
def test_edit_distance(a: str, b: str) -> None:
    assert anls.edit_distance(a, b) == anls.edit_distance(b, a) == recursive_distance(a, b)


@settings(deadline=None)
@given(data=st.data())
def test_circular_is_at_most_vanilla(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    targets = [t for i, n in enumerate(counts) for t in rotations(**{f"i{r * 1000000 + i}": "A" for r in range(n)})]
    marks = [Mark(float(data.draw(st.booleans())), "A") for _ in targets]
    ours = metric("mmbench", "lmms-eval").aggregate(marks, targets)
    assert 0 <= ours["circular"] <= ours["vanilla"] <= 1


BOXES = st.tuples(*[st.floats(-100, 100)] * 4)


@settings(deadline=None)
@given(a=BOXES, b=BOXES)
def test_iou_is_symmetric_and_a_share(a: grounding.Box, b: grounding.Box) -> None:
    assert 0 <= grounding.iou(a, b) == grounding.iou(b, a) <= 1
    x1, y1, x2, y2 = a
    if x2 - x1 > 1e-6 and y2 - y1 > 1e-6:
        assert grounding.iou(a, a) == 1


@settings(deadline=None)
@given(raw=TEXT)
def test_all_normalisers_but_one_are_idempotent(raw: str) -> None:
    for normaliser in (normalise.official, normalise.evalai_untokenised, normalise.vlmevalkit, exact.lmms_form):
        assert normaliser(normaliser(raw)) == normaliser(raw)


def test_two_commas_between_digits_tell_the_official_normaliser_from_evalai() -> None:
    assert normalise.official("1,,000") == normalise.vlmevalkit("1,,000") == "1 000"
    assert normalise.evalai_untokenised("1,,000") == "1000"


def test_llava_normalises_what_it_hands_to_the_official_scorer() -> None:
    ten = {"answers": ("dogs",) * 10}
    assert (score("vqav2", "official", "Dogs.", **ten), score("vqav2", "llava", "Dogs.", **ten)) == (0, 1)
    with pytest.raises(ConfigError, match="9 of them"):
        score("textvqa", "llava", "dogs", answers=("dogs",) * 9)


def test_all_vqa_normalisers_spare_the_33rd_period() -> None:
    for normaliser in (normalise.official, normalise.evalai, normalise.vlmevalkit):
        assert normaliser("." * 33 + " x") == ". x"


def test_evalai_is_not_idempotent() -> None:
    assert normalise.evalai("hes") == "he's"
    assert normalise.evalai("he's") == "he 's"


@pytest.mark.parametrize("found", ALL)
@settings(max_examples=20, deadline=None)
@given(prediction=TEXT)
def test_any_reply_gets_a_mark(found: Metric, prediction: str) -> None:
    answer = "no" if found.name in YES_NO else "A"
    assert 0 <= found.score(prediction, asked(found, answer)).score <= 1


def test_the_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")
    listed = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| `")]
    headlines = [list(dict.fromkeys(found.headline for found in dialects.values())) for dialects in METRICS.values()]
    assert [(name, dialects) for name, dialects, *_ in listed] == [(f"`{n}`", ", ".join(d)) for n, d in METRICS.items()]
    assert [list(dict.fromkeys(headline.replace("`", "").split(", "))) for _, _, headline, _ in listed] == headlines
