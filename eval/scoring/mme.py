"""MME: two questions about every image, one to be affirmed and one to be denied. (Fu et al., arXiv 2306.13394)"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from visiontok.errors import ConfigError

from . import yes_no
from .base import Mark, Metric, Summary, Tally, Target, grouped, mean_score, rows, unparsed
from .tally import by_part, parts_of, ratio

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def aggregate(marks: Sequence[Mark], targets: Sequence[Target]) -> Summary:
    """Per category acc + acc+, in 0 … 200; perception (of at most 2000), cognition (of 800) and total are their sums.

    acc is the share of right questions, acc+ that of images with both right. Images are told apart within their
    category.

    Raises:
        ConfigError: if an image of a category has not exactly two questions.
    """
    pairs = rows(marks, targets)
    summary = {"total": 0.0, "perception": 0.0, "cognition": 0.0, "unparsed": unparsed(pairs)}
    for category, part in grouped(pairs, lambda target: target.group("category")).items():
        images = grouped(part, lambda target: target.group("image"))
        for image, questions in images.items():
            if len(questions) != 2:
                raise ConfigError(
                    f"image {image!r} of {category!r} has {len(questions)} questions, but MME asks two each"
                )
        acc = 100 * mean_score(part)
        acc_plus = 100 * fmean(all(mark.score == 1 for mark, _ in questions) for questions in images.values())
        summary |= {f"acc/{category}": acc, f"acc+/{category}": acc_plus, f"score/{category}": acc + acc_plus}
        summary["total"] += acc + acc_plus
        for kind, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            summary[kind] += (acc + acc_plus) * (category in members)
    return summary


def tally(marks: Sequence[Mark], targets: Sequence[Target]) -> Tally:
    """The total; both questions about an image are counted with its first one."""
    image = [f"{target.group('category')}\0{target.group('image')}" for target in targets]
    right: dict[str, bool] = {}
    for name, mark in zip(image, marks, strict=True):
        right[name] = right.get(name, True) and mark.score == 1
    entries = []
    for name, mark, target in zip(image, marks, targets, strict=True):
        both = right.pop(name, None)
        added = (mark.score, float(both is not None), float(both or False))
        entries.append([(target.group("category"), added)])

    def score(sums: np.ndarray) -> np.ndarray:
        questions, hits, images, both = parts_of(sums, 4)
        return 100 * (ratio(hits, questions) + ratio(both, images)).sum(-1)

    categories = {target.group("category") for target in targets}
    return Tally(by_part(entries, 3), score, 200.0 * len(categories), image)


METRICS = (
    Metric("mme", "official", yes_no.scorer(yes_no.prefix), aggregate, "total", tally, 1.0),
    Metric("mme", "lmms-eval", yes_no.scorer(yes_no.prefix_or_initial), aggregate, "total", tally, 1.0),
    Metric("mme", "vlmevalkit", yes_no.scorer(yes_no.one_of_two), aggregate, "total", tally, 1.0),
)
