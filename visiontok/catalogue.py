"""The methods in Markdown, generated from their cards: a table (`visiontok methods --markdown README.md`), and a page
for each in the documentation."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from . import recipes
from .errors import ConfigError
from .method import Card, Tower

BEGIN, END = "<!-- methods: begin, generated -->", "<!-- methods: end -->"
HEADINGS = ("name", "stage", "idea", "paper", "published", "count", "image", "question", "sync")
# Names depend on the tower: with a CLS token, with thumbnail and crops too, and without.
CLIP = Tower(depth=24, has_cls=True, feature_layer=22, full_attention=tuple(range(24)))
TILED = Tower(depth=24, has_cls=True, feature_layer=22, full_attention=tuple(range(24)), thumbnail=True)
NO_CLS = Tower(depth=32, has_cls=False, feature_layer=31, full_attention=tuple(range(32)))


def labels(name: str) -> list[str]:
    """The names under which results of a method are reported, substitutes in brackets."""
    return list(dict.fromkeys(recipes.find(name)().adapt(tower).label for tower in (TILED, CLIP, NO_CLS)))


def stages(name: str) -> list[str]:
    """Where a method acts: ``pixel``, ``encoder``, ``merge``, ``prompt``, ``decoder``, ``cache``, or several."""
    kinds = (stage.kind for stage in recipes.find(name)().stages())
    outside = ("pixel", "encoder", "merge", "prompt", "cache")
    return list(dict.fromkeys(kind if kind in outside else "decoder" for kind in kinds))


def published(card: Card) -> str:
    """``✓`` for the published form, ``weights`` where it needs trained ones, ``substitute`` for a part of ours."""
    if card.venue == "baseline":
        return "-"
    if card.trained != "none":
        return "weights"
    return "✓" if card.name in labels(card.name) else "substitute"


def table() -> str:
    """One row per method."""
    rows = [_row(card) for card in recipes.methods()]
    lines = [HEADINGS, ("---",) * 5 + (":-:",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(card: Card) -> str:
    """A method's own page."""
    title, paper = card.title[:1].upper() + card.title[1:], _linked(card.paper)
    source = recipes.find(card.name).__module__.replace(".", "/")
    facts = {
        "Paper": "none" if paper == "-" else f"{paper}, {card.venue}",
        "Acts at": ", ".join(stages(card.name)),
        "Reads": card.needs,
        "Reported as": ", ".join(f"`{name}`" for name in labels(card.name)),
        "Defaults": card.defaults,
        "Cost": card.cost,
        "Published code": card.official,
        "Its bugs": card.bugs,
        "Departures": card.departures,
        "Trained weights": card.trained,
        "Source": f"`{source}.py`",
    }
    lines = [f"# {card.name}", "", f"{title}.", "", f"    {card.formula}", ""]
    lines += [f"**{name}.** {text}\n" for name, text in facts.items() if text != "-"]
    lines += ["## Serving contract", "", "| promise | |", "| --- | :-: |"]
    promises = {name: value for name, value in asdict(card.contract).items() if name != "whole_groups"}
    lines += [f"| `{name}` | {'yes' if value else 'no'} |" for name, value in promises.items()]
    budget = ", keep=0.25" if card.budget else ""
    lines += ["", "```python", f'visiontok.compress(model, "{card.name}"{budget})', "```", ""]
    return "\n".join(lines)


def write(path: Path) -> None:
    """Put the table between the two markers of a file.

    Raises:
        ConfigError: if the file does not have each marker once, in order.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = re.fullmatch(f"(.*{re.escape(BEGIN)}\n).*?({re.escape(END)}.*)", text, re.DOTALL)
    if parts is None or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{path}: needs one line {BEGIN!r} and below it one line {END!r}")
    path.write_text(f"{parts[1]}{table()}\n{parts[2]}", encoding="utf-8")


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def _row(card: Card) -> tuple[str, ...]:
    first, *others = labels(card.name)
    names = [first, *(label.removeprefix(card.name) for label in others)]
    idea = card.title if card.trained == "none" else f"{card.title}. *Published with trained weights:* {card.trained}"
    paper = _linked(card.paper)
    source = paper if card.venue in ("-", "baseline") else f"{paper}, {card.venue}"
    promises = card.contract
    ticks = (promises.count_from_grid, promises.per_image, promises.question_independent, promises.sync_free)
    return (
        " ".join(f"`{name}`" for name in names),
        ", ".join(stages(card.name)),
        idea,
        source,
        published(card),
        *("✓" if tick else "" for tick in ticks),
    )
