"""What other evaluation harnesses find visiontok by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The entry point of lmms-eval, which calls it in every run: nothing heavy is imported here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("visiontok", chat_class_path=f"{__name__}.lmms.Visiontok")
