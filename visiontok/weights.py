"""Weights: those of trained scorers and routers, from safetensors files only (nothing in them is ever executed), and
what tells one model's from another's."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

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
    parts = _read(said, path, _WRAPPERS)
    _check_names(said, parts, "VisionSelector head", _NAMES)
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
    parts = _read(said, path)
    _check_names(said, parts, "retrieval head", _LAYERS)
    shapes = [tuple(parts[name].shape) for name in _LAYERS]
    first, second = shapes[0], shapes[2]
    fits = len(first) == len(second) == 2 and shapes[1] == first[:1] and shapes[3] == second[:1]
    if not fits or second[1] != first[0]:
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(_LAYERS, shapes, strict=True))
        raise ConfigError(f"{said}: {listed}; weights must be (H, D) and (E, H), biases (H,) and (E,)")
    w1, b1, w2, b2 = (parts[name].to(device, torch.float32) for name in _LAYERS)
    return (w1, b1), (w2, b2)


@functools.lru_cache(maxsize=4)
def load_routers(path: str, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Linear maps to one number, one per decoder layer that has some; read once per device.

    Args:
        path: a .safetensors file, or a folder with one, of ``layers.L.weight`` (1, D) and ``layers.L.bias`` (1,).
        device: where the weights are wanted.

    Returns:
        by layer, a weight (D,) and a bias (1,).

    Raises:
        ConfigError: if there is no such file, it cannot be read, or it holds something else.
    """
    said = f"weights={path!r}"
    parts = _read(said, path)
    layers = {match[1] for name in parts if (match := re.fullmatch(r"layers\.(\d+)\.(weight|bias)", name))}
    wanted = [f"layers.{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    if not wanted or sorted(wanted) != sorted(parts):
        odd = sorted(set(parts) ^ set(wanted))[:4]
        raise ConfigError(
            f"{said}: no routers ({', '.join(odd) or 'empty'}); it has layers.L.weight and layers.L.bias only"
        )
    found = {}
    for layer in layers:
        weight, bias = parts[f"layers.{layer}.weight"], parts[f"layers.{layer}.bias"]
        if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
            raise ConfigError(
                f"{said}: layers.{layer} has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; a router is "
                "(1, D) and (1,)"
            )
        found[int(layer)] = (weight[0].to(device), bias.to(device))
    return found


def _read(said: str, path: str, wrappers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of a file, without ``wrappers`` before their names; errors begin with ``said``."""
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        found = f"a folder with {len(files)} .safetensors files" if place.is_dir() else "no .safetensors file"
        raise ConfigError(f"{said}: {found}; give one .safetensors file, or a folder that holds one")
    try:
        with safe_open(files[0], framework="pt") as stored:
            names: list[str] = stored.keys()
            return {functools.reduce(_unwrapped, wrappers, name): stored.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has an exception of its own for each kind of damage
        raise ConfigError(f"{said}: cannot be read ({error}); fetch the file again") from error


def _check_names(said: str, parts: dict[str, Tensor], what: str, wanted: tuple[str, ...]) -> None:
    if sorted(parts) == sorted(wanted):
        return
    missing, odd = sorted(set(wanted) - set(parts)), sorted(set(parts) - set(wanted))
    wrong = "; ".join(
        f"{fault} {', '.join(found[:4])}" for fault, found in (("no", missing), ("unknown", odd)) if found
    )
    raise ConfigError(f"{said}: no {what} ({wrong}); it has {', '.join(wanted)} and nothing else")


def _unwrapped(name: str, wrapper: str) -> str:
    return name.replace(wrapper, "")


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of every parameter's name, shape, and up to 64 of its values."""
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        some = flat[:: max(len(flat) // 64, 1)][:64]
        found.update(repr((name, tuple(value.shape))).encode())
        found.update(some.to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()[:16]
