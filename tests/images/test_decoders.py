from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfercache.errors import DecodeError, ResourceError
from transfercache.images.decode import Decoder, decode_image, pick_decoder
from transfercache.spec import Preprocessing


def decoder(name: str, *, resize: int = 256) -> Decoder:
    return pick_decoder(Preprocessing(resize, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, decoder=name))


def blobs(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def test_pick_decoder__pillow_is_the_reference() -> None:
    assert decoder("pillow") is decode_image


@pytest.mark.parametrize(
    ("size", "resize", "decoded"),
    [
        ((1600, 1200), 256, (400, 300)),
        ((1200, 1601), 151, (300, 401)),  # 1/8 has 150 pixels: one too few
        ((1600, 1200), 601, (1600, 1200)),
        ((500, 375), 256, (500, 375)),
        ((9000, 4500), 30, (1125, 563)),
    ],
)
def test_draft__is_the_smallest_whose_shorter_side_is_enough(
    size: tuple[int, int], resize: int, decoded: tuple[int, int]
) -> None:
    assert decoder("draft", resize=resize)(blobs(*size), "a.jpg").size == decoded


def test_draft__is_near_the_picture_and_not_it() -> None:
    data = blobs(1600, 1200)
    shrunk = np.asarray(decoder("draft")(data, "a.jpg")).astype(int)
    reference = np.asarray(decode_image(data, "a.jpg").resize((400, 300), Image.Resampling.BOX))
    assert 0 < np.abs(shrunk - reference).max() <= 8


def test_draft__is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoder("draft")(blobs(1600, 1200, exif=exif), "a.jpg").size == (300, 400)


def test_draft__leaves_small_and_other_files_as_they_are() -> None:
    for data in (blobs(500, 375), blobs(1600, 1200, "PNG")):
        pixels = np.asarray(decoder("draft")(data, "a"))
        np.testing.assert_array_equal(pixels, np.asarray(decode_image(data, "a")))


@pytest.mark.parametrize("name", ["pillow", "draft"])
def test_decoders__refuse_damage_in_the_same_words(name: str) -> None:
    data = blobs(1600, 1200)
    middle = len(data) // 2
    torn = data[:middle] + bytes(1024) + data[middle + 1024 :]
    for damaged, reason in ((data[:middle], "truncated"), (torn, r"damaged \(a hole of 10\d\d zero bytes")):
        with pytest.raises(DecodeError, match=reason):
            decoder(name)(damaged, "a.jpg")


def test_pick_decoder__fast_that_cannot_be_loaded__names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.delitem(sys.modules, "transfercache.images.fast", raising=False)
    with pytest.raises(ResourceError, match=r"--decode fast.*pip install 'transfercache\[fast\]'"):
        decoder("fast")
