"""Reading images as people have them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from visiontok.errors import ImageError

_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def load_image(source: str | os.PathLike[str] | bytes | Image.Image, *, as_stored: bool = False) -> Image.Image:
    """An RGB image, upright, as it would look on a white page.

    The EXIF orientation is applied, transparency is composited on white, deep greyscale is scaled to 8 bits (not
    clipped), and of an animation the first frame is taken (of an open `PIL.Image`, the current one).

    Args:
        source: Path of an image file, the bytes of one, or an open image, which stays unchanged.
        as_stored: Nothing of the above but the first frame: Pillow's own conversion to RGB, as benchmarks have it.

    Returns:
        An image in mode "RGB" that is loaded and holds no file open.

    Raises:
        ImageError: The file is missing, broken, truncated, of no known format, empty or dangerously large.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image", as_stored)
    if isinstance(source, bytes):
        name = f"the image ({len(source)} bytes)"
        if not source:
            raise ImageError(f"{name} is empty; read the file again, opened in binary mode")
        return _open(io.BytesIO(source), name, as_stored)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"image: expected a path, bytes or a PIL image, got {type(source).__name__}")
    text = os.fspath(source)
    if text.startswith(("http://", "https://", "data:")):
        raise ImageError(f"image {text[:80]!r} is an address, not a file; download it and give its path")
    path = Path(text).expanduser()
    name = f"image {str(path)!r}"
    if not path.exists():
        raise ImageError(f"{name} does not exist; check the path (looked from {Path.cwd()})")
    if path.is_dir():
        raise ImageError(f"{name} is a folder; give the path of one image file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}; check its permissions") from error
    if not data:
        raise ImageError(f"{name} is empty; fetch or export it again")
    return _open(io.BytesIO(data), name, as_stored)


def _open(stream: io.BytesIO, name: str, as_stored: bool) -> Image.Image:
    try:
        with Image.open(stream) as image:
            return _decode(image, name, as_stored)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is in no image format that Pillow can read; save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to be decoded safely ({error}); scale it down first") from error
    # Pillow's plugins meet broken files with nearly any exception: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        raise ImageError(f"{name} is broken or truncated ({error}); fetch or export it again") from error


def _decode(image: Image.Image, name: str, as_stored: bool) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels (it is {image.width}×{image.height}); give an image of at least 1×1")
    image.load()
    if as_stored:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    from_file = image.format is not None
    image = _upright(image)
    if image.mode in _DEEP_GREY:
        return _eight_bits(image, from_file).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data or image.mode == "RGBa":
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(page, layer)
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # A damaged EXIF block is common in the wild and no reason to refuse the pixels.
    except Exception:
        return image


def _eight_bits(image: Image.Image, from_file: bool) -> Image.Image:
    """Greyscale of 16 or 32 bits or of floats, scaled to mode "L".

    16-bit modes span 0…65535. Mode "I" holds 8, 16 or 32 bits and mode "F" anything, so there the values decide: within
    0…1 (floats), 0…255 or 0…65535 that range is meant; anything else is stretched from its least to its greatest value.
    Integers read from a file are never 8-bit: Pillow would have given mode "L".
    """
    grey = image if image.mode == "F" else image.convert("I")
    low, high = cast("tuple[float, float]", grey.getextrema())
    if image.mode.startswith("I;"):
        start, end = 0.0, 65535.0
    elif low < 0 or high > 65535:
        start, end = low, high
    elif image.mode == "F" and high <= 1:
        start, end = 0.0, 1.0
    elif high <= 255 and (image.mode == "F" or not from_file):
        start, end = 0.0, 255.0
    else:
        start, end = 0.0, 65535.0
    scale = 255.0 / (end - start) if end > start else 0.0
    offset = 0.5 - start * scale
    # For these modes `point` takes only a linear function, and truncates: hence the half.
    return grey.point(lambda value: value * scale + offset).convert("L")
