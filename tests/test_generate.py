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
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import inject, leave, recipe
from visiontok.conformance.zoo import BANNED, IMAGE, QWEN, batch, build, visual

pytestmark = pytest.mark.engine
OLD = transformers.__version__ < "5.18"
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


def history(inputs, ids, mask=None):
    """The texts ``ids`` with what belongs to them: attention to them (``mask``, or everything behind ``inputs``), types."""
    if mask is None:
        known = inputs["attention_mask"]
        mask = torch.cat([known, known.new_ones(len(ids), ids.shape[1] - known.shape[1])], 1)
    kinds = {k: (ids == IMAGE).to(inputs[k].dtype) for k in ("mm_token_type_ids", "token_type_ids") if k in inputs}
    return {"input_ids": ids, "attention_mask": mask, **kinds}


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


def test_transformers_5_17_gives_copies_of_a_prompt_the_wrong_images():
    """Why beams over several images per row are tested on Qwen and Idefics only there: A B becomes A A B B."""
    model = build("llava")
    inputs = batch("llava", model, rows=1)
    _, expanded = model._expand_inputs_for_generation(2, **inputs)
    first, second = inputs["pixel_values"]
    if OLD:
        assert torch.equal(expanded["pixel_values"], torch.stack([first, first, second, second]))


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


@pytest.mark.parametrize("ending", ENDINGS)
@on_every_model
def test_endings(name, ending):
    """Rows that have ended go on as padding, while the others are decoded."""
    model = build(name)
    inputs = batch(name, model, images=1)
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, recipe("inject, cut, exit")) as compression:
        plain = run(model, inputs, 6).sequences
        options = ENDINGS[ending](plain, length)
        got = run(model, inputs, 6, **options)
        alive = alive_in(compression, inputs)
    check_same(got, by_oracle(model, alive, inputs, 6, **options))
    if ending == "max_length":
        assert torch.equal(got.sequences, plain[:, : length + 3])
    else:
        assert not torch.equal(got.sequences, plain)


@on_every_schedule
@on_every_model
def test_a_prompt_that_begins_an_answer(name, schedule):
    """An answer begun by the user is prompt like any other: going on from it gives what was said before."""
    model = build(name)
    inputs = batch(name, model)
    length = inputs["input_ids"].shape[1]
    with visiontok.compress(model, recipe(schedule)):
        whole = run(model, inputs, 6)
        begun = inputs | history(inputs, whole.sequences[:, : length + 3])
        rest = run(model, begun, 3)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(rest.logits), torch.stack(whole.logits[3:]), rtol=1e-5, atol=1e-5)


EMBEDDED = [name for name in NAMES if name != "gemma3"]


def test_gemma3_generates_from_ids_only():
    """Why it is missing below: its stock ``generate()`` refuses embeddings."""
    model = build("gemma3")
    with pytest.raises(ValueError, match="inputs_embeds"):
        run(model, {"inputs_embeds": torch.zeros(1, 3, 32).double()})


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


@pytest.mark.parametrize("candidates", ["from the prompt", "two right, one wrong"])
@on_every_schedule
@on_every_model
def test_candidates(name, schedule, candidates, monkeypatch):
    """They are fed several at once, in the prefill already; the cache is cropped by those that are rejected."""
    model = build(name)
    inputs = batch(name, model, rows=1, pad=0)
    inputs["input_ids"][0, -5:] = torch.tensor([7, 8, 7, 8, 7])
    steps, accepted = 10, []
    generator = candidate_generator.PromptLookupCandidateGenerator
    monkeypatch.setattr(generator, "update_candidate_strategy", lambda self, ids, scores, n: accepted.append(int(n)))
    with visiontok.compress(model, recipe(schedule)) as compression:
        if candidates == "two right, one wrong":
            answer = run(model, inputs, steps).sequences
            monkeypatch.setattr(generator, "get_candidates", two_right_one_wrong(answer))
        got = run(model, inputs, steps, prompt_lookup_num_tokens=3, streamer=(streamer := Recorder()))
        alive = alive_in(compression, inputs)
    if candidates == "two right, one wrong":
        assert accepted == [2, 2, 2, 0]
    sequences, logits = greedy(model, inputs, alive, steps, BANNED)
    assert torch.equal(got.sequences, sequences)
    assert torch.equal(torch.cat([tokens[0] for tokens in streamer.given]), sequences[0])
    torch.testing.assert_close(torch.stack(got.logits, 1).double(), logits, rtol=1e-5, atol=1e-5)


@on_every_model
def test_a_draft_model(name):
    """A stock model drafts for a compressed one, whose answer stays its own."""
    model, draft = build(name), copy.deepcopy(build(name))
    inputs = batch(name, model, rows=1, pad=0)
    with visiontok.compress(model, recipe("inject, cut, exit")):
        check_same(run(model, inputs, 10, assistant_model=draft), run(model, inputs, 10))


# ---- what generate() returns besides tokens


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
    computed = [slots[0], *slots]  # hidden state 0 is the input of layer 0, hidden state i > 0 the output of layer i - 1
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


class Conversation:
    """A batch of conversations on one cache, and all that the oracle must know of them.

    Attributes:
        said: (B, N) ids so far, ``heard`` its mask.
        pixels: every picture so far, in the order of the placeholders.
        alive: per layer (B, N') who was alive in the prompts up to the last picture.
    """

    def __init__(self, name, compression, inputs):
        self.name, self.model, self.compression = name, compression.model, compression
        self.types = inputs
        self.said = self.heard = inputs["input_ids"][:, :0]
        self.pixels, self.alive, self.cache = {}, [inputs["input_ids"][:, :0].bool()] * DEPTH, None
        self.hear(inputs)

    def hear(self, turn, **options):
        """A turn, with or without pictures; the answer on the cache."""
        new = {k: v for k, v in turn.items() if k in ("pixel_values", "image_grid_thw")}
        before = self.said.shape[1]
        self.pixels = together(self.name, self.pixels, new)
        ids, mask = torch.cat([self.said, turn["input_ids"]], 1), torch.cat([self.heard, turn["attention_mask"]], 1)
        self.whole = history(self.types, ids, mask) | self.pixels
        self.now = history(self.types, ids, mask) | new
        if new and before and self.name in QWEN:  # stock cannot number a new picture without the grids of the old ones
            others = {k: v for k, v in self.whole.items() if k != "input_ids"}
            self.now["position_ids"] = self.model._prepare_position_ids_for_generation(ids, others)
        self.answer = run(self.model, self.now, 3, past_key_values=self.cache, **options)
        self.cache, self.said = self.answer.past_key_values, self.answer.sequences
        self.heard = torch.cat([mask, mask.new_ones(len(mask), self.said.shape[1] - mask.shape[1])], 1)
        if new:
            fresh = masks(self.compression)
            gap = ids.shape[1] - self.alive[0].shape[1] - fresh[0].shape[1]
            self.alive = [torch.cat([a, a.new_ones(len(a), gap), b], 1) for a, b in zip(self.alive, fresh, strict=True)]
        return self

    def expected(self):
        """What the oracle answers to everything heard so far."""
        return self.answer, self.whole, self.alive
