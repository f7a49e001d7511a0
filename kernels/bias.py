"""Attention with a bias per key in kernels that take none: extra columns of queries and keys carry it.

With queries q' = [q, 1, 1, …], keys k' = [k, t₁, t₂, …] and values v' = [v, 0, 0, …] any attention kernel that is given
the scale s of the original head dimension computes

    s · q'·k'  =  s · (q·k + Σ tᵢ)  =  s · q·k + b        where  Σ tᵢ = b / s,

and what it returns is the attention with the bias b on each key, followed by columns of 0. Masks, causality, windows,
sinks and grouped heads are the kernel's own as before. A soft cap on the logits is not: it would cap the bias too.

**Rounding.** s and b / s are rounded to float32. Three terms of 8 bits, which bfloat16 holds, are all 24 bits of that:
nothing more is lost in float32, float16 or bfloat16, nor where a kernel rounds its inputs to bfloat16 or TF32. (In
float16, what lies below 2⁻²⁴ is; it is not seen beside q·k.) In float64 a fourth term is what is left.
The logits differ from those of exact arithmetic by at most

    2⁻²³ |b|  +  (d + 4) · 2⁻²⁴ · (s Σ|qᵢ kᵢ| + |b|),

the second term being the kernel's own float32 sum, which without a bias is the same but for |b|. A mask of numbers in
bfloat16 rounds b itself, by up to 2⁻⁹ |b|.

**Limits.** b is finite; what is to be hidden, padding for one, is the mask's business, and its bias is not seen. The
head dimension grows to the next multiple of 8 that has 4 columns to spare, of which flash attention takes no more than
256. Keys, values and queries are written once more per call: cheap beside a prefill; a decode step moves about three
times the bytes. On a CPU sdpa is therefore better off with its mask (bench/results/bias.md).

**On a GPU**, ``python -m visiontok.kernels.bench`` is to time each of :func:`variants` beside plain causal attention of
the same shape (its floor), for a prefill of N rows and for a decode step of one row on N keys. What to look at: sdpa
with a mask of numbers leaves its flash kernel, builds N × N numbers and repeats grouped heads; columns take head
dimension 128 to 136, for which flash attention has a kernel of 160 or 192. No time on a GPU is known yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import UnsupportedError

WIDEST = 256
"""Largest head dimension of flash attention."""
_TERMS = 4
_MULTIPLE = 8


def widened(head_dim: int) -> int:
    """The head dimension with the columns of a bias."""
    return -(-(head_dim + _TERMS) // _MULTIPLE) * _MULTIPLE


class KeyBias:
    """A bias per key, whose columns are made once for all layers that it serves.

    Args:
        bias: (B, K), finite; natural logarithms of weights.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self._columns: dict[tuple[int, float, torch.dtype, torch.device], Tensor] = {}

    def columns(self, k: Tensor, scale: float) -> Tensor:
        """(B, 1, K, c), what stands behind the d columns of keys ``k`` (B, G, K, d) that are multiplied by ``scale``.

        Raises:
            UnsupportedError: if no flash attention takes as many columns.
        """
        key = (k.shape[-1], scale, k.dtype, k.device)
        if key not in self._columns:
            self._columns[key] = columns(self.bias.to(k.device), scale, k.shape[-1], k.dtype)[:, None]
        return self._columns[key]


def columns(bias: Tensor, scale: float, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(B, K, c) of ``dtype``: ``bias`` (B, K) over ``scale`` as a sum, and zeros.

    Raises:
        UnsupportedError: if no flash attention takes as many columns.
    """
    width = widened(head_dim)
    if width > WIDEST:
        raise UnsupportedError(
            f"a bias per key (mass attention) widens head_dim={head_dim} to {width}, and flash attention takes "
            f'{WIDEST} at most; use attn_implementation="sdpa", or mass=False'
        )
    left = bias.to(torch.promote_types(torch.promote_types(bias.dtype, dtype), torch.float32)) / scale
    terms = []
    for _ in range(_TERMS - 1):
        terms.append(left.bfloat16().to(left.dtype))
        left = left - terms[-1]  # exact
    return F.pad(torch.stack([*terms, left], -1), (0, width - head_dim - _TERMS)).to(dtype)


def augment(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with which a kernel that takes no bias attends with one; see the module.

    Args:
        q: (B, H, Q, d).
        k: (B, G, K, d).
        v: (B, G, K, e), e ≤ d.
        columns: (B, 1, K, c) from :meth:`KeyBias.columns` for these keys.

    Returns:
        (B, H, Q, d + c), (B, G, K, d + c) and (B, G, K, d + c). The kernel must be given the same scale as ``columns``,
        not its default for d + c; the first e columns of its outcome are the attention.
    """
    width = k.shape[-1] + columns.shape[-1]
    k = torch.cat([k, columns.expand(*k.shape[:-1], -1)], -1)
    return F.pad(q, (0, columns.shape[-1]), value=1.0), k, F.pad(v, (0, width - v.shape[-1]))


Variant = Callable[[Tensor, Tensor, Tensor, Tensor, float], Callable[[], Tensor]]
"""(q, k, v, bias, scale) → what a layer does, when run: (B, H, Q, e), causal, the last query seeing all keys.

What all layers share is made beforehand. There are as many queries as keys, or one."""


def variants() -> Mapping[str, Variant]:
    """The ways to attend with a bias per key that are to be timed beside each other, by name."""
    return {"mask of numbers": _masked, "columns": _columned}


def _masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Callable[[], Tensor]:
    """As Transformers runs sdpa with a mask: grouped heads are repeated for many queries, and packed for one."""
    rows, groups = q.shape[2], q.shape[1] // k.shape[1]
    mask = bias[:, None, None].to(q.dtype)
    if rows == 1:
        packed = q.unflatten(1, (-1, groups)).flatten(2, 3)
        return lambda: F.scaled_dot_product_attention(packed, k, v, mask, scale=scale).view(*q.shape[:3], -1)
    seen = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    whole = mask.masked_fill(~seen, torch.finfo(q.dtype).min)

    def run() -> Tensor:
        keys, values = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, whole, scale=scale)

    return run


def _columned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Callable[[], Tensor]:
    extra = KeyBias(bias).columns(k, scale)
    causal, grouped = q.shape[2] > 1, q.shape[1] != k.shape[1]

    def run() -> Tensor:
        queries, keys, values = augment(q, k, v, extra)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out[..., : v.shape[-1]]

    return run
