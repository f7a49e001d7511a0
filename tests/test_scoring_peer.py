"""Scoring against the code of lmms-eval itself, on random replies, wherever the release it follows is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visiontok.eval.scoring import chartqa, letters, mmmu, normalise

RELEASE = "0.7.3"
PIECES = """
    A B C D E a b (B) B. C: D) (A) (D). :B A, B, dog cat bird Dog yes no two Ten hes couldnt've 'ows'at y'alld've an the
    1 1,000 3.14 1.5e3 -2 12, 0 0.0 % $ 10. . , ? ! ' 's - / it is= so final option or and Because **B** [C] 答案是
""".split()  # noqa: SIM905
PHRASES = ["the answer is ", "The answer is ", "my choice is ", "i pick ", "Answer: ", " ", "\n", ""]
REPLY = st.lists(st.sampled_from([*PIECES, *PHRASES]) | st.sampled_from(["", " "]), max_size=9).map("".join)
PETS = {"A": "cat", "B": "dog", "C": "bird", "D": "zebra"}


def peer(module: str, name: str) -> Any:
    try:
        found = version("lmms-eval")
    except PackageNotFoundError:
        pytest.skip("lmms-eval is not installed")
    if found != RELEASE:
        pytest.skip(f"lmms-eval {found} is installed, but the dialect follows {RELEASE}")
    return getattr(import_module(f"lmms_eval.tasks.{module}"), name)


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        ("_task_utils.mcq_extract", "extract_mcq_answer", lambda text: letters.lmms_shared(text) or ""),
        ("_task_utils.vqa_eval_metric", "EvalAIAnswerProcessor", normalise.evalai),
    ],
)
@settings(deadline=None)
@given(reply=REPLY)
def test_of_a_reply(module: str, name: str, ours: Callable[[str], str], reply: str) -> None:
    theirs = peer(module, name)
    assert ours(reply) == (theirs()(reply) if isinstance(theirs, type) else theirs(reply))


@settings(deadline=None)
@given(reply=REPLY, answer=REPLY)
def test_relaxed_accuracy(reply: str, answer: str) -> None:
    assert chartqa.relaxed(reply, answer) == peer("chartqa.utils", "relaxed_correctness")(reply, answer)


@settings(deadline=None)
@given(reply=REPLY)
def test_mmmu_letter(reply: str) -> None:
    theirs = peer("_task_utils.mmmu_mcq_utils", "parse_mmmu_multi_choice_response")
    ours = mmmu.read_choice(reply, PETS)
    drawn = {theirs(reply, list(PETS), PETS) for _ in range(1 if ours else 40)}
    assert drawn == {ours} if ours else len(drawn) > 1  # where nothing can be read, it draws
