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
from PIL import Image, ImageFile

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


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("name", ["named.jpg", "named.png"])
def test_decode_image__lossless_formats_by_content(kind: str, name: str) -> None:
    decoded = decode_image(encode(quarters(), kind, **({"lossless": True} if kind == "WEBP" else {})), name)
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


def png(width: int, height: int, *, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of a kind that Pillow reads and does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def grey_tiff(*, bits: int, zero_is_white: bool, rows: bytes) -> bytes:
    """An uncompressed TIFF of 2 x 1 grey values, of a kind that Pillow reads and does not write."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: not zero_is_white, 273: 122, 277: 1, 278: 1, 279: len(rows)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + rows


GREY_16 = np.array([[0, 128, 129, 257], [32768, 65407, 65406, 65535]], dtype=np.uint16)
GREY_8 = [[0, 0, 1, 1], [128, 255, 254, 255]]  # round(v / 257)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_image__16_bit_grey_is_scaled(kind: str) -> None:
    decoded = np.asarray(decode_image(encode(Image.fromarray(GREY_16), kind), "a.png"))
    np.testing.assert_array_equal(decoded, np.repeat(np.array(GREY_8)[:, :, None], 3, axis=2))


def test_decode_image__16_bit_grey_keeps_256_levels() -> None:
    # Pillow's convert("RGB") would clip all but the lowest of them: of these pixels, all but one in 256 to white.
    ramp = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    decoded = np.asarray(decode_image(encode(ramp, "PNG"), "a.png"))[:, :, 0].ravel()
    assert np.bincount(decoded).tolist() == [129, *[257] * 254, 129]
    assert (np.diff(decoded.astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("colour_type", "values", "rgb"),
    [
        (2, (0x1234, 0x80FF, 0xFFFF), (0x12, 0x80, 0xFF)),
        (6, (0x1234, 0x80FF, 0xFFFF, 0), (0x12, 0x80, 0xFF)),
        (4, (0x1234, 0), (0x12, 0x12, 0x12)),
    ],
    ids=["colour", "colour and alpha", "grey and alpha"],
)
def test_decode_image__16_bit_colour_has_its_upper_8_bits(
    colour_type: int, values: tuple[int, ...], rgb: tuple[int, int, int]
) -> None:
    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    decoded = decode_image(png(1, 1, depth=16, colour_type=colour_type, rows=rows), "a.png")
    assert decoded.getpixel((0, 0)) == rgb


@pytest.mark.parametrize(
    ("bits", "zero_is_white", "rows"),
    [(12, False, b"\xff\xff\xff"), (16, True, b"\0\x10\0\x80")],
)
def test_decode_image__grey_that_pillow_reads_wrongly_is_refused(bits: int, zero_is_white: bool, rows: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^a\.tif: grey of 12 bits, or with 0 for white; save it with 8 or 16 bits"):
        decode_image(grey_tiff(bits=bits, zero_is_white=zero_is_white, rows=rows), "a.tif")


@pytest.mark.parametrize(("zero_is_white", "grey"), [(False, [16, 128]), (True, [239, 127])])
def test_decode_image__8_bit_grey_of_either_polarity(zero_is_white: bool, grey: list[int]) -> None:
    decoded = decode_image(grey_tiff(bits=8, zero_is_white=zero_is_white, rows=b"\x10\x80"), "a.tif")
    assert np.asarray(decoded)[0].tolist() == [[value] * 3 for value in grey]


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


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_decode_image__1_bit_is_black_and_white(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (5, 11)).astype(bool)
    decoded = decode_image(encode(Image.fromarray(pixels), kind), "a.png")
    np.testing.assert_array_equal(np.asarray(decoded), np.repeat(pixels[:, :, None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_decode_image__cmyk(kind: str) -> None:
    options = {"quality": 100} if kind == "JPEG" else {}
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind, **options)
    np.testing.assert_allclose(decode_image(data, "a.jpg").getpixel((4, 4)), RED, atol=3)


def test_decode_image__ycck_jpeg() -> None:
    # Adobe stores the complement of CMYK, and turns its first three to YCbCr: red is the YCbCr of cyan, and K 255.
    # Pillow writes no YCCK, so these values are saved as if they were CMYK (complemented by Pillow), with the colour
    # transform of the Adobe segment then set to 2.
    y, cb, cr = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    planes = Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 0))
    data = bytearray(encode(planes, "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    np.testing.assert_allclose(decode_image(bytes(data), "a.jpg").getpixel((8, 8)), RED, atol=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decode_image__a_point_and_a_line(kind: str, size: tuple[int, int]) -> None:
    decoded = decode_image(encode(Image.new("RGB", size, RED), kind), "a.png")
    assert decoded.size == size
    np.testing.assert_allclose(np.asarray(decoded).reshape(-1, 3), [RED] * (size[0] * size[1]), atol=3)


def test_decode_image__first_of_the_images_of_a_phone() -> None:
    data = encode(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), RED)], quality=100)
    decoded = decode_image(data, "a.jpg")
    assert decoded.size == (32, 16)
    np.testing.assert_allclose(decoded.getpixel((24, 12)), WHITE, atol=3)


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
        (b"\xff\xd8\xff", "truncated, damaged or of an unusual kind (its header cannot be read)"),
        (bytes(5000), "nothing but zero bytes (from a torn copy or download)"),
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
def test_decode_image__bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert side * side > MAX_PIXELS
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} pixels were decoded"))
    with pytest.raises(DecodeError, match="more than 178 million"):
        decode_image(png_of_claimed_size(side, side), "bomb.png")


def test_decode_image__bomb_is_refused_where_pillows_own_limit_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DecodeError, match=r"^bomb\.png: more than 178 million pixels$"):
        decode_image(png_of_claimed_size(30_000, 30_000), "bomb.png")


def claiming(side: int) -> dict[str, bytes]:
    """Small files of each format whose headers claim side x side pixels."""

    def patched(data: bytes, at: int, value: bytes) -> bytes:
        return data[:at] + value + data[at + len(value) :]

    gif, bmp, jpeg = (encode(quarters(), kind) for kind in ("GIF", "BMP", "JPEG"))
    width_tag, height_tag = 10 + 8, 10 + 12 + 8
    tiff = grey_tiff(bits=8, zero_is_white=False, rows=b"ab")
    for at in (width_tag, height_tag):
        tiff = patched(tiff, at, struct.pack("<H", side))
    canvas = struct.pack("<I", side - 1)[:3] * 2
    return {
        "GIF": patched(gif, 6, struct.pack("<HH", side, side)),
        "BMP": patched(bmp, 18, struct.pack("<ii", side, side)),
        "JPEG": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side)),
        "TIFF": tiff,
        "PPM": b"P6\n%d %d\n255\n" % (side, side) + bytes(300),
        "WEBP": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + canvas + bytes(10),
    }


@pytest.mark.parametrize("kind", ["GIF", "BMP", "JPEG", "TIFF", "PPM", "WEBP"])
def test_decode_image__bomb_of_another_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} pixels were decoded"))
    with pytest.raises(DecodeError, match=r"^a\.jpg: more than 178 million pixels$"):
        decode_image(claiming(16_383)[kind], "a.jpg")


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
    reasons: set[str] = set()
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"):
        clean = encode(quarters(), kind)
        for _ in range(60):
            data = bytearray(clean)
            for place in rng.integers(0, len(data), 4).tolist():
                data[place] = int(rng.integers(256))
            try:
                assert decode_image(bytes(data), "a").mode == "RGB"
            except DecodeError as error:
                reasons.add(error.reason)
    # For people, and the same in every run: no address of an object in it.
    assert [reason for reason in reasons if not reason.isprintable() or "0x" in reason] == []
    assert "truncated" in reasons


def test_load_image__reads_and_names_as_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(quarters(), "PNG"))
    assert load_image(path, "ants/a.jpg").size == (32, 16)
    os.unlink(path)
    with pytest.raises(DecodeError, match=r"^ants/a\.jpg: cannot be read \(No such file or directory\)$"):
        load_image(path, "ants/a.jpg")
