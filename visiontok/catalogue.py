"""The table of methods in Markdown, generated from their cards: `visiontok methods --markdown README.md`."""

from __future__ import annotations

import re
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
    """Where a method acts: ``pixel``, ``merge``, ``prompt``, ``decoder`` or ``cache``, or several of them."""
    kinds = (stage.kind for stage in recipes.find(name)().stages())
    return list(dict.fromkeys(kind if kind in ("pixel", "merge", "prompt", "cache") else "decoder" for kind in kinds))


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


def _row(card: Card) -> tuple[str, ...]:
    first, *others = labels(card.name)
    names = [first, *(label.removeprefix(card.name) for label in others)]
    idea = card.title if card.trained == "none" else f"{card.title}. *Published with trained weights:* {card.trained}"
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", card.paper)
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
