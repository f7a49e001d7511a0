"""Reading yes or no out of a reply: "yes", "no", or None for neither."""

from __future__ import annotations

from collections.abc import Callable

from visiontok.errors import ConfigError

from .base import Mark, Scorer, Target, equal
from .normalise import vlmevalkit_punctuation


def expected(target: Target) -> str:
    answer = target.answer.lower().strip().replace(".", "")
    if answer not in {"yes", "no"}:
        raise ConfigError(f"question {target.id!r}: answers={target.answers!r}; this metric takes yes or no")
    return answer


def scorer(read: Callable[[str], str | None]) -> Scorer:
    def score(prediction: str, target: Target) -> Mark:
        return equal(read(prediction), expected(target))

    return score


def exact(text: str) -> str | None:
    """lmms-eval for POPE: the whole reply, so "Yes." is neither."""
    text = text.lower().strip()
    return text if text in {"yes", "no"} else None


def first_sentence(text: str) -> str:
    """LLaVA for POPE: no if a word of the first sentence is No, no or not; everything else, NO and none too, is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def one_of_two(text: str) -> str | None:
    """VLMEvalKit: whichever of the two words occurs, if only one of them does."""
    found = {"yes", "no"} & set(vlmevalkit_punctuation(text.lower()).split())
    return found.pop() if len(found) == 1 else None


def prefix(text: str) -> str | None:
    """The official MME script: yes, else no, among the first four characters; "know" is a no."""
    start = text.lower().strip()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def prefix_or_initial(text: str) -> str | None:
    """lmms-eval for MME: as the official one, after deleting periods; y and n alone count, too."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or prefix(text)
