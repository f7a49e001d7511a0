"""URaG: an early decoder layer finds the pages that answer the question, and the others leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..functional import late_interaction, whole
from ..method import Card, Contract, Layer, Method, Needs, Stage, labelled

if TYPE_CHECKING:
    from ..context import Context


def urag(
    tokens: Tensor,
    question: Tensor,
    k: int | Tensor,
    *,
    most: int | None = None,
    group: Tensor | None = None,
    groups: int = 1,
    row: Tensor | None = None,
    question_valid: Tensor | None = None,
    valid: Tensor | None = None,
    official: bool = False,
) -> Tensor:
    """Of each prompt the groups of tokens that late interaction with its question puts first, as a whole.

    Args:
        tokens: (U, N, D) of U images.
        question: (U, Q, D), what each is asked.
        k: tokens to keep of a prompt, int or (U,) long, its images' shares; the best group stays in any case.
        most: groups to keep of a prompt at most; None for what ``k`` holds.
        group: (U, N) long in 0 … G-1, the group of each token within its image; an image is one by default.
        groups: G.
        row: (U,) long, the prompt of each image; one prompt by default.
        question_valid: (U, Q) bool.
        valid: (U, N) bool.
        official: groups that are as good as the worst one kept stay, too, as in the published code.

    Returns:
        (U, N) bool keep mask.
    """
    there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
    place = torch.zeros_like(there, dtype=torch.long) if group is None else group
    scores = late_interaction(question, tokens, place, groups, question_valid=question_valid, valid=there)
    sizes = torch.zeros_like(scores, dtype=torch.long).scatter_add(1, place, there.long())  # (U, G)
    prompt = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device) if row is None else row
    mine = prompt == torch.arange(int(prompt.max()) + 1 if len(prompt) else 0, device=prompt.device)[:, None]  # (B, U)
    share = torch.as_tensor(k, device=prompt.device)
    total = torch.where(mine, share, 0).sum(1) if share.ndim else share

    def everyone(x: Tensor) -> Tensor:
        """(U, G) → (B, U·G): all groups in every row, those of other prompts too."""
        return x.flatten().expand(len(mine), -1)

    rivals = mine.repeat_interleave(groups, 1)
    keep = whole(everyone(scores), everyone(sizes), total, most, rivals)
    if official:
        worst = torch.where(keep, scores.flatten(), torch.inf).amin(1, keepdim=True)
        keep = rivals & everyone(sizes > 0) & (scores.flatten() >= worst)
    return keep.any(0).view_as(scores).gather(1, place) & there


@dataclass(frozen=True)
class URaG(Method):
    """One early cut that keeps pages whole or drops them whole.

    Attributes:
        layer: decoder layer whose input is cut; an index, or a fraction of the depth.
        groups: pages of a prompt that stay at most. None for as many as ``keep`` holds, and 5 without ``keep``.
        of: what is a page: every ``image`` (a video is one), or every ``frame`` of a video and tile of a picture, where
            the grid of its tokens tells them apart.
        tail: last tokens of the prompt that are no question, such as the template's beginning of the answer; special
            tokens are none in any case.
        head: the trained retrieval head, a .safetensors file or a folder with one: the state of
            ``nn.Sequential(nn.Linear(D, 1024), nn.GELU(), nn.Linear(1024, 512))``, of any widths. Without, states are
            compared as they are behind the last norm, which is training-free and ours.
    """

    layer: Layer = 6 / 28
    groups: int | None = None
    of: Literal["image", "frame"] = "image"
    tail: int = 0
    head: str | None = None

    card: ClassVar[Card] = Card(
        name="urag",
        title="an early decoder layer finds the pages that answer the question; the others leave whole",
        paper="arXiv 2511.10552",
        venue="AAAI 2026",
        formula="the G pages of the largest Σ_t max_{v in page} cos(f(q_t), f(x_v)); q the question, x the page's "
        "tokens on the input of layer c, f the final norm and a trained MLP",
        stage="decoder",
        needs="features (hidden states), question tokens, the language model's final norm",
        official="Qwen2.5-VL 3B and 7B: layer 6, five pages, an MLP D-1024-512 with GELU behind the final norm. The "
        "question ends nine tokens before the prompt does. A page takes its vision start and end tokens with it. "
        "Layers below keep all keys; kept tokens keep their positions. Batch 1.",
        bugs="Pages that score as the fifth one all stay, so that more than K remain (so with fidelity='official').",
        trained="a retrieval head, trained with the model; name it by head=, the final norm alone stands in without",
        departures="Without head= it is urag[training_free], our own reconstruction: cosines of the states behind the "
        "final norm. The published file format was not seen; ours is that of a torch Sequential. Exactly G pages, ties "
        "to the first. A share or a number of tokens is of all pages of the prompt: the best that fit, at least one. "
        "Vision start and end tokens are text here and stay. The question is the text behind the last image without "
        "special tokens; tail=9 ends it where the code does. Pages of an earlier turn on the same cache are not asked "
        "again. of='frame' lets frames of a video compete.",
        defaults="layer=6/28 of the depth, the official 6 on the 7B model; write layer=6 on the 3B model, of 36 "
        "layers. groups=5 without keep.",
        cost="O(NTD), with a head O(N(D·1024 + 1024·512)); layers below the cut run in full",
        contract=Contract(
            count_from_grid=False,
            question_independent=False,
            per_image=False,
            sync_free=False,
            keeps_some=False,
            whole_groups=True,
        ),
    )

    def __post_init__(self) -> None:
        if self.groups is not None and self.groups < 1:
            raise ConfigError(f"groups={self.groups!r}: at least 1")
        if self.of not in ("image", "frame"):
            raise ConfigError(f"of={self.of!r}: use 'image' or 'frame'")
        if self.tail < 0:
            raise ConfigError(f"tail={self.tail!r}: a number of tokens at the end of the prompt")
        if self.head is not None:
            _load(self.head, torch.device("cpu"))  # what is wrong with it is said before the model runs

    @property
    def label(self) -> str:
        return labelled("urag", "" if self.head else "training_free", "frame" if self.of == "frame" else "")

    def needs(self) -> Needs:
        return Needs(question=True, final_norm=True)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(kind="cut", method=self, layer=self.layer),)

    def select(self, ctx: Context) -> Tensor:
        question, asks = ctx.question()
        group = self._frames(ctx) if self.of == "frame" else None
        return urag(
            self._vectors(ctx, ctx.features),
            self._vectors(ctx, question),
            ctx.count,
            most=5 if self.groups is None and not ctx.budgeted else self.groups,
            group=group,
            groups=1 if group is None else int(group.max()) + 1,
            row=ctx.row,
            question_valid=asks & self._before_tail(ctx),
            valid=ctx.valid,
            official=ctx.fidelity == "official",
        )

    def _vectors(self, ctx: Context, states: Tensor) -> Tensor:
        x = ctx.normed(states).float()
        if self.head is None:
            return x
        (w1, b1), (w2, b2) = _load(self.head, x.device)
        if w1.shape[1] != x.shape[-1]:
            raise ConfigError(
                f"head={self.head!r}: it takes states of width {w1.shape[1]}, those of this {ctx.model_type} have "
                f"{x.shape[-1]}; use the head that was trained for this model"
            )
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def _before_tail(self, ctx: Context) -> Tensor:
        """(U, Q) bool: words of the question that are not among the last ``tail`` tokens of the prompt.

        Raises:
            ConfigError: if none is left.
        """
        if ctx.question_place is None or ctx.question_valid is None:
            raise ConfigError("ctx.question_place: declare question=True in needs() of the method")
        end = (ctx.text_valid * torch.arange(ctx.text_valid.shape[1], device=ctx.text_valid.device)).amax(1)
        words = ctx.question_place <= (end - self.tail)[:, None]
        left = (words & ctx.question_valid).any(1)
        if not bool(left[ctx.row].all()):
            raise ConfigError(
                f"tail={self.tail}: no word of the question of a prompt is left to look for pages with; lower tail, or "
                "put the question behind the last image"
            )
        return words[ctx.row]

    @staticmethod
    def _frames(ctx: Context) -> Tensor:
        """(U, N) long: the frame or tile of each token; one without (a newline) is of that before it."""
        t = ctx.need_grid()[..., 0]
        here = torch.arange(t.shape[1], device=t.device).expand_as(t)
        before = torch.where(t >= 0, here, 0).cummax(1).values
        return t.gather(1, before).clamp_min(0)


def _load(path: str, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from ..weights import load_retriever  # only who has weights needs the reader

    return load_retriever(path, device)
