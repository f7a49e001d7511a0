"""The architectures that embedded models have, by their Hugging Face model type."""

from __future__ import annotations

from .llava import Llava
from .model import Architecture
from .qwen import Qwen

ARCHITECTURES: dict[str, type[Architecture]] = {kind.name: kind for kind in (Llava, Qwen)}
