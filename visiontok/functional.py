"""The operators: pure functions of tensors that know nothing of models.

Tensors are ``(N, …)`` or ``(B, N, …)``. Everything is computed in float32 and deterministic: tokens rank by (score
descending, index ascending), NaN is -inf, a budget of at least the number of candidates keeps them all, and tokens
outside ``valid`` are never kept.
"""

from .allocators import apportion, layer_average
from .kernels import Picks
from .mergers.absorb import absorb
from .mergers.bipartite import bipartite
from .mergers.merge import merge, unmerge
from .mergers.nearest import nearest_kept
from .scorers.attention import attention_columns, attention_rows
from .scorers.blur import blur
from .scorers.entropy import pixel_entropy
from .scorers.minmax import minmax
from .scorers.norm import norm
from .scorers.residual import centred, foreground, residual
from .scorers.sensitivity import sensitivity
from .selectors.anchors import anchors
from .selectors.components import components
from .selectors.coverage import coverage
from .selectors.discount import discount
from .selectors.dpp import dpp
from .selectors.facility import facility
from .selectors.maxmin import maxmin
from .selectors.maxsum import maxsum
from .selectors.mmr import mmr
from .selectors.pivots import least_similar
from .selectors.product import product
from .selectors.quota import quota
from .selectors.suppress import suppress
from .selectors.topk import rank, topk
from .selectors.uniform import uniform

__all__ = [
    "Picks",
    "absorb",
    "anchors",
    "apportion",
    "attention_columns",
    "attention_rows",
    "bipartite",
    "blur",
    "centred",
    "components",
    "coverage",
    "discount",
    "dpp",
    "facility",
    "foreground",
    "layer_average",
    "least_similar",
    "maxmin",
    "maxsum",
    "merge",
    "minmax",
    "mmr",
    "nearest_kept",
    "norm",
    "pixel_entropy",
    "product",
    "quota",
    "rank",
    "residual",
    "sensitivity",
    "suppress",
    "topk",
    "uniform",
    "unmerge",
]
