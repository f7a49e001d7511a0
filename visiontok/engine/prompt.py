"""The prompt stages of one prefill: find its images, run the methods, open the books. Both planes begin here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..cost import VisionInputs
from ..ledger import TokenLedger
from .call import Call
from .trace import Trace
from .vision import Encoded, Units, locate

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

    from .attach import Policy


def run_prompt_stages(
    adapter: Adapter,
    policy: Policy,
    *,
    masks: Mapping[str, torch.Tensor],
    records: list[Encoded],
    ids: torch.Tensor | None,
    embeds: torch.Tensor,
    attended: torch.Tensor,
    depth: int,
) -> tuple[Call, torch.Tensor | None, torch.Tensor]:
    """Ask the methods before the language model.

    Args:
        adapter: of the model.
        policy: who decides.
        masks: per modality (B, N) bool, placeholder positions.
        records: the tower runs that made the features.
        ids: (B, N) token ids, or None if the caller gave embeddings.
        embeds: (B, N, D) inputs of the language model.
        attended: (B, N) bool, positions that are not padding.
        depth: number of decoder layers.

    Returns:
        the call with its books, the (B, N) keep mask over visual positions (None: all), and the embeddings, merged or
        not.
    """
    call = Call("prefill", Trace(depth))
    call.trace.clock.mark("prefill")
    visual = functools.reduce(torch.logical_or, masks.values()).to(embeds.device)
    units = _units(adapter, masks, records)
    call.begin_prefill(visual, attended, units, records, ids, embeds)
    call.trace.ledger = TokenLedger(visual, attended, units, depth)
    call.trace.encoders = [record.clock for record in records]
    if adapter.model_types:  # the default adapter knows nothing of the tower
        call.trace.inputs = [VisionInputs.from_call(adapter.base.config, record.inputs) for record in records]
    call.trace.clock.mark("selection")
    keep, embeds = policy.prompt(call, embeds)
    call.trace.clock.mark("selected")
    if keep is not None:
        call.kept = keep & visual
    call.check_last(torch.where(visual, call.kept, attended))
    return call, keep, embeds


def _units(adapter: Adapter, masks: Mapping[str, torch.Tensor], records: list[Encoded]) -> Units:
    grids: dict[Any, Any] = {}
    for modality in masks:
        items = [
            (r, i, grid)
            for r, record in enumerate(records)
            if record.modality == modality
            for i, grid in enumerate(adapter.grids(record))
        ]
        grids[modality] = items if any(record.modality == modality for record in records) else None
    return locate(
        dict(masks),  # type: ignore[arg-type]
        grids,
        join_adjacent=adapter.join_adjacent,
        model=adapter.base.config.model_type,
    )
