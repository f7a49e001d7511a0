"""The cache stage: as soon as a layer has stored the keys and values of a prompt, some of its visual tokens go.

The layer's own attention has them all; what comes behind the prompt sees what stays. Every key head may keep other
tokens, but all of a layer keep as many, so that one padding mask serves all heads. Keys stay as they are, with the
positions they were turned by. A layer is thinned before the next one runs, so that one layer at a time is stored whole.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..context import Attention, Context
from ..errors import ConfigError, UnsupportedError
from ..functional import attention_columns
from ..method import Selection
from .call import Prefill
from .host import stops_host, upload
from .probe import Visible, visible_keys

if TYPE_CHECKING:
    from .policy import StagePolicy


def thin(
    policy: StagePolicy,
    layer: int,
    call: Prefill | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    kwargs: Any,
) -> None:
    """Ask the cache method about one layer, and free what it does not keep; a sink of :class:`~.probe.Tap`.

    Raises:
        UnsupportedError: if a sliding window has already pushed out a part of the prompt.
    """
    if not isinstance(call, Prefill) or call.policy is not policy or call.cache is None:
        return
    alive = list(policy.counts(call, layer))
    wanted = [min(n, there) for n, there in zip(policy.to_cache(call), alive, strict=True)]
    if wanted == alive:
        return
    new, stored = call.slots(layer), call.cache.layers[layer]
    if stored.keys.shape[2] < new:
        raise UnsupportedError(
            f"decoder layer {layer} slides over {stored.keys.shape[2] + 1} tokens, fewer than the {new} of this prompt,"
            " so its cache holds a part of the image already; use a prompt stage or a cut instead of a cache stage"
        )
    used = call.slots_in_use(layer)
    seen = visible_keys(mask, q, k, used, kwargs.get("sliding_window"))
    read = functools.partial(_read, policy, call, layer, q, k, used, seen, kwargs.get("scaling"))
    keep = _ask(policy, call, layer, wanted, read)  # (U, N, G)

    stays = torch.stack([call.units.scatter(head) for head in keep.unbind(2)], 2)
    stays = stays | (call.attended & ~call.visual)[..., None]  # (B, N, G)
    slots = call.held(layer, stays) & used[..., None]
    rows = call.row_counts(wanted)
    width = max(*rows, 1)
    # as in a layout: a stable sort puts what goes first and keeps the rest in order behind it
    index = torch.argsort(slots.to(torch.int8), dim=1, stable=True)[:, new - width :].transpose(1, 2)
    key = "cached", tuple(rows)
    if key not in call.masks:  # one tensor for all layers that keep as many, which then share their masks
        begins = upload(torch.tensor([width - n for n in rows]), q.device)
        whole = all(n == width for n in rows)
        call.masks[key] = None if whole else torch.arange(width, device=q.device) >= begins[:, None]
    stored.thin(index.expand(-1, k.shape[1], -1), new, call.masks[key])
    call.cached[layer] = stays, width


def _ask(policy: StagePolicy, call: Prefill, layer: int, wanted: list[int], read: Any) -> torch.Tensor:
    """(U, N, G or 1) bool, the method's answer, checked."""
    stage: Any = policy.cache_stage
    if call.asked_of_cache is None:
        everything = policy._context(call, stage, None, call.embeds, call.units.valid, call.units.sizes)
        call.asked_of_cache = replace(everything, stage="cache")
    ctx: Context = replace(
        call.asked_of_cache,
        layer=layer,
        valid=call.units.gather(call.alive[layer][..., None])[..., 0] & call.units.valid,
        count=upload(torch.tensor(wanted), call.embeds.device),
        attention=Attention(read),
    )
    answer = stage.method.select(ctx)
    keep = answer.keep if isinstance(answer, Selection) else answer
    if not torch.is_tensor(keep) or keep.dtype != torch.bool or keep.shape[:2] != ctx.valid.shape or keep.ndim > 3:
        found = f"{tuple(keep.shape)} {keep.dtype}" if torch.is_tensor(keep) else type(keep).__name__
        raise ConfigError(
            f"{stage.label}: select() returned {found}; at a cache stage it must return a bool mask "
            f"{tuple(ctx.valid.shape)}, or one per key head behind it"
        )
    if isinstance(answer, Selection) and (answer.features is not None or answer.into is not None):
        raise UnsupportedError(f"{stage.label}: merged tokens at a cache stage, which stores what layers have computed")
    keep = (keep if keep.ndim == 3 else keep[..., None]) & ctx.valid[..., None]
    right = (keep.sum(1) == ctx.count[:, None]).all()

    def error() -> ConfigError:
        return ConfigError(
            f"{stage.label}: select() kept another number of tokens than the budget {wanted} in some head of layer "
            f"{layer}; every head of a cache keeps as many"
        )

    if stops_host(keep.device):
        call.promises.expect(right, error)
    elif not right:
        raise error()
    return keep


def _read(
    policy: StagePolicy,
    call: Prefill,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    used: torch.Tensor,
    seen: Visible,
    scale: float | None,
    stat: str,
    argument: int,
) -> torch.Tensor:
    """(U, N, G) statistics of the attention that a layer just computed; see :class:`visiontok.context.Attention`."""
    stage: Any = policy.cache_stage
    if not stat.startswith("cache_") and policy.thins_from is not None:
        return policy._read(call, policy.thins_from, stat, argument)
    if argument not in getattr(stage.method.needs(), stat, ()):
        raise ConfigError(
            f"attention.{stat}({argument}): declare it in needs() of the method; a cache stage without a layer has "
            "cache_window and cache_received only"
        )
    if stat == "cache_window":
        asking = _window(call, layer, used, argument)
        at = torch.where(asking, torch.arange(asking.shape[1], device=q.device), -1).sort(1).values[:, -argument:]
        weight, at = at >= 0, at.clamp_min(0)  # -1 for none
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        asks = q.transpose(1, 2)[row, at].transpose(1, 2)
        options: dict[str, Any] = {"visible": seen.of(at)}
    else:
        weight, asks, options = used, q, seen.options()
    each = attention_columns(asks, k, scale=scale, **options, weight=weight, heads="each", normalise=None)
    total = each.unflatten(1, (k.shape[1], -1)).sum(2)
    mine = total[..., -q.shape[2] :].transpose(1, 2)  # what earlier turns stored is no candidate
    return call.units.gather(call.to_prompt(layer, mine))


def _window(call: Prefill, layer: int, used: torch.Tensor, width: int) -> torch.Tensor:
    """(B, M) bool: the last ``width`` slots in use of each row, behind its last visual one; the last one at least."""
    slot = torch.arange(used.shape[1], device=used.device)
    shown = call.held(layer, call.visual) & used
    last = torch.where(shown, slot, -1).amax(1, keepdim=True)
    end = torch.where(used, slot, -1).amax(1, keepdim=True)
    asks = used & ((slot > last) | (slot == end))
    return asks & (asks.flip(1).cumsum(1).flip(1) <= width)
