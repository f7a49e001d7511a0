"""Reading the letter of an option out of a reply. On tricky replies the readers disagree about two times in five.

Each takes the reply and what it needs of the options, and returns a letter or None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .normalise import punctuation

# ------------------------------------------------------------------------------------------------------ ScienceQA, SEED

_LLAVA_PHRASE = re.compile("The answer is ([A-Z]).")  # any character may follow, but one must
_LLAVA_LETTERS = "ABCDE"


def llava_scienceqa(text: str, options: int) -> str | None:
    """LLaVA's ScienceQA: the letter alone, or "B. text", or exactly one "The answer is B."."""
    if text in tuple(_LLAVA_LETTERS):
        found = text
    elif text[:1] in tuple(_LLAVA_LETTERS) and text[1:3] == ". ":
        found = text[0]
    else:
        phrases = _LLAVA_PHRASE.findall(text)
        found = phrases[0] if len(phrases) == 1 else ""
    return found if found and found in _LLAVA_LETTERS[:options] else None


def lmms_scienceqa(text: str) -> str | None:
    """lmms-eval's ScienceQA: the letter alone, in either case, or an upper-case letter and a period in front."""
    text = text.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[1:2] == "." and text[0].isupper() else None


def first_character(text: str) -> str | None:
    """lmms-eval's SEED: the first character, in either case; "Because" is B."""
    return text.strip()[:1].upper() or None


_AI2D = re.compile(r"\s*([A-Z])\.")


def ai2d(text: str) -> str:
    """lmms-eval's AI2D: an upper-case letter and a period in front, or else the whole reply."""
    found = _AI2D.match(text)
    return found[1] if found else text


# ------------------------------------------------------------------------------- lmms-eval's shared reader (MMStar, …)

_SUBJECTS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{subject} is" for subject in _SUBJECTS),
    *(f"the {subject} is" for subject in _SUBJECTS),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
EIGHT = "ABCDEFGH"


class _Find(NamedTuple):
    rank: int
    at: int
    letter: str


def lmms_shared(text: str, letters: Sequence[str] = EIGHT) -> str | None:
    """The letter in the most telling place; of equally telling ones, the last in the text.

    From most to least telling: the first character, the last, after a phrase like "the answer is", then "(B)", "B.",
    "B:", "B)", "B " anywhere, even at the end of a word; and if there is none of these, any upper-case letter of an
    option anywhere ("Dog." is D). This is the reader of lmms-eval 0.7.3; later ones abstain more often.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded, bare = f" {text} ", text.strip()
    finds = []
    for choice in letters:
        for rank, form in enumerate((f"{choice} ", f"{choice})", f"{choice}:", f"{choice}.", f"({choice})"), 1):
            if form in padded:
                finds.append(_Find(rank, padded.rfind(form), choice))
        for phrase in _PHRASES:
            start = padded.lower().find(phrase)
            at = padded.find(choice, start + len(phrase)) if start >= 0 else -1
            if at >= 0:
                finds.append(_Find(6, at, choice))
        if bare.endswith(choice) and not bare[-2:-1].isalpha():
            finds.append(_Find(7, len(padded), choice))
        if bare.startswith(choice) and not bare[1:2].isalpha():
            finds.append(_Find(8, 0, choice))
    finds = finds or [_Find(0, padded.rfind(choice), choice) for choice in letters if choice in padded]
    return max(finds, key=lambda find: (find.rank, find.at)).letter if finds else None


# -------------------------------------------------------------------------------------------------- lmms-eval's MMBench

_MMBENCH_LETTERS = "ABCDE"
_DRESSES = (
    *("{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."),
    *(":{}", ":{},", ":{}.", ":{})", ":{})."),
)


def mmbench_option(text: str) -> str | None:
    """The only one of A … E that stands alone, else the only one in some dress, such as "B." or "(B)".

    An A among more than three words counts as the article, and then no bare letter counts.
    """
    words = text.split()
    bare = [choice for choice in _MMBENCH_LETTERS if choice in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for dress in _DRESSES:
        dressed = [choice for choice in _MMBENCH_LETTERS if dress.format(choice) in words]
        if len(dressed) == 1:
            return dressed[0]
    return None


def mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's MMBench before it asks its judge: the letter, else the only option whose text the reply contains."""
    return mmbench_option(text) or _by_text(text, options)


def mmbench_static(text: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's MMBench with "static" evaluation, where its shared reader takes the place of the judge."""
    return mmbench(text, options) or lmms_shared(text, list(options))


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    found = [choice for choice, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


# ----------------------------------------------------------------------------------------------------------- VLMEvalKit

REFUSED = "Z"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def vlmevalkit_option(text: str, options: Mapping[str, str]) -> str | None:
    """The only letter of an option among the words, if it is one of the last four; Z for a refusal.

    In longer replies "answer is B" counts, too. No vector here tells that rule and the four words from earlier ones,
    which lacked both.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = text.translate(_SPACES).split()
    found = [choice for choice in options if choice in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    phrase = _ANSWER_IS.search(text)
    return phrase[1].upper() if phrase and phrase[1].upper() in options else None


def vlmevalkit(text: str, options: Mapping[str, str]) -> str | None:
    """As above, else the only option whose text occurs in the reply, if it is at most twice as long as they are."""
    found = vlmevalkit_option(text, options)
    if found or len(text) > 2 * sum(map(len, options.values())):
        return found
    return _by_text(text, options)


# ----------------------------------------------------------------------------------------------- video tasks, lmms-eval

_FIVE = re.compile("[A-E]")
_DELETED = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)
_OPTION = re.compile(r"([A-E])\.\s*.+", re.IGNORECASE)
_WORD = re.compile(r"\b[A-E]\b", re.IGNORECASE)


def first_of_five(text: str) -> str | None:
    """lmms-eval's LongVideoBench: the first capital A … E after some phrases are deleted ("Cat" is C)."""
    for phrase in _DELETED:
        text = text.replace(phrase, "")
    found = _FIVE.search(text)
    return found[0] if found else None


def mvbench(text: str) -> str | None:
    """lmms-eval's MVBench: "B. text", else the first of A … E that stands alone, in either case ("A big B" is A).

    A reply without a letter is itself what was read, since only empty ones get special treatment there.
    """
    option = _OPTION.fullmatch(text.strip())
    if option:
        return option[1].upper()
    found = _WORD.search(punctuation(text.replace("\n", " ").replace("\t", " ").strip()))
    return found[0].upper() if found else text or None
