"""Which tokens a decoder layer holds, and how to move between the full sequence and that layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import gather_rows


class Layout:
    """The tokens of a parent sequence that are present in some layers, left padded to one width.

    Left padding keeps the last token last and slot order equal to causal order, whatever the rows keep.

    Attributes:
        keep: (B, N) bool, parent positions that are present.
        slots: (B, M) long, slot → parent position; M is the largest row count.
        counts: tokens of each row.
        valid: (B, M) bool, slots that hold a kept token; None when every slot does.
    """

    def __init__(self, keep: torch.Tensor, counts: Sequence[int]) -> None:
        """``counts``: true entries of each row of ``keep``, on the host."""
        self.keep = keep
        self.counts = list(counts)
        self.length = keep.shape[1]
        self.width = max(*counts, 1)
        # a stable sort puts dropped positions first and keeps the kept ones in order behind them
        self.slots = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, self.length - self.width :]
        self.valid = None if all(n == self.width for n in counts) else keep.gather(1, self.slots)

    def gather(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """(…, B or 1, N, …) → (…, B, M, …): the kept slice of ``x`` along ``dim``; the batch stands just before it.

        A 1-D tensor (positions shared by all rows and given without a batch) is read as (1, N).
        """
        return self.gather_each([x], [dim])[0]

    def gather_each(self, tensors: Sequence[torch.Tensor], dims: Sequence[int]) -> list[torch.Tensor]:
        """:meth:`gather` of each of ``tensors`` along its dimension."""
        tensors = [x.unsqueeze(dim - 1) if x.ndim == dim else x for x, dim in zip(tensors, dims, strict=True)]
        devices = {x.device for x in tensors}
        if len(devices) != 1:  # nothing to gather, or the layers of a model stand on several
            return [self.gather(x, dim) for x, dim in zip(tensors, dims, strict=True)]
        return gather_rows(tensors, dims, self.slots.to(devices.pop()))

    def scatter(self, full: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``full`` (B, N, D) with its kept positions replaced by ``x`` (B, M, D); a new tensor."""
        if self.valid is not None:
            x = torch.where(self.valid.to(x.device)[..., None], x, self.gather(full))
        return full.scatter(1, self.slots.to(x.device)[..., None].expand_as(x), x)

    def gather_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Rows and columns of an attention mask (B or 1, H, N, P + N) → (B, H, M, P + M); P cached columns stay.

        Unused slots see only themselves, so that no softmax row is empty.
        """
        slots = self.slots.to(mask.device)
        batch, width = slots.shape
        mask = mask.expand(batch, *mask.shape[1:])
        heads, columns = mask.shape[1], mask.shape[3]
        mask = mask.gather(2, slots[:, None, :, None].expand(batch, heads, width, columns))
        past = columns - self.length
        new = mask[..., past:].gather(3, slots[:, None, None, :].expand(batch, heads, width, width))
        if self.valid is not None:
            itself = torch.eye(width, dtype=torch.bool, device=mask.device)
            unused = ~self.valid.to(mask.device)[:, None, None, :] & ~itself
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            new = new.masked_fill(unused, hidden)
        return torch.cat([mask[..., :past], new], 3)

    def slot_of(self) -> torch.Tensor:
        """(B, N) long: the slot of each parent position; a dropped one gets the last kept slot before it."""
        shift = self.width - self.keep.sum(1, keepdim=True)
        return (self.keep.long().cumsum(1) - 1 + shift).clamp(0, self.width - 1)

    def fill(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, …) → (B, N, …): back to the parent length, a dropped position repeats the last kept one before it."""
        slot = self.slot_of().to(x.device)
        index = slot.view(*slot.shape, *[1] * (x.ndim - 2))
        return x.gather(1, index.expand(*slot.shape, *x.shape[2:]))


class Parted:
    """The B·M slots of a layer, row behind row, in two kinds.

    Attributes:
        others: long, those without a visual token: text and padding.
        visual: long, those with one.
    """

    def __init__(self, visual: torch.Tensor, count: int) -> None:
        """``visual`` (B, M) bool, ``count`` its true entries, on the host."""
        order = torch.argsort(visual.flatten().to(torch.int8), stable=True)
        self.others, self.visual = order.split([visual.numel() - count, count])
