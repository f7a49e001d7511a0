"""The three normalisers of VQA answers. They disagree, and published numbers depend on how."""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}

# The table of the official scorer spells a contraction from any form that lacks exactly one of its apostrophes
# (couldnt've and couldn'tve, but not couldntve). It leaves out those whose bare form is another word (lets, shes, its),
# and of its entries with a capital I none ever fires, since words are in lower case by then.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round, as in the official table

# The official pattern for periods means to spare those after a digit, but its lookbehind is mistyped and checks
# nothing; VLMEvalKit corrects it.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_CORRECTED = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_PERIODS = 32  # the official scorer passes a flag where the number of replacements goes
_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"\d,+\d")


def official(text: str) -> str:
    """That of the official VQA scorer, punctuation first, then numbers, articles and contractions.

    Of a punctuation mark with a space beside it anywhere, every occurrence is deleted, of others every one becomes a
    space; and one comma between digits makes all of them deleted.

    Idempotent up to 32 periods, as are those below but EvalAI's.
    """
    return _words(punctuation(one_line(text)))


def evalai(text: str) -> str:
    """That of EvalAI, for TextVQA and VizWiz: commas and question marks vanish and "'s" stands alone, then as above.

    Not idempotent: "hes" becomes "he's", and that becomes "he 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return evalai_untokenised(text.strip())


def evalai_untokenised(text: str) -> str:
    """That of lmms-eval for VQAv2: EvalAI's without its first step. Differs from ``official`` in "1,,000" only."""
    return _words(punctuation(one_line(text), comma=_COMMAS))


def vlmevalkit(text: str) -> str:
    """That of VLMEvalKit: the official one, but a period after a digit stays, so "10." is not "10"."""
    return _words(punctuation(one_line(text), period=_PERIOD_CORRECTED))


def vlmevalkit_punctuation(text: str) -> str:
    """The first half of VLMEvalKit's, which it also reads yes and no with."""
    return punctuation(text, period=_PERIOD_CORRECTED)


def punctuation(text: str, *, comma: re.Pattern[str] = _COMMA, period: re.Pattern[str] = _PERIOD) -> str:
    between_digits = comma.search(text) is not None
    result = text
    for mark in _MARKS:
        delete = between_digits or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete else " ")
    return period.sub("", result, count=_MOST_PERIODS)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes where they belong."""
    numbered = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)
