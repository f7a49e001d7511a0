"""Cuts whose score is no attention row, in models: kept tokens are those of a plain loop over what hooks on the stock
model see. Four families: plain, M-RoPE, DeepStack, norms on both sides of a module and masks of their own; two padded
prompts of two images each, grouped-query attention."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from naive import Array, cos
from test_pmod import some_routers
from torch.utils.flop_counter import FlopCounterMode

import visiontok
from visiontok import Budget, Card, Context, Method, Needs, Recipe
from visiontok.conformance.zoo import BANNED, IMAGE, batch, build
from visiontok.errors import UnsupportedError
from visiontok.method import Stage
from visiontok.recipes import find

pytestmark = pytest.mark.engine

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
CUT = 2  # the input of this layer; layers 0 and 1 see every token


@dataclass
class Seen:
    """What the stock model computes for one batch; per decoder layer (B, N, …) arrays, images as positions per row."""

    inputs: dict[str, Any]
    rows: list[int]
    places: list[list[int]]
    states: list[Array] = field(default_factory=list)
    modules: dict[int, list[tuple[Array, Array]]] = field(default_factory=dict)
    attention: list[Array] = field(default_factory=list)  # head means (B, N, N)
    peaks: list[Array] = field(default_factory=list)  # largest of all heads (B, N, N)
    last: list[Array] = field(default_factory=list)  # (B, H, N), what the last token looks at
    heads: dict[str, list[Array]] = field(default_factory=dict)  # (B, N, H, d), before rotary positions


@functools.cache
def seen(name: str) -> Seen:
    model, inputs = build(name), batch(name, build(name))
    found = Seen(inputs, [], [])
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        places = [i for i, token in enumerate(ids) if token == IMAGE]
        breaks = [0, *(j for j in range(1, len(places)) if places[j] != places[j - 1] + 1), len(places)]
        for start, end in itertools.pairwise(breaks):
            found.rows.append(b)
            found.places.append(places[start:end])

    def array(x: Any) -> Array:
        return (x[0] if isinstance(x, tuple) else x).detach().double().numpy()

    handles = []
    for index, layer in enumerate(model.get_decoder().layers):

        def entering(module: Any, args: Any, kwargs: Any) -> None:
            found.states.append(array(args[0] if args else kwargs["hidden_states"]))

        def made(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            found.modules.setdefault(index, []).append((array(x), array(output)))

        def projected(module: Any, args: Any, output: Any, what: str) -> None:
            width = model.get_decoder().layers[0].self_attn.head_dim
            x = array(output).reshape(*inputs["input_ids"].shape, -1, width) if output.ndim == 3 else array(output)
            found.heads.setdefault(what, []).append(
                x if x.shape[1] == inputs["input_ids"].shape[1] else x.swapaxes(1, 2)
            )

        for what in "qkv":  # behind the norm of the heads, where the family has one
            last = getattr(layer.self_attn, f"{what}_norm", getattr(layer.self_attn, f"{what}_proj"))
            handles.append(last.register_forward_hook(functools.partial(projected, what=what)))
        handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        handles += [m.register_forward_hook(made, with_kwargs=True) for m in (layer.self_attn, layer.mlp)]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    eager = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    twin = copy.deepcopy(build(name, "eager", torch.float32))
    twin.load_state_dict(model.state_dict())  # drawn in another precision
    with torch.no_grad():
        maps = twin(**eager, output_attentions=True).attentions
    found.peaks = [m.amax(1).double().numpy() for m in maps]
    found.last = [m[:, :, -1].double().numpy() for m in maps]
    found.attention = [m.mean(1).double().numpy() for m in maps]
    return found


def asking(inputs: dict[str, Any], row: int) -> list[int]:
    """Positions of the text behind the last image."""
    ids = inputs["input_ids"][row].tolist()
    return list(range(max(i for i, token in enumerate(ids) if token == IMAGE) + 1, len(ids)))


def best(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def share(scores: list[float]) -> list[float]:
    return [s / sum(scores) for s in scores]


# ------------------------------------------------------------------------- the rules: image number → a score per token


def variation(s: Seen, u: int) -> list[float]:
    before, after = (s.states[layer][s.rows[u]] for layer in (CUT - 1, CUT))
    return [float(np.linalg.norm(after[i] - before[i])) for i in s.places[u]]


def transition(s: Seen, u: int, *, official: bool = False) -> list[float]:
    total = [0.0] * len(s.places[u])
    mask = s.inputs["attention_mask"].bool().numpy()
    for layer in range(CUT):
        for x, y in s.modules[layer]:
            turn = {
                (b, i): math.exp(1 - cos(x[b, i], y[b, i]))
                for b in range(len(x))
                for i in range(mask.shape[1])
                if mask[b, i]
            }
            mine = [(s.rows[u], i) for i in s.places[u]]
            whole = sum(turn.values()) if official else sum(turn[place] for place in mine)
            for n, (b, i) in enumerate(mine):
                total[n] += float(np.linalg.norm(y[b, i]) / np.linalg.norm(x[b, i])) * turn[b, i] / whole
    return total


def guided(s: Seen, u: int) -> list[float]:
    asks = asking(s.inputs, s.rows[u])
    attention = s.attention[CUT - 1][s.rows[u]][asks].mean(0)[s.places[u]]
    return [t + a for t, a in zip(share(transition(s, u)), share(attention.tolist()), strict=True)]


def entropy(s: Seen, u: int, *, of: str = "q", normalise: bool = False) -> list[float]:
    heads = s.states[CUT] if of == "states" else s.heads[of][CUT - 1]
    if of == "states":
        heads = heads.reshape(*heads.shape[:2], s.heads["q"][0].shape[2], -1)
    scores = []
    for i in s.places[u]:
        z = heads[s.rows[u], i] - heads[s.rows[u], i].mean(0)
        values = np.linalg.eigvalsh(z @ z.T / len(z)).clip(min=0)
        values = values / values.sum() if normalise else values
        scores.append(-sum(v * math.log(v) for v in values if v > 1e-12) / math.log(len(z)))
    return scores


def smoothed(s: Seen, u: int) -> list[float]:
    """Logarithms of attention are logits but for a number per head."""
    scores = np.log(s.last[CUT][s.rows[u]][:, s.places[u]]).mean(0)
    return [float(scores[max(0, i - 2) : i + 3].mean()) for i in range(len(scores))]


def peaks(s: Seen, u: int) -> list[float]:
    row, own = s.rows[u], s.places[u]
    largest = s.peaks[CUT - 1][row]
    return [sum(largest[j, i] for j in own) * sum(largest[t, i] for t in asking(s.inputs, row)) for i in own]


ONE_CUT = {"layers": (CUT,), "shares": (1.0,)}
RULES: dict[str, tuple[str, dict[str, Any], Callable[[Seen, int], list[float]]]] = {
    "v2drop": ("v2drop", ONE_CUT, variation),
    "transprune": ("transprune", ONE_CUT | {"since": 0}, guided),
    "transprune[ttv]": ("transprune", ONE_CUT | {"since": 0, "guided": False}, transition),
    "transprune[ttv], official": (
        "transprune", ONE_CUT | {"since": 0, "guided": False, "fidelity": "official"},
        functools.partial(transition, official=True),
    ),
    "fitprune": ("fitprune", ONE_CUT, peaks),
    "gemfilter": ("gemfilter", {"layer": CUT}, smoothed),
    "entropyprune": ("entropyprune", {"layer": CUT}, entropy),
    "entropyprune[keys]": ("entropyprune", {"layer": CUT, "of": "keys"}, functools.partial(entropy, of="k")),
    "entropyprune[values]": ("entropyprune", {"layer": CUT, "of": "values"}, functools.partial(entropy, of="v")),
    "entropyprune[normalised]": (
        "entropyprune", {"layer": CUT, "normalise": True}, functools.partial(entropy, normalise=True),
    ),
    "entropyprune[states]": ("entropyprune", {"layer": CUT, "of": "states"}, functools.partial(entropy, of="states")),
}  # fmt: skip


def kept_of(model: Any, inputs: dict[str, Any], recipe: Any, layer: int = CUT) -> list[list[int]]:
    """Per image which of its tokens are alive in ``layer``."""
    with visiontok.compress(model, recipe) as compression, torch.no_grad():
        model(**inputs)
        alive, units = compression.ledger.alive(layer), compression.ledger.units
    places = zip(units.row, units.slots, units.valid, strict=True)
    return [alive[row][slots][valid].nonzero()[:, 0].tolist() for row, slots, valid in places]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_are_those_of_the_published_rule(name: str, rule: str) -> None:
    s, (method, options, score) = seen(name), RULES[rule]
    for keep in (1, 3, 7):
        k = min(keep, *map(len, s.places))
        recipe = visiontok.recipe(method, keep=k, **options)
        assert kept_of(build(name), s.inputs, recipe) == [best(score(s, u), k) for u in range(len(s.places))]


@dataclass(frozen=True)
class Reader(Method):
    """Keeps what it is asked for and remembers the peaks of attention that it saw."""

    read: dict[str, torch.Tensor] = field(default_factory=dict)
    card = Card(name="reader", title="-", paper="-", venue="-", stage="decoder", needs="-")

    def needs(self) -> Needs:
        return Needs(decoder_own_peaks=(-1,), decoder_text_peaks=(-1,))

    def select(self, ctx: Context) -> torch.Tensor:
        self.read.update(own=ctx.attention.own_peaks(-1), text=ctx.attention.text_peaks(-1))
        return ctx.valid


def test_peaks_are_means_over_the_rows_of_the_image_itself_and_of_the_text() -> None:
    """Two images of different sizes in a row, of which the second looks at the first one, too."""
    s, reader = seen("qwen2_5_vl"), Reader()
    with visiontok.compress(build("qwen2_5_vl"), Recipe(stages=(Stage(kind="cut", layer=CUT, method=reader),))):
        build("qwen2_5_vl")(**s.inputs)
    for u, own in enumerate(s.places):
        row = s.rows[u]
        for name, rows in (("own", own), ("text", asking(s.inputs, row))):
            expected = torch.from_numpy(s.peaks[CUT - 1][row][rows][:, own].mean(0)).float()
            torch.testing.assert_close(reader.read[name][u][: len(own)], expected, atol=1e-6, rtol=1e-5)


def test_a_later_cut_sees_what_the_first_one_left() -> None:
    """Scores of its own layers, among those that are still there."""
    model, s = build("llava"), seen("llava")
    one = kept_of(model, s.inputs, visiontok.recipe("v2drop", layers=(1,), shares=(0.5,)), 1)
    both = visiontok.recipe("v2drop", layers=(1, 3), shares=(0.5, 0.25))
    first, second = (kept_of(model, s.inputs, both, layer) for layer in (1, 3))
    assert first == one
    assert all(len(b) == 4 and set(b) < set(a) for a, b in zip(first, second, strict=True))


def test_two_heads_less_their_mean_have_no_entropy() -> None:
    model, inputs = build("llava"), seen("llava").inputs
    with (
        visiontok.compress(model, "entropyprune", keep=3, of="keys", normalise=True),
        pytest.raises(UnsupportedError, match=r"of='keys', but 2 head\(s\).*use of='queries'"),
    ):
        model(**inputs)


# ------------------------------------------------------------------------------------------------------- looking ahead


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_layers_that_ran_ahead_are_counted(name: str) -> None:
    """The report's FLOPs are those of the counter, but for the one row of products that is looked at."""
    model = build(name, "eager", torch.float32)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in seen(name).inputs.items()}
    with FlopCounterMode(display=False) as stock, torch.no_grad():
        model(**inputs)
    with (
        visiontok.compress(model, "gemfilter", keep=3, layer=CUT) as compression,
        FlopCounterMode(display=False) as run,
        torch.no_grad(),
    ):
        model(**inputs)
    account = compression.report.account
    assert account.decoder is not None
    assert account.decoder_stock is not None
    config, (rows, length) = model.config.text_config, inputs["input_ids"].shape
    row = 2 * rows * length * config.num_attention_heads * 8
    counted = _work(run) - _work(stock)
    assert counted == sum(account.decoder) - sum(account.decoder_stock) + row
    assert account.decoder[0] > account.decoder_stock[0] > account.decoder[3]


def _work(counter: FlopCounterMode) -> int:
    """All FLOPs but those of rotary tables, which old releases of transformers make by a product of matrices."""
    tables = [sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(tables)


def test_looking_ahead_leaves_no_trace_in_what_the_model_returns() -> None:
    """Hidden states are those of the run that counts; with every token kept they are the stock model's."""
    model, inputs = build("llava"), seen("llava").inputs
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
        with visiontok.compress(model, "gemfilter", keep=15):
            short = model(**inputs, output_hidden_states=True)
    assert len(short.hidden_states) == len(stock.hidden_states)
    assert {state.shape[1] for state in short.hidden_states[1:]} == {short.hidden_states[1].shape[1]}
    assert short.hidden_states[1].shape[1] < stock.hidden_states[1].shape[1]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock.logits)


def test_looking_ahead_needs_hooks_and_an_empty_cache() -> None:
    model, inputs = build("llava"), seen("llava").inputs
    with pytest.raises(UnsupportedError, match=r"needs the hooks of compress\(\)"):
        visiontok.compress_inputs(model, inputs, "gemfilter", keep=3)
    with visiontok.compress(model, "gemfilter", keep=3), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        longer = inputs | {"attention_mask": torch.cat([torch.ones_like(inputs["attention_mask"])] * 2, 1)}
        with pytest.raises(UnsupportedError, match="holds an earlier turn"):
            model(**longer, past_key_values=cache)


# ----------------------------------------------------------------------------------------------------- prefix_cacheable

DECODER = [card for card in visiontok.methods() if card.stage == "decoder"]


def with_question(inputs: dict[str, Any], seed: int, more: int) -> dict[str, Any]:
    """The same prompts with other words behind the last image, ``more`` of them more."""
    g = torch.Generator().manual_seed(seed)
    out = dict(inputs)
    ids = inputs["input_ids"].clone()
    for row in range(len(ids)):
        asks = asking(inputs, row)
        ids[row, asks] = torch.randint(5, 90, (len(asks),), generator=g)
    assert not (ids == max(BANNED)).any()
    tail = torch.randint(5, 90, (len(ids), more), generator=g)
    out["input_ids"] = torch.cat([ids, tail], 1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            out[name] = torch.cat([inputs[name], torch.full_like(tail, value).to(inputs[name].dtype)], 1)
    return out


def kept_for_each_question(name: str, method: str, **options: Any) -> list[list[list[list[int]]]]:
    """What is alive in each layer for three questions, one of them longer."""
    model, inputs = build(name), seen(name).inputs
    recipe = visiontok.recipe(method, **options)
    first = recipe.stages[0]
    if first.keep is None and first.method is not None and first.method.card.budget:
        recipe = recipe.with_keep(Budget.ratio(0.4))
    questions = inputs, with_question(inputs, 1, 0), with_question(inputs, 2, 4)
    return [[kept_of(model, asked, recipe, layer) for layer in range(4)] for asked in questions]


@pytest.mark.parametrize("card", [c for c in DECODER if c.contract.prefix_cacheable], ids=lambda card: card.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_prefix_cacheable_does_not_depend_on_the_question(name: str, card: Card) -> None:
    options = {"weights": some_routers()} if card.name == "pmod" else {}
    first, *others = kept_for_each_question(name, card.name, **options)
    assert others == [first, first]


def test_what_reads_the_question_depends_on_it() -> None:
    """The questions of this test are different enough to be told apart."""
    first, *others = kept_for_each_question("llava", "fastv")
    assert others[0] != first != others[1]
    assert not find("fastv").card.contract.prefix_cacheable
