"""Weights of trained scorers, from safetensors files only: nothing in them is ever executed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import ConfigError

_NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
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
    said, place = f"scorer_weights={path!r}", Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        found = f"a folder with {len(files)} .safetensors files" if place.is_dir() else "no .safetensors file"
        raise ConfigError(f"{said}: {found}; give one .safetensors file, or a folder that holds one")
    try:
        with safe_open(files[0], framework="pt") as stored:
            names: list[str] = stored.keys()
            parts = {functools.reduce(_unwrapped, _WRAPPERS, name): stored.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has an exception of its own for each kind of damage
        raise ConfigError(f"{said}: cannot be read ({error}); fetch the file again") from error
    if sorted(parts) != sorted(_NAMES):
        missing, odd = sorted(set(_NAMES) - set(parts)), sorted(set(parts) - set(_NAMES))
        wrong = "; ".join(
            f"{what} {', '.join(names[:4])}" for what, names in (("no", missing), ("unknown", odd)) if names
        )
        raise ConfigError(f"{said}: no VisionSelector head ({wrong}); it has {', '.join(_NAMES)} and nothing else")
    shapes = [tuple(parts[name].shape) for name in _NAMES]
    if len(shapes[0]) != 2 or shapes != [shapes[0], shapes[0][:1]] * 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(_NAMES, shapes, strict=True))
        raise ConfigError(f"{said}: {listed}; both weights must be (H, D) and both biases (H,)")
    wq, bq, wk, bk = (parts[name].to(device, torch.float32) for name in _NAMES)
    return (wq, bq), (wk, bk)


def _unwrapped(name: str, wrapper: str) -> str:
    return name.replace(wrapper, "")
