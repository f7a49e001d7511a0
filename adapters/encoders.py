"""Which models without a language model are encoders whose tokens can be merged."""

from __future__ import annotations

from torch import nn

from .encoder import Encoder


def find_encoder(model: nn.Module) -> Encoder | None:
    """The encoder that a model without a language model is; None if it is none of those known.

    Raises:
        UnsupportedError: for a model of timm or open_clip in which tokens cannot be merged; says why.
    """
    library = next(
        (name for cls in type(model).__mro__ if (name := cls.__module__.partition(".")[0]) in ("timm", "open_clip")), ""
    )
    if library == "timm":
        from .timm import timm_encoder

        return timm_encoder(model)
    if library == "open_clip":
        from .open_clip import open_clip_encoder

        return open_clip_encoder(model)
    if hasattr(model, "config"):
        from .transformers_encoder import plain_encoder

        return plain_encoder(model)
    return None
