"""The operators: pure functions of tensors that know nothing of models.

Tensors are ``(N, …)`` or ``(B, N, …)``. Everything is computed in float32 and deterministic: tokens rank by (score
descending, index ascending), NaN is -inf, a budget of at least the number of candidates keeps them all, and tokens
outside ``valid`` are never kept.
"""

from .allocators import apportion, layer_average
from .kernels import Picks
from .mergers.absorb import absorb
from .mergers.bipartite import bipartite, bipartite_rounds, pair_cosines
from .mergers.cells import cells
from .mergers.clusters import clusters
from .mergers.merge import merge, unmerge
from .mergers.middles import middles
from .mergers.nearest import nearest_kept
from .mergers.neighbours import neighbours
from .mergers.peaks import density_peaks
from .scorers.attention import (
    attention_columns,
    attention_flow,
    attention_heads,
    attention_logits,
    attention_rows,
    attention_share,
)
from .scorers.background import background
from .scorers.blur import blur
from .scorers.entropy import pixel_entropy
from .scorers.heads import head_entropy
from .scorers.interaction import late_interaction
from .scorers.learned import learned
from .scorers.minmax import minmax
from .scorers.norm import norm
from .scorers.relevance import relevance
from .scorers.residual import centred, foreground, residual
from .scorers.sensitivity import sensitivity
from .scorers.spectrum import effective_rank
from .scorers.transition import transition
from .scorers.uniqueness import uniqueness
from .scorers.variation import variation
from .selectors.anchors import anchors
from .selectors.components import components
from .selectors.coordinates import coordinates
from .selectors.coverage import coverage
from .selectors.discount import discount
from .selectors.dpp import dpp
from .selectors.facility import facility
from .selectors.maxmin import maxmin
from .selectors.maxsum import maxsum
from .selectors.mmr import mmr
from .selectors.pivots import least_similar
from .selectors.predictive import predictive
from .selectors.product import product
from .selectors.quota import quota
from .selectors.runs import runs
from .selectors.soft import soft_topk
from .selectors.spaced import spaced
from .selectors.suppress import suppress
from .selectors.thinned import thinned
from .selectors.topk import rank, topk
from .selectors.uniform import uniform
from .selectors.whole import whole
from .selectors.widening import widening
from .selectors.within import rank_within

__all__ = [
    "Picks",
    "absorb",
    "anchors",
    "apportion",
    "attention_columns",
    "attention_flow",
    "attention_heads",
    "attention_logits",
    "attention_rows",
    "attention_share",
    "background",
    "bipartite",
    "bipartite_rounds",
    "blur",
    "cells",
    "centred",
    "clusters",
    "components",
    "coordinates",
    "coverage",
    "density_peaks",
    "discount",
    "dpp",
    "effective_rank",
    "facility",
    "foreground",
    "head_entropy",
    "late_interaction",
    "layer_average",
    "learned",
    "least_similar",
    "maxmin",
    "maxsum",
    "merge",
    "middles",
    "minmax",
    "mmr",
    "nearest_kept",
    "neighbours",
    "norm",
    "pair_cosines",
    "pixel_entropy",
    "predictive",
    "product",
    "quota",
    "rank",
    "rank_within",
    "relevance",
    "residual",
    "runs",
    "sensitivity",
    "soft_topk",
    "spaced",
    "suppress",
    "thinned",
    "topk",
    "transition",
    "uniform",
    "uniqueness",
    "unmerge",
    "variation",
    "whole",
    "widening",
]
