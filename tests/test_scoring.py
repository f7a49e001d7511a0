"""Scoring against what the peers' code computed, on tricky strings: the golden tables, and those of the specification.

Another folder with a metrics.json of the same format is tested with VISIONTOK_GOLDEN=folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from visiontok.eval.scoring import (
    Metric,
    Target,
    anls,
    chartqa,
    exact,
    letters,
    metric,
    mmmu,
    normalise,
    ocrbench,
    pope,
    vqa,
    yes_no,
)

HERE = Path(__file__).parent / "golden"
FOLDERS = sorted({HERE, Path(os.environ.get("VISIONTOK_GOLDEN", HERE))})

Row = dict[str, Any]


def bare(module: Any, dialect: str) -> Callable[..., float]:
    """The scorer of a module's only metric, without what a harness does to predictions before it."""
    (found,) = (m for m in module.METRICS if m.dialect == dialect)
    return lambda prediction, **target: found.score(prediction, Target(**target)).score


def answers(row: Row) -> tuple[str, ...]:
    return (row["answer"],) if isinstance(row["answer"], str) else tuple(row["answer"])


# ---------------------------------------------------------- golden tables: section → column → what we have in the row

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
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def golden_rows() -> list[Any]:
    return [
        pytest.param(section, table, row, id=f"{folder.name}-{section}-{i}")
        for folder in FOLDERS
        for section, table in tables(folder).items()
        for i, row in enumerate(table.get("rows", ()))
    ]


def golden_wholes() -> list[Any]:
    return [
        pytest.param(section, table, id=f"{folder.name}-{section}")
        for folder in FOLDERS
        for section, table in tables(folder).items()
        if "rows" not in table
    ]


@pytest.mark.parametrize(("section", "table", "row"), golden_rows())
def test_golden_row(section: str, table: Row, row: Row) -> None:
    columns = row.keys() - INPUTS
    assert columns, "nothing compared"
    for column in columns:
        ours = TABLES[section][column](row, table)
        assert ours == (pytest.approx(row[column], abs=1e-9) if isinstance(row[column], float) else row[column]), column


@pytest.mark.parametrize(("section", "table"), golden_wholes())
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


# ----------------------------------------------------------------------------- vectors of the specification, part A4

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
    ],
    named("scienceqa", "lmms-eval"): [
        *[(text, "B", 1) for text in ("B", "b", "B.", "B. foo", "B ")],
        *[(text, "B", 0) for text in ("(B)", "B) foo", "The answer is B.")],
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
    ],
    letters.mmbench_option: [("A big red cat here", None), ("**B**", None)],
    letters.first_of_five: [("Both", "B"), ("Cat", "C")],
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
