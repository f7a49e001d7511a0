"""What methods read of the vision tower and the projector: which of its layers are tapped, and what the taps saw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..functional import attention_columns, attention_logits, attention_rows
from ..method import Layer, Stage, Tower, resolve_layer
from .call import Prefill
from .probe import Tap, allowed, attention_modules
from .readings import Host, needs_of
from .vision import Encoded, current_record

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

_OF_CLS = ("cls", "cls_joined", "cls_logits")
_VISION = (*_OF_CLS, "keys", "received")


def describe_tower(adapter: Adapter) -> Tower:
    """What methods may know of the vision tower of a model."""
    depth = len(attention_modules(getattr(adapter.base, adapter.tower, nn.Module())))
    layer = adapter.feature_layer
    return Tower(
        depth=depth,
        has_cls=adapter.cls_token,
        feature_layer=max(layer + depth if layer < 0 else layer, 0),
        full_attention=adapter.full_attention(depth),
        thumbnail=adapter.thumbnail,
    )


class TowerReadings:
    """What the methods of a recipe read of the vision tower.

    Args:
        host: the model, and where taps go.
        stages: those with a method.

    Raises:
        UnsupportedError: if no projector is known whose input a method wants.
        ConfigError: if a layer lies outside the tower.
    """

    def __init__(self, host: Host, stages: Sequence[Stage]) -> None:
        self.adapter, self._host = host.adapter, host
        self._modules = attention_modules(getattr(self.adapter.base, self.adapter.tower, nn.Module()))
        wanted: dict[int, set[str]] = {}
        for stage in stages:
            needs = needs_of(stage)
            for stat in _VISION:
                for name in getattr(needs, f"vision_{stat}"):
                    if stat in _OF_CLS and not self.adapter.cls_token:
                        continue  # the context says so when the method asks
                    index = resolve_layer(name, len(self._modules), name=_vision_option(stage, name))
                    wanted.setdefault(index, set()).add(stat)
        if any(needs_of(stage).encoder_features or needs_of(stage).projector for stage in stages):
            self._tap_projector(host)
        for index, stats in wanted.items():
            host.add(Tap(self._modules[index], functools.partial(self._sink, index, frozenset(stats))))

    @property
    def _model(self) -> str:
        return self.adapter.base.config.model_type

    def _tap_projector(self, host: Host) -> None:
        if self.adapter.projector is None:
            raise UnsupportedError(f"{self._model}: no projector is known whose input could be read")
        module = self.adapter.base.get_submodule(self.adapter.projector)
        host.add(module.register_forward_pre_hook(self._projector_hook, with_kwargs=True))

    def _projector_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        record = self.record()
        if record is not None and kwargs is not None:
            record.encoder_features.append(args[0] if args else next(iter(kwargs.values())))

    def record(self) -> Encoded | None:
        """The tower's run in progress, if its readings are for these methods."""
        record = current_record()
        if record is None or record.memory is None:
            return record if self._host.serves() else None
        return record if record.memory is self._host else None

    def _sink(
        self,
        layer: int,
        stats: frozenset[str],
        call: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        kwargs: Any,
    ) -> None:
        record = self.record()
        if record is None:
            return
        skip, scale = int(self.adapter.cls_token), kwargs.get("scaling")
        for stat in stats:
            if stat == "cls":
                found = attention_rows(q[:, :, :1], k, scale=scale, visible=_exists(mask))[:, 0]
            elif stat == "cls_joined":
                found = attention_rows(_joined(q[:, :, :1]), _joined(k), visible=_exists(mask))[:, 0]
            elif stat == "cls_logits":
                found = attention_logits(q[:, :, :1], k, scale=scale)[:, 0]
            elif stat == "keys":
                found = k.transpose(1, 2).float()
            else:
                found = _received(q, k, scale, mask, kwargs.get("cu_seq_lens_q"))
            record.attention.setdefault((stat, layer), []).append(found[:, skip:])

    def read(self, call: Prefill, stat: str, layer: int | float) -> torch.Tensor:
        """(U, N, …) what ``stat`` of :class:`visiontok.context.Attention` is.

        Raises:
            ConfigError: if the method did not declare it.
            UnsupportedError: if the model cannot tell.
        """
        if stat in _OF_CLS and not self.adapter.cls_token:
            raise UnsupportedError(
                f"{self._model}: its vision tower has no CLS token; use attention.received, or a method without CLS"
            )
        index = resolve_layer(layer, len(self._modules), name="vision layer")
        values: list[list[torch.Tensor]] = []
        for record in call.records:
            calls = record.attention.get((stat, index))
            if calls is None:
                raise ConfigError(f"attention.{stat}({layer}): declare it in needs() of the method")
            if record.inside is not None:
                calls = record.inside.spread(calls)
            if record.merged is not None:
                calls = [record.merged.spread_patches(c, index) for c in calls]
            patches = [c.reshape(*c.shape[:2], -1) for c in calls]
            groups = _placed(record, functools.partial(self.adapter.group, patches=patches))
            values.append([g.mean(1).unflatten(-1, calls[0].shape[2:] or (1,)) for g in groups])
        found = self._by_unit(call, values, missing=0.0 if stat in ("keys", "cls_logits") else -1.0)
        return found if stat == "keys" else found[..., 0]

    def encoder_features(self, call: Prefill) -> torch.Tensor:
        """(U, N, m, C) the m patches that the projector makes a token of."""
        values = []
        for record in call.records:
            if not record.encoder_features:
                raise UnsupportedError(f"{self._model}: the projector's input was not seen; pass pixels, not features")
            patches = [x if x.ndim == 3 else x[None] for x in record.encoder_features]
            if record.merged is not None:
                patches = [record.merged.spread_features(x) for x in patches]
            values.append(_placed(record, functools.partial(self.adapter.group, patches=patches)))
        return self._by_unit(call, values, missing=0.0)

    def groups(self, call: Prefill) -> tuple[torch.Tensor, int]:
        """(U, N) long: which tokens share a feature since they merged inside the tower, -1 for those of no patch; and
        a number above all of them."""
        most = 0
        values: list[list[torch.Tensor]] = []
        for record in call.records:
            run = record.merged
            if run is None:  # of no image of the prompt
                values.append([])
                continue
            pictures, n = run.source.shape
            first = torch.arange(pictures, device=run.source.device)[:, None] * n
            ids = (run.without_prefix(run.source) + first).double()[..., None]
            groups = _placed(record, functools.partial(self.adapter.group, patches=[ids]))
            values.append([g[:, 0] for g in groups])
            most = max(most, pictures * n)
        return self._by_unit(call, values, missing=-1.0)[..., 0].long(), most

    def pixels(self, call: Prefill) -> torch.Tensor:
        """(U, N, …) what the picture shows at each token, not normalised."""
        mean, std = (torch.tensor(x, dtype=torch.float32)[:, None] for x in self.adapter.pixel_statistics)
        values = [
            [x.float() * std.to(x.device) + mean.to(x.device) for x in _shown(record, self.adapter)]
            for record in call.records
        ]
        return self._by_unit(call, values, missing=0.0)

    def project(self, patches: int, x: torch.Tensor) -> torch.Tensor:
        """(..., patches · C) → (..., D): the projector, in float32 at least, every token for itself.

        Packed weights, which are no floating-point numbers, stay as they are: their layers know what to do.
        """
        module = self.adapter.base.get_submodule(self.adapter.projector or "")
        exact = {
            n: p.to(torch.promote_types(p.dtype, torch.float32))
            for n, p in module.named_parameters()
            if p.is_floating_point()
        }
        dtype = max((p.dtype for p in exact.values()), key=lambda d: d.itemsize, default=torch.float32)
        run = functools.partial(torch.func.functional_call, module, exact)
        rows = x.to(dtype).flatten(0, -2).unflatten(-1, (patches, -1))
        with torch.autocast(x.device.type, enabled=False):
            out = self.adapter.project(lambda *args, **kwargs: run(args, kwargs), rows)
        return out.unflatten(0, x.shape[:-1])

    def _by_unit(self, call: Prefill, values: list[list[torch.Tensor]], *, missing: float) -> torch.Tensor:
        """Per record and item (n, …) values → (U, N, …), NaN (no patch) replaced by ``missing``."""
        units = call.units
        out: torch.Tensor | None = None
        for u, source in enumerate(units.source):
            if source is None:
                raise UnsupportedError(
                    f"{self._model}: this call carries features instead of pixels, so nothing is known of the vision "
                    "tower; pass pixels, or use a method that reads features only"
                )
            record, item, number = source
            value = torch.cat(values[record][item : item + number])
            if len(value) != units.sizes[u]:
                raise UnsupportedError(
                    f"{self._model}: {len(value)} values of the vision tower stand against an image of "
                    f"{units.sizes[u]} tokens; use a method that reads features only"
                )
            if out is None:
                out = value.new_full((*units.valid.shape, *value.shape[1:]), missing)
            out[u, : len(value)] = torch.nan_to_num(value, nan=missing)
        if out is None:
            raise UnsupportedError(f"{self._model}: this call has no image")
        return out.to(units.row.device)


def _placed(record: Encoded, read: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Per item (n, …) values of its tokens, which ``read`` takes from what the tower was really given."""
    return read(record) if record.smaller is None else record.smaller.place(read(record.smaller))


def _shown(record: Encoded, adapter: Adapter) -> list[torch.Tensor]:
    """Per item (n, 3, P) normalised pixels of its tokens."""
    whole = record.smaller is None or record.smaller.whole
    return adapter.pixels(record) if whole else _placed(record, adapter.pixels)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """(B, H, n, d) → (B, 1, n, H·d)."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _exists(mask: Any) -> torch.Tensor | None:
    """(B or 1, 1, N) bool: keys that hold a patch, from whatever mask the kernel was given; None for all."""
    if not torch.is_tensor(mask):
        return None
    return mask.bool()[:, None] if mask.ndim == 2 else allowed(mask).any(1, keepdim=True)


def _received(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, mask: Any, borders: torch.Tensor | None
) -> torch.Tensor:
    """(B, N): attention that each patch receives, mean over heads and the patches of its own picture."""
    if borders is not None:  # flash attention takes all pictures in one call
        packed = q[0].transpose(0, 1), k[0].transpose(0, 1)
        return attention_columns(*packed, scale=scale, cu_seqlens=borders, normalise="count")[None]
    if torch.is_tensor(mask) and mask.ndim == 2:  # flash attention with key padding
        return attention_columns(q, k, scale=scale, valid=mask.bool())
    if not torch.is_tensor(mask):
        return attention_columns(q, k, scale=scale)
    # One picture among others sees itself, and padding, which may see, is seen by nobody.
    seen = allowed(mask).expand(q.shape[0], -1, -1)
    return attention_columns(q, k, scale=scale, visible=seen, weight=seen.any(1), normalise="count")


def _vision_option(stage: Stage, layer: Layer) -> str:
    """How an error names a layer of the vision tower: by the option that asks for it, where there is one."""
    method: Any = stage.method
    names = (field.name for field in fields(method) if "layer" in field.name)
    option = next((name for name in names if getattr(method, name) == layer), "layer")
    return f"{stage.label}: vision {option}"
