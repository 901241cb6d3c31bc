"""Holes in made JPEG files are found, and nothing else is taken for one."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transfercache.errors import DecodeError
from transfercache.images.decode import decode_image
from transfercache.images.jpeg import HOLE, hole_bytes

WHITE = (255, 255, 255)


def encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", side: int = 160) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 4), dtype=np.uint8)
    return Image.frombytes("RGBX", (side, side), pixels.tobytes()).convert("RGB").convert(mode)


def zeroed(data: bytes, start: int, n: int) -> bytes:
    # Neighbours that are no zeros, so that the hole has exactly n bytes.
    return data[: start - 1] + b"\x55" + bytes(n) + b"\x55" + data[start + n + 1 :]


def middle_zeroed(data: bytes, n: int = 1000) -> bytes:
    return zeroed(data, (len(data) - n) // 2, n)


def start_of_scan(data: bytes, number: int) -> int:
    """Where the coded data of a scan begin."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"\xff\xda", at + 1)
    return at + 2 + int.from_bytes(data[at + 2 : at + 4])


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard tables, 4:2:0": ("RGB", {"subsampling": 2}),
    "standard tables, 4:4:4": ("RGB", {"subsampling": 0}),
    "optimised, 4:2:0": ("RGB", {"subsampling": 2, "optimize": True}),
    "optimised, 4:4:4": ("RGB", {"subsampling": 0, "optimize": True}),
    "optimised, quality 95": ("RGB", {"quality": 95, "optimize": True}),
    "grey": ("L", {}),
    "grey, optimised": ("L", {"optimize": True}),
    "CMYK": ("CMYK", {}),
    "restart markers": ("RGB", {"restart_marker_rows": 1}),
    "progressive": ("RGB", {"progressive": True}),
    "progressive grey": ("L", {"progressive": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hole__in_the_middle_is_found_where_pillow_sees_none(kind: str) -> None:
    mode, options = KINDS[kind]
    data = encode(noise(mode), **options)
    assert decode_image(data, "a.jpg").size == (160, 160)
    torn = middle_zeroed(data)
    with Image.open(io.BytesIO(torn)) as opened:
        opened.load()
    with pytest.raises(DecodeError) as caught:
        decode_image(torn, "a.jpg")
    assert str(caught.value) == "a.jpg: damaged (a hole of 1000 zero bytes in its image data)"


def test_hole__of_half_a_sector_is_not_looked_for() -> None:
    data = encode(noise())
    assert [hole_bytes(middle_zeroed(data, n)) for n in (511, 512, 513)] == [0, 512, 513]


def test_hole__to_the_end_of_a_download_that_never_went_on() -> None:
    data = encode(noise())
    assert hole_bytes(data[:3000] + b"\x55" + bytes(50_000)) == 50_000


def test_hole__over_the_header_of_a_later_scan() -> None:
    data = encode(noise(), progressive=True)
    assert hole_bytes(zeroed(data, start_of_scan(data, 3) - 600, 1000)) == 1000


def test_hole__in_a_photo_of_several_images_is_looked_for_in_the_first() -> None:
    buffer = io.BytesIO()
    noise().save(buffer, "MPO", save_all=True, append_images=[noise(side=80)])
    data = buffer.getvalue()
    second = data.rindex(b"\xff\xd8")
    assert decode_image(zeroed(data, second + 2000, 600), "a.jpg").size == (160, 160)
    with pytest.raises(DecodeError, match="a hole of 600 zero bytes"):
        decode_image(zeroed(data, 6000, 600), "a.jpg")


FLAT: dict[str, dict[str, Any]] = {
    "standard tables": {},
    "optimised": {"optimize": True},
    "optimised, 4:4:4": {"optimize": True, "subsampling": 0},
    "progressive": {"progressive": True},
    "progressive, 4:4:4": {"progressive": True, "subsampling": 0},
}


@pytest.mark.parametrize("options", FLAT.values(), ids=FLAT)
@pytest.mark.parametrize(("colour", "size"), [("white", (4000, 3000)), ("black", (1600, 1200)), ("#731", (1600, 1200))])
def test_flat_image__is_no_hole(options: dict[str, Any], colour: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, colour)
    data = encode(image, **options)
    assert (HOLE in data) == bool(options)  # standard tables have other bits for the end of a block
    difference = np.abs(np.asarray(decode_image(data, "a.jpg")).astype(int)[::64, ::64] - image.getpixel((0, 0)))
    assert difference.max() <= 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_flat_image__of_one_or_four_components_is_no_hole(mode: str) -> None:
    for options in ({"optimize": True}, {"progressive": True}):
        data = encode(Image.new(mode, (1600, 1200)), **options)
        assert HOLE in data
        assert hole_bytes(data) == 0


@pytest.mark.parametrize("options", [{"optimize": True}, {"progressive": True}])
def test_flat_ground_around_a_photo__is_no_hole(options: dict[str, Any]) -> None:
    image = Image.new("RGB", (3000, 4000), "white")
    image.paste(noise(), (1400, 1900))
    data = encode(image, **options)
    assert HOLE in data
    decoded = decode_image(data, "a.jpg")
    assert decoded.getpixel((0, 0)) == decoded.getpixel((2999, 3999)) == WHITE


def test_zeros_outside_the_picture__are_no_hole() -> None:
    plain = encode(noise())
    exif = Image.Exif()
    exif[0x927C] = bytes(2000)  # a maker note, as cameras pad it
    thumbnail = encode(Image.new("RGB", (1000, 1000)), optimize=True)
    files = [
        encode(noise(), exif=exif),
        encode(noise(), icc_profile=bytes(3000)),
        encode(noise(), comment=bytes(2000)),
        encode(noise(), exif=b"Exif\0\0" + thumbnail + bytes(700)),
        plain + bytes(4096),
    ]
    for data in files:
        assert HOLE in data
        np.testing.assert_array_equal(np.asarray(decode_image(data, "a.jpg")), np.asarray(decode_image(plain, "a.jpg")))
        start = start_of_scan(data, data.count(b"\xff\xda") - 1) + 2000
        assert hole_bytes(zeroed(data, start, 800)) == 800


def test_zeros_up_to_a_marker__are_the_padding_of_a_camera() -> None:
    plain = encode(noise())
    padded = plain[:-2] + bytes(3000) + plain[-2:]
    np.testing.assert_array_equal(np.asarray(decode_image(padded, "a.jpg")), np.asarray(decode_image(plain, "a.jpg")))


def test_hole__where_zeros_may_be_right_is_not_seen() -> None:
    """What docs/images.md names as unseen; a test, so that the document is corrected when this gets better."""
    grey = encode(noise("L", side=800), progressive=True, quality=95)
    # Scans of a grey progressive file from libjpeg: DC, AC 1-5, AC 6-63, AC refined, DC refined, AC refined.
    refined_dc = start_of_scan(grey, 4)
    assert hole_bytes(zeroed(grey, refined_dc + 100, 600)) == 0
    assert hole_bytes(zeroed(grey, start_of_scan(grey, 0) + 1000, 600)) == 600
    # Mostly flat, so that its own tables give zero bits to flat blocks.
    ground = Image.new("RGB", (1600, 1600), "white")
    ground.paste(noise(side=400), (600, 600))
    assert hole_bytes(middle_zeroed(encode(ground, optimize=True))) == 0
    arithmetic = encode(noise()).replace(b"\xff\xc0", b"\xff\xc9", 1)
    assert hole_bytes(middle_zeroed(arithmetic)) == 0


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body


def headers(frame: int, dc: tuple[int, int], ac: tuple[int, int], first: int = 0, refined: int = 0) -> bytes:
    """All that is looked at of a file with two components, whose tables have these first symbols (of two)."""
    tables = [bytes([kind << 4 | i]) + bytes([1, 1] + [0] * 14) + bytes([symbol, 9])
              for kind, symbols in enumerate((dc, ac)) for i, symbol in enumerate(symbols)]  # fmt: skip
    scan = segment(0xDA, bytes([2, 1, 0x00, 2, 0x11, first, 63, refined << 4]))
    return b"\xff\xd8" + segment(frame, bytes(15)) + segment(0xC4, b"".join(tables)) + scan


EOB, EOB3, ZRL, ONE = 0x00, 0x30, 0xF0, 0x01


@pytest.mark.parametrize(
    ("file", "is_hole"),
    [
        (headers(0xC0, (0, 0), (EOB, EOB)), False),
        (headers(0xC0, (0, 0), (EOB, ONE)), True),
        (headers(0xC0, (0, 0), (EOB, ZRL)), True),
        (headers(0xC0, (0, 2), (EOB, EOB)), True),
        (headers(0xC1, (2, 0), (EOB, EOB)), True),
        (headers(0xC9, (2, 0), (ONE, ONE)), False),
        (headers(0xC2, (0, 0), (ONE, ONE)), False),
        (headers(0xC2, (0, 2), (EOB, EOB)), True),
        (headers(0xC2, (0, 2), (EOB, EOB), refined=1), False),
        (headers(0xC2, (2, 2), (EOB, EOB3), first=1), False),
        (headers(0xC2, (2, 2), (EOB, ZRL), first=1), True),
        (headers(0xC2, (0, 0), (EOB3, ONE), first=1, refined=1), True),
    ],
)
def test_zeros__are_judged_by_what_the_tables_make_of_them(file: bytes, is_hole: bool) -> None:
    assert hole_bytes(file + b"\x55" + bytes(600) + b"\x55\xff\xd9") == 600 * is_hole


def test_zeros__are_looked_for_up_to_the_end_of_the_image() -> None:
    file = headers(0xC0, (0, 2), (ONE, ONE))
    assert hole_bytes(file + b"\x55\xff\xd9\0\0" + file[2:] + bytes(600) + b"\x55\xff\xd9") == 0


def test_zeros__after_a_scan_header_that_is_cut_off_are_left_to_the_decoder() -> None:
    file = headers(0xC2, (0, 2), (ONE, ONE))
    assert hole_bytes(file[: file.index(b"\xff\xda")] + segment(0xDA, b"") + bytes(600) + b"\x55\xff\xd9") == 0


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(2, 700))
def test_hole_bytes__any_bytes_have_an_answer(before: bytes, after: bytes, at: int) -> None:
    data = encode(noise(side=16))
    torn = data[:at] + before + HOLE + after + data[at:]
    assert 0 <= hole_bytes(torn) < len(torn)
    for length in range(20):  # of a scan header, most of them wrong
        assert 0 <= hole_bytes(torn[:at] + b"\xff\xda\0" + bytes([length]) + HOLE) <= len(HOLE) + at
