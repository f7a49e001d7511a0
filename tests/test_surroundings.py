"""What people do around a compressed model: pipelines, casting, threads, saving, offloading, PEFT, compiling, quantising."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import visiontok
from visiontok import Recipe
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import SCHEDULES, cut, recipe
from visiontok.conformance.zoo import BANNED, batch, build, config, prepare
from visiontok.errors import ConfigError

DEPTH, STEPS = 4, 3


def fresh(name, dtype=torch.float64, **options):
    """A model that no other test sees, with the weights of ``build(name)``."""
    return copy.deepcopy(build(name, dtype=dtype, **options))


def generate(model, inputs, steps=STEPS, **options):
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=list(BANNED),
            **options,
        )


def same(got, expected):
    """Bitwise: two results of ``generate``."""
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ---- threads

RECIPES = {
    "grid": lambda: visiontok.recipe("grid", keep=5),
    "random": lambda: visiontok.recipe("random", keep=3),
    "cls_topk": lambda: visiontok.recipe("cls_topk", keep=7),
    "cls_topk, less": lambda: visiontok.recipe("cls_topk", keep=2),
    "fastv": lambda: visiontok.recipe("fastv", keep=6, layer=2),
    "fastv, less": lambda: visiontok.recipe("fastv", keep=2, layer=2),
    "pyramid": lambda: recipe("pyramid"),
}


def in_threads(*work):
    """Run callables at the same time; returns what they return, raises what they raise."""
    results, errors = [None] * len(work), []

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.engine
@pytest.mark.parametrize(
    "pair",
    [("fastv", "fastv, less"), ("cls_topk", "cls_topk, less"), ("grid", "fastv"), ("pyramid", "cls_topk")],
    ids=" and ".join,
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_two_threads_two_recipes_one_model(name, pair):
    """In step, layer by layer, on one module object; whoever comes first and leaves first."""
    if name == "qwen3_vl":
        pair = tuple(n for n in pair if "cls" not in n)
        pair = (*pair, "random", "pyramid")[:2]
    model = fresh(name)
    inputs = [batch(name, model, seed=seed) for seed in (0, 1)]
    expected = []
    for recipe_name, given in zip(pair, inputs, strict=True):
        with visiontok.compress(model, RECIPES[recipe_name]()) as compression:
            expected.append((generate(model, given), compression.ledger.tokens()))
    stock = logits(model, inputs[0])

    barrier = threading.Barrier(2, timeout=10)

    def in_step(*_):
        barrier.wait()

    text = model.model.language_model
    steps = [module.register_forward_pre_hook(in_step) for module in (*text.layers, text.norm)]

    def work(i):
        with visiontok.compress(model, RECIPES[pair[i]]()) as compression:
            barrier.wait()
            out = generate(model, inputs[i])
            assert visiontok.attached(model) is compression
            barrier.wait()
            tokens = compression.ledger.tokens()
            if i:  # the second to leave is the first to come half of the time
                barrier.wait()
        if not i:
            barrier.wait()
        return out, tokens

    for _ in range(2):
        found = in_threads(lambda: work(0), lambda: work(1))
        for (got, tokens), (wanted, wanted_tokens) in zip(found, expected, strict=True):
            same(got, wanted)
            assert tokens == wanted_tokens
    for handle in steps:
        handle.remove()
    assert visiontok.attached(model) is None
    assert torch.equal(logits(model, inputs[0]), stock)
    assert not any("visiontok" in key for module in model.modules() for key in vars(module))


def test_a_thread_without_a_recipe_of_its_own_is_served_by_the_oldest():
    model = fresh("llava")
    inputs = batch("llava", model)
    alone = {}
    for keep in (9, 5, 3):
        with visiontok.compress(model, "grid", keep=keep):
            alone[keep] = logits(model, inputs)

    def other(keep):
        with visiontok.compress(model, "grid", keep=keep):
            assert torch.equal(logits(model, inputs), alone[keep])
            # its own worker: the server's recipe, not the recipe of whoever came last
            assert torch.equal(in_threads(lambda: logits(model, inputs))[0], alone[9])
            with pytest.raises(ConfigError, match="already compressed with grid"):
                visiontok.compress(model, "grid", keep=2)
        assert torch.equal(logits(model, inputs), alone[9])

    with visiontok.compress(model, "grid", keep=9) as server:
        assert torch.equal(in_threads(lambda: logits(model, inputs))[0], alone[9])
        in_threads(lambda: other(5))
        in_threads(lambda: other(3))
        assert torch.equal(logits(model, inputs), alone[9])
        assert visiontok.attached(model) is server
    assert in_threads(lambda: visiontok.attached(model)) == [None]
