"""Schedules that exercise every kind of stage, with a method whose choice is random but known afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..context import Context
from ..method import Card, Method, Stage
from ..recipe import Recipe


@dataclass(frozen=True)
class About(Method):
    """Keeps about a fraction of the candidates; images and prompts differ in how many they keep.

    The choice depends on how the prompt begins and on which of its images it is, so beams of one prompt agree, and so
    do prompts that go on differently.
    """

    fraction: float = 0.5
    draw: int = 0
    card: ClassVar[Card] = Card(name="about", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx: Context) -> torch.Tensor:
        keep = torch.zeros_like(ctx.valid)
        for u, valid in enumerate(ctx.valid):
            row, image = int(ctx.row[u]), int(ctx.image[u])
            begin = [] if ctx.text_ids is None else ctx.text_ids[row][ctx.text_valid[row]][:2].tolist()
            g = torch.Generator().manual_seed(hash((self.draw, image, *begin)) % 2**63)
            candidates = valid.nonzero()[:, 0]
            n = max(1, int(len(candidates) * self.fraction) - image % 2 - sum(begin) % 2)
            chosen = torch.randperm(len(candidates), generator=g)[:n].to(valid.device)
            keep[u] = keep[u].scatter(0, candidates[chosen], True)
        return keep


def prompt(fraction: float = 0.5, draw: int = 1) -> Stage:
    return Stage(kind="prompt", method=About(fraction, draw))


def cut(layer: int, fraction: float = 0.5, draw: int = 1) -> Stage:
    return Stage(kind="cut", layer=layer, method=About(fraction, draw))


def inject(layer: int) -> Stage:
    return Stage(kind="inject", layer=layer)


def leave(layer: int) -> Stage:
    return Stage(kind="exit", layer=layer)


def freeze(layer: int, until: int | None = None) -> Stage:
    return Stage(kind="freeze", layer=layer, until=until)


SCHEDULES = {
    "prompt": (prompt(),),
    "cut": (cut(2),),
    "cut at 0": (cut(0),),
    "pyramid": (cut(1, 0.75, 1), cut(2, 0.7, 2), cut(3, 0.5, 3)),
    "inject": (inject(2),),
    "inject and select": (inject(2), cut(2)),
    "exit": (leave(3),),
    "inject, cut, exit": (inject(1), cut(1, 0.75), leave(3)),
    "skip": (cut(0, 0.6), Stage(kind="skip", layer=1, until=2)),
    "prompt and cut": (prompt(), cut(2)),
    "prompt, inject, exit": (prompt(), inject(1), leave(3)),
    "freeze": (freeze(0), freeze(2, 4)),
    "prompt, inject, freeze, cut, exit": (prompt(0.8), inject(1), freeze(1, 3), cut(2), leave(3)),
}


def recipe(name: str) -> Recipe:
    return Recipe(stages=SCHEDULES[name], name=name)
