"""What people do with ``generate()`` on a compressed model, each mode against the dense oracle in the same call.

The oracle masks the stock model by what the ledger says was alive, recomputes everything at every step and keeps no
cache; sampling draws the same numbers in both, and beams are searched in both.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from test_engine import DEPTH, masks
from transformers.generation import candidate_generator
from transformers.generation.streamers import BaseStreamer

import visiontok
from visiontok import Recipe
from visiontok.budget import Budget
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import inject, leave, recipe
from visiontok.conformance.zoo import BANNED, IMAGE, QWEN, batch, build, visual
from visiontok.method import Stage
from visiontok.recipes.random import Random

pytestmark = pytest.mark.engine
OLD = transformers.__version__ < "5.18"
CANNOT_CHUNK = transformers.__version__ < "5.23"
# the mask of its sliding layers gets the length that layer 0 stores, which behind a pruned prompt is another
GEMMA3_BY_LAYER_0 = transformers.__version__ < "5.17"
NAMES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3")
SCHEDULES = ("prompt", "pyramid", "inject and select", "inject, cut, exit")

on_every_model = pytest.mark.parametrize("name", NAMES)
on_every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def run(model, inputs, steps=4, seed=0, **options):
    """``generate`` with everything it can return, its random numbers those of ``seed``."""
    torch.manual_seed(seed)
    settings = {
        "max_new_tokens": steps, "do_sample": False, "suppress_tokens": list(BANNED),
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    with torch.no_grad():
        return model.generate(**inputs, **settings | options)


def by_oracle(model, alive, inputs, steps=4, **options):
    """The same call on the stock model, masked by ``alive`` and without a cache."""
    with DenseMasked(model, alive):
        return run(model, inputs, steps, **options | {"use_cache": False})


def alive_in(compression, inputs):
    """Who was alive in each layer, of the prompt only: without a cache the ledger knows of new tokens too."""
    return [mask[:, : inputs["input_ids"].shape[1]] for mask in masks(compression)]


def check_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("beam_indices", "sequences_scores"):
        if name in expected:
            torch.testing.assert_close(got[name], expected[name])
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(got[name]), torch.stack(expected[name]), rtol=1e-5, atol=1e-5)


def longer(mask, ids):
    """``mask`` (B, N), and ones up to the length of ``ids``."""
    return torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)


def history(name, inputs, ids, mask):
    """The texts ``ids`` that begin with ``inputs``, attention to them, and the types of their tokens."""
    if name == "paligemma":  # 0 for the prefix, which sees itself, 1 for all that follows
        kinds = {"token_type_ids": longer(inputs["token_type_ids"], ids)}
    else:
        kinds = {k: (ids == IMAGE).to(inputs[k].dtype) for k in ("mm_token_type_ids", "token_type_ids") if k in inputs}
    return {"input_ids": ids, "attention_mask": mask, **kinds}


# ---- what stock gets wrong, and is therefore left out below


@pytest.mark.skipif(not OLD, reason="a bug of transformers up to 5.17")
def test_stock_5_17_gives_copies_of_a_prompt_the_wrong_images():
    """Two images A B of a prompt become A A B B where the prompt is doubled, except on Qwen and Idefics."""
    model = build("llava")
    inputs = batch("llava", model, rows=1)
    _, expanded = model._expand_inputs_for_generation(2, **inputs)
    first, second = inputs["pixel_values"]
    assert torch.equal(expanded["pixel_values"], torch.stack([first, first, second, second]))


@pytest.mark.skipif(not CANNOT_CHUNK, reason="a bug of transformers up to 5.22")
@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
def test_stock_5_22_cannot_chunk_a_prompt_with_images(name):
    """It gives another answer; on Qwen, it raises up to 5.18."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    whole, chunked = (run(model, inputs, prefill_chunk_size=size).logits[0] for size in (None, 8))
    assert (whole - chunked).abs().max() > 0.1


@pytest.mark.support(architecture="gemma3", mode="embeddings instead of ids", stage="prompt")
def test_stock_gemma3_generates_from_ids_only(record_property):
    model = build("gemma3")
    with pytest.raises(ValueError, match="inputs_embeds") as refusal:
        run(model, {"inputs_embeds": torch.zeros(1, 3, 32).double()})
    record_property("refused", f"stock: {refusal.value}")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_stock_qwen_cannot_number_a_masked_step(name):
    """It numbers the whole text instead of the new token."""
    model = build(name)
    inputs = batch(name, model)
    step = torch.tensor([[17], [18]])
    mask = longer(inputs["attention_mask"], torch.cat([inputs["input_ids"], step], 1))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(input_ids=step, attention_mask=mask, past_key_values=cache)


# ---- one prompt, every way of choosing tokens

MODES = {
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 1.7, "top_k": 20},
    "several samples": {"do_sample": True, "temperature": 1.7, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 1.7},
    "no cache": {"use_cache": False},
}


@pytest.mark.support
@pytest.mark.parametrize("mode", MODES)
@on_every_schedule
@on_every_model
def test_modes(name, schedule, mode):
    model, options = build(name), MODES[mode]
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    inputs = batch(name, model, images=1 if OLD and copies > 1 and name in ("llava", "gemma3") else 2)
    with visiontok.compress(model, recipe(schedule)) as compression:
        got = run(model, inputs, **options)
        alive = alive_in(compression, inputs)
    assert len(alive[0]) == 2 * copies
    rows = [mask.view(2, copies, -1) for mask in alive]
    assert all(torch.equal(row, row[:, :1].expand_as(row)) for row in rows), "copies of a prompt disagree"
    kept = [(mask[:, 0] & visual(inputs)).sum(1) for mask in rows]
    assert any(first != second for first, second in kept), "both prompts keep as many tokens"
    check_same(got, by_oracle(model, alive, inputs, **options))


@pytest.mark.parametrize("mode", ["several samples", "beams"])
@on_every_model
def test_stochastic_methods_draw_alike_for_copies_of_a_prompt(name, mode):
    model, options = build(name), MODES[mode]
    inputs = batch(name, model, images=1 if OLD and name in ("llava", "gemma3") else 2)
    stages = (
        Stage(kind="prompt", method=Random(), keep=Budget.parse(0.7)),
        Stage(kind="cut", layer=2, method=Random(), keep=Budget.parse(0.5)),
    )
    with visiontok.compress(model, Recipe(stages=stages)) as compression:
        got = run(model, inputs, **options)
        alive = alive_in(compression, inputs)
    for mask in alive:
        rows = mask.view(2, 3, -1)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
    check_same(got, by_oracle(model, alive, inputs, **options))


ENDINGS = {
    "end of sequence": lambda plain, length: {"eos_token_id": int(plain[0, length + 1])},
    "several ends": lambda plain, length: {"eos_token_id": plain[:, length + 2].tolist(), "num_beams": 2},
    "min_new_tokens": lambda plain, length: {"eos_token_id": int(plain[0, length + 1]), "min_new_tokens": 4},
    "max_length": lambda plain, length: {"max_length": length + 3, "max_new_tokens": None},
    "stopping_criteria": lambda plain, length: {
        "stopping_criteria": [lambda ids, scores: ids[:, -1] == plain[1, length]],
        "eos_token_id": 119,
    },
}


@pytest.mark.support(mode="endings", stage=("inject", "cut", "exit"))
@pytest.mark.parametrize("ending", ENDINGS)
@on_every_model
def test_endings(name, ending):
    """Rows that have ended go on as padding, while the others are decoded."""
    model = build(name)
    inputs = batch(name, model, images=1)
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, recipe("inject, cut, exit")) as compression:
        plain = run(model, inputs, 5).sequences
        options = ENDINGS[ending](plain, length)
        got = run(model, inputs, 5, **options)
        alive = alive_in(compression, inputs)
    check_same(got, by_oracle(model, alive, inputs, 5, **options))
    if ending == "max_length":
        assert torch.equal(got.sequences, plain[:, : length + 3])
    else:
        assert not torch.equal(got.sequences, plain)


@pytest.mark.support(mode="answer begun by the user")
@on_every_schedule
@on_every_model
def test_a_prompt_that_begins_an_answer(name, schedule):
    """An answer begun by the user is prompt like any other: going on from it gives what was said before."""
    model = build(name)
    inputs = batch(name, model)
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, recipe(schedule)):
        whole = run(model, inputs, 6)
        ids = whole.sequences[:, : length + 3]
        begun = inputs | history(name, inputs, ids, longer(inputs["attention_mask"], ids))
        rest = run(model, begun, 3)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(rest.logits), torch.stack(whole.logits[3:]), rtol=1e-5, atol=1e-5)


EMBEDDED = [name for name in NAMES if name != "gemma3"]


@pytest.mark.support(mode="embeddings instead of ids")
@on_every_schedule
@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_instead_of_ids(name, schedule):
    """Placeholders are found by their embedding, as stock does; positions of Qwen must be given, for stock too."""
    model = build(name)
    inputs = batch(name, model)
    ids = inputs["input_ids"]
    others = {k: v for k, v in inputs.items() if k != "input_ids"}
    embedded = others | {
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "position_ids": model._prepare_position_ids_for_generation(ids, others),
    }
    with visiontok.compress(model, recipe(schedule)) as compression:
        got = run(model, embedded)
        alive = alive_in(compression, inputs)
    assert any((visual(inputs) & ~mask).any() for mask in alive)
    expected = by_oracle(model, alive, inputs)
    expected.sequences = expected.sequences[:, ids.shape[1] :]
    check_same(got, expected)


@pytest.mark.parametrize("name", EMBEDDED)
def test_features_that_the_user_merged_are_not_pruned(name):
    """Nothing tells them from text: a warning, and the stock result."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        items = model.get_image_features(**pixels, return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter(visual(inputs)[..., None], torch.cat([i.flatten(0, -2) for i in items]))
    merged = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    expected = run(model, merged)
    with (
        visiontok.compress(model, recipe("prompt")),
        pytest.warns(UserWarning, match="nothing is pruned in it"),
    ):
        got = run(model, merged)
    check_same(got, expected)


class Recorder(BaseStreamer):
    """Writes down what it is given."""

    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value):
        self.given.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.support(mode="streamers")
@on_every_schedule
@on_every_model
def test_streamers(name, schedule):
    """The whole prompt first, then one token per row and step, as if nothing had been dropped."""
    model = build(name)
    inputs = batch(name, model)
    with visiontok.compress(model, recipe(schedule)) as compression:
        got = run(model, inputs, streamer=(streamer := Recorder()))
        alive = alive_in(compression, inputs)
    expected = by_oracle(model, alive, inputs, streamer=(reference := Recorder()))
    assert torch.equal(streamer.given[0], inputs["input_ids"])
    assert torch.equal(torch.stack(streamer.given[1:], 1), got.sequences[:, inputs["input_ids"].shape[1] :])
    assert len(streamer.given) == len(reference.given) == 5
    assert all(torch.equal(a, b) for a, b in zip(streamer.given, reference.given, strict=True))
    assert streamer.ended == 1
    check_same(got, expected)


# ---- candidates: several tokens at once, of which some are taken back


def two_right_one_wrong(answer):
    """A candidate generator's method: of the three tokens it proposes, the last is never the ``answer``'s (1, N)."""

    def get_candidates(self, ids, **others):
        right = answer[:, ids.shape[1] :][:, :3]
        wrong = 5 + (right[:, 2:] - 4) % 80
        return torch.cat([ids, right[:, :2], wrong], 1), None

    return get_candidates


@pytest.mark.support(mode="prompt lookup")
@pytest.mark.parametrize("candidates", ["from the prompt", "two right, one wrong"])
@on_every_schedule
@on_every_model
def test_candidates(name, schedule, candidates, monkeypatch):
    """They are fed several at once, in the prefill already; the cache is cropped by those that are rejected."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    inputs["input_ids"][0, -5:] = torch.tensor([7, 8, 7, 8, 7])
    steps, accepted = 7, []
    generator = candidate_generator.PromptLookupCandidateGenerator
    monkeypatch.setattr(generator, "update_candidate_strategy", lambda self, ids, scores, n: accepted.append(int(n)))
    with visiontok.compress(model, recipe(schedule)) as compression:
        if candidates == "two right, one wrong":
            answer = run(model, inputs, steps).sequences
            monkeypatch.setattr(generator, "get_candidates", two_right_one_wrong(answer))
        got = run(model, inputs, steps, prompt_lookup_num_tokens=3, streamer=(streamer := Recorder()))
        alive = alive_in(compression, inputs)
    if candidates == "two right, one wrong":
        assert accepted == [2, 2, 0]
    sequences, logits = greedy(model, inputs, alive, steps, BANNED)
    assert torch.equal(got.sequences, sequences)
    assert torch.equal(torch.cat([tokens[0] for tokens in streamer.given]), sequences[0])
    torch.testing.assert_close(torch.stack(got.logits, 1).double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.support(mode="assistant model", stage=("inject", "cut", "exit"))
@on_every_model
def test_a_draft_model(name):
    """A stock model drafts for a compressed one, whose answer stays its own."""
    model, draft = build(name), copy.deepcopy(build(name))
    inputs = batch(name, model, rows=1, pad=0)
    with visiontok.compress(model, recipe("inject, cut, exit")):
        check_same(run(model, inputs, 10, assistant_model=draft), run(model, inputs, 10))


# ---- what generate() returns besides tokens


@pytest.mark.support(mode="hidden states, attentions")
@on_every_schedule
@on_every_model
def test_hidden_states_and_attentions(name, schedule):
    """Each layer returns the slots it computed: rows left padded to the longest, tokens in the order of the prompt."""
    model = copy.deepcopy(build(name, "eager", torch.float32))  # a copy that has never returned hidden states yet
    inputs = batch(name, model)
    with visiontok.compress(model, recipe(schedule)) as compression:
        out = run(model, inputs, 3, output_hidden_states=True, output_attentions=True)
        alive, slots = alive_in(compression, inputs), compression.ledger.tokens()
    heads, width = 4, 32
    computed = [
        slots[0],
        *slots,
    ]  # hidden state 0 is the input of layer 0, hidden state i > 0 the output of layer i - 1
    for step, (states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        assert [s.shape for s in states] == [(2, 1 if step else n, width) for n in computed]
        assert [a.shape for a in attentions] == [(2, heads, 1 if step else n, n + step) for n in slots]

    with DenseMasked(model, alive), torch.no_grad():
        dense = model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
    whole = inputs["attention_mask"].shape[1]
    for index, (state, expected) in enumerate(zip(out.hidden_states[0], dense.hidden_states, strict=True)):
        for row, here in enumerate(alive[max(index - 1, 0)]):
            there = here.nonzero()[:, 0] if state.shape[1] == whole else slice(-int(here.sum()), None)
            torch.testing.assert_close(state[row, there], expected[row, here], rtol=1e-4, atol=1e-4)
    for layer, (weights, expected) in enumerate(zip(out.attentions[0], dense.attentions, strict=True)):
        for row, here in enumerate(alive[layer]):
            there = here.nonzero()[:, 0] if weights.shape[-1] == whole else torch.arange(-int(here.sum()), 0)
            torch.testing.assert_close(
                weights[row][:, there][..., there], expected[row][:, here][..., here], rtol=1e-4, atol=1e-5
            )


# ---- conversations: a compressed cache goes on


def left_padded(*rows):
    """A text turn: one list of tokens per row."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def together(name, old, new):
    """The pictures of two turns, in the order of their placeholders; one picture per row in each turn."""
    if not old or not new:
        return old or new
    pixels, more = old["pixel_values"], new["pixel_values"]
    if name == "idefics3":
        return {"pixel_values": torch.cat([pixels, more], 1)}
    if name not in QWEN:
        return {"pixel_values": torch.stack([pixels, more], 1).flatten(0, 1)}
    grids = [old["image_grid_thw"], new["image_grid_thw"]]
    parts = [p.split(g.prod(1).tolist()) for p, g in zip((pixels, more), grids, strict=True)]
    return {
        "pixel_values": torch.cat([part for row in zip(*parts, strict=True) for part in row]),
        "image_grid_thw": torch.stack(grids, 1).flatten(0, 1),
    }


class Conversation:
    """A batch of conversations on one cache.

    Attributes:
        said: (B, N) ids so far, and ``heard``, their mask.
        pixels: every picture so far.
        alive: per layer (B, M) bool, who was alive in the turns up to the last picture; M ≤ N.
        log: per turn the answer, and what the oracle must be told to give the same.
    """

    def __init__(self, name, compression, inputs):
        self.name, self.compression, self.inputs = name, compression, inputs
        self.said, self.heard = inputs["input_ids"][:, :0], inputs["attention_mask"][:, :0]
        self.alive = [self.heard.bool()] * DEPTH
        self.pixels, self.cache, self.log = {}, None, []
        self.hear(inputs)

    def hear(self, turn):
        """Answer a turn, with or without new pictures, on the cache."""
        new = {k: v for k, v in turn.items() if k in ("pixel_values", "image_grid_thw")}
        ids, mask = torch.cat([self.said, turn["input_ids"]], 1), torch.cat([self.heard, turn["attention_mask"]], 1)
        self.pixels = together(self.name, self.pixels, new)
        text = history(self.name, self.inputs, ids, mask)
        given, whole, model = text | new, text | self.pixels, self.compression.model
        if self.name in QWEN:  # to number a new picture, stock would need the grids of those it must not encode again
            rest = {k: v for k, v in whole.items() if k != "input_ids"}
            given["position_ids"] = model._prepare_position_ids_for_generation(ids, rest)
        answer = run(model, given, 3, past_key_values=self.cache)
        if new:
            latest = masks(self.compression)
            gap = ids.shape[1] - self.alive[0].shape[1] - latest[0].shape[1]  # answers and text turns in between
            self.alive = [torch.cat([a, a.new_ones(2, gap), b], 1) for a, b in zip(self.alive, latest, strict=True)]
        self.log.append((answer, whole, self.alive))
        self.cache, self.said = answer.past_key_values, answer.sequences
        self.heard = longer(mask, self.said)

    def fork(self, copied):
        """The same conversation on a copy of the cache."""
        other = copy.copy(self)
        other.cache, other.log = copied(self.cache), []
        return other

    def check(self):
        # 5.17 and before count the answer of PaliGemma's first turn as prefix when it is computed again
        first = int(OLD and self.name == "paligemma")
        for answer, whole, alive in self.log[first:]:
            check_same(answer, by_oracle(self.compression.model, alive, whole, 3))


def first_turn(name):
    return batch(name, build(name), images=1)


def new_images(name):
    """A padded turn with a picture in each row, others than those of the first turn."""
    turn = batch(name, build(name), images=1, pad=2, seed=3)
    return turn | {"pixel_values": turn["pixel_values"].flip(-1)}


TEXT, MORE = left_padded([7, 8], [11, 12, 13, 14, 15]), left_padded([21, 22, 23, 24], [25])


@pytest.mark.support(mode="text turns")
@on_every_schedule
@pytest.mark.parametrize("name", [*NAMES, "paligemma"])
def test_text_turns(name, schedule):
    if GEMMA3_BY_LAYER_0 and (name, schedule) == ("gemma3", "inject, cut, exit"):
        pytest.skip("transformers 5.16 sizes Gemma 3's masks by layer 0")
    with visiontok.compress(build(name), recipe(schedule)) as compression:
        chat = Conversation(name, compression, first_turn(name))
        chat.hear(TEXT)
        chat.hear(MORE)
    chat.check()


@pytest.mark.support(mode="new image in a later turn")
@on_every_schedule
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
def test_new_images_in_the_second_turn(name, schedule):
    with visiontok.compress(build(name), recipe(schedule)) as compression:
        chat = Conversation(name, compression, first_turn(name))
        chat.hear(new_images(name))
        chat.hear(TEXT)
    chat.check()


@pytest.mark.support(mode="copied cache")
@on_every_schedule
@on_every_model
def test_a_copied_cache_goes_another_way(name, schedule):
    """Copied in memory and through a pickle, while the original goes on."""
    if GEMMA3_BY_LAYER_0 and (name, schedule) == ("gemma3", "inject, cut, exit"):
        pytest.skip("transformers 5.16 sizes Gemma 3's masks by layer 0")
    with visiontok.compress(build(name), recipe(schedule)) as compression:
        chat = Conversation(name, compression, first_turn(name))
        one, other = chat.fork(copy.deepcopy), chat.fork(lambda cache: pickle.loads(pickle.dumps(cache)))
        chat.hear(TEXT)
        one.hear(MORE)
        other.hear(MORE)
    for each in (chat, one, other):
        each.check()


@pytest.mark.support(mode="decoding by hand")
@pytest.mark.parametrize("rows", [1, 2])
@on_every_schedule
@on_every_model
def test_decoding_by_hand(name, schedule, rows):
    """Forwards without position ids, token by token and several at once; a single row without a mask, too."""
    model = build(name)
    inputs = batch(name, model, rows=rows, pad=0 if rows == 1 else 3)
    more = torch.tensor([[17, 18, 19, 20], [21, 22, 23, 24]])[:rows]
    ids = torch.cat([inputs["input_ids"], more], 1)
    whole = inputs | history(name, inputs, ids, longer(inputs["attention_mask"], ids))
    start = inputs["input_ids"].shape[1]
    rest = {k: v for k, v in whole.items() if k != "input_ids"}
    positions = model._prepare_position_ids_for_generation(ids, rest) if rows > 1 and name in QWEN else None
    with visiontok.compress(model, recipe(schedule)) as compression, torch.no_grad():
        first = {k: v for k, v in inputs.items() if rows > 1 or k != "attention_mask"}
        cache = model(**first, use_cache=True).past_key_values
        alive = masks(compression)
        got = []
        for a, b in itertools.pairwise((start, start + 1, start + 2, start + 4)):
            given = {"input_ids": ids[:, a:b], "past_key_values": cache}
            given |= {"attention_mask": whole["attention_mask"][:, :b]} if rows > 1 else {}
            given |= {"position_ids": positions[..., a:b]} if positions is not None else {}
            got.append(model(**given).logits)
    with DenseMasked(model, alive), torch.no_grad():
        expected = model(**whole, position_ids=positions, use_cache=False).logits[:, start:]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-6, atol=1e-6)


# ---- images and prompts in pieces


@pytest.mark.support(mode="new image in a later turn")
@on_every_schedule
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_new_images_where_masks_span_the_prompt(name, schedule):
    if OLD and name == "gemma3":
        pytest.skip("transformers up to 5.17 answers differently with and without a cache")
    with visiontok.compress(build(name), recipe(schedule)) as compression:
        chat = Conversation(name, compression, first_turn(name))
        chat.hear(new_images(name))
        chat.hear(TEXT)
    chat.check()


CHUNKED = {
    "a choice among whole images": ("divprune", "between images"),
    "no choice, whole images": (Recipe(stages=(inject(1), leave(3))), "between images"),
    "no choice, split images": (Recipe(stages=(inject(1), leave(3))), "in an image"),
}


@pytest.mark.support(mode="chunked prefill")
@pytest.mark.skipif(CANNOT_CHUNK, reason="transformers up to 5.22 cannot chunk a prompt with images")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.support(stage="prompt" if chosen == "divprune" else ("inject", "exit")))
        for case, (chosen, _) in CHUNKED.items()
    ],
)
@on_every_model
def test_chunked_prefill(name, case):
    """A prompt in pieces gives what it gives at once."""
    chosen, border = CHUNKED[case]
    if name == "gemma3" and border == "in an image":
        pytest.skip("tokens of one image see each other: the stock answer depends on the border, too")
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    where = visual(inputs)[0].nonzero()[:, 0]
    last = int(where[:-1][where.diff() > 1][0])  # of the first image
    size = last + 2 if border == "between images" else last - 1
    options = {"keep": 3} if chosen == "divprune" else {}
    with visiontok.compress(model, chosen, **options):
        whole, chunked = (run(model, inputs, prefill_chunk_size=n) for n in (None, size))
    check_same(chunked, whole)
    assert not torch.equal(run(model, inputs).logits[0], whole.logits[0])
