"""A share of the budget for coordinate tokens: the model's own phases, whatever the method, on both planes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import test_mllama
import torch
import transformers
from torch import Tensor

import visiontok
import visiontok.functional as F
from visiontok import Method, Recipe, Selection
from visiontok._window import minor
from visiontok.budget import Budget
from visiontok.conformance.zoo import batch, build
from visiontok.context import Context
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Card, Mass, Stage

K, SHARE = 7, 0.45  # three tokens by cosine, three by sine


@dataclass(frozen=True)
class First(Method):
    """Keeps the first candidates and remembers what it was asked."""

    seen: list[Context] = field(default_factory=list)
    card = Card(name="first", title="-", paper="-", venue="-", stage="prompt", needs="-")

    def select(self, ctx: Context) -> Tensor | Selection:
        self.seen.append(ctx)
        return ctx.valid & (ctx.valid.cumsum(1) <= ctx.count[:, None])


@dataclass(frozen=True)
class Erasing(First):
    """The same, and what it merges becomes zero."""

    def select(self, ctx: Context) -> Selection:
        return Selection(keep=super().select(ctx), features=torch.zeros_like(ctx.features))


def reserving(method: Method, *layers: int | None, keep: int = K) -> Recipe:
    """A selection before the model (None) or at decoder layers, each with a reserve."""
    stages = [
        Stage(
            kind="cut" if layer else "prompt", method=method, layer=layer, keep=Budget.tokens(keep - i), reserve=SHARE
        )
        for i, layer in enumerate(layers)
    ]
    return Recipe(stages=tuple(stages))


def positions_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(A, B, N): what the stock language model is given; where it is given nothing, tokens are counted per row."""
    found: dict[str, Any] = {}
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda m, a, k: found.update(k), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    given = found.get("position_ids")
    if given is None:
        return (inputs["attention_mask"].cumsum(1) - 1)[None]
    ahead = (inputs["attention_mask"].cumsum(1) == 0).sum(1, keepdim=True)
    return given[-3:] if given.ndim == 3 else (given - ahead)[None]  # a forward numbers padding, too


def phases(model: Any, positions: Tensor) -> tuple[list[float], list[float]]:
    """V and U of one image, written out; positions (A, N)."""
    config = model.config.get_text_config()
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = [np.float32(1) / np.float32(rope["rope_theta"] ** (i / width)) for i in range(0, width, 2)]
    angles = [[np.float32(p) * f for p in token for f in frequencies] for token in positions.T.tolist()]
    v, u = ([round(float(np.mean([np.float64(fn(a)) for a in row])), 6) for row in angles] for fn in (np.cos, np.sin))
    return v, u


def axes(model: Any, positions: Tensor, k: int, candidates: list[int]) -> set[int]:
    """The k largest of V and the k largest of U."""
    best = (sorted(candidates, key=lambda i: (-scores[i], i))[:k] for scores in phases(model, positions))
    return {i for one in best for i in one}


@pytest.mark.parametrize("k", [0, 1, 5])
def test_coordinates_are_the_largest_mean_cosines_and_sines(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    angle, valid = 9 * torch.rand(3, 12, 4, generator=g), torch.rand(3, 12, generator=g) < 0.7
    angle[:, 7] = angle[:, 3]  # equals: the lower index
    budgets = torch.tensor([k, 2, 0])
    mine = F.coordinates(angle.cos(), angle.sin(), budgets, valid)
    for b, n in enumerate(budgets.tolist()):
        expected = set()
        for table in (angle[b].cos(), angle[b].sin()):
            scores = table.double().mean(1).tolist()
            expected |= set(sorted(valid[b].nonzero()[:, 0].tolist(), key=lambda i: (-round(scores[i], 6), i))[:n])
        assert set(mine[b].nonzero()[:, 0].tolist()) == expected
        assert torch.equal(F.coordinates(angle[b].cos(), angle[b].sin(), n, valid[b]), mine[b])


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_reserved_are_the_models_own_coordinates(name: str) -> None:
    """Before the model and at a cut, where those of the tokens still alive count, by their positions in the prompt."""
    model, method, keep = build(name), First(), 3 if name == "gemma3" else K
    inputs = batch(name, model)
    positions = positions_of(model, inputs)
    with visiontok.compress(model, reserving(method, None, 2, keep=keep)) as compression, torch.no_grad():
        model(**inputs)
        ledger = compression.ledger
    units = ledger.units
    for u in range(4):
        row, slots = int(units.row[u]), units.slots[u][units.valid[u]]
        mine, alive = positions[:, row, slots], list(range(len(slots)))
        for layer, budget, ctx in zip((0, 2), (keep, keep - 1), method.seen, strict=True):
            held = axes(model, mine, int(SHARE * budget), alive)
            rest = [i for i in alive if i not in held]
            assert ctx.valid[u].nonzero()[:, 0].tolist() == rest
            assert int(ctx.count[u]) == budget - len(held)
            alive = sorted(held | set(rest[: budget - len(held)]))
            assert ledger.alive(layer)[row, slots].nonzero()[:, 0].tolist() == alive


@pytest.mark.engine
def test_coordinates_move_with_the_place_of_the_image() -> None:
    """One axis of positions: the same image behind more text has other coordinates; padding is no text."""
    model, kept = build("llava"), []
    for ahead, pad in ((0, 0), (0, 5), (9, 0)):
        inputs = batch("llava", model, rows=1, images=1, pad=pad)
        text = torch.full((1, ahead), 7)
        inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :pad], text, inputs["input_ids"][:, pad:]], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(text)], 1)
        method = First()
        with visiontok.compress(model, reserving(method, None)), torch.no_grad():
            model(**inputs)
        kept.append(~method.seen[0].valid[0])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_generation_forward_and_shorter_inputs_reserve_alike(name: str) -> None:
    model, recipe = build(name), visiontok.recipe("divprune", keep=K)
    inputs = batch(name, model)
    with visiontok.compress(model, recipe, reserve=SHARE) as compression, torch.no_grad():
        model(**inputs)
        alive = compression.ledger.alive(0)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(compression.ledger.alive(0), alive)
    if name != "qwen3_vl" or minor(transformers.__version__) >= (5, 18):  # DeepStack needs encoded images
        short = visiontok.compress_inputs(model, inputs, recipe, reserve=SHARE)
        assert torch.equal(short.ledger.alive(0), alive)
        assert short.report.recipe == "divprune[reserve=0.45]"


@pytest.mark.engine
def test_an_image_of_a_later_turn_stands_where_it_stands_in_the_conversation() -> None:
    model, once, turns = build("llava"), First(), First()
    inputs = batch("llava", model, rows=1, images=2, pad=0)
    split = int((inputs["input_ids"][0] == 100).nonzero()[15]) + 1
    with visiontok.compress(model, reserving(once, None, 2)), torch.no_grad():
        model(**inputs)
    with visiontok.compress(model, reserving(turns, None, 2)), torch.no_grad():
        first = {"input_ids": inputs["input_ids"][:, : split + 1], "pixel_values": inputs["pixel_values"][:1]}
        cache = model(**first, use_cache=True).past_key_values
        model(
            input_ids=inputs["input_ids"][:, split + 1 :],
            pixel_values=inputs["pixel_values"][1:],
            past_key_values=cache,
        )
    for stage in (0, 1):
        assert torch.equal(turns.seen[2 + stage].valid[0], once.seen[stage].valid[1])
    assert not torch.equal(once.seen[0].valid[0], once.seen[0].valid[1])


@pytest.mark.engine
def test_what_is_reserved_is_not_merged() -> None:
    model, method, found = build("llava"), Erasing(), {}
    inputs = batch("llava", model)
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, a, k: found.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with visiontok.compress(model, reserving(method, None)) as compression, torch.no_grad():
        model(**inputs)
        units, alive = compression.ledger.units, compression.ledger.alive(0)
    hook.remove()
    [ctx] = method.seen
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        states = found["x"][b, -int(alive[b].sum()) :]  # rows are left padded
        place = alive[b].cumsum(0) - 1
        for u in (units.row == b).nonzero()[:, 0].tolist():
            for i, slot in enumerate(units.slots[u].tolist()):
                if alive[b, slot]:
                    expected = ctx.features[u, i] * ~ctx.valid[u, i]
                    torch.testing.assert_close(states[place[slot]], expected)
        assert mask[alive[b]].all()


@pytest.mark.engine
def test_visual_tokens_outside_the_prompt_have_no_coordinates() -> None:
    model = test_mllama.build()
    with visiontok.compress(model, "norm", keep=3, reserve=0.2), pytest.raises(UnsupportedError, match="no positions"):
        model(**test_mllama.batch(model))


def test_naming_saving_and_errors() -> None:
    recipe = visiontok.recipe("idpruner", keep=K, scorer="norm").with_reserve(0.25)
    assert recipe.label == "idpruner[norm, reserve=0.25]"
    assert recipe.with_mass(Mass()).label == "idpruner[norm, reserve=0.25, mass]"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.hash() != recipe.with_reserve(0).hash() == visiontok.recipe("idpruner", keep=K, scorer="norm").hash()
    for share in (0.5, -0.1, True, "0.1", float("nan")):
        with pytest.raises(ConfigError, match=r"reserve=.*: a share of the budget, at least 0 and below 1/2"):
            visiontok.recipe("norm").with_reserve(share)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"reserve=0.2: the exit stage picks no tokens"):
        Stage(kind="exit", layer=2, reserve=0.2)
    with pytest.raises(ConfigError, match=r"reserve=0.2: vtw picks no tokens"):
        visiontok.recipe("vtw").with_reserve(0.2)


@pytest.mark.engine
def test_models_without_positions_to_compute_are_refused() -> None:
    from visiontok.engine.rotary import rotary_tables

    model, other = build("llava").model.language_model, torch.nn.Module()
    other.config = model.config
    with pytest.raises(UnsupportedError, match="no rotary positions"):
        rotary_tables(other, torch.arange(3), 1)
    other.rotary_emb = torch.nn.Identity()
    other.rotary_emb.forward = lambda x, position_ids: torch.ones(3, 4)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="no cosines and sines per token"):
        rotary_tables(other, torch.arange(3), 1)
    cos, sin = rotary_tables(model, torch.arange(3), 2)
    assert cos.shape == sin.shape == (2, 3, 8)
