"""IDPruner: importance against redundancy, by maximal marginal relevance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional import Picks, foreground, learned, minmax, mmr, norm
from ..method import Card, Contract, Layer, Needs, Tower, VectorMethod, labelled

if TYPE_CHECKING:
    from ..context import Context

SCORERS = ("cls", "received", "norm")


def idpruner(
    features: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    balance: float = 0.5,
    per_round: int = 1,
    valid: Tensor | None = None,
) -> Picks:
    """Maximal marginal relevance on min-max normalised importance.

    Args:
        features: (N, D) or (B, N, D), in the language model's input space.
        scores: (N,) or (B, N), importance on any scale.
        k: tokens to keep, int or (B,) long.
        balance: λ, the weight of importance against redundancy.
        per_round: picks at once; more than 1 may keep duplicates.
        valid: (N,) or (B, N) bool.

    Returns:
        Picks, the kept set and its order.

    Raises:
        ConfigError: if ``k`` < 1.
    """
    return mmr(features, minmax(scores, valid), k, balance=balance, per_round=per_round, valid=valid)


@dataclass(frozen=True)
class IDPruner(VectorMethod):
    """MMR over a scorer of your choice.

    Attributes:
        scorer: ``cls`` (CLS attention), ``received`` (mean attention received) or ``norm`` (length of the token); by
            default ``cls`` where the tower has a CLS token, ``received`` elsewhere.
        scorer_weights: the trained VisionSelector head in the place of a scorer, as the published method has it: a
            .safetensors file, or a folder with one, in AngelSlim's format.
        layer: tower layer of the attention scorers; by default the one the features come from.
        balance: λ in [0, 1], the weight of importance against redundancy.
        background: what is taken out of the features before they are compared: None nothing, 0 their mean, r > 0 their
            mean and r leading principal directions.
    """

    scorer: Literal["cls", "received", "norm"] | None = None
    scorer_weights: str | None = None
    layer: Layer | None = None
    balance: float = 0.5
    background: int | None = None

    card: ClassVar[Card] = Card(
        name="idpruner",
        title="maximal marginal relevance: importance against redundancy",
        paper="arXiv 2602.13315",
        venue="preprint",
        formula="argmax_i λ·w_i - (1-λ)·max_{j∈S} cos(z_i, z_j), the first by w alone; w = (s - min s)/(max s - min "
        "s + 10⁻⁶)",
        stage="prompt",
        needs="features, projector inputs with features='merger_in'; CLS attention or received attention of one tower "
        "layer, neither with scorer='norm' or scorer_weights",
        official="Scores come from the trained VisionSelector head; all images of a prompt share one pool; several "
        "picks per round on request.",
        trained="VisionSelector's scoring head, published for Qwen2.5-VL; name it by scorer_weights=, other scorers "
        "stand in without.",
        departures="Without scorer_weights, which makes it idpruner[trained], the scorer is a substitute and is named "
        "with the method, as in idpruner[cls]. Every image has its own budget, and the trained head sees one image at "
        "a time. One pick per round. With a background taken out of the features (Cen-Prune, LRCP), or with those "
        "before the merger, the label says so, as in idpruner[cls, centred, merger_in].",
        defaults="scorer=cls for CLIP towers, received for towers without CLS; the layer the features come from.",
        cost="O(N²D) once, O(N) per pick",
        contract=Contract(sync_free=False),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer is not None and self.scorer not in SCORERS:
            raise ConfigError(f"scorer={self.scorer!r}: use one of {', '.join(SCORERS)}")
        if self.scorer is not None and self.scorer_weights is not None:
            raise ConfigError(
                f"scorer={self.scorer!r}, scorer_weights={self.scorer_weights!r}: weights are a scorer; give either"
            )
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance={self.balance!r}: the weight of importance lies in [0, 1]")
        if self.background is not None and self.background < 0:
            raise ConfigError(f"background={self.background!r}: at least 0 directions, or None")

    @property
    def label(self) -> str:
        scorer = "trained" if self.scorer_weights is not None else self.scorer or "attention"
        background = "" if self.background is None else "residual" if self.background else "centred"
        return labelled("idpruner", scorer, background, self.space)

    def adapt(self, tower: Tower) -> IDPruner:
        if self.scorer_weights is not None:
            _load(self.scorer_weights, torch.device("cpu"))  # what is wrong with them is said before the model runs
            return self
        return replace(
            self,
            scorer=self.scorer or ("cls" if tower.has_cls else "received"),
            layer=tower.feature_layer if self.layer is None else self.layer,
        )

    def needs(self) -> Needs:
        layers = () if self.layer is None else (self.layer,)
        return replace(
            super().needs(),
            vision_cls=layers if self.scorer == "cls" else (),
            vision_received=layers if self.scorer == "received" else (),
        )

    def select(self, ctx: Context) -> Tensor:
        layer, features = -1 if self.layer is None else self.layer, self.vectors(ctx)
        if self.scorer == "norm":
            scores = norm(features)
        elif self.scorer_weights is not None:
            scores = self._trained(ctx, self.scorer_weights)
        else:
            scores = ctx.attention.received(layer) if self.scorer == "received" else ctx.attention.cls(layer)
            scores = torch.where(scores < 0, torch.nan, scores)  # what has no patch must not stretch the scale
        if self.background is not None:
            features = foreground(features, self.background, ctx.valid)
        return idpruner(features, ctx.scored(scores), ctx.count, balance=self.balance, valid=ctx.valid).keep

    @staticmethod
    def _trained(ctx: Context, path: str) -> Tensor:
        query, key = _load(path, ctx.features.device)
        made, width = query[0].shape[1], ctx.features.shape[-1]
        if made != width:
            raise ConfigError(
                f"scorer_weights={path!r}: a head for tokens of width {made}, those of this {ctx.model_type} have "
                f"{width}; use the head that was trained for this model"
            )
        return learned(ctx.features, query, key, ctx.valid)


def _load(path: str, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from ..weights import load_selector  # only who has weights needs the reader

    return load_selector(path, device)
