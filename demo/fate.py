"""What became of every visual token of one answer: in which layers it lived, by which score, and who took it over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visiontok.functional import rank
from visiontok.ledger import Choice, TokenLedger
from visiontok.overlay import living

Token = tuple[int, int]
"""(unit, token of the unit)."""
PROMPT = -1
"""The place before decoder layer 0, as the prompt stage left it."""


@dataclass(frozen=True)
class Facts:
    """One visual token.

    Attributes:
        place: (t, row, column) in its image's grid; -1 where unknown.
        score: how important the method found it; None if the method does not say.
        rank: its place by score among the candidates of that choice, 1 is the best.
        candidates: how many they were.
        dropped: the first decoder layer without it, ``PROMPT`` if it never got so far; None if it lived to the end.
        heir: who took it over when it was dropped; None for nobody.
        mass: how many original tokens it stands for where the view is; 0 where it is not alive.
    """

    place: tuple[int, int, int]
    score: float | None
    rank: int | None
    candidates: int | None
    dropped: int | None
    heir: Token | None
    mass: float


class Fate:
    """The books of one answer, on the host; L decoder layers, U images, N visual tokens of the largest.

    Args:
        ledger: of the call.
    """

    def __init__(self, ledger: TokenLedger) -> None:
        units = ledger.units
        self.depth = ledger.depth
        self.grid, self.valid = units.grid.cpu(), units.valid.cpu()
        self.layers = [living(ledger, layer) for layer in range(ledger.depth)]
        self.masses = [units.gather(ledger.mass(i)[..., None])[..., 0].cpu() for i in range(ledger.depth)]
        self.choices = [_on_host(choice) for choice in ledger.choices]
        self.merged = None if ledger.merged is None else ledger.merged.cpu()
        before = [choice.kept for choice in self.choices if choice.layer is None]
        self.prompt = before[-1] if before else self.valid

    @property
    def tokens(self) -> int:
        """Visual tokens of the stock model."""
        return int(self.valid.sum())

    def alive(self, layer: int) -> torch.Tensor:
        """(U, N) bool: who is there in a decoder layer, or behind the prompt stage (``PROMPT``)."""
        return self.prompt if layer == PROMPT else self.layers[layer]

    def scores(self) -> torch.Tensor | None:
        """(U, N) how important the tokens were at the first choice that says so, NaN for those it was not about."""
        for choice in self.choices:
            if choice.scores is not None:
                return choice.scores.float().masked_fill(~choice.candidates, torch.nan)
        return None

    def facts(self, token: Token, layer: int) -> Facts:
        """One token, seen from a layer."""
        unit, index = token
        about = [choice for choice in self.choices if bool(choice.candidates[token])]
        scored = [choice for choice in about if choice.scores is not None]
        score = place = count = None
        if scored and scored[-1].scores is not None:
            scores, there = scored[-1].scores[unit], scored[-1].candidates[unit]
            score, place, count = float(scores[index]), int(rank(scores, there)[index]) + 1, int(there.sum())
        dropped = next((at for at in range(PROMPT, self.depth) if self._gone(token, at)), None)
        heir: Token | None = None
        if about and about[-1].into is not None and not bool(about[-1].kept[token]):
            heir = (unit, int(about[-1].into[token]))
        elif self.merged is not None and int(self.merged[token]) != index:  # inside the vision tower
            heir = (unit, int(self.merged[token]))
        mass = self.masses[max(layer, 0)][token] if bool(self.alive(layer)[token]) else 0.0
        t, row, column = self.grid[token].tolist()
        return Facts(
            (t, row, column), score, place, count, dropped, heir if heir is None or heir[1] >= 0 else None, float(mass)
        )

    def _gone(self, token: Token, layer: int) -> bool:
        """Whether the token is not there in a layer nor in any behind it."""
        return not any(bool(self.alive(at)[token]) for at in range(layer, self.depth))


def _on_host(choice: Choice) -> Choice:
    return Choice(
        choice.label,
        choice.layer,
        choice.candidates.cpu(),
        choice.kept.cpu(),
        None if choice.scores is None else choice.scores.cpu(),
        None if choice.into is None else choice.into.cpu(),
    )
