"""The methods, one file each. Other packages add theirs through the entry-point group ``visiontok.methods``."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata

from ..errors import ConfigError
from ..method import Card, Method

_BUILT_IN = (
    "visiontok",
    "random", "grid", "resize", "pixelprune", "background", "pixel_entropy", "temporal", "trim", "tower_cut", "ipcv",
    "tome", "tinychart", "auroracap", "dymu", "norm", "cls_topk", "divprune", "idpruner", "hiprune", "todre",
    "visionzip", "prumerge", "prumerge_plus", "vispruner", "vscan", "zoo_prune", "scope", "cdpruner", "mmtok", "eadp",
    "dart", "holov", "globalcom2", "prunesid", "agile", "aim_merge", "m3_pool", "textmonkey", "kmeans", "erase",
    "sieve", "fastv", "feather", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "hidrop", "aim", "fitprune",
    "transprune", "v2drop", "entropyprune", "gemfilter", "explain", "urag", "vtw", "todre_exit", "shortv", "pmod",
    "yopo", "snapkv", "h2o", "dycoke_cache",
)  # fmt: skip


def names() -> list[str]:
    """Names of all methods, built in and from other packages."""
    return [*_BUILT_IN, *sorted(set(_third_party()) - set(_BUILT_IN))]


def methods() -> list[Card]:
    """The cards of all methods."""
    return [find(name).card for name in names()]


def find(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        ConfigError: for an unknown name; lists the close ones.
    """
    if name in _BUILT_IN:
        module = importlib.import_module(f".{name}", __name__)
        for value in vars(module).values():
            card = getattr(value, "card", None)
            if isinstance(value, type) and issubclass(value, Method) and card is not None and card.name == name:
                return value
    entry = _third_party().get(name)
    if entry is not None:
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(f"method={name!r}: entry point {entry.value} is no Method subclass")
        return cls
    close = difflib.get_close_matches(str(name), names(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known methods: {', '.join(names())}"
    raise ConfigError(f"method={name!r}: unknown; {hint}")


def _third_party() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group="visiontok.methods")}
