"""What a method was asked and what it answered, caught in a real run; and the same question put differently."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..api import Callback
from ..context import Attention, Context
from ..method import Card, Contract, Encoding, Kept, Merging, Method, Needs, Picture, Rebuild, Selection, Tower
from ..recipe import Recipe

# Fields of a context with one entry per image, and those of them with one per visual token.
PER_TOKEN = ("features", "valid", "grid", "place", "encoder_features", "pixels")
PER_IMAGE = (*PER_TOKEN, "count", "size", "row", "image")


@dataclass(frozen=True)
class Asked:
    """One question to a method.

    Attributes:
        method: who was asked, adapted to the model.
        context: what it was given a copy of.
        answer: what it said.
        drew: whether it took a generator of the context.
        touched: fields of its copy that it changed in place.
        global_random: whether it used torch's global random numbers.
    """

    method: Method
    context: Context
    answer: Selection
    drew: bool
    touched: tuple[str, ...]
    global_random: bool

    @property
    def contract(self) -> Contract:
        """What the method promises; a plain function promises everything but what its attribute ``contract`` denies."""
        return contract(self.method)


@dataclass(frozen=True)
class Spy(Method):
    """A method that notes every question before it passes it on."""

    method: Method
    log: list[Asked]

    @property
    def card(self) -> Card:  # type: ignore[override]
        """The method's."""
        return self.method.card

    @property
    def label(self) -> str:
        """The method's."""
        return self.method.label

    def adapt(self, tower: Tower) -> Spy:
        """Adapt the method."""
        return replace(self, method=self.method.adapt(tower))

    def needs(self) -> Needs:
        """The method's."""
        return self.method.needs()

    def picture(self, shape: tuple[int, int], count: int) -> tuple[int, int]:
        """The method's."""
        return self.method.picture(shape, count)

    def units(self, picture: Picture) -> Kept:
        """The method's."""
        return self.method.units(picture)

    @property
    def rebuild(self) -> Rebuild | None:
        """The method's."""
        return self.method.rebuild

    def stay(self, encoding: Encoding) -> torch.Tensor:
        """The method's."""
        return self.method.stay(encoding)

    def merging(self, tokens: int, count: int | None, **tower: Any) -> Merging:
        """The method's."""
        return self.method.merging(tokens, count, **tower)

    def select(self, ctx: Context) -> Selection:
        """Ask the method, and see what it does besides answering."""
        self.log.append(ask(self.method, ctx))
        return self.log[-1].answer


def spied(recipe: Recipe, log: list[Asked]) -> Recipe:
    """The recipe with a :class:`Spy` before each of its methods."""
    stages = (s if s.method is None else replace(s, method=Spy(s.method, log)) for s in recipe.stages)
    return replace(recipe, stages=tuple(stages))


def contract(method: Method) -> Contract:
    """The contract on a method's card, or in the attribute ``contract`` of a plain function."""
    if isinstance(method, Callback):
        return getattr(method.function, "contract", None) or Contract()
    return method.card.contract


def ask(method: Method, ctx: Context) -> Asked:
    """Put a question to a method, which gets a copy of the tensors."""
    drawn: list[int] = []

    def generator(u: int) -> torch.Generator:
        drawn.append(u)
        return ctx.generator(u)

    tensors = {f.name: value for f in fields(ctx) if torch.is_tensor(value := getattr(ctx, f.name))}
    copies: dict[str, Any] = {name: value.clone() for name, value in tensors.items()}
    state = torch.get_rng_state()
    answer = method.select(replace(ctx, **copies, generator=generator))
    return Asked(
        method=method,
        context=ctx,
        answer=answer if isinstance(answer, Selection) else Selection(keep=answer),
        drew=bool(drawn),
        touched=tuple(name for name, value in tensors.items() if not _same(value, copies[name])),
        global_random=not torch.equal(torch.get_rng_state(), state),
    )


def keeps(method: Method, ctx: Context) -> torch.Tensor:
    """(U, N), or (U, N, G) per head of a cache, bool: what the method keeps of the candidates."""
    return within(ask(method, ctx).answer.keep, ctx)


def within(keep: torch.Tensor, ctx: Context) -> torch.Tensor:
    """What of ``keep`` is a candidate."""
    return keep & ctx.valid.view(*ctx.valid.shape, *[1] * (keep.ndim - 2))


def without_ties(ctx: Context, seed: int, *, scattered: bool) -> Context:
    """The same question about random features and attention, no two tokens alike; ``scattered``: at random places."""
    g = torch.Generator().manual_seed(seed)
    scores: dict[tuple[str, int | float], torch.Tensor] = {}

    def read(stat: str, layer: int | float) -> torch.Tensor:
        if (stat, layer) not in scores:
            real = _read(ctx, stat, layer)
            scores[stat, layer] = (torch.rand(real.shape, generator=g) / real.shape[1]).to(real.dtype)
        return scores[stat, layer]

    def random(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=g).to(x.dtype)

    new: dict[str, Any] = {"features": random(ctx.features)}
    if ctx.encoder_features is not None:
        new["encoder_features"] = random(ctx.encoder_features)
    if ctx.pixels is not None:
        # levels as well as their number vary, so that no two patches have the same histogram
        share = torch.rand(*ctx.pixels.shape[:2], 1, 1, generator=g)
        new["pixels"] = (torch.rand(ctx.pixels.shape, generator=g) * share).to(ctx.pixels.dtype)
    if scattered:
        units, n = ctx.valid.shape
        side = 2 * n
        cells = torch.stack([torch.randperm(side * side, generator=g)[:n] for _ in range(units)])
        new["grid"] = torch.stack([torch.zeros_like(cells), cells // side, cells % side], -1)
    return replace(ctx, **new, attention=Attention(read))


def permuted(ctx: Context, order: torch.Tensor) -> Context:
    """The same question with the tokens of each image in another order, (U, N) long."""
    mine: dict[str, Any] = {name: take(value, order) for name in PER_TOKEN if (value := getattr(ctx, name)) is not None}
    return replace(ctx, **mine, attention=Attention(lambda stat, layer: take(_read(ctx, stat, layer), order)))


def take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(U, N, …) with the tokens of each image in the order (U, N)."""
    return x[torch.arange(len(x))[:, None], order]


def alone(ctx: Context, u: int) -> Context:
    """The same question about one image, without the others of its batch."""
    mine: dict[str, Any] = {name: value[u : u + 1] for name in PER_IMAGE if (value := getattr(ctx, name)) is not None}
    return replace(
        ctx,
        **mine,
        attention=Attention(lambda stat, layer: _read(ctx, stat, layer)[u : u + 1]),
        generator=lambda _: ctx.generator(u),
    )


def padded(ctx: Context, value: float, slots: int = 3) -> Context:
    """The same question with more slots that hold no token, and ``value`` in all such slots."""

    def widen(x: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([x, x.new_full((x.shape[0], slots, *x.shape[2:]), fill)], 1)

    valid = widen(ctx.valid, False)

    def poison(x: torch.Tensor) -> torch.Tensor:
        return widen(x, value).masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), value)

    return replace(
        ctx,
        valid=valid,
        grid=widen(ctx.grid, -1),
        place=widen(ctx.place, 0),
        features=poison(ctx.features),
        encoder_features=None if ctx.encoder_features is None else poison(ctx.encoder_features),
        pixels=None if ctx.pixels is None else poison(ctx.pixels),
        attention=Attention(lambda stat, layer: poison(_read(ctx, stat, layer))),
    )


def _read(ctx: Context, stat: str, layer: int | float) -> torch.Tensor:
    return getattr(ctx.attention, stat)(layer)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
