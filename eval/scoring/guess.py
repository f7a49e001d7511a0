"""Guesses: where nothing can be read out of a reply, some official scripts draw an option."""

from __future__ import annotations

import random
from collections.abc import Sequence

from visiontok.errors import ConfigError

from .base import Mark, Summary, Target, average, mean_score, rows


def mark(parsed: str | None, target: Target) -> Mark:
    """As read, or else as guessed. The guess is seeded by the question, so that all methods compared on it share it."""
    if parsed is None and not target.id:
        raise ConfigError(
            f"a question with answers={target.answers!r} needs an id, which seeds the guess of its option"
        )
    guess = parsed or random.Random(target.id).choice(list(target.options))
    return Mark(float(guess in target.answers), parsed)


def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """``accuracy`` includes guesses, as published; ``accuracy_without_guesses`` counts them as wrong."""
    strict = [(Mark(m.score if m.parsed is not None else 0.0, m.parsed), target) for m, target in rows(marks, targets)]
    return average(marks, targets) | {"accuracy_without_guesses": mean_score(strict)}
