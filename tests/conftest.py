"""Set before anything else is imported: no network, one thread a worker, and torchvision's stand-in."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with a thread pool each would fight over the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import visiontok._torchvision  # noqa: F401
