"""Weights of trained scorers, from safetensors files only: nothing in them is ever executed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import ConfigError

_NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
_LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias")
_WRAPPERS = ("module.", "_orig_mod.", "visual.importance_scorer.")  # what training frameworks put before the names


@functools.lru_cache(maxsize=4)
def load_selector(path: str, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The head of VisionSelector in AngelSlim's format, for :func:`visiontok.functional.learned`; read once per device.

    Args:
        path: a .safetensors file, or a folder with one.
        device: where the weights are wanted.

    Returns:
        query and key maps, each a float32 weight (H, D) and bias (H,).

    Raises:
        ConfigError: if there is no such file, it cannot be read, or it holds another head.
    """
    said = f"scorer_weights={path!r}"
    parts = _read(said, path, "VisionSelector head", _NAMES, _WRAPPERS)
    shapes = [tuple(parts[name].shape) for name in _NAMES]
    if len(shapes[0]) != 2 or shapes != [shapes[0], shapes[0][:1]] * 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(_NAMES, shapes, strict=True))
        raise ConfigError(f"{said}: {listed}; both weights must be (H, D) and both biases (H,)")
    wq, bq, wk, bk = (parts[name].to(device, torch.float32) for name in _NAMES)
    return (wq, bq), (wk, bk)


@functools.lru_cache(maxsize=4)
def load_retriever(path: str, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The head of URaG as a sequence of a linear map, GELU and another linear map; read once per device.

    Args:
        path: a .safetensors file with the state of ``nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, E))``, or a
            folder with one.
        device: where the weights are wanted.

    Returns:
        both maps, float32 weights (H, D) and (E, H) and biases (H,) and (E,).

    Raises:
        ConfigError: if there is no such file, it cannot be read, or it holds something else.
    """
    said = f"head={path!r}"
    parts = _read(said, path, "retrieval head", _LAYERS, ())
    shapes = [tuple(parts[name].shape) for name in _LAYERS]
    first, second = shapes[0], shapes[2]
    fits = len(first) == len(second) == 2 and shapes[1] == first[:1] and shapes[3] == second[:1]
    if not fits or second[1] != first[0]:
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(_LAYERS, shapes, strict=True))
        raise ConfigError(f"{said}: {listed}; weights must be (H, D) and (E, H), biases (H,) and (E,)")
    w1, b1, w2, b2 = (parts[name].to(device, torch.float32) for name in _LAYERS)
    return (w1, b1), (w2, b2)


def _read(said: str, path: str, what: str, wanted: tuple[str, ...], wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a file, which must be those ``wanted`` once ``wrappers`` are taken off their names.

    Raises:
        ConfigError: begins with ``said``.
    """
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        found = f"a folder with {len(files)} .safetensors files" if place.is_dir() else "no .safetensors file"
        raise ConfigError(f"{said}: {found}; give one .safetensors file, or a folder that holds one")
    try:
        with safe_open(files[0], framework="pt") as stored:
            names: list[str] = stored.keys()
            parts = {functools.reduce(_unwrapped, wrappers, name): stored.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has an exception of its own for each kind of damage
        raise ConfigError(f"{said}: cannot be read ({error}); fetch the file again") from error
    if sorted(parts) != sorted(wanted):
        missing, odd = sorted(set(wanted) - set(parts)), sorted(set(parts) - set(wanted))
        wrong = "; ".join(
            f"{fault} {', '.join(found[:4])}" for fault, found in (("no", missing), ("unknown", odd)) if found
        )
        raise ConfigError(f"{said}: no {what} ({wrong}); it has {', '.join(wanted)} and nothing else")
    return parts


def _unwrapped(name: str, wrapper: str) -> str:
    return name.replace(wrapper, "")
