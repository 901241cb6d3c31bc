from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfercache.errors import DataError, DecodeError
from transfercache.images.decode import MAX_PIXELS, decode_image, load_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters() -> Image.Image:
    """Red, green / blue, white in four blocks, 32 wide and 16 high: every orientation looks different."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16], pixels[8:, 16:] = RED, (0, 255, 0), BLUE, WHITE
    return Image.fromarray(pixels)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_claimed_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF"])
def test_decode_image__lossless_formats_by_content(kind: str) -> None:
    decoded = decode_image(encode(quarters(), kind), "named.jpg")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(quarters()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    # Where the four corners of the stored image are seen, by the EXIF table: row 0 of the file is at the top, etc.
    stored = np.asarray(quarters())
    seen = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    decoded = np.asarray(decode_image(encode(quarters(), kind, exif=exif, **options), "a.jpg"))
    np.testing.assert_allclose(decoded.astype(int), seen.astype(int), atol=3)


def test_decode_image__damage_beside_the_orientation_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("not to be written again")

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(quarters(), "JPEG", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert decode_image(data, "a.jpg").size == (16, 32)


def test_decode_image__damaged_exif_keeps_the_pixels() -> None:
    data = encode(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 30)
    assert decode_image(data, "a.jpg").size == (32, 16)


GREY_16 = np.array([[0, 128, 129, 257], [32768, 65407, 65406, 65535]], dtype=np.uint16)
GREY_8 = [[0, 0, 1, 1], [128, 255, 254, 255]]  # round(v / 257)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_image__16_bit_grey_is_scaled(kind: str) -> None:
    decoded = np.asarray(decode_image(encode(Image.fromarray(GREY_16), kind), "a.png"))
    np.testing.assert_array_equal(decoded, np.repeat(np.array(GREY_8)[:, :, None], 3, axis=2))


def test_decode_image__16_bit_grey_in_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (4, 2), GREY_16.astype(">u2").tobytes())
    decoded = np.asarray(decode_image(encode(image, "TIFF"), "a.tif"))
    np.testing.assert_array_equal(decoded[:, :, 0], GREY_8)


def test_decode_image__32_bit_grey_within_16_bits_is_scaled_and_beyond_refused() -> None:
    decoded = decode_image(encode(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"), "a.tif")
    np.testing.assert_array_equal(np.asarray(decoded)[:, :, 1], GREY_8)
    for value in (-1, 65536):
        data = encode(Image.fromarray(np.full((2, 2), value, dtype=np.int32)), "TIFF")
        with pytest.raises(DecodeError, match="grey values outside 0 to 65535"):
            decode_image(data, "a.tif")


def test_decode_image__floating_point_grey_is_refused() -> None:
    with pytest.raises(DecodeError, match=r"a\.tif: 32-bit floating-point grey"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), "a.tif")


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80\xff"])
def test_decode_image__palette_with_transparency_keeps_its_colours(transparency: int | bytes | None) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, *WHITE])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    decoded = decode_image(encode(image, "PNG", **options), "a.png")
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [RED, BLUE, WHITE]


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (77, 0), (77, 77, 77)),
        ("L", 77, (77, 77, 77)),
        ("1", 255, WHITE),
    ],
)
def test_decode_image__alpha_is_dropped_and_grey_spread(mode: str, colour: Any, rgb: tuple[int, int, int]) -> None:
    decoded = decode_image(encode(Image.new(mode, (2, 2), colour), "PNG"), "a.png")
    assert (decoded.mode, decoded.getpixel((1, 1))) == ("RGB", rgb)


def test_decode_image__cmyk_jpeg() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decode_image(data, "a.jpg").getpixel((4, 4)), RED, atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_decode_image__first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, "a.webp").getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_decode_image__truncated_is_an_error(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(DecodeError, match=r"truncated|damaged"):
        decode_image(data[: int(len(data) * share)], "a.jpg")


def test_decode_image__truncated_jpeg_says_so() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(DecodeError) as caught:
        decode_image(encode(noise, "JPEG")[:2000], "ants/7.jpg")
    assert (str(caught.value), caught.value.path, caught.value.reason) == (
        "ants/7.jpg: truncated",
        "ants/7.jpg",
        "truncated",
    )
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "not an image (it starts like HTML)"),
        (b"<?xml version='1.0'?><svg/>", "not an image of pixels (it starts like XML or SVG)"),
        (b"this is a text file called .jpg\n", "not an image (it starts like text)"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC, AVIF or video file; convert it to JPEG or PNG"),
        (b"\xff\xd8\xff", "truncated or damaged (its header cannot be read)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image (it starts like text)"),
        (
            bytes(range(7, 250)),
            "not an image in a format that is read (JPEG, PNG, TIFF, WebP, BMP, GIF, PPM)",
        ),
    ],
)
def test_decode_image__not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, "photo.jpg")
    assert str(caught.value) == f"photo.jpg: {reason}"


@pytest.mark.parametrize("side", [13_378, 30_000, 2**31 - 1])
def test_decode_image__bomb_is_refused_from_its_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(DecodeError, match="more than 178 million"):
        decode_image(png_of_claimed_size(side, side), "bomb.png")


def test_decode_image__large_but_allowed_raises_no_warning() -> None:
    # Between Pillow's warning (89 million pixels) and its refusal; here the header lies, so it is merely damaged.
    with pytest.raises(DecodeError, match=r"truncated|damaged"):
        decode_image(png_of_claimed_size(10_000, 9_500), "large.png")


def test_decode_image__pillow_warnings_never_leak_from_threads() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, *WHITE])
    files = [
        encode(image, "PNG", transparency=b"\x00\x80\xff"),
        encode(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30),
        png_of_claimed_size(10_000, 9_500),
    ]
    problems: list[BaseException] = []

    def decode_all() -> None:
        for data in files * 2:
            try:
                decode_image(data, "a")
            except DecodeError:
                pass
            except Warning as warning:
                problems.append(warning)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(files[0], "a")
        threads = [threading.Thread(target=decode_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (problems, caught) == ([], [])


def test_decode_image__damage_at_any_byte_is_an_image_or_a_decode_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"):
        clean = encode(quarters(), kind)
        for _ in range(60):
            data = bytearray(clean)
            for place in rng.integers(0, len(data), 4).tolist():
                data[place] = int(rng.integers(256))
            try:
                assert decode_image(bytes(data), "a").mode == "RGB"
            except DecodeError:
                continue


def test_load_image__reads_and_names_as_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(quarters(), "PNG"))
    assert load_image(path, "ants/a.jpg").size == (32, 16)
    os.unlink(path)
    with pytest.raises(DecodeError, match=r"^ants/a\.jpg: cannot be read \(No such file or directory\)$"):
        load_image(path, "ants/a.jpg")
