"""CIDEr of captions (Vedantam et al., arXiv 1411.5726), by pycocoevalcap, an extra of its own.

It weighs words by how rare they are among the captions of all images, so single captions have no score and CIDEr is no
:class:`~visiontok.eval.scoring.Metric`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from visiontok.errors import ConfigError

_WORD = re.compile(r"\w+(?:'\w+)*")


def cider_simple(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[float, dict[str, float]]:
    """CIDEr without the PTB tokeniser, which needs a Java machine: words in lower case, without punctuation.

    Published numbers are tokenised by PTB, so they differ a little; compare within this one.

    Args:
        predictions: image → caption.
        references: image → its reference captions, for the same images.

    Returns:
        The score of the corpus, and that of each image; around 1, not 100.

    Raises:
        ConfigError: if pycocoevalcap is missing, the images differ, or there is only one.
    """
    if predictions.keys() != references.keys():
        odd = sorted(predictions.keys() ^ references.keys())
        raise ConfigError(f"predictions and references are of different images, for example {odd[0]!r}")
    if len(predictions) < 2:
        raise ConfigError(f"{len(predictions)} image: CIDEr needs at least two, or no word is rarer than another")
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as missing:
        raise ConfigError("CIDEr needs pycocoevalcap: pip install 'visiontok[captions]'") from missing
    images = sorted(predictions)
    corpus, each = Cider().compute_score(
        {image: [_tokens(caption) for caption in references[image]] for image in images},
        {image: [_tokens(predictions[image])] for image in images},
    )
    return float(corpus), dict(zip(images, map(float, each), strict=True))


def _tokens(caption: str) -> str:
    return " ".join(_WORD.findall(caption.lower()))
