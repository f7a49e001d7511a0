"""CIDEr: what pycocoevalcap gives for three captions, and what we say without it."""

from __future__ import annotations

import sys

import pytest
from visiontok.eval.scoring.captions import cider_simple

from visiontok.errors import ConfigError

REFERENCES = {
    "0": ["A cat sits on a mat.", "the cat is on the mat"],
    "1": ["a dog runs in the park", "dog running in park"],
    "2": ["two people ride bikes", "people riding bicycles on road"],
}
PREDICTIONS = {"0": "a cat sits on a mat", "1": "A dog, in the park!", "2": "a man eats food"}


def test_three_images() -> None:
    pytest.importorskip("pycocoevalcap")
    corpus, each = cider_simple(PREDICTIONS, REFERENCES)
    assert corpus == pytest.approx(3.003105, abs=1e-6)
    assert [each[image] for image in "012"] == pytest.approx([5.725406, 3.283910, 0.0], abs=1e-6)


def test_one_image_has_no_score() -> None:
    with pytest.raises(ConfigError, match="needs at least two"):
        cider_simple({"0": "a cat"}, {"0": ["a cat"]})


def test_images_must_agree() -> None:
    with pytest.raises(ConfigError, match="for example '2'"):
        cider_simple({"0": "a cat", "1": "a dog"}, REFERENCES)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ConfigError, match=r"pip install 'visiontok\[captions\]'"):
        cider_simple(PREDICTIONS, REFERENCES)
