"""The releases of transformers that visiontok is tested on: the one place that names them."""

from __future__ import annotations

import re

TESTED = ("5.16.1", "5.20.2", "5.23.0")
"""CI runs the engine's tests on these: the oldest supported, the newest that vLLM 0.33 allows (≥ 5.16.1, < 5.21), the
newest."""


def minor(version: str) -> tuple[int, int]:
    """Major and minor of a version such as ``5.24.0.dev0``.

    Raises:
        ValueError: if it does not begin with two numbers.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} does not begin with two numbers")
    return int(found[1]), int(found[2])


def describe(version: str) -> str:
    """How ``version`` of transformers lies to the window."""
    oldest, newest = (".".join(map(str, minor(v))) for v in (TESTED[0], TESTED[-1]))
    if minor(version) < minor(TESTED[0]):
        return f"{version} is not supported: it is older than the tested window {oldest} – {newest}"
    if minor(version) > minor(TESTED[-1]):
        return f"{version} is untested: it is newer than the tested window {oldest} – {newest}"
    return f"{version} lies in the tested window {oldest} – {newest}"
