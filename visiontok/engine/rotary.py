"""The rotary tables of a language model at given positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..errors import UnsupportedError


def rotary_tables(text: Any, positions: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines at which a language model turns its keys.

    Every axis of M-RoPE gets all frequencies, however the model divides these among the axes. Where layer types have
    tables of their own, those of full attention are taken.

    Args:
        text: the language model.
        positions: (N,) or (B or 1, N), or (A, B, N) for A axes, with the text positions before them if A is 4.
        batch: B.

    Returns:
        two (B, N, A·R) float32 tensors.

    Raises:
        UnsupportedError: if the model has no rotary positions that can be computed from these.
    """
    rotary = getattr(text, "rotary_emb", None)
    if rotary is None:
        raise UnsupportedError(
            f"{text.config.model_type}: its language model has no rotary positions at .rotary_emb, so there are no "
            "coordinate tokens to reserve; leave reserve out"
        )
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[1:]
    axes = positions if positions.ndim == 3 else positions.reshape(1, -1, positions.shape[-1])
    options: dict[str, Any] = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = text.config.layer_types
        options["layer_type"] = "full_attention" if "full_attention" in kinds else kinds[0]
    like = torch.empty(0, device=positions.device)  # tells device and dtype
    tables = []
    for axis in axes:
        # a model with several axes is given the same one for each; some versions answer with a table for each
        at = axis.expand(len(axes), batch, -1) if positions.ndim == 3 else axis.expand(batch, -1)
        tables.append([x[0] if x.ndim == 4 else x for x in rotary(like, at, **options)])
    shape = (batch, axes.shape[-1])
    if any(len(table) != 2 or any(x.shape[:-1] != shape for x in table) for table in tables):
        raise UnsupportedError(
            f"{text.config.model_type}: its rotary tables are no cosines and sines per token, so there are no "
            "coordinate tokens to reserve; leave reserve out"
        )
    cos, sin = zip(*tables, strict=True)
    return torch.cat(cos, -1), torch.cat(sin, -1)
