"""The operators: pure functions of tensors that know nothing of models.

Tensors are ``(N, …)`` or ``(B, N, …)``. Everything is computed in float32 and deterministic: tokens rank by (score
descending, index ascending), NaN is -inf, a budget of at least the number of candidates keeps them all, and tokens
outside ``valid`` are never kept.
"""

from .allocators import apportion, layer_average
from .kernels import Picks
from .mergers.absorb import absorb
from .mergers.bipartite import bipartite
from .mergers.cells import cells
from .mergers.clusters import clusters
from .mergers.merge import merge, unmerge
from .mergers.nearest import nearest_kept
from .mergers.neighbours import neighbours
from .scorers.attention import attention_columns, attention_logits, attention_rows
from .scorers.minmax import minmax
from .scorers.norm import norm
from .scorers.uniqueness import uniqueness
from .selectors.anchors import anchors
from .selectors.coverage import coverage
from .selectors.dpp import dpp
from .selectors.facility import facility
from .selectors.maxmin import maxmin
from .selectors.maxsum import maxsum
from .selectors.mmr import mmr
from .selectors.product import product
from .selectors.spaced import spaced
from .selectors.thinned import thinned
from .selectors.topk import rank, topk
from .selectors.uniform import uniform
from .selectors.within import rank_within

__all__ = [
    "Picks",
    "absorb",
    "anchors",
    "apportion",
    "attention_columns",
    "attention_logits",
    "attention_rows",
    "bipartite",
    "cells",
    "clusters",
    "coverage",
    "dpp",
    "facility",
    "layer_average",
    "maxmin",
    "maxsum",
    "merge",
    "minmax",
    "mmr",
    "nearest_kept",
    "neighbours",
    "norm",
    "product",
    "rank",
    "rank_within",
    "spaced",
    "thinned",
    "topk",
    "uniform",
    "uniqueness",
    "unmerge",
]
