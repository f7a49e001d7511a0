"""Attention taps: see the true queries and keys of one attention module while the stock kernel does the attention.

The tapped module gets its own copy of the config object, which names a registered attention function; ``model.config``,
the mask builders and every other module are untouched. The function hands q and k to a sink and calls the kernel that
the original config asks for.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from visiontok.kernels.bias import WIDEST, KeyBias, augment, widened

from ..errors import UnsupportedError

IMPLEMENTATION = "visiontok_tap"
TAKE_BIAS = ("eager", "sdpa")
"""Attention implementations that take a mask of numbers. Flash attention has no such argument; FlexAttention has one
that corrupts memory on the CPU (torch 2.13), and rounds head dimensions up to powers of 2."""
BIAS = "visiontok_bias"  # keyword under which a decoder layer carries a bias per key that is not in its mask
CALL = "visiontok_call"  # keyword under which a decoder layer carries the state of the current call
SPLIT = "visiontok_split"  # the same for rows of this layer that are not computed

_TAPS = "_visiontok_taps"  # attribute of a tapped module: its own config object, and the taps

Sink = Callable[..., None]


def is_flash(config: Any) -> bool:
    """Whether a language model runs flash attention, which knows 2-D masks alone."""
    return "flash" in str(config._attn_implementation)


def takes_columns(config: Any) -> bool:
    """Whether a bias per key goes to the model's own kernel as columns of queries and keys, beside a 2-D mask."""
    if not is_flash(config) or getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return widened(head_dim) <= WIDEST


def _tapped_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    call, split = kwargs.pop(CALL, None), kwargs.pop(SPLIT, None)
    bias: KeyBias | None = kwargs.pop(BIAS, None)
    if isinstance(call, _Glance):
        call.seen = query, key, value, kwargs
        raise _Enough
    if split is not None:
        key, value = split.attend(key, value)
    # another thread may have taken the last tap away since this one read the config
    config, taps = module.__dict__.get(_TAPS) or (module.config, ())
    _show(taps, call, query, key, value, attention_mask, kwargs)
    name = config._attn_implementation
    if name not in TAKE_BIAS and torch.is_tensor(attention_mask) and attention_mask.ndim == 4:
        name = "sdpa"  # only a bias per key, or frozen rows, lead to such a mask here
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if bias is None:
        out = kernel(module, query, key, value, attention_mask, **kwargs)
    else:
        scale = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5  # not the kernel's default for more columns
        wide = augment(query, key, value, bias.columns(key, scale))
        out = kernel(module, *wide, attention_mask, scaling=scale, **kwargs)
        out = out[0][..., : value.shape[-1]], *out[1:]
    for tap in taps:
        if tap.behind is not None:
            out = _behind(tap.behind, query, key, value, attention_mask, kwargs, out)
    return out


@torch.compiler.disable
def _behind(change: Callable[..., Any], *seen: Any) -> Any:
    return change(*seen)


@torch.compiler.disable
def _show(taps: tuple[Tap, ...], *seen: Any) -> None:
    with torch.no_grad():  # scores have no gradient, and a replay by gradient checkpointing may find no call to score
        for tap in taps:
            if tap.sink is not None:
                tap.sink(*seen)


class _Enough(Exception):  # noqa: N818  # nothing went wrong
    """Queries and keys are known; the rest of the layer need not run."""


class _Glance:
    """Stands for the call where a layer runs up to its attention only.

    Attributes:
        policy: that of no attachment, so that hooks leave it alone.
        seen: queries, keys, values, and what else the kernel was given.
    """

    policy = None
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.rows: torch.Size | None = None  # of a layer that is to make no queries


_thread = _Thread()


def _reach(forward: Callable[..., Any], layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> _Glance:
    """Run ``layer`` up to its attention module's kernel; its own hooks do not run, caches are left out."""
    call = _Glance()
    kwargs = {name: None if name.startswith("past_key_value") else value for name, value in kwargs.items()}
    try:
        forward(x, **kwargs | {CALL: call})
    except _Enough:
        return call
    raise RuntimeError(f"{type(layer).__name__}: its attention module did not reach the tapped kernel")


@torch.no_grad()
def glance(layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Queries and keys of ``x`` as ``layer`` makes them: its own norms, projections and rotary positions.

    The layer runs up to its attention module's kernel, so whatever its family does before that is done.

    Args:
        layer: a decoder layer whose attention module is tapped.
        x: (B, M, D) states on its input.
        kwargs: its keywords.

    Returns:
        (B, H, M, d), (B, G, M, d), and the factor on the logits or None.
    """
    q, k, _, given = _reach(layer.forward, layer, x, kwargs).seen
    return q, k, given.get("scaling")


def keys_values(layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, G, M, d) likewise, with gradients; queries are not computed.

    Args:
        layer: a decoder layer whose attention module is tapped and has the hooks of :func:`skip_queries`.
        x: (B, M, D) states on its input.
        kwargs: its keywords.
    """
    # a checkpoint around what is broken off could not be replayed
    forward = vars(layer).get("forward") or functools.partial(inspect.unwrap(type(layer).forward), layer)
    _thread.rows = x.shape[:-1]
    try:
        return _reach(forward, layer, x, kwargs).seen[1:3]
    finally:
        _thread.rows = None


def skip_queries(attention: nn.Module, model: str) -> list[Any]:
    """Hooks by which an attention module makes no queries where :func:`keys_values` asks for keys and values.

    Raises:
        UnsupportedError: if queries have no projection of their own.
    """
    queries = getattr(attention, "q_proj", None)
    if not isinstance(queries, nn.Module):
        raise UnsupportedError(
            f"{model}: {type(attention).__name__} has no projection 'q_proj' of its queries alone, which frozen tokens "
            "could do without; drop tokens instead, with a cut or an exit"
        )
    return [queries.register_forward_pre_hook(_no_rows), queries.register_forward_hook(_as_many_rows)]


@torch.compiler.disable
def _no_rows(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return None if _thread.rows is None else (args[0][..., :0, :], *args[1:])


@torch.compiler.disable
def _as_many_rows(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    return None if _thread.rows is None else output.new_zeros(1).expand(*_thread.rows, output.shape[-1])


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _tapped_attention)


class Tap:
    """A removable tap on one attention module, which may have several.

    Args:
        module: attention module that dispatches through ``ALL_ATTENTION_FUNCTIONS``.
        sink: called as ``sink(call, query, key, value, attention_mask, kwargs)`` with query (B, H, Q, d), key and value
            (B, Hkv, K, d); must be picklable. None only lets the module take a bias per key.
        behind: called as ``behind(query, key, value, attention_mask, kwargs, output)``, with gradients; returns the
            output that goes on.
    """

    def __init__(self, module: Any, sink: Sink | None, behind: Callable[..., Any] | None = None) -> None:
        self.module, self.sink, self.behind = module, sink, behind
        config, taps = module.__dict__.get(_TAPS) or (module.config, ())
        module.__dict__[_TAPS] = (config, (*taps, self))
        if not taps:
            tapped = copy.copy(config)
            tapped.__dict__["_attn_implementation_internal"] = IMPLEMENTATION
            module.config = tapped

    def remove(self) -> None:
        """Take this tap away, and with the last one put the original config object back."""
        config, taps = self.module.__dict__[_TAPS]
        rest = tuple(tap for tap in taps if tap is not self)
        if rest:
            self.module.__dict__[_TAPS] = (config, rest)
        else:
            self.module.config = config
            del self.module.__dict__[_TAPS]


def attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The attention modules of a stack, in layer order."""
    return [m for m in tower.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]


def attention_and_mlp(layer: nn.Module, index: int, consequence: str) -> tuple[nn.Module, nn.Module]:
    """The two modules of a decoder layer.

    Raises:
        UnsupportedError: if there is not one attention module and one of the name ``mlp``; ends with ``consequence``.
    """
    attention, mlp = attention_modules(layer), getattr(layer, "mlp", None)
    if len(attention) != 1 or not isinstance(mlp, nn.Module):
        raise UnsupportedError(
            f"{type(layer).__name__}: decoder layer {index} is not one attention module and one 'mlp', so {consequence}"
        )
    return attention[0], mlp


@dataclass(frozen=True)
class Visible:
    """What each query slot sees: by order alone, or by a mask.

    Attributes:
        rows: query slots M.
        columns: keys K, of which the last M are the slots' own.
        keys: (B, K) bool, those that hold a token; None for all. Each slot sees them up to its own.
        window: how many of these it sees at most, or None.
        mask: (B, M, K) bool, which says it all if it is there.
    """

    rows: int
    columns: int
    keys: torch.Tensor | None = None
    window: int | None = None
    mask: torch.Tensor | None = None

    def options(self, own: bool = False) -> dict[str, Any]:
        """Keywords of the operators; with ``own``, of the last M keys alone."""
        begin = self.columns - self.rows if own else 0
        if self.mask is not None:
            return {"visible": self.mask[..., begin:]}
        return {"causal": True, "window": self.window, "valid": None if self.keys is None else self.keys[:, begin:]}

    def of(self, at: torch.Tensor) -> torch.Tensor:
        """(B, R, K) bool: what the slots ``at`` (B, R) see."""
        if self.mask is not None:
            return self.mask[torch.arange(len(at), device=at.device)[:, None], at]
        key, place = torch.arange(self.columns, device=at.device), at[..., None] + self.columns - self.rows
        seen = key <= place
        if self.window is not None:
            seen = seen & (key > place - self.window)
        return seen if self.keys is None else seen & self.keys[:, None]


def visible_keys(
    mask: Any, q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None, window: int | None = None
) -> Visible:
    """What each query slot sees, from whatever the kernel was given: its mask, and the window that flash attention has
    beside it."""
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    if torch.is_tensor(mask) and mask.ndim == 4:
        return Visible(rows, columns, mask=allowed(mask)[..., :columns].expand(batch, rows, columns))
    if torch.is_tensor(mask) and mask.ndim == 2:
        valid = mask[:, :columns].bool()
    elif valid is not None:
        valid = torch.cat([valid.new_ones(batch, columns - rows), valid], 1)
    return Visible(rows, columns, valid, window)


def allowed(mask: torch.Tensor) -> torch.Tensor:
    """(B, 1, M, K) as kernels have it, truth values or numbers → (B, M, K) bool."""
    return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
