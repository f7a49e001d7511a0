"""MMMU: multiple choice and open answers read out of free text. (Yue et al., arXiv 2311.16502)

lmms-eval 0.7.3 reads as the official script does. VLMEvalKit asks a language model about open questions, so it is not
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from . import guess
from .base import Mark, Metric, Target

# ------------------------------------------------------------------------------------------------------ multiple choice


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter: "(B)", else "B ", else "B.", else, of more than five words, an option's text. The last one counts.

    Of several "B ", the last that stands alone counts, and the first in the alphabet if none does.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [choice for choice in options if form.format(choice) in padded]
        if found:
            return max(found, key=lambda choice: padded.rfind(place.format(choice)))
    if len(text.split()) > 5:
        lower = padded.lower()
        found = [choice for choice, option in options.items() if option.lower() in lower]
        if found:
            return max(found, key=lambda choice: lower.rfind(options[choice].lower()))
    return None


# --------------------------------------------------------------------------------------------------------- open answers

_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NOTHING = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1.2
)


def read_open(text: str) -> set[str | float]:
    """What may be the answer: the ends of lines after words such as "is", and the numbers in them."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")  # the script means to split sentences, too, but at capitals, of which none is left
    tails = [_tail(line, last=i == len(lines) - 1) for i, line in enumerate(lines)]
    parts = [tail for tail in tails if tail and tail not in _NOTHING] or [text]
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return {form for part in (*parts, *numbers) for form in _forms(part)}


def _tail(line: str, *, last: bool) -> str:
    """The shortest rest of the line behind a lead; in the last line "=" leads, too."""
    shortest = ""
    for lead in (*_LEADS, "=") if last else _LEADS:
        if lead in line:
            tail = line.rsplit(lead, 1)[1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def _forms(text: str) -> list[str | float]:
    """Numbers rounded to two decimals; other text in lower case, one character alone only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether a number read is an answer, or a text read contains one."""
    right = [form for answer in answers for form in _forms(answer)]
    strings = [form for form in right if isinstance(form, str)]
    return any(
        any(string in form for string in strings) if isinstance(form, str) else form in right
        for form in read_open(text)
    )


# --------------------------------------------------------------------------------------------------------------- metric


def score(prediction: str, target: Target) -> Mark:
    """Of a question without choices, the open answer. Where no letter can be read, a guess."""
    if not target.choices:
        return Mark(float(open_is_right(prediction, target.answers)), prediction)
    return guess.mark(read_choice(prediction, target.options), target)


METRICS = (
    Metric("mmmu", "official", score, guess.aggregate, "accuracy"),
    Metric("mmmu", "lmms-eval", score, guess.aggregate, "accuracy"),
)
