"""What `visiontok doctor` tells: the versions, devices, kernels and known quirks of this machine.

Works when pieces are missing or broken: then it says so instead of failing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _window

if TYPE_CHECKING:
    from rich.console import Console

NOT_INSTALLED = "not installed"

_DISTRIBUTIONS = {
    "visiontok": "visiontok",
    "torch": "torch",
    "transformers": "transformers",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "triton": "triton",
    "pillow": "pillow",
    "accelerate": "accelerate",
    "torchvision": "torchvision",
    "flash_attn": "flash_attn",
    "gradio": "gradio",
}


def inspect() -> dict[str, Any]:
    """All findings as plain data, ready for JSON."""
    torch, problem = _import("torch")
    devices = _devices(torch) if torch else []
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
        "transformers": _transformers(),
        "platform": platform.platform(),
        "torch": _torch(torch, problem),
        "devices": devices,
        "attention": _attention(torch),
        "triton": _triton(any(device["kind"] in ("cuda", "hip", "xpu") for device in devices)),
        "torchvision": _torchvision(torch),
        "embedded models": _embedded_models(),
    }


def render(findings: dict[str, Any], console: Console) -> None:
    """Prints the findings as one table."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in findings["versions"].items():
        table.add_row("versions" if name == "python" else "", name, version)
    for name in ("transformers", "platform", "torch"):
        table.add_row(name, "", findings[name])
    for place, device in enumerate(findings["devices"]):
        memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        table.add_row("" if place else "devices", device["device"], f"{device['name']}{memory}")
    for place, (name, state) in enumerate(findings["attention"].items()):
        table.add_row("" if place else "attention", name, state)
    for name in ("triton", "torchvision", "embedded models"):
        table.add_row(name, "", findings[name])
    console.print(table)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS[name])
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not. A half-broken install fails in ways that no one exception names."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None, NOT_INSTALLED
        return None, f"cannot be imported: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _transformers() -> str:
    version = _version("transformers")
    return version if version == NOT_INSTALLED else _window.describe(version)


def _torch(torch: Any, problem: str) -> str:
    if torch is None:
        return problem
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built for the CPU only"


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "kind": "cpu",
            "name": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "kind": "hip" if torch.version.hip else "cuda",
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "kind": "mps", "name": "Apple Metal"})
    return devices


def _attention(torch: Any) -> dict[str, str]:
    if torch is None:
        return {}
    flash = _version("flash_attn")
    flex = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None
    return {
        "eager": "available",
        "sdpa": "available",
        "flash_attention_2": "available" if flash != NOT_INSTALLED and torch.cuda.is_available() else flash,
        "flex_attention": "available" if flex else NOT_INSTALLED,
    }


def _triton(has_gpu: bool) -> str:
    module, problem = _import("triton")
    if module is None:
        return f"{problem}; the PyTorch twins of the kernels are used"
    if not has_gpu:
        return "importable, but there is no GPU; the PyTorch twins of the kernels are used"
    return "importable, with a GPU"


def _torchvision(torch: Any) -> str:
    if importlib.util.find_spec("torchvision") is None:
        return NOT_INSTALLED
    if torch is None:
        return "installed, but needs torch"
    from visiontok import _torchvision

    _, problem = _import("torchvision")
    if problem:
        return problem
    if _torchvision.is_active():
        return "CUDA build beside a CPU-only torch; imports through a stand-in, its compiled operators do not work"
    return "importable"


def _embedded_models() -> str:
    spec = importlib.util.find_spec("visiontok.demo")
    if spec is None or spec.origin is None:
        return NOT_INSTALLED
    weights = sorted(Path(spec.origin).with_name("weights").glob("*/model.safetensors"))
    if not weights:
        return "weights missing"
    size = sum(path.stat().st_size for path in weights) / 2**20
    return f"{len(weights)} with weights ({size:.1f} MiB)"
