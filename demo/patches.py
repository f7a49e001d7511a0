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
_PAIRS = len(COLOR_NAMES) * len(SHAPES)
_TABLES = (COLOR_NAMES, SHAPES, GLYPHS)
_NOTHING = (0.25, 0.25, 0.15)  # weight of the class "none" in each table: most patches show nothing


@dataclass(frozen=True)
class Targets:
    """What the N patches of each of B pictures show; class 0 is "none".

    Attributes:
        words: int64 (B, N, 3): colour, shape and glyph. A patch of a glyph also names its object's colour and
            shape, and a patch of an object with a glyph on it the glyph: reading needs that binding.
        radius: float (B, N), radius of the object drawn there as a share of the largest, 0 elsewhere.
        present: float (B, colour-shape pairs + glyphs), 1 where the picture has one.
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
    pairs = torch.where(layout.there, layout.color * len(SHAPES) + layout.shape + 1, 0)
    glyphs = torch.where(layout.glyph >= 0, _PAIRS + layout.glyph + 1, 0)
    present = torch.zeros(len(layout), 1 + _PAIRS + len(GLYPHS), device=pairs.device)
    present.scatter_(1, torch.cat([pairs, glyphs], 1), 1.0)
    radius = F.pad(layout.radius, (1, 0)).gather(1, drawn).clamp(min=0).float() / NORMAL.radius[1]
    return Targets(
        torch.stack([of(layout.color, owner), of(layout.shape, owner), glyph], -1),
        radius,
        present[:, 1:],
        layout.background,
        layout.there.sum(1).clamp(max=_COUNTS - 1),
    )


class PatchHeads(nn.Module):
    """The training-only loss on visual tokens and on the summary of a picture.

    A token's logits for a colour, a shape or a glyph are its products with the word vectors of the answers, so the
    projector learns the language that the decoder will read.

    Args:
        width: of the language model.
        summary: width of a picture's summary.
    """

    def __init__(self, width: int, summary: int) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.randn(len(_TABLES), width) * width**-0.5)
        self.geometry = nn.Linear(width, 3)  # x, y, radius
        self.picture = nn.Linear(summary, _PAIRS + len(GLYPHS) + len(BACKGROUNDS) + _COUNTS)

    def forward(self, features: Tensor, summary: Tensor, words: Tensor, wanted: Targets) -> tuple[Tensor, Tensor]:
        """The loss, and the accuracy on patches that show something.

        Args:
            features: (B, N, D), visual tokens.
            summary: (B, S), the pictures' summaries.
            words: (vocabulary, D), the word embeddings.
            wanted: the targets.

        Returns:
            The loss, and accuracies (3,) of colour, shape and glyph.
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
        ends = torch.linspace(-1, 1, round(features.shape[1] ** 0.5), device=features.device)
        places = torch.stack(torch.meshgrid(ends, ends, indexing="xy"), -1).view(1, -1, 2)
        geometry = self.geometry(features)
        loss = loss + 2 * F.mse_loss(geometry[..., :2], places.expand(len(features), -1, -1))
        drawn = (wanted.radius > 0).float()
        error = (F.mse_loss(geometry[..., 2], wanted.radius, reduction="none") * drawn).sum() / drawn.sum().clamp(min=1)
        sizes = (wanted.present.shape[1], len(BACKGROUNDS), _COUNTS)
        present, background, count = self.picture(summary).split(sizes, -1)
        rare = torch.tensor(4.0, device=features.device)  # a picture shows few of the pairs and glyphs
        loss = loss + 4 * error + 3 * F.binary_cross_entropy_with_logits(present, wanted.present, pos_weight=rare)
        loss = loss + 0.5 * F.cross_entropy(background, wanted.background) + 0.5 * F.cross_entropy(count, wanted.count)
        return loss, torch.stack(accuracies)
