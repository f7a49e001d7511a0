"""Supervision of visual tokens while training: what every patch shows, said in the language model's own words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .glyphs import GLYPHS
from .questions import TOKEN_ID
from .raster import Pictures
from .scenes import BACKGROUNDS, COLOR_NAMES, NORMAL, SHAPES, SIDE, Layout

_COUNTS = 8  # classes of the count head: 0 … 7 or more
_TABLES = (COLOR_NAMES, SHAPES, GLYPHS, ("sign",))
_NOTHING = (0.25, 0.25, 0.15, 0.15)  # weight of the class "none" in each table: most patches show nothing
_SCALES = (("left", "center", "right"), ("top", "middle", "bottom"), ("smaller", "larger"))
_PRESENT = (len(COLOR_NAMES), len(SHAPES), len(GLYPHS))


@dataclass(frozen=True)
class Targets:
    """What the N patches of each of B pictures show; class 0 is "none".

    Attributes:
        words: int64 (B, N, 4): colour, shape, glyph and whether that is a sign's. A patch of a glyph also names its
            object's colour and shape, and a patch of an object with a glyph on it the glyph: reading needs that
            binding.
        radius: float (B, N), the radius of the object drawn there, from 0 for the smallest to 1; NaN elsewhere.
        present: float (B, colours + shapes + glyphs), 1 where an object has it. Not in pairs: those that are never
            shown would be learned as absent.
        background: int64 (B,).
        count: int64 (B,), number of objects, at most _COUNTS - 1.
    """

    words: Tensor
    radius: Tensor
    present: Tensor
    background: Tensor
    count: Tensor


def _owners(owners: Tensor, many: int, cell: int, least: int) -> Tensor:
    """int64 (B, N): 1 + the thing with most pixels in each cell, 0 where it has fewer than `least`."""
    grid = SIDE // cell
    patches = owners.view(-1, grid, cell, grid, cell).transpose(2, 3).reshape(-1, grid * grid, cell * cell).long()
    counts = torch.zeros(*patches.shape[:2], many + 1, dtype=torch.int32, device=owners.device)
    counts.scatter_add_(2, patches, torch.ones_like(patches, dtype=torch.int32))
    most, which = counts[..., 1:].max(-1)
    return torch.where(most >= least, which + 1, 0)


def targets(layout: Layout, pictures: Pictures, cell: int) -> Targets:
    """The targets of B scenes.

    Args:
        layout: what they show.
        pictures: of them.
        cell: pixels of a patch, per side.
    """
    many = layout.color.shape[1]
    drawn = _owners(pictures.objects, many, cell, 18)
    written = _owners(pictures.labels, many, cell, 24)
    signed = _owners(pictures.signs, layout.sign.shape[1], cell, 16)
    owner = torch.where(drawn > 0, drawn, written)

    def of(values: Tensor, thing: Tensor) -> Tensor:
        """1 + the value of the thing in each patch, 0 without one."""
        return F.pad(values + 1, (1, 0)).gather(1, thing)

    glyph = torch.where(written > 0, of(layout.glyph, written), of(layout.sign, signed))
    sign = ((written == 0) & (signed > 0)).long()
    present = [
        torch.zeros(len(layout), 1 + size, device=owner.device).scatter_(1, values + 1, 1.0)[:, 1:]
        for values, size in zip((layout.color, layout.shape, layout.glyph), _PRESENT, strict=True)
    ]
    low, high = NORMAL.radius
    radius = F.pad(layout.radius.float() - low, (1, 0), value=torch.nan).gather(1, drawn) / (high - low)
    return Targets(
        torch.stack([of(layout.color, owner), of(layout.shape, owner), glyph, sign], -1),
        radius,
        torch.cat(present, 1),
        layout.background,
        layout.there.sum(1).clamp(max=_COUNTS - 1),
    )


def _blend(place: Tensor, words: int) -> Tensor:
    """Shares (..., words) of the words of a scale, which stand evenly from 0 to 1, at places (...) between them."""
    at = torch.arange(words, device=place.device)
    return (1 - (place[..., None] * (words - 1) - at).abs()).clamp(min=0)


class PatchHeads(nn.Module):
    """The training-only loss on visual tokens and on the summary of a picture.

    A token's logits for a colour, a shape or a glyph are its products with the word vectors of the answers, so the
    projector learns the language that the decoder will read; its place and size blend the words of a scale.

    Args:
        width: of the language model.
        summary: width of a picture's summary.
    """

    def __init__(self, width: int, summary: int) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.randn(len(_TABLES), width) * width**-0.5)
        self.picture = nn.Linear(summary, sum(_PRESENT) + len(BACKGROUNDS) + _COUNTS)

    def forward(self, features: Tensor, summary: Tensor, words: Tensor, wanted: Targets) -> tuple[Tensor, Tensor]:
        """The loss, and the accuracy on patches that show something.

        Args:
            features: (B, N, D), visual tokens.
            summary: (B, S), the pictures' summaries.
            words: (vocabulary, D), the word embeddings.
            wanted: the targets.

        Returns:
            The loss, and accuracies (4,) of colour, shape, glyph and sign.
        """
        loss = features.new_zeros(())
        accuracies = []
        for column, names in enumerate(_TABLES):
            vectors = torch.cat([self.none[column : column + 1], words[[TOKEN_ID[name] for name in names]]])
            logits, wish = features @ vectors.T, wanted.words[..., column]
            weight = torch.ones(len(vectors), device=features.device)
            weight[0] = _NOTHING[column]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wish.flatten(), weight=weight)
            shown = wish > 0
            accuracies.append((logits.argmax(-1)[shown] == wish[shown]).float().mean())
        ends = torch.linspace(0, 1, round(features.shape[1] ** 0.5), device=features.device)
        rows, columns = torch.meshgrid(ends, ends, indexing="ij")
        scales = [axis.flatten().expand(len(features), -1) for axis in (columns, rows)] + [wanted.radius]
        for names, scale in zip(_SCALES, scales, strict=True):
            known = ~scale.isnan()
            logits = features[known] @ words[[TOKEN_ID[name] for name in names]].T
            loss = loss + F.cross_entropy(logits, _blend(scale[known].clamp(0, 1), len(names)))
        sizes = (wanted.present.shape[1], len(BACKGROUNDS), _COUNTS)
        present, background, count = self.picture(summary).split(sizes, -1)
        loss = loss + 3 * F.binary_cross_entropy_with_logits(present, wanted.present)
        loss = loss + 0.5 * F.cross_entropy(background, wanted.background) + 0.5 * F.cross_entropy(count, wanted.count)
        return loss, torch.stack(accuracies)
