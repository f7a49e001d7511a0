"""Scoring: what a prediction is worth, as each of the harnesses that papers report would have it.

Metrics come in dialects: ``official`` (the benchmark's own script), ``llava`` (the scripts of LLaVA-1.5), ``lmms-eval``
(0.7.3) and ``vlmevalkit`` (August 2026, without a language model as judge). They disagree on the same strings, so there
is no default, and a dialect that a harness does not define does not exist here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from visiontok.errors import ConfigError

from . import anls, chartqa, choice, exact, grounding, hallusion, mmbench, mme, mmmu, ocrbench, pope, vqa
from .base import DIALECTS, Mark, Metric, Tally, Target

__all__ = ["DIALECTS", "METRICS", "Mark", "Metric", "Tally", "Target", "metric"]


def _end_to_end(metric: Metric) -> Metric:
    """lmms-eval strips every prediction before any scorer sees it, which shows where the scorer itself does not."""
    if metric.dialect != "lmms-eval":
        return metric
    return replace(metric, score=lambda prediction, target: metric.score(prediction.strip(), target))


def _by_name() -> Mapping[str, Mapping[str, Metric]]:
    table: dict[str, dict[str, Metric]] = {}
    for module in (vqa, exact, pope, mme, hallusion, anls, chartqa, ocrbench, choice, mmbench, mmmu, grounding):
        for found in module.METRICS:
            table.setdefault(found.name, {})[found.dialect] = _end_to_end(found)
    return MappingProxyType({name: MappingProxyType(dialects) for name, dialects in table.items()})


METRICS = _by_name()
"""Name → dialect → metric."""


def metric(name: str, dialect: str) -> Metric:
    """The metric of this name in this dialect.

    Raises:
        ConfigError: if there is none; the message names those there are.
    """
    if name not in METRICS:
        raise ConfigError(f"metric={name!r} is unknown; there are {', '.join(sorted(METRICS))}")
    if dialect not in METRICS[name]:
        raise ConfigError(f"dialect={dialect!r} does not exist for metric {name!r}; it has {', '.join(METRICS[name])}")
    return METRICS[name][dialect]
