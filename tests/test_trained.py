"""Scorers with trained weights: VisionSelector heads in AngelSlim's format, read from safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import visiontok
import visiontok.functional as F
from visiontok.conformance.checks import CHECKS, Case
from visiontok.conformance.zoo import batch, build
from visiontok.errors import ConfigError
from visiontok.recipes.idpruner import IDPruner
from visiontok.weights import load_selector

WIDTH, HIDDEN, K = 32, 6, 5


def head(width: int = WIDTH, hidden: int = HIDDEN, prefix: str = "") -> dict[str, Tensor]:
    """As the published heads are stored: two linear maps of half the width, in bfloat16."""
    g = torch.Generator().manual_seed(0)
    shapes = {"k_proj.bias": (hidden,), "k_proj.weight": (hidden, width)}
    shapes |= {name.replace("k_", "q_"): shape for name, shape in shapes.items()}
    return {prefix + name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}


def scores_of(x: np.ndarray, parts: dict[str, Tensor]) -> np.ndarray:
    """The published formula, with the table of all products written out."""
    q, k = (
        x @ parts[f"{name}_proj.weight"].double().numpy().T + parts[f"{name}_proj.bias"].double().numpy()
        for name in "qk"
    )
    return (q @ k.T / np.sqrt(q.shape[1])).mean(1)


def test_learned_is_the_mean_of_all_products() -> None:
    g = torch.Generator().manual_seed(1)
    x, parts = torch.randn(2, 9, WIDTH, generator=g), head()
    valid = torch.arange(9) < torch.tensor([[9], [4]])
    maps = [(parts[f"{name}_proj.weight"], parts[f"{name}_proj.bias"]) for name in "qk"]
    mine = F.learned(x.masked_fill(~valid[..., None], 50.0), maps[0], maps[1], valid)
    for b, n in enumerate((9, 4)):
        np.testing.assert_allclose(mine[b, :n], scores_of(x[b, :n].double().numpy(), parts), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(F.learned(x[b, :n], maps[0], maps[1]), mine[b, :n])


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_published_form_in_a_model(name: str, tmp_path: Path) -> None:
    """Images of different sizes in one batch: each is scored and pruned by itself."""
    save_file(head(prefix="module.visual.importance_scorer."), tmp_path / "model.safetensors")
    model, inputs = build(name), batch(name, build(name))
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    with visiontok.compress(model, "idpruner", keep=K, scorer_weights=str(tmp_path)) as compression, torch.no_grad():
        model(**inputs)
        alive, units = compression.ledger.alive(0), compression.ledger.units
        assert compression.report.recipe == "idpruner[trained]"
    for u, image in enumerate(features):
        z = image.double().numpy()
        kept = alive[units.row[u]][units.slots[u][units.valid[u]]].nonzero()[:, 0].tolist()
        assert kept == sorted(naive.idpruner_naive(z, scores_of(z, head()), K))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_trained_scorer_conforms(name: str, tmp_path: Path) -> None:
    save_file(head(), tmp_path / "head.safetensors")
    recipe = visiontok.recipe("idpruner", scorer_weights=str(tmp_path / "head.safetensors"))
    for check in CHECKS.values():
        check(Case(recipe, name))


def write(folder: Path, parts: dict[str, Tensor] | bytes, name: str = "head.safetensors") -> str:
    if isinstance(parts, bytes):
        (folder / name).write_bytes(parts)
    else:
        save_file(parts, folder / name)
    return str(folder / name)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in head().items() if key != name}


@pytest.mark.parametrize(
    ("parts", "name", "message"),
    [
        (b"", "head.bin", "no .safetensors file; give one"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense", "head.safetensors", "cannot be read .*; fetch the file again"),
        (without("k_proj.bias"), "head.safetensors", r"no VisionSelector head \(no k_proj.bias\); it has q_proj"),
        (head() | {"v_proj.weight": torch.ones(2, 2)}, "head.safetensors", r"\(unknown v_proj.weight\)"),
        ({"norm.weight": torch.ones(2)}, "head.safetensors", r"\(no k_proj.bias, .*; unknown norm.weight\)"),
        (head() | {"k_proj.weight": torch.ones(HIDDEN, 9)}, "head.safetensors", r"k_proj.weight \(6, 9\).*must be"),
        (head() | {"q_proj.bias": torch.ones(3)}, "head.safetensors", r"q_proj.bias \(3,\).*must be \(H, D\)"),
        (head() | {"q_proj.weight": torch.ones(4)}, "head.safetensors", r"q_proj.weight \(4,\).*must be \(H, D\)"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(tmp_path: Path, parts: Any, name: str, message: str) -> None:
    path = write(tmp_path, parts, name)
    with pytest.raises(ConfigError, match=f"scorer_weights='{path}': .*{message}"):
        visiontok.compress(build("llava"), "idpruner", keep=K, scorer_weights=path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        load_selector(str(tmp_path / "none.safetensors"), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"a folder with 0 \.safetensors files"):
        load_selector(str(tmp_path), torch.device("cpu"))
    write(tmp_path, head())
    write(tmp_path, head(), "other.safetensors")
    with pytest.raises(ConfigError, match=r"a folder with 2 \.safetensors files; give one"):
        load_selector(str(tmp_path), torch.device("cpu"))


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = build("llava"), write(tmp_path, head(width=48))
    wrong = pytest.raises(ConfigError, match="for tokens of width 48, those of this llava have 32; use the head")
    with visiontok.compress(model, "idpruner", keep=K, scorer_weights=path), torch.no_grad(), wrong:
        model(**batch("llava", model))


def test_weights_are_a_scorer() -> None:
    with pytest.raises(ConfigError, match=r"scorer='cls', scorer_weights='x': weights are a scorer"):
        IDPruner(scorer="cls", scorer_weights="x")
    method = IDPruner(scorer_weights="head.safetensors", background=0)
    assert method.label == "idpruner[trained, centred]"
    assert IDPruner.build(method.options()) == method
    assert method.needs() == visiontok.Needs()
