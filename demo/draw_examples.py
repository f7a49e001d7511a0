"""Three pictures of the kinds of objects that the embedded models know, drawn with Pillow alone.

Nothing here comes from the generator that the models are trained on: edges are smooth, the pictures have other sizes,
and two backgrounds are of kinds that training never shows. `python -m visiontok.demo.draw_examples` draws them anew.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

_FINE = 4  # pixels are drawn so many times finer, then averaged


def _polygon(x: float, y: float, radii: list[float], turn: float = -90) -> list[tuple[float, float]]:
    """Corners around (x, y), one for each radius."""
    angles = [math.radians(turn + 360 * corner / len(radii)) for corner in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _finish(image: Image.Image, name: str) -> None:
    size = image.width // _FINE, image.height // _FINE
    image.resize(size, Image.Resampling.LANCZOS).save(Path(__file__).parent / "examples" / name)


def still_life() -> None:
    """A red star and a blue circle on a table, under a plain wall."""
    side = 320 * _FINE
    image = Image.new("RGB", (side, side), (150, 145, 140))
    draw = ImageDraw.Draw(image)
    draw.polygon(_polygon(side * 0.28, side * 0.3, [side * 0.11, side * 0.046] * 5), fill=(205, 30, 45))
    draw.ellipse((side * 0.62, side * 0.6, side * 0.8, side * 0.78), fill=(40, 70, 200))
    _finish(image, "star.png")


def traffic() -> None:
    """Three green triangles and an orange square on a soft vertical gradient."""
    side = 288 * _FINE
    image = Image.linear_gradient("L").resize((side, side)).point(lambda value: 95 + value // 4).convert("RGB")
    draw = ImageDraw.Draw(image)
    for x, y in ((0.2, 0.25), (0.72, 0.2), (0.3, 0.75)):
        draw.polygon(_polygon(side * x, side * y, [side * 0.1] * 3), fill=(50, 150, 70))
    draw.rectangle((side * 0.62, side * 0.6, side * 0.82, side * 0.8), fill=(240, 130, 40))
    _finish(image, "triangles.png")


def sea() -> None:
    """A yellow ring and a purple diamond under a spotlight."""
    side = 240 * _FINE
    light = Image.radial_gradient("L").resize((side, side)).point(lambda value: 165 - value // 4)
    image = Image.merge("RGB", (light, light, light.point(lambda value: value + 20)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((side * 0.14, side * 0.56, side * 0.36, side * 0.78), outline=(235, 210, 50), width=side // 24)
    draw.polygon(_polygon(side * 0.7, side * 0.3, [side * 0.12, side * 0.085] * 2), fill=(140, 55, 170))
    _finish(image, "ring.png")


if __name__ == "__main__":
    still_life()
    traffic()
    sea()
