"""Calibration: measure a model on pictures and questions, and recommend the layers that a method asks for.

`calibrate` makes an artefact, a small JSON document, which
:meth:`visiontok.Recipe.load` reads as a recipe of the method.
"""

from __future__ import annotations

from .artefact import Artefact
from .base import Calibrator
from .collapse import EntropyCollapse
from .decay import MassDecay
from .fit import FitBisect
from .freeze import LayerKL
from .merging import MergeThresholds, merge_thresholds
from .similarity import InterLayerSimilarity
from .withdraw import ExitKL
from .work import calibrate

__all__ = ["CALIBRATORS", "Artefact", "Calibrator", "calibrate", "merge_thresholds"]

_ALL = (ExitKL, LayerKL, FitBisect, EntropyCollapse, InterLayerSimilarity, MassDecay, MergeThresholds)
CALIBRATORS: dict[str, type[Calibrator]] = {one.method: one for one in _ALL}
"""By the method that they are for."""
