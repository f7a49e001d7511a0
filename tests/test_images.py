"""Images as people have them: each odd file reads as it would look on a white page, or the error says what to do."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from visiontok.errors import ImageError
from visiontok.images import load_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey16(values: list[int]) -> Image.Image:
    return Image.frombytes("I;16", (len(values), 1), struct.pack(f"<{len(values)}H", *values))


def greys(image: Image.Image) -> list[int]:
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


def test_path_bytes_and_open_image_give_the_same_pixels(tmp_path: Path) -> None:
    original = Image.effect_noise((7, 5), 80).convert("RGB")
    path = tmp_path / "a.png"
    original.save(path)
    for source in (str(path), path, path.read_bytes(), original):
        image = load_image(source)
        assert (image.mode, image.tobytes()) == ("RGB", original.tobytes())


def test_result_is_a_copy() -> None:
    original = Image.new("RGB", (2, 2))
    load_image(original).putpixel((0, 0), RED)
    assert original.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (3, 2))
    upright.putpixel((0, 0), RED)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encode(stored, exif=exif))
    assert (image.size, image.tobytes()) == (upright.size, upright.tobytes())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_pixels() -> None:
    data = encode(Image.new("RGB", (4, 3), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01")
    assert load_image(data).size == (4, 3)


def palette_and_alpha(layer: Image.Image) -> Image.Image:
    # `convert("PA")` drops the alpha channel.
    image = layer.convert("LA").convert("PA")
    image.putalpha(layer.getchannel("A"))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparent_pixels_are_white(mode: str) -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    image = {
        "RGBA": lambda: layer,
        "LA": lambda: layer.convert("LA"),
        "PA": lambda: palette_and_alpha(layer),
        "La": lambda: layer.convert("LA").convert("La"),
        "RGBa": lambda: layer.convert("RGBa"),
    }[mode]()
    assert image.mode == mode
    assert greys(load_image(image)) == [0, 255]


def test_half_transparent_red_is_pink() -> None:
    assert load_image(encode(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_transparent_colour(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (200, 200, 200))
    image = image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    image = load_image(encode(image, transparency=image.getpixel((0, 0))))
    assert greys(image) == [255, 200]


def test_palette() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 255))
    stored = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert load_image(encode(stored)).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = [0, 257, 255, 128 * 257, 40000, 65535]
    assert greys(load_image(encode(grey16(values), kind))) == [round(value / 257) for value in values]


def test_16_bit_grey_in_a_pgm() -> None:
    data = b"P5 3 1 65535\n" + struct.pack(">3H", 0, 128 * 257, 65535)
    assert greys(load_image(data)) == [0, 128, 255]


def test_a_dark_16_bit_file_stays_dark() -> None:
    assert greys(load_image(b"P5 2 1 65535\n" + struct.pack(">2H", 0, 200))) == [0, 1]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 128, 255], [0, 128, 255]),
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I", [-100, 0, 100], [0, 128, 255]),
        ("I", [-5, -5, -5], [0, 0, 0]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 128.0, 255.0], [0, 128, 255]),
        ("F", [-1.0, 0.0, 1.0], [0, 128, 255]),
    ],
)
def test_deep_grey_arrays(mode: str, values: list[float], expected: list[int]) -> None:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    assert greys(load_image(image)) == pytest.approx(expected, abs=1)


def test_float_file() -> None:
    image = Image.new("F", (2, 1), 255.0)
    image.putpixel((0, 0), 128.0)
    assert greys(load_image(encode(image, "TIFF"))) == [128, 255]


def test_cmyk() -> None:
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = image.getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert greys(load_image(encode(image))) == [0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV", "LAB"])
def test_one_pixel_of_any_mode(mode: str) -> None:
    image = load_image(Image.new(mode, (1, 1)))
    assert (image.mode, image.size) == ("RGB", (1, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert load_image(data).getpixel((0, 0)) == RED


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png' does not exist; check the path"):
        load_image(tmp_path / "no.png")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder; give the path of one image file"):
        load_image(tmp_path)


def test_address() -> None:
    with pytest.raises(ImageError, match="is an address, not a file; download it"):
        load_image("https://example.org/cat.png")


def test_wrong_type() -> None:
    with pytest.raises(ImageError, match="expected a path, bytes or a PIL image, got int"):
        load_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"", b"not an image", b"%PDF-1.7"])
def test_not_an_image(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    with pytest.raises(
        ImageError, match=r"odd\.png' is (empty; fetch|in no image format that Pillow can read; save it)"
    ):
        load_image(path)
    with pytest.raises(ImageError, match=r"bytes\) is (empty; read|in no image format)"):
        load_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated(kind: str, part: float, tmp_path: Path) -> None:
    data = encode(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError, match=r"cut\.img' is .*; (fetch or export it again|save it as PNG or JPEG)"):
        load_image(path)


def test_broken_checksum(tmp_path: Path) -> None:
    data = bytearray(encode(Image.effect_noise((64, 64), 90)))
    data[60] ^= 0xFF
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.png' is broken or truncated"):
        load_image(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Metadata Warning")
def test_every_cut_of_a_file_reads_or_raises_an_image_error() -> None:
    for kind in ("PNG", "GIF", "TIFF", "JPEG"):
        data = encode(Image.effect_noise((9, 9), 90), kind)
        for length in range(len(data)):
            try:
                assert load_image(data[:length]).mode == "RGB"
            except ImageError:
                pass


def test_decompression_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(PngImagePlugin._MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"bomb\.png' is too large to be decoded safely .*; scale it down first"):
        load_image(path)


def test_no_pixels() -> None:
    with pytest.raises(ImageError, match="has no pixels"):
        load_image(Image.new("RGB", (0, 3)))
