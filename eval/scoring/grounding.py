"""Grounding (RefCOCO, RefCOCO+, RefCOCOg): the box of what a phrase describes; right at IoU 0.5 or more.

All peers score alike, but models name coordinates in different units, each a metric here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from visiontok.errors import ConfigError

from .base import Box, Mark, Metric, Scorer, Summary, Target, average, rows

RIGHT = 0.5
_NUMBER = r"(-?(?:\d+(?:\.\d*)?|\.\d+))"
_BOX = re.compile(r"(?<![\w.])" + r"[\s,;()\[\]]+".join([_NUMBER] * 4))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; symmetric, in 0 … 1, and 0 for boxes without area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def read_box(text: str) -> Box | None:
    """The first four numbers in a row: "[10, 20, 30, 40]", "(10,20),(30,40)" or JSON's "bbox_2d": [10, 20, 30, 40]."""
    found = _BOX.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def _scorer(units: tuple[float, float] | None) -> Scorer:
    """Units are the coordinates of the image's right and lower edge; None: pixels of the image the model was given."""

    def score(prediction: str, target: Target) -> Mark:
        if target.box is None or target.size is None:
            raise ConfigError(
                f"question {target.id!r}: grounding needs box and size, but has {target.box}, {target.size}"
            )
        box = read_box(prediction)
        if box is None:
            return Mark(0.0, None)
        right, lower = units or target.seen or target.size
        x, y = target.size[0] / right, target.size[1] / lower
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        return Mark(float(iou(box, target.box) >= RIGHT), ",".join(map(repr, box)))

    return score


def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """Accuracy at IoU 0.5, and the mean IoU, in which unread boxes are 0."""
    overlaps = [_overlap(mark, target) for mark, target in rows(marks, targets)]
    return average(marks, targets) | {"mean_iou": fmean(overlaps)}


def _overlap(mark: Mark, target: Target) -> float:
    if mark.parsed is None or target.box is None:
        return 0.0
    x1, y1, x2, y2 = map(float, mark.parsed.split(","))
    return iou((x1, y1, x2, y2), target.box)


METRICS = (
    Metric("grounding-pixels", "official", _scorer(None), aggregate, "accuracy"),
    Metric("grounding-1000", "official", _scorer((1000, 1000)), aggregate, "accuracy"),
    Metric("grounding-unit", "official", _scorer((1, 1)), aggregate, "accuracy"),
)
