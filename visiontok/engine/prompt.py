"""The prompt stages of one prefill: find its images, run the methods, open the books. Both planes begin here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..cost import VisionInputs, attention_lengths, knows
from ..ledger import TokenLedger
from .call import Prefill
from .trace import Trace
from .vision import Encoded, Units, locate

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

    from .attach import Policy


def run_prompt_stages(
    adapter: Adapter,
    policy: Policy,
    trace: Trace,
    *,
    masks: Mapping[str, torch.Tensor],
    records: list[Encoded],
    ids: torch.Tensor | None,
    ids_host: torch.Tensor | None,
    embeds: torch.Tensor,
    attended: torch.Tensor,
    positions: Callable[[], torch.Tensor],
    ahead: Callable[[int, Prefill], torch.Tensor] | None = None,
    rests: Callable[[Prefill], torch.Tensor] | None = None,
) -> tuple[Prefill, torch.Tensor | None, torch.Tensor]:
    """Ask the methods before the language model.

    Args:
        adapter: of the model.
        policy: who decides.
        trace: of the call.
        masks: per modality (B, N) bool on the host, placeholder positions.
        records: the tower runs that made the features.
        ids: (B, N) token ids, or None if the caller gave embeddings; ``ids_host`` are the same on the host.
        embeds: (B, N, D) inputs of the language model.
        attended: (B, N) bool on the host, positions that are not padding.
        positions: makes the positions of the prompt in the language model, (…, B, N) long.
        ahead: looks ahead to a decoder layer; None if that cannot be done.
        rests: says what the next token rests on; None if that cannot be done.

    Returns:
        the call with its books, the (B, N) keep mask over visual positions (None: all), and the embeddings, merged or
        not.
    """
    visual = functools.reduce(torch.logical_or, masks.values())
    units = _units(adapter, masks, records)
    call = Prefill(policy, trace, units, records, visual, attended, ids, ids_host, embeds)
    call.positions, call.ahead, call.rests = positions, ahead, rests
    trace.ledger = TokenLedger(call.visual, call.attended, call.units, trace.depth)
    trace.encoders = [record.clock for record in records]
    trace.remembered = any(record.remembered for record in records)
    config: Any = adapter.base.config
    trace.inputs = [_vision_inputs(config, record) if knows(config) else None for record in records]
    trace.merged = [record.merged for record in records]
    trace.clock.mark("selection")
    keep, embeds = policy.prompt(call, embeds)
    trace.clock.mark("selected")
    if keep is not None:
        call.kept = keep & call.visual
    call.check_last(torch.where(call.visual, call.kept, call.attended))
    return call, keep, embeds


def _vision_inputs(config: Any, record: Encoded) -> tuple[VisionInputs, VisionInputs]:
    stock = VisionInputs.from_call(config, record.inputs)
    ran, smaller, inside = stock, record.smaller, record.inside
    if smaller is not None and any(part.changes for part in smaller.parts):
        ran = VisionInputs.from_call(config, smaller.inputs)
        lengths = [part.lengths for part in smaller.parts if part.lengths is not None]
        if lengths:
            area = stock.patches // sum(map(len, smaller.kept))
            ran = VisionInputs(
                grids=tuple((1, 1, int(mask.sum()) * area) for mask in smaller.kept),
                embedded=ran.computed,
                lengths=tuple(sum(layer, ()) for layer in zip(*lengths, strict=True)),
            )
    if inside is not None and (inside.lengths or inside.mlp):
        whole = attention_lengths(config, ran)
        left = tuple(inside.lengths.get(layer, tuple(mine)) for layer, mine in enumerate(whole))
        mlp = tuple(inside.mlp.get(layer, sum(mine)) for layer, mine in enumerate(left))
        ran = replace(ran, lengths=left, mlp=mlp, projected=tuple(whole[-1]))
    return stock, ran


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
