"""Methods and adapters with one fault each, and sound ones, for test_check.py. A user's file may look like this."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from visiontok.adapters.gemma3 import Gemma3Adapter
from visiontok.adapters.llava import LlavaAdapter
from visiontok.adapters.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter

from visiontok import Card, Context, Contract, Method, Recipe, Selection, Stage
from visiontok.functional import rank, topk


def length(ctx: Context) -> torch.Tensor:
    """(U, N): the norm of each token."""
    return ctx.features.float().norm(dim=-1)


# ---- sound


def longest(ctx):
    return topk(length(ctx), ctx.count, ctx.valid)


def last(ctx):
    return ctx.valid & (ctx.valid.flip(1).cumsum(1).flip(1) <= ctx.count[:, None])


last.contract = Contract(order_free=False)


def centre(ctx):
    """Nearest to the middle of the image; on a regular grid many tokens tie."""
    place = ctx.need_grid()[..., 1:].float()
    middle = (place * ctx.valid[..., None]).sum(1, keepdim=True) / ctx.valid.sum(1)[:, None, None]
    return topk(-(place - middle).norm(dim=-1), ctx.count, ctx.valid)


def draw(ctx):
    scores = [torch.rand(ctx.valid.shape[1], generator=ctx.generator(u)) for u in range(len(ctx.valid))]
    return topk(torch.stack(scores), ctx.count, ctx.valid)


draw.contract = Contract(question_independent=False)  # draws are seeded by the prompt


def merge_into_longest(ctx):
    """What is dropped is added to every kept token, as its mean."""
    keep = longest(ctx)
    rest = ctx.valid & ~keep
    mean = torch.where(rest[..., None], ctx.features, 0).sum(1) / rest.sum(1)[:, None].clamp_min(1)
    return Selection(keep=keep, features=(ctx.features + mean[:, None]) / 2)


# ---- faulty, one way each


def one_too_many(ctx):
    return topk(length(ctx), ctx.count + 1, ctx.valid)


def shortest_slot(ctx):
    """Padded slots are zero, so they win."""
    return topk(-length(ctx), ctx.count)


def against_the_batch(ctx):
    return topk((ctx.features - ctx.features.mean((0, 1))).norm(dim=-1), ctx.count, ctx.valid)


def everything(ctx):
    return ctx.valid


def global_draw(ctx):
    return topk(torch.rand(ctx.valid.shape), ctx.count, ctx.valid)


def pythons_draw(ctx):
    return topk(torch.tensor([[random.random() for _ in row] for row in ctx.valid]), ctx.count, ctx.valid)


def first(ctx):
    return ctx.valid & (ctx.valid.cumsum(1) <= ctx.count[:, None])


def quantiles(ctx):
    """Equal steps through the tokens in order of length, from the longest to the shortest."""
    keep = torch.zeros_like(ctx.valid)
    for u, (place, valid, k) in enumerate(
        zip(rank(length(ctx), ctx.valid), ctx.valid, ctx.count.tolist(), strict=True)
    ):
        n = int(valid.sum())
        for i in range(k):
            keep[u] |= place == i * (n - 1) // (k - 1)
    return keep


def relative(ctx):
    scores = length(ctx)
    return topk(scores / scores.amax(1, keepdim=True), ctx.count, ctx.valid)


def centred_in_place(ctx):
    ctx.features[~ctx.valid] = 0
    ctx.features.sub_(ctx.features.sum(1, keepdim=True) / ctx.valid.sum(1)[:, None, None])
    return topk(length(ctx), ctx.count, ctx.valid)


def through_numpy(ctx):
    return topk(torch.from_numpy(ctx.features.numpy()).float().norm(dim=-1), ctx.count, ctx.valid)


def asked_for(ctx):
    text = (ctx.text_features * ctx.text_valid[..., None]).sum(1)
    return topk((ctx.features @ text[ctx.row][..., None])[..., 0], ctx.count, ctx.valid)


def merge_with_next(ctx):
    return Selection(keep=longest(ctx), features=(ctx.features + ctx.features.roll(1, 1)) / 2)


def card(name: str, **claims: object) -> Card:
    return Card(name=name, title="-", paper="-", venue="-", stage="prompt", needs="features", **claims)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AboveAverage(Method):
    """How many it keeps depends on the pixels; the contract does not say so."""

    card: ClassVar[Card] = card("above_average", budget=False)

    def select(self, ctx: Context) -> torch.Tensor:
        scores = length(ctx)
        return ctx.valid & (scores >= torch.where(ctx.valid, scores, 0).sum(1, True) / ctx.valid.sum(1, True))


@dataclass(frozen=True)
class Adaptive(AboveAverage):
    """The same, said."""

    card: ClassVar[Card] = card("adaptive", budget=False, contract=Contract(count_from_grid=False))


@dataclass(frozen=True)
class SecretDraw(Method):
    """Draws, and its card does not say so."""

    card: ClassVar[Card] = card("secret_draw")

    def select(self, ctx: Context) -> torch.Tensor:
        return draw(ctx)


nothing_hidden = Recipe(stages=(Stage(kind="inject", layer=0),), name="nothing hidden")


# ---- adapters


class Sound(LlavaAdapter):
    """As shipped."""


class WrongText(LlavaAdapter):
    text = "text_model"


class RowsForColumns(LlavaAdapter):
    def grids(self, record):
        return [grid[:, [0, 2, 1]] for grid in super().grids(record)]


class OnePlace(LlavaAdapter):
    def grids(self, record):
        return [grid.clamp_max(2) for grid in super().grids(record)]


class UnitsTransposed(LlavaAdapter):
    def units(self, record):
        return [pixels.transpose(1, 2) for pixels in super().units(record)]


class WindowsForgotten(Qwen25VLAdapter):
    def layers(self, record):
        return replace(super().layers(record), order=lambda run: None)


class OtherPlaces(Qwen3VLAdapter):
    def parts(self, record, kept):
        [part] = super().parts(record, kept)
        part.changes["interp_indices"] = part.changes["interp_indices"].roll(4, 0)
        return [part]


class Shifted(LlavaAdapter):
    def group(self, record, patches):
        return [group.roll(1, 0) for group in super().group(record, patches)]


class NoClsToken(LlavaAdapter):
    cls_token = False


class FalseClsToken(Gemma3Adapter):
    cls_token = True


class NoOwnMask(Gemma3Adapter):
    own_mask = False


class NoDeepStack(Qwen3VLAdapter):
    model_types = ("qwen3_vl",)
    deepstack = None


class Unknown(LlavaAdapter):
    model_types = ("llava_of_tomorrow",)
