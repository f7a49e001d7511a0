"""What a calibration leaves behind: a JSON document, and a drawing of its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_INK = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
_WIDTH, _HEIGHT, _LEFT, _TOP = 560, 200, 60, 30
_TEXT = 'font-family="sans-serif" font-size="11"'


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A finished calibration.

    Attributes:
        calibration: the method that it is for.
        title: what the curves show.
        source: as published, or a reconstruction of what.
        model: name, type, number of decoder layers, and 16 hex digits of the weights.
        data: where the samples are from, how many, and 16 hex digits of them.
        options: of the calibrator.
        recommended: options of the method; None if nothing suits.
        curves: [layer, number] pairs, mean over samples.
        notes: what a reader must know.
        axis: what the curves are drawn over.
    """

    calibration: str
    title: str
    source: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    recommended: Mapping[str, Any] | None
    curves: Mapping[str, Sequence[tuple[int, float]]]
    notes: Sequence[str]
    axis: str = "decoder layer"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the axis, which follows from the method."""
        return {name: value for name, value in asdict(self).items() if name != "axis"}

    def save(self, path: Path) -> Path:
        """Write the document, and the drawing beside it.

        Returns:
            the path of the drawing, with the suffix .svg.
        """
        drawing = path.with_suffix(".svg")
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        drawing.write_text(self.svg())
        return drawing

    def svg(self) -> str:
        """One panel for each curve, with the recommended layers as dashed lines."""
        drawn = (layer for points in self.curves.values() for layer, _ in points)
        depth = max(int(self.model["layers"]) - 1 if self.axis == "decoder layer" else max(drawn, default=1), 1)
        panels = [
            part
            for number, (name, points) in enumerate(self.curves.items())
            for part in _panel(
                _TOP + (_HEIGHT + 60) * number, f"{name} by {self.axis}", points, depth, self.layers(), _INK[number % 4]
            )
        ]
        title = f"{self.calibration}, {self.model['name']}: {self.title}"
        size = f"{_LEFT + _WIDTH + 20} {_TOP + (_HEIGHT + 60) * len(self.curves)}"
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{_LEFT}" y="18" {_TEXT}>{escape(title)}</text>',
        ]
        return "\n".join([*head, *panels, "</svg>"]) + "\n"

    def layers(self) -> list[int]:
        """The decoder layers among what is recommended."""
        found: list[int] = []
        for name, value in (self.recommended or {}).items():
            if name in ("layer", "layers", "inject", "exit"):
                found += value if isinstance(value, list) else [value]
        return found


def _panel(
    top: int, name: str, points: Sequence[tuple[int, float]], depth: int, marks: Sequence[int], ink: str
) -> list[str]:
    """The elements of one curve; ``depth`` is the last layer."""
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    span = (high - low) or 1.0
    bottom = top + _HEIGHT
    out = []
    for quarter in range(5):
        x, y = _LEFT + _WIDTH * quarter / 4, bottom - _HEIGHT * quarter / 4
        value, layer = f"{low + span * quarter / 4:.3g}", f"{depth * quarter / 4:.3g}"
        out.append(f'<path d="M{_LEFT} {y:g}h{_WIDTH}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end" {_TEXT}>{value}</text>')
        out.append(f'<text x="{x:g}" y="{bottom + 16}" text-anchor="middle" {_TEXT}>{layer}</text>')
    places = [_LEFT + _WIDTH * mark / depth for mark in marks]
    out += [f'<path d="M{x:.1f} {top}v{_HEIGHT}" stroke="#888" stroke-dasharray="4 3"/>' for x in places]
    line = " ".join(f"{_LEFT + _WIDTH * x / depth:.1f},{bottom - _HEIGHT * (y - low) / span:.1f}" for x, y in points)
    out.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="2"/>')
    middle, label = f"{_LEFT + _WIDTH / 2:g}", escape(name)
    return [*out, f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle" fill="{ink}" {_TEXT}>{label}</text>']
