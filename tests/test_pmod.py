"""p-MoD against a dense twin: the stock model, in which a layer's formula is written out with two runs of the layer."""

from __future__ import annotations

import atexit
import functools
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cost import count, layer_counts
from torch import Tensor

import visiontok
from visiontok import Recipe
from visiontok.conformance.checks import STEPS, generate
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import cut, freeze, leave, prompt
from visiontok.conformance.zoo import BANNED, batch, build, visual
from visiontok.errors import ConfigError
from visiontok.method import Stage

pytestmark = pytest.mark.engine
DEPTH, WIDTH = 4, 32
SHARES = {1: 0.75, 2: 0.25, 3: 0.15}  # the cosine at thirds of the way
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
OTHERS = ("glm4v", "qwen3_vl_moe", "paligemma", "idefics3")


def routers(path: Path, *, zero: bool = False, layers: range = range(1, DEPTH), width: int = WIDTH) -> str:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        tensors[f"layers.{layer}.weight"] = torch.randn(1, width, generator=g) * (not zero)
        tensors[f"layers.{layer}.bias"] = torch.randn(1, generator=g) * (not zero)
    save_file(tensors, path / "routers.safetensors")
    return str(path / "routers.safetensors")


@functools.cache
def some_routers() -> str:
    """A file for tests that take no fixture."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return routers(Path(folder))


class Twin(DenseMasked):
    """The dense oracle, which routes by the formula, token by token, instead of being told."""

    def __init__(self, model: Any, file: str, units: Tensor, known: Tensor) -> None:
        """``units`` (B, N): the image of each visual token, -1 for text; ``known`` (B, N): who enters."""
        self.routers, self.units, self.model, self.known = load_file(file), units, model, known
        super().__init__(model, [known] * DEPTH, weights={})

    def _pre(self, index: int, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if index in SHARES:
            w, b = (self.routers[f"layers.{index}.{part}"].double() for part in ("weight", "bias"))
            alive, weight = self.known.clone(), torch.ones(self.known.shape, dtype=torch.float64)
            for row in range(len(alive)):
                for image in range(int(self.units[row].max()) + 1):
                    mine = [i for i in range(alive.shape[1]) if self.units[row, i] == image and self.known[row, i]]
                    logit = {i: float(w[0] @ x[row, i].double() + b[0]) for i in mine}
                    best = sorted(mine, key=lambda i: (-logit[i], i))[: math.trunc(len(mine) * SHARES[index])]
                    for i in mine:
                        alive[row, i] = i in best
                        weight[row, i] = 1 + 0.2 * math.tanh(logit[i])
            self.alive[index] = self.processed[index] = alive
            self.weights[index] = weight
        return super()._pre(index, args, kwargs)


def check(name: str, file: str, recipe: Recipe, attention: str = "sdpa", **options: Any) -> visiontok.Report:
    dtype, tolerance = (torch.float64, 1e-6) if attention == "sdpa" else (torch.float32, 1e-4)
    model = build(name, attention, dtype)
    inputs = batch(name, model, **options)
    with visiontok.compress(model, recipe) as compression:
        out = generate(model, inputs, BANNED)
        ledger, report = compression.ledger, compression.report
        alive = [ledger.alive(layer) for layer in range(DEPTH)]
        units = torch.where(visual(inputs), ledger.grid()[..., 0], -1)
    twin = Twin(model, file, units, alive[0])
    sequences, logits = greedy(model, inputs, alive, STEPS, BANNED, twin)
    assert torch.equal(out.sequences, sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < tolerance * logits.abs().max()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(alive, twin.alive, strict=True))
    stored = [layer.keys.shape[-2] - STEPS + 1 for layer in out.past_key_values.layers]
    assert stored == ledger.tokens()
    return report


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_generation_equals_the_twin(name: str, attention: str, tmp_path: Path) -> None:
    """Rows of different length, two images each, who passes by a layer is back in the next."""
    file = routers(tmp_path)
    report = check(name, file, visiontok.recipe("pmod", weights=file), attention)
    for image in report.images:
        assert image.kept == (image.tokens, *(math.trunc(image.tokens * share) for share in SHARES.values()))


@pytest.mark.parametrize("images", [[2, 0], [1, 3]])
def test_rows_with_any_number_of_images(images: list[int], tmp_path: Path) -> None:
    file = routers(tmp_path)
    check("qwen3_vl", file, visiontok.recipe("pmod", weights=file), images=images)


def test_behind_a_selection(tmp_path: Path) -> None:
    """Its shares are of what is left."""
    file = routers(tmp_path)
    report = check("llava", file, Recipe(stages=(prompt(0.7),)) + visiontok.recipe("pmod", weights=file))
    for image in report.images:
        assert image.kept[1:] == tuple(math.trunc(image.kept[0] * share) for share in SHARES.values())


def test_routers_at_their_beginning_send_the_first_ones_through_and_scale_nothing(tmp_path: Path) -> None:
    file = routers(tmp_path, zero=True)
    check("llava", file, visiontok.recipe("pmod", weights=file))
    model = build("llava")
    inputs = batch("llava", model, rows=1, pad=0, images=1)
    place = visual(inputs)[0].nonzero()[:, 0].tolist()
    with visiontok.compress(model, "pmod", weights=file) as compression, torch.no_grad():
        got = model(**inputs).logits[:, -1]
        alive = [compression.ledger.alive(layer) for layer in range(DEPTH)]
    assert [[i for i in place if a[0, i]] for a in alive] == [place, place[:12], place[:4], place[:2]]
    with DenseMasked(model, alive), torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_what_it_costs_is_what_torch_counts(tmp_path: Path) -> None:
    model = build("llava", dtype=torch.float32)
    inputs = batch("llava", model)
    with visiontok.compress(model, "pmod", weights=routers(tmp_path)) as compression:
        flops = count(model, lambda m: m(**inputs, use_cache=True))
        assert list(compression.report.account.decoder) == layer_counts(flops, "model.language_model.layers.")


# ------------------------------------------------------------------------------------------------------------- refused


def test_without_routers_it_is_refused_and_says_how_to_give_them() -> None:
    with pytest.raises(ConfigError, match=r"weights=None: pmod .* give weights=FILE.safetensors .* layers.L.weight"):
        visiontok.compress(build("llava"), "pmod")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"router.weight": torch.zeros(1, WIDTH)}, r"no routers \(router.weight\)"),
        ({"layers.1.weight": torch.zeros(1, WIDTH)}, r"no routers \(layers.1.bias\)"),
        (
            {"layers.1.weight": torch.zeros(2, WIDTH), "layers.1.bias": torch.zeros(2)},
            r"weight \(2, 32\) and bias \(2,\); a router is \(1, D\) and \(1,\)",
        ),
        (
            {"layers.1.weight": torch.zeros(1, 8), "layers.1.bias": torch.zeros(1)},
            r"layer 1 of 4 needs a router of \(32,\), the file has \(8,\) in layer 1",
        ),
        (
            {"layers.8.weight": torch.zeros(1, WIDTH), "layers.8.bias": torch.zeros(1)},
            r"layer 1 of 4 needs a router of \(32,\), the file has \[8\]",
        ),
    ],
)
def test_files_without_the_right_routers_are_refused(tensors: Any, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "wrong.safetensors")
    model = build("llava")
    with (
        visiontok.compress(model, "pmod", weights=str(tmp_path / "wrong.safetensors")),
        pytest.raises(ConfigError, match=message),
        torch.no_grad(),
    ):
        model(**batch("llava", model))


@pytest.mark.parametrize("other", [cut(2), freeze(1), leave(3)])
def test_other_stages_may_not_act_in_its_layers(other: Stage, tmp_path: Path) -> None:
    routed = visiontok.recipe("pmod", weights=routers(tmp_path))
    with pytest.raises(ConfigError, match=r"layer=\d: pmod routes tokens around a layer where"):
        visiontok.compress(build("llava"), routed + Recipe(stages=(other,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "pmod has no budget"),
        ({"mass": True}, "keeps no token that could speak for others"),
        ({"least": 0.9}, "least=0.9, most=0.85: shares lie"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        visiontok.compress(build("llava"), "pmod", weights=routers(tmp_path), **options)
