"""Training a compressed model: loss and every gradient equal those of the dense masked oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import visiontok
from visiontok.conformance.oracle import DenseMasked
from visiontok.conformance.schedules import recipe
from visiontok.conformance.zoo import batch, build, visual
from visiontok.errors import UnsupportedError

pytestmark = pytest.mark.engine
DEPTH = 4
# Which minor release moved gradient checkpointing inside the layer's hooks is of no interest; that both work is.
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)
NAMES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3")
ALL_NAMES = (*NAMES, "llava_next", "paligemma", "internvl", "qwen3_vl_moe")
SCHEDULES = ("prompt", "pyramid", "inject", "inject, cut, exit", "freeze")


def fresh(name):
    """A model that no other test sees, in training mode."""
    return copy.deepcopy(build(name)).train()


def masked(labels, alive):
    """The labels that can be learned: those whose preceding position is there in the last decoder layer."""
    labels = labels.clone()
    labels[:, 1:][~alive[-1][:, :-1]] = -100
    return labels


def labels_of(inputs, *, placeholders=False):
    """Every token but padding and placeholders, as a collator makes them; or with placeholders, as a careless one."""
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"] == 0] = -100
    if not placeholders:
        labels[visual(inputs)] = -100
    return labels


def alive_in(compression):
    return [compression.ledger.alive(layer) for layer in range(DEPTH)]


def frozen_in(compression):
    return [compression.ledger.frozen(layer) for layer in range(DEPTH)]


def step(model, inputs, labels, **options):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**inputs, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(got, expected, tolerance=1e-6):
    """Loss and gradients; norms that some families take in float32 set the tolerance."""
    assert torch.allclose(got[0], expected[0], rtol=tolerance, atol=0)
    assert any(gradient.any() for gradient in expected[1].values())
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (got[1][name] - gradient).abs().max()
        assert error <= tolerance * max(float(gradient.abs().max()), 1e-6), name


@pytest.mark.support(mode="training")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_loss_and_gradients_equal_the_oracle(name, schedule):
    model = fresh(name)
    inputs = batch(name, model)
    labels = labels_of(inputs)
    for mode in (True, False) if schedule == "pyramid" else (True,):
        model.train(mode)
        with visiontok.compress(model, recipe(schedule)) as compression:
            with torch.no_grad():
                model(**inputs)
            alive, frozen = alive_in(compression), frozen_in(compression)
            learned = masked(labels, alive)
            got = step(model, inputs, learned)
        with DenseMasked(model, alive, frozen=frozen):
            expected = step(model, inputs, learned, use_cache=False)
        close(got, expected)
        stock = step(model, inputs, learned)
        assert not torch.allclose(stock[0], expected[0], rtol=1e-5, atol=0), "nothing was dropped, so nothing is shown"


def checkpointing(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.support(mode="gradient checkpointing")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")
@pytest.mark.parametrize(
    ("schedule", "reentrant"), [*((s, False) for s in SCHEDULES), ("prompt", True), ("pyramid", True), ("freeze", True)]
)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, schedule, reentrant, record_property):
    model = fresh(name)
    inputs = batch(name, model)
    with visiontok.compress(model, recipe(schedule)) as compression:
        with torch.no_grad():
            model(**inputs)
        alive, frozen = alive_in(compression), frozen_in(compression)
        labels = masked(labels_of(inputs), alive)
        checkpointing(model, reentrant)
        if reentrant and (schedule == "freeze" or (HOOKS_INSIDE and schedule != "prompt")):
            with pytest.raises(UnsupportedError, match="use_reentrant") as refusal:
                step(model, inputs, labels)
            record_property("refused", str(refusal.value))
            return
        got = step(model, inputs, labels)
    model.gradient_checkpointing_disable()
    with DenseMasked(model, alive, frozen=frozen):
        expected = step(model, inputs, labels, use_cache=False)
    close(got, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "method"), [("llava", "cls_topk"), ("llava", "fastv"), ("qwen2_5_vl", "hiprune"), ("qwen3_vl", "fastv")]
)
def test_scores_take_no_part_in_the_gradient(name, method):
    """Taps look at attention while it is recorded, and once more while a checkpoint replays it."""
    model = fresh(name)
    inputs = batch(name, model)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing(model)
        with visiontok.compress(model, method, keep=0.5) as compression:
            with torch.no_grad():
                model(**inputs)
            alive = alive_in(compression)
            labels = masked(labels_of(inputs), alive)
            found.append(step(model, inputs, labels))
            assert all(torch.equal(a, b) for a, b in zip(alive, alive_in(compression), strict=True))
    model.gradient_checkpointing_disable()
    with DenseMasked(model, alive):
        expected = step(model, inputs, labels, use_cache=False)
    for got in found:
        close(got, expected)


# ---- labels


def right_padded(inputs):
    """The same batch with the padding behind, as collators for training put it."""
    out = dict(inputs)
    shift = [int((row == 0).sum()) for row in inputs["attention_mask"]]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            out[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift, strict=True)])
    return out


@pytest.mark.parametrize(
    ("name", "schedule", "case"),
    [(n, s, "answers") for n in ("llava", "qwen2_5_vl", "gemma3") for s in ("prompt", "pyramid", "inject, cut, exit")]
    + [("llava", "pyramid", case) for case in ("placeholders", "right padding", "a row without image", "items")],
)
def test_labels_predicted_from_dropped_positions_are_ignored(name, schedule, case):
    """The first word behind an image is predicted from its last token, which may be gone."""
    model = fresh(name)
    inputs = batch(name, model, images=[2, 0] if case == "a row without image" else 2)
    if case == "right padding":
        inputs = right_padded(inputs)
    labels = labels_of(inputs, placeholders=case == "placeholders")
    given = labels.clone()
    options = {"num_items_in_batch": torch.tensor(17)} if case == "items" else {}  # the caller's denominator stays
    with visiontok.compress(model, recipe(schedule)) as compression:
        got = step(model, inputs, labels, **options)
        alive = alive_in(compression)
    assert torch.equal(labels, given), "the caller's tensor is the caller's"
    learned = masked(labels, alive)
    assert not torch.equal(learned, labels), "every label is predicted from a token that is there"
    with DenseMasked(model, alive):
        expected = step(model, inputs, learned, use_cache=False, **options)
    close(got, expected)


@pytest.mark.parametrize("items", [None, torch.tensor(3)])
def test_when_every_label_is_predicted_from_a_dropped_position(items):
    """As stock with nothing to learn: not a number for a mean over nothing, zero for a sum."""
    model = fresh("llava")
    inputs = batch("llava", model)
    behind = visual(inputs).roll(1, 1) & ~visual(inputs)
    labels = torch.where(behind, inputs["input_ids"], -100)
    assert (labels != -100).any()
    nothing = torch.full_like(labels, -100)
    stock = model(**inputs, labels=nothing, num_items_in_batch=items).loss
    with visiontok.compress(model, "vtw", layer=2):
        got = model(**inputs, labels=labels, num_items_in_batch=items).loss
    assert torch.equal(got.isnan(), stock.isnan())
    assert torch.equal(got.nan_to_num(), stock.nan_to_num())


def test_labels_predicted_from_living_positions_count():
    """Answers stand behind the question, and nothing is taken from them."""
    model = fresh("llava")
    inputs = batch("llava", model)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with visiontok.compress(model, recipe("pyramid")) as compression:
        got = step(model, inputs, labels)
        alive = alive_in(compression)
    with DenseMasked(model, alive):
        close(got, step(model, inputs, labels, use_cache=False))


# ---- transformers.Trainer


IGNORED = ["past_key_values", "image_hidden_states"]  # of which stock cannot pad the caches of two batches


class Samples(list):
    """Two-image prompts whose last words are to be learned; remembers what was drawn."""

    def __init__(self, number):
        model = build("llava")
        for seed in range(number):
            one = batch("llava", model, rows=1, pad=seed % 3, seed=seed)
            labels = one["input_ids"].clone()
            labels[:, :-3] = -100
            self.append({**one, "labels": labels})
        self.drawn = []

    def collate(self, samples):
        width = max(s["input_ids"].shape[1] for s in samples)
        out = {"pixel_values": torch.cat([s["pixel_values"] for s in samples])}
        for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = [torch.nn.functional.pad(s[key], (0, width - s[key].shape[1]), value=filler) for s in samples]
            out[key] = torch.cat(rows)
        self.drawn.append(out)
        return out


def trainer_for(model, samples, folder, *, accumulate=1, steps=4, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        remove_unused_columns=False,
        **{"save_strategy": "no"} | options,
    )
    return Trainer(
        model=model, args=arguments, train_dataset=samples, eval_dataset=samples, data_collator=samples.collate
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_does_what_a_loop_by_hand_does(tmp_path, accumulate):
    schedule = recipe("pyramid")
    samples, steps = Samples(8), 4
    model, twin = fresh("llava"), fresh("llava")
    with visiontok.compress(model, schedule) as compression:
        trainer = trainer_for(model, samples, tmp_path, accumulate=accumulate, steps=steps)
        assert trainer.model_accepts_loss_kwargs  # as without a recipe: the sum over a step has one denominator
        trainer.train()
        assert compression.report.images[0].kept[-1] < 16
    drawn = samples.drawn
    assert len(drawn) == steps * accumulate
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    losses = []
    with visiontok.compress(twin, schedule):
        for start in range(0, len(drawn), accumulate):
            group = drawn[start : start + accumulate]
            items = sum((b["labels"][:, 1:] != -100).sum() for b in group)
            optimizer.zero_grad()
            loss = sum(twin(**b, num_items_in_batch=items).loss for b in group)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=2e-4)  # the log is rounded
    stock = build("llava").state_dict()
    for (name, trained), by_hand in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(trained, by_hand, rtol=1e-9, atol=1e-12), name
    assert any(not torch.equal(trained, stock[name]) for name, trained in model.state_dict().items())


def test_a_trainer_saves_and_evaluates(tmp_path):
    samples, model = Samples(4), fresh("llava")

    def loss_by_hand():
        model.eval()
        with torch.no_grad():
            return sum(model(**samples.collate(samples[i : i + 2])).loss.item() for i in (0, 2)) / 2

    with visiontok.compress(model, "cls_topk", keep=6):
        before = loss_by_hand()
        trainer = trainer_for(model, samples, tmp_path, steps=10, save_strategy="steps", save_steps=10)
        trainer.train()
        found, prediction = trainer.evaluate(), trainer.predict(samples, ignore_keys=IGNORED)
        after = loss_by_hand()
    assert after < 0.9 * before
    assert found["eval_loss"] == pytest.approx(after)
    assert prediction.metrics["test_loss"] == pytest.approx(after)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-10")
    assert visiontok.attached(saved) is None
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), model.state_dict().values(), strict=True))
