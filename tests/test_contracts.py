"""The serving contract on every method's card, asked of the method itself about pictures in tiny models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from device import OnDevice, Watch
from torch import Tensor

import visiontok
from visiontok import Budget, Card, Context, Selection
from visiontok.conformance.checks import Case
from visiontok.conformance.spy import Asked
from visiontok.conformance.zoo import batch, build
from visiontok.context import Attention

pytestmark = pytest.mark.engine

PROMPT = [card for card in visiontok.methods() if card.stage == "prompt"]
CACHE = [card for card in visiontok.methods() if card.stage == "cache"]
ARCHITECTURES = ("llava", "qwen2_5_vl")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def cards(which: Callable[[Card], bool]) -> Any:
    return pytest.mark.parametrize("card", list(filter(which, PROMPT)), ids=lambda card: card.name)


@functools.cache
def case(name: str, architecture: str, keep: int | float = 5) -> Case:
    recipe = visiontok.recipe(name)
    budget = Budget.ratio(keep) if isinstance(keep, float) else Budget.tokens(keep)
    if recipe.average is None and len(recipe.stages) > 1:  # the published stages behind the first one have their own
        recipe = replace(recipe, stages=recipe.stages[:1])
    return Case(recipe, architecture, budget)


def asked(name: str, architecture: str, **inputs: Any) -> Asked:
    """What the method was asked before the language model, in a run on the batch of the zoo with other ``inputs``."""
    mine = case(name, architecture)
    if not inputs:
        return mine.plain.asked[0]
    return mine.run(mine.asking, inputs).asked[0]


def kept(question: Asked) -> list[list[int]]:
    """Kept tokens of each image."""
    keep = question.answer.keep & question.context.valid
    return [row.nonzero()[:, 0].tolist() for row in keep]


# ------------------------------------------------------------------------------------------------------- sync_free


def on_device(ctx: Context) -> Context:
    """The same question with every tensor on the pretended device."""
    tensors = {f.name: OnDevice(x) for f in fields(ctx) if torch.is_tensor(x := getattr(ctx, f.name))}
    project = ctx.project
    return replace(
        ctx,
        **tensors,
        attention=Attention(lambda stat, layer: OnDevice(getattr(ctx.attention, stat)(layer))),
        project=None if project is None else lambda x: OnDevice(project(x.inner)),
    )


def reads(method: visiontok.Method, ctx: Context) -> tuple[list[str], Selection]:
    """Where ``select`` waited for the device, and its answer."""
    with Watch() as watch, torch.no_grad():
        answer = method.select(on_device(ctx))
        found = list(watch.reads)
    return found, answer if isinstance(answer, Selection) else Selection(keep=answer)


SYNC_FREE = [card for card in (*PROMPT, *CACHE) if card.contract.sync_free]


@every_architecture
@pytest.mark.parametrize("card", SYNC_FREE, ids=lambda card: card.name)
def test_sync_free_selection_reads_nothing_back(card: Card, architecture: str) -> None:
    question = asked(card.name, architecture)
    found, answer = reads(question.method, question.context)
    assert found == []
    assert torch.equal(answer.keep.inner, question.answer.keep)  # type: ignore[attr-defined]


@cards(lambda card: not card.contract.sync_free and card.contract.count_from_grid)
def test_who_does_not_claim_it_does_read_something_back(card: Card) -> None:
    """A card that promises less than it could is wrong too. Counts that the grid does not tell are read by the engine;
    some methods only ask something of pictures in tiles."""
    question = asked(card.name, "llava_next")
    found: list[str] = []
    try:
        found = reads(question.method, question.context)[0]
    except RuntimeError as error:  # host and device meet, on a real device an error or a copy
        found = [str(error)]
    assert found


OFFENDERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "copied into a host tensor": lambda x: torch.zeros(6).copy_(x),
    "nonzero": lambda x: (x > 0).nonzero(),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "where with one argument": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "assignment by a boolean index": lambda x: x.clone().__setitem__(x > 0, x[:3]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.abs().long().bincount(),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(x.abs().long()),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
    "svd": lambda x: torch.linalg.svd(x[:, None] * x),
    "inverse": lambda x: torch.linalg.inv(torch.diag(x)),
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "sort": lambda x: x.sort(descending=True, stable=True).indices,
    "index by a long tensor": lambda x: x[x.argsort()],
    "assignment by a long index": lambda x: x.clone().__setitem__(x.argsort(), x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "upload": lambda x: x + torch.ones(6).to(x.device),
    "assignment of a number": lambda x: x.clone().__setitem__(0, 1.0),
    "shape": lambda x: x.shape[0] + len(x),
}


def planted(act: Callable[[Tensor], Any]) -> list[str]:
    with Watch() as watch:
        act(OnDevice(torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])))
        return list(watch.reads)


@pytest.mark.parametrize("name", OFFENDERS)
def test_the_watch_sees(name: str) -> None:
    assert planted(OFFENDERS[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_the_watch_is_not_alarmed_by(name: str) -> None:
    assert planted(HARMLESS[name]) == []


# -------------------------------------------------------------------------------------------- question_independent


@every_architecture
@cards(lambda card: card.contract.question_independent)
def test_other_questions_keep_the_same_tokens(card: Card, architecture: str) -> None:
    """Other words, and another number of them."""
    plain = kept(asked(card.name, architecture))
    for question in ({"seed": 1}, {"seed": 2, "text": 11}):
        other = batch(architecture, build(architecture), **question)
        assert kept(asked(card.name, architecture, **other)) == plain


# ------------------------------------------------------------------------------------------------- count_from_grid


@every_architecture
@cards(lambda card: card.contract.count_from_grid and card.budget)
def test_the_count_follows_from_the_grid(card: Card, architecture: str) -> None:
    """Sizes and budget tell it before there are features, whatever the pixels are."""
    plain = case(card.name, architecture).inputs
    noise = torch.randn(plain["pixel_values"].shape, generator=torch.Generator().manual_seed(7))
    for pixels in (plain["pixel_values"], noise.to(plain["pixel_values"]), torch.zeros_like(noise).double()):
        question = asked(card.name, architecture, **plain | {"pixel_values": pixels})
        expected = [min(5, n) for n in question.context.size.tolist()]
        assert [len(tokens) for tokens in kept(question)] == expected


# ------------------------------------------------------------------------------------------------------- per_image


def alone(architecture: str, inputs: dict[str, Any], u: int) -> dict[str, Any]:
    """A prompt of image ``u`` of a batch and nothing else but a few words."""
    mine = {}
    if architecture == "llava":
        mine["pixel_values"], tokens, borders = inputs["pixel_values"][u : u + 1], 16, ([], [])
    else:
        grid = inputs["image_grid_thw"]
        patches = inputs["pixel_values"].split(grid.prod(1).tolist())
        mine["pixel_values"], mine["image_grid_thw"] = patches[u], grid[u : u + 1]
        tokens, borders = len(patches[u]) // 4, ([102], [103])
    ids = torch.tensor([[1, 9, *borders[0], *[100] * tokens, *borders[1], 8, 7]])
    mine |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mine if architecture == "llava" else mine | {"mm_token_type_ids": (ids == 100).int()}


@every_architecture
@cards(lambda card: card.contract.per_image and card.contract.question_independent)
def test_an_image_in_a_batch_keeps_what_it_keeps_alone(card: Card, architecture: str) -> None:
    """Through the whole model, in a prompt of its own; the kit's check asks the method alone."""
    inputs = case(card.name, architecture).inputs
    together = kept(asked(card.name, architecture))
    assert len(together) == 4
    for u, tokens in enumerate(together):
        assert kept(asked(card.name, architecture, **alone(architecture, inputs, u))) == [tokens]
