"""Calibrations: models in which the layers are known, statistics against stock attention, and the artefact."""

from __future__ import annotations

import functools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import visiontok
from visiontok import Recipe, cli
from visiontok.calibration import CALIBRATORS, calibrate
from visiontok.calibration.base import Calibrator, Measure, Outcome, Row, mean
from visiontok.calibration.collapse import EntropyCollapse, matrix_entropy
from visiontok.calibration.decay import MassDecay
from visiontok.calibration.fit import FitBisect, _deleted, _masses
from visiontok.calibration.freeze import LayerKL
from visiontok.calibration.job import scenes
from visiontok.calibration.probe import Probe
from visiontok.calibration.samples import QUESTION, Sample, digest, read
from visiontok.calibration.similarity import InterLayerSimilarity
from visiontok.calibration.withdraw import ExitKL
from visiontok.conformance import zoo
from visiontok.conformance.oracle import DenseMasked
from visiontok.conventions import published_flops
from visiontok.cost import Load, Widths
from visiontok.engine.policy import StagePolicy
from visiontok.errors import ConfigError
from visiontok.recipes.todre_exit import ToDREExit
from visiontok.weights import fingerprint

DEPTH = 6


@functools.cache
def config() -> Any:
    made = zoo.config("llava")
    made.text_config.num_hidden_layers = DEPTH
    return made


def llava(attention: str = "sdpa") -> Any:
    """A LLaVA of six layers."""
    torch.manual_seed(0)
    return zoo.prepare(zoo.T.AutoModelForImageTextToText.from_config(config(), attn_implementation=attention))


def prompts(model: Any, name: str = "llava", number: int = 2) -> list[dict[str, Any]]:
    return [zoo.batch(name, model, rows=1, pad=0, images=1, seed=seed, text=4 + seed) for seed in range(number)]


def run(calibrator: Calibrator, model: Any, **more: Any) -> Any:
    inputs = [lambda one=one: one for one in prompts(model)]
    return calibrate(calibrator, model, inputs, name="tiny", data={"hash": "0"}, **more)


def silence(layer: Any, *, attention: bool = True, mlp: bool = False) -> None:
    """Take from a layer what it adds to its input."""
    with torch.no_grad():
        if attention:
            layer.self_attn.o_proj.weight.zero_()
        if mlp:
            layer.mlp.down_proj.weight.zero_()


# ------------------------------------------------------------------------------------------------------- known layers


@pytest.mark.parametrize("known", [2, 4])
def test_vtw_finds_the_layer_from_which_on_nothing_attends(known: int) -> None:
    model = llava()
    for layer in model.get_decoder().layers[known:]:
        silence(layer)
    found = run(ExitKL(), model)
    assert found.recommended == {"layer": known}
    assert [abs(kl) < 1e-9 for _, kl in found.curves["kl"]] == [layer >= known for layer in range(1, DEPTH)]


def test_vtw_says_that_no_layer_suits() -> None:
    found = run(ExitKL(eta=1e-12), llava())
    assert found.recommended is None
    assert re.fullmatch(r"in no layer from 1 on is the divergence at most eta=1e-12; the least is \d.*", found.notes[0])


def test_vtw_tries_no_layer_before_the_first() -> None:
    model = llava()
    for layer in model.get_decoder().layers[1:]:
        silence(layer)
    assert run(ExitKL(), model).recommended == {"layer": 1}
    assert run(ExitKL(first=3), model).recommended == {"layer": 3}
    assert run(ExitKL(first=0.5), model).recommended == {"layer": 3}


@pytest.mark.engine
def test_the_divergence_is_that_of_a_stock_model_without_the_columns() -> None:
    model = llava()
    found = run(ExitKL(), model)
    for layer, kl in found.curves["kl"]:
        expected = []
        for inputs in prompts(model):
            present = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            alive = [present if one < layer else ~zoo.visual(inputs) for one in range(DEPTH)]
            with torch.no_grad():
                stock = model(**inputs).logits[0, -1].log_softmax(-1)
                with DenseMasked(model, alive):
                    gone = model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            expected.append(torch.nn.functional.kl_div(stock, gone, log_target=True, reduction="sum"))
        assert kl == pytest.approx(float(sum(expected)) / 2, rel=1e-4)


def test_shortv_finds_the_layers_that_do_nothing() -> None:
    model = llava()
    for layer in (1, 3):
        silence(model.get_decoder().layers[layer], mlp=True)
    found = run(LayerKL(share=0.5), model)  # what visual tokens become in the last layer, nobody sees
    assert found.recommended == {"layers": [1, 3, 5]}
    assert [layer for layer, kl in found.curves["kl"] if kl > 1e-6] == [0, 2, 4]


@pytest.mark.engine
def test_the_divergence_is_that_of_a_stock_model_whose_visual_tokens_stand_still() -> None:
    model = llava()
    found = run(LayerKL(), model)
    for layer, kl in found.curves["kl"]:
        expected = []
        for inputs in prompts(model):
            alive = [torch.ones_like(inputs["input_ids"], dtype=torch.bool)] * DEPTH
            frozen = [zoo.visual(inputs) if one == layer else ~alive[0] for one in range(DEPTH)]
            with torch.no_grad():
                stock = model(**inputs).logits[0, -1].log_softmax(-1)
                with DenseMasked(model, alive, frozen=frozen):
                    still = model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            expected.append(torch.nn.functional.kl_div(stock, still, log_target=True, reduction="sum"))
        assert kl == pytest.approx(float(sum(expected)) / 2, rel=2e-3, abs=1e-9)  # float32, of small differences


def test_the_artefact_of_shortv_is_a_recipe(tmp_path: Path) -> None:
    model = llava()
    found = run(LayerKL(share=0.5), model)
    found.save(tmp_path / "shortv.json")
    layers = found.recommended["layers"]
    loaded = Recipe.load(tmp_path / "shortv.json")
    assert loaded == replace(visiontok.recipe("shortv", layers=layers), calibrated=("llava", DEPTH))
    with visiontok.compress(model, loaded) as compression:
        model.generate(**prompts(model)[0], max_new_tokens=2)
        assert [bool(compression.ledger.frozen(k).any()) for k in range(DEPTH)] == [k in layers for k in range(DEPTH)]


@pytest.mark.parametrize("known", [1, 3])
def test_entropyprune_finds_the_collapse(known: int) -> None:
    """A layer that adds nothing but multiples of one vector makes all tokens alike."""
    model = llava()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.get_decoder().layers[known].mlp.down_proj.weight
        direction, weights = (torch.randn(n, generator=g, dtype=weight.dtype) for n in weight.shape)
        weight.copy_(1000 * direction[:, None] * weights)
    found = run(EntropyCollapse(), model)
    assert found.recommended == {"layer": known + 1}
    assert [layer for layer, _ in found.curves["entropy"]] == list(range(DEPTH))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_matrix_entropy_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    power = torch.linalg.svdvals((states - states.mean(0)).double()) ** 2
    expected = -sum(float(p) * math.log(p) for p in power / power.sum() if p / power.sum() > 1e-12)
    assert matrix_entropy(states) == pytest.approx(expected, abs=1e-6)
    assert matrix_entropy(states[:1].expand(3, -1)) == 0


# --------------------------------------------------------------------------------------------------- stock statistics


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_rows_and_states_are_those_of_the_stock_model(name: str) -> None:
    model, eager = zoo.build(name, dtype=torch.float32), zoo.build(name, "eager", torch.float32)
    [inputs] = prompts(model, name, number=1)
    visual = zoo.visual(inputs)[0]
    with torch.no_grad():
        stock = eager(**inputs, output_attentions=True)
    probe = Probe(model)
    assert torch.equal(probe.visual(inputs), visual)
    for found, weights in zip(probe.last_rows(inputs), stock.attentions, strict=False):
        torch.testing.assert_close(found, weights[0, :, -1, visual].mean(0), atol=1e-5, rtol=1e-4)
    assert len(probe.last_rows(inputs)) == len(stock.attentions) - 1
    entered: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: entered.append((a[0] if a else k["hidden_states"])[0, visual]), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for found, states in zip(probe.states(inputs), entered, strict=True):
        torch.testing.assert_close(found, states)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_the_largest_of_the_heads_is_that_of_the_stock_model(name: str) -> None:
    model, eager = zoo.build(name, dtype=torch.float32), zoo.build(name, "eager", torch.float32)
    [inputs] = prompts(model, name, number=1)
    found: dict[int, Tensor] = {}
    probe = Probe(model)
    with probe.attention(found.__setitem__):
        probe.log_probabilities(inputs)
    with torch.no_grad():
        stock = eager(**inputs, output_attentions=True)
    for layer, weights in enumerate(stock.attentions):
        torch.testing.assert_close(found[layer], weights[0].amax(0), atol=1e-5, rtol=1e-4)
    assert not any("_visiontok_taps" in module.__dict__ for module in model.modules())


# ----------------------------------------------------------------------------------------------------------- FitPrune


def fit_by_hand(eager: Any, inputs: dict[str, Any], alpha: float) -> list[int]:
    """FitPrune's deletions, with the whole model run anew, masked, for every layer."""
    visual = zoo.visual(inputs)[0]
    last = int(visual.nonzero().max())

    def statistics(weights: Tensor, alive: Tensor) -> list[Tensor]:
        most = weights[0].amax(0)
        here = alive.nonzero()[:, 0]
        return [most[here][:, here].sum(0) / len(here), most[last + 1 :, here].sum(0) / (len(visual) - last - 1)]

    def attentions(alive: list[Tensor]) -> Any:
        with torch.no_grad(), DenseMasked(eager, alive):
            return eager(**inputs, output_attentions=True, use_cache=False).attentions

    everything = [torch.ones_like(visual)[None]] * DEPTH
    stock = [statistics(weights, visual) for weights in attentions(everything)]
    alive, deleted = visual.clone(), []
    masks = list(everything)
    for layer in range(DEPTH):
        weights = attentions(masks)[layer]
        here = alive.nonzero()[:, 0].tolist()
        sets = []
        for values, whole in zip(statistics(weights, alive), stock[layer], strict=True):
            order = sorted(range(len(here)), key=lambda i: float(values[i]))
            least, gone = float(whole.sum()) * (1 - alpha), set()
            for i in order:
                if float(values.sum()) - sum(float(values[j]) for j in (*gone, i)) < least:
                    break
                gone.add(i)
            sets.append(gone)
        both = sets[0] & sets[1]
        deleted.append(len(both))
        alive[[here[i] for i in both]] = False
        masks = masks[: layer + 1] + [(alive | ~visual)[None]] * (DEPTH - layer - 1)
    return deleted


@pytest.mark.engine
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7])
def test_fitprune_deletes_as_by_hand(alpha: float) -> None:
    model, eager = llava().float(), llava("eager").float()
    for sample, inputs in enumerate(prompts(model)):
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        stock = [_masses(Probe(model), inputs, sample)] * 2
        found = _deleted(Probe(model), inputs, sample, stock=stock, alpha=alpha)["deleted"]
        assert found == fit_by_hand(eager, inputs, alpha)
        assert sum(found) > 0


@pytest.mark.parametrize("reduction", [0.3, 0.6])
def test_fitprune_meets_the_flops_and_hardly_more(reduction: float) -> None:
    found = run(FitBisect(reduction=reduction), llava())
    scheme = [count for _, count in found.curves["deleted"]]
    widths, n = Widths.of(config()), 16
    left = [int(n - sum(scheme[:layer])) for layer in range(DEPTH + 1)]
    assert [left for _, left in found.curves["left"]] == left[1:]
    cut = [layer for layer in range(1, DEPTH) if left[layer] < left[layer - 1]]
    assert found.recommended == {"layers": cut, "shares": [left[layer] / n for layer in cut]}
    policy = StagePolicy(visiontok.recipe("fitprune", **found.recommended).stages, DEPTH)
    assert {at: int(stage.keep.counts([n])) for at, stage in policy.cuts.items()} == {at: left[at] for at in cut}  # type: ignore[union-attr]
    loads = [Load(a, a, b) for a, b in pairwise(left)]
    share = published_flops("B", loads, widths) / published_flops("B", [Load.all(n)] * DEPTH, widths)
    assert share == pytest.approx(1 - reduction, abs=0.15)  # whole tokens of 16, and means are rounded down
    assert all(count >= 0 for count in scheme)
    assert left[-1] >= 1


def test_fitprune_takes_the_smallest_loss_that_meets_the_flops() -> None:
    """Bisection over a made-up model: of 100 tokens, the first layer deletes alpha · 100."""
    asked = []

    def measure(stage: str, reading: Any) -> list[Row]:
        if stage == "mass":
            return [{"self": [1.0] * DEPTH, "cross": [1.0] * DEPTH, "tokens": [100.0]}]
        asked.append(float(stage.removeprefix("alpha=")))
        return [{"deleted": [float(int(asked[-1] * 100)), *[0.0] * (DEPTH - 1)]}]

    found = FitBisect(reduction=0.3).find(measure, config())
    assert len(asked) == 7  # halves of 1 down to 1/128
    assert found.recommended is not None
    scheme = [int(count) for count in found.curves["deleted"].values()]
    assert found.recommended == {"layers": [1], "shares": [(100 - scheme[0]) / 100]}
    widths = Widths.of(config())
    whole = published_flops("B", [Load.all(100)] * DEPTH, widths)

    def costs(gone: int) -> float:
        return published_flops("B", [Load(100, 100, 100 - gone), *[Load.all(100 - gone)] * (DEPTH - 1)], widths) / whole

    assert costs(scheme[0]) <= 0.7 < costs(scheme[0] - 2)
    assert scheme[1:] == [0] * (DEPTH - 1)


def test_fitprune_refuses_pictures_of_different_sizes_and_impossible_savings() -> None:
    def rows(*tokens: float) -> Measure:
        return lambda stage, reading: [{"tokens": [n], "deleted": [0.0] * DEPTH} for n in tokens]

    with pytest.raises(ConfigError, match="data: pictures of 4 to 9 visual tokens"):
        FitBisect().find(rows(9, 4), config())
    nothing = FitBisect().find(rows(9), config())
    assert nothing.recommended is None
    assert nothing.notes == ("no loss of attention saves a share of 0.6; ask for less",)


# -------------------------------------------------------------------------------------------------------- conclusions


def given(**rows: list[float]) -> Measure:
    """A model of which this was measured, twice."""
    return lambda stage, reading: [rows, rows]


@pytest.mark.parametrize(
    ("mass", "found"),
    [
        ([0.2, 0.5, 0.4, 0.3, 0.09, 0.08, 0.02], {"layer": 5, "threshold": 0.1}),
        ([0.2, 0.5, 0.4, 0.3, 0.09, 0.2, 0.02], None),  # one layer alone is no decay
        ([0.5, 0.01, 0.01, 0.01, 0.2, 0.01, 0.01], {"layer": 6, "threshold": 0.1}),  # not in the first half
        ([0.5] * 7, None),
    ],
)
def test_mass_decay(mass: list[float], found: dict[str, Any] | None) -> None:
    outcome = MassDecay().find(given(mass=mass), None)
    assert outcome.recommended == found
    if found is not None:
        method = visiontok.recipe("todre_exit", **found).stages[0].method
        assert method == ToDREExit(layer=found["layer"], threshold=0.1)
    assert outcome.curves == {"mass": dict(enumerate(mass))}
    assert bool(outcome.notes) == (found is None)


def test_inter_layer_similarity() -> None:
    mass = [0.05, 0.1, 0.4, 0.6, 0.5, 0.3, 0.2, 0.05, 0.02]
    alike = [0.1, 0.2, 0.9, 0.5, 0.8, 0.4, 0.95, 0.1]  # of layers 0 and 1, 1 and 2, …
    outcome = InterLayerSimilarity(cuts=2).find(given(mass=mass, similarity=alike), None)
    assert outcome.recommended == {"inject": 2, "layers": [4, 6], "exit": 7}
    assert outcome.curves["similarity"] == dict(enumerate(alike, 1))
    never = given(mass=[0.5, 0.5, 0.5], similarity=[0.9, 0.8])
    fades = "attention to the image never fades: the exit is the last layer"
    few = "2 layers lie between injection at 0 and exit at 3; ask for fewer cuts"
    assert InterLayerSimilarity(cuts=1).find(never, None) == Outcome(
        {"mass": dict(enumerate([0.5] * 3)), "similarity": {1: 0.9, 2: 0.8}},
        {"inject": 0, "layers": [2], "exit": 3},
        (fades, "hidrop knows shares for 4 cuts; recommended.shares has to name 1"),
    )
    four = InterLayerSimilarity(rise=0.1, fall=0.05).find(given(mass=mass, similarity=alike), None)
    assert four.notes == ()
    kinds = [stage.kind for stage in visiontok.recipe("hidrop", **four.recommended).stages]  # type: ignore[arg-type]
    assert kinds == ["inject", *["cut"] * 4, "exit"]
    assert InterLayerSimilarity(cuts=3).find(never, None).notes == (few, fades)


def test_what_is_no_papers_code_is_called_a_reconstruction() -> None:
    published = {"vtw", "shortv", "fitprune", "dymu"}
    for method, kind in CALIBRATORS.items():
        assert kind.source.startswith("as published" if method in published else "a reconstruction")


def test_curves_are_means_over_samples() -> None:
    assert mean([{"a": [1.0, 2.0]}, {"a": [3.0, 6.0]}], "a") == [2.0, 4.0]


# ---------------------------------------------------------------------------------------------------------- the work


class Counting(Calibrator):
    """Notes which samples it reads, and stops where it is told to."""

    method = "vtw"
    title = "numbers"
    source = "as published"

    def __init__(self, stop: int | None = None) -> None:
        object.__setattr__(self, "read", [])
        object.__setattr__(self, "stop", stop)

    def find(self, measure: Measure, config: Any) -> Outcome:
        rows = [measure(stage, functools.partial(self.one, stage=stage)) for stage in ("a", "b")]
        return Outcome({"n": dict(enumerate(mean(rows[0] + rows[1], "n")))}, {"layer": 2})

    def one(self, probe: Probe, inputs: Mapping[str, Any], sample: int, *, stage: str) -> Row:
        if len(self.read) == self.stop:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        self.read.append((stage, sample))  # type: ignore[attr-defined]
        return {"n": [sample + (stage == "b") / 2]}


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    model, file = llava(), tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt):
        run(Counting(stop=3), model, partial=file)
    with file.open("a") as cut_off:
        cut_off.write('{"round": "b", "sam')
    again = Counting()
    found = run(again, model, partial=file)
    assert again.read == [("b", 1)]
    assert not file.exists()
    assert found == run(Counting(), model)


def test_results_of_another_calibration_are_not_mixed_in(tmp_path: Path) -> None:
    model, file = llava(), tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt):
        run(Counting(stop=1), model, partial=file)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ConfigError, match=r"x\.partial: intermediate results of another"):
        run(Counting(), model, partial=file)


def test_fingerprints_tell_weights_apart() -> None:
    one, other = llava(), llava()
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.get_decoder().layers[-1].mlp.down_proj.weight.mul_(1.001)
    assert fingerprint(one) != fingerprint(other)


def test_nothing_stays_on_the_model() -> None:
    model = llava()
    [inputs] = prompts(model, number=1)
    with torch.no_grad():
        before = model(**inputs).logits
    for kind in CALIBRATORS.values():
        run(kind(), model)
    assert visiontok.attached(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.get_decoder().layers)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_the_artefact_is_a_recipe(tmp_path: Path) -> None:
    model, file = llava(), tmp_path / "vtw.json"
    for layer in model.get_decoder().layers[3:]:
        silence(layer)
    found = run(ExitKL(), model)
    drawing = found.save(file)
    data = json.loads(file.read_text())
    assert data["model"] == {"name": "tiny", "type": "llava", "layers": DEPTH, "weights": fingerprint(model)}
    assert (data["options"], data["recommended"]) == ({"eta": 0.003, "first": 5 / 32}, {"layer": 3})
    loaded = Recipe.load(file)
    assert loaded == replace(visiontok.recipe("vtw", layer=3), calibrated=("llava", DEPTH))
    assert loaded == Recipe.from_dict(loaded.to_dict())
    assert (visiontok.recipe("fastv") + loaded).calibrated == loaded.calibrated
    with visiontok.compress(model, str(file)) as compression:
        model.generate(**prompts(model)[0], max_new_tokens=2)
        assert [sum(layer.tolist()) > 0 for layer in (compression.ledger.alive(k)[0] & compression.ledger.visual[0]
                for k in range(DEPTH))] == [True] * 3 + [False] * 3  # fmt: skip
    root = ET.parse(drawing).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [DEPTH - 1]


def test_an_artefact_of_another_model_is_refused(tmp_path: Path) -> None:
    run(ExitKL(eta=1e9), llava()).save(tmp_path / "vtw.json")
    other = zoo.build("llava")
    with pytest.raises(ConfigError, match=r"calibrated=\('llava', 6\): .* this llava of 4 decoder layers; run"):
        visiontok.compress(other, tmp_path / "vtw.json")
    data = json.loads((tmp_path / "vtw.json").read_text())
    for wrong in ("llava", ["llava"], ["llava", "6"]):
        with pytest.raises(ConfigError, match=r"calibrated=.*\['llava', 32\]"):
            Recipe.from_dict({"stages": [{"kind": "exit", "layer": 1}], "calibrated": wrong})
    with pytest.raises(ConfigError, match="calibrated="):
        Recipe.from_dict(data | {"model": data["model"] | {"layers": None}})


def test_an_artefact_that_recommends_nothing_is_no_recipe(tmp_path: Path) -> None:
    run(ExitKL(eta=1e-12), llava()).save(tmp_path / "vtw.json")
    with pytest.raises(ConfigError, match="recommended=None: this calibration of vtw found nothing"):
        Recipe.load(tmp_path / "vtw.json")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExitKL(eta=0), "eta=0"),
        (lambda: LayerKL(share=1), "share=1"),
        (lambda: FitBisect(reduction=60), "reduction=60"),
        (lambda: MassDecay(share=0), "share=0"),
        (lambda: InterLayerSimilarity(cuts=0), "cuts=0"),
        (lambda: InterLayerSimilarity(fall=2), "fall=2"),
        (lambda: calibrate(ExitKL(), llava(), [], name="", data={}), "samples=0"),
    ],
)
def test_errors_name_argument_and_value(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


# ---------------------------------------------------------------------------------------------------------- samples


def test_samples_of_a_folder_and_of_a_list(tmp_path: Path) -> None:
    for number, name in enumerate(("b.png", "a.jpg", "c.webp")):
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("How many?\n")
    (tmp_path / "notes.md").write_text("no picture")
    found = read(str(tmp_path), 2)
    assert [(s.picture.size, s.question) for s in found] == [((5, 4), QUESTION), ((4, 4), "How many?")]
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"image": "c.webp", "question": "What?"}\n\n{"image": "a.jpg", "question": "Who?"}\n')
    assert [(s.picture.size, s.question) for s in read(str(listed), 9)] == [((6, 4), "What?"), ((5, 4), "Who?")]


@pytest.mark.parametrize("line", ["no json", "[]", '{"image": "a.png"}', '{"image": 3, "question": "?"}'])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match=r"list\.jsonl': line 1 is not"):
        read(str(file), 1)


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no picture"):
        read(str(tmp_path), 1)
    with pytest.raises(ConfigError, match="no such folder or file"):
        read(str(tmp_path / "none"), 1)


def test_scenes_ask_different_things_and_digests_tell_samples_apart() -> None:
    found = scenes(4)
    assert len({s.question.split()[0] for s in found}) > 1
    assert digest(found) == digest(scenes(4)) != digest(found[:3])
    assert digest([Sample(found[0].picture, "a")]) != digest([Sample(found[0].picture, "b")])


# ------------------------------------------------------------------------------------------------------- command line


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["visiontok", "calibrate", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    streams = capsys.readouterr()
    return stop.value.code, streams.out, streams.err


def test_the_command_writes_artefact_and_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "vtw", "--samples", "2", "--option", "eta=1000")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ['recommended: {"layer": 1}', "written: vtw.json, vtw.svg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vtw.json", "vtw.svg"]
    data = json.loads(Path("vtw.json").read_text())
    assert data["data"]["source"] == "2 scenes of visiontok.demo"
    assert data["options"]["eta"] == 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fastv",), "method='fastv': has no calibration; there are vtw"),
        (("vtw", "--samples", "0"), "samples=0"),
        (("vtw", "--out", "x.txt"), "--out 'x.txt'"),
        (("vtw", "--out", "none/x.json"), "--out 'none/x.json'"),
        (("vtw", "--data", "none"), "data='none'"),
        (("vtw", "--option", "eta=low"), "--option eta=low"),
        (("vtw", "--option", "beta=1"), "no such option; it takes eta, first"),
        (("entropyprune", "--option", "beta=1"), "it takes none"),
    ],
)
def test_the_command_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not list(tmp_path.iterdir())
