from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional

from transfercache.errors import DecodeError, ResourceError
from transfercache.images.decode import decode_image, pick_decoder
from transfercache.images.transforms import view_pixels
from transfercache.spec import Preprocessing

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.5,) * 3, (0.5,) * 3, decoder="fast")
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
# One entry, the orientation 6, as bytes of text, where a number is due.
EXIF_OF_TEXT = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0\0\0\0\0"

try:
    decode_fast = pick_decoder(PREPROCESSING)
except ResourceError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def photo(width: int = 123, height: int = 87) -> Image.Image:
    """Smooth blobs of colour with some grain, as photographs have them."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(blobs).astype(int) + grain, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (photo() if image is None else image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turned(orientation: int, endian: str = "<") -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[ORIENTATION] = orientation
    return jpeg(exif=exif)


def ycck() -> bytes:
    data = bytearray(jpeg(photo().convert("CMYK")))
    data[data.index(b"Adobe") + 11] = 2  # the colour transform
    return bytes(data)


def of_a_phone() -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, "MPO", save_all=True, append_images=[photo().rotate(180)])
    return buffer.getvalue()


JPEGS = {
    **{f"orientation {o} {endian}": turned(o, endian) for o in range(10) for endian in "<>"},
    **{f"sampling {s}": jpeg(subsampling=s, quality=q) for s, q in enumerate((100, 75, 30))},
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_rows=1),
    "grey": jpeg(photo().convert("L")),
    "CMYK": jpeg(photo().convert("CMYK")),
    "YCCK": ycck(),
    "RGB": jpeg(keep_rgb=True),
    "phone": of_a_phone(),
    "orientation in XMP": jpeg(xmp=XMP),
    "orientation as text": jpeg(exif=EXIF_OF_TEXT),
    "orientation in EXIF of another name": turned(3).replace(b"Exif\0\0", b"exif\0\0"),
    "damaged EXIF": jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "bytes after its end": jpeg() + b"after" * 99,
    "a point": jpeg(photo(1, 1)),
}


@pytest.mark.parametrize("name", JPEGS)
def test_decode_fast__gives_pillows_pixels_without_pillow(name: str) -> None:
    decoded, reference = decode_fast(JPEGS[name], "a.jpg"), decode_image(JPEGS[name], "a.jpg")
    assert not isinstance(decoded, Image.Image)
    assert decoded.size == reference.size
    np.testing.assert_array_equal(np.array(decoded), np.asarray(reference))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"])
def test_decode_fast__leaves_other_files_to_pillow(kind: str) -> None:
    buffer = io.BytesIO()
    photo().save(buffer, kind)
    decoded = decode_fast(buffer.getvalue(), "a.jpg")
    assert isinstance(decoded, Image.Image)
    np.testing.assert_array_equal(np.array(decoded), np.asarray(decode_image(buffer.getvalue(), "a.jpg")))


def test_decode_fast__16_bit_grey_is_scaled() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 129, 32768, 65535]], dtype=np.uint16)).save(buffer, "PNG")
    assert np.array(decode_fast(buffer.getvalue(), "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (300, 500), (1600, 1200), (100, 90), (20_000, 10)])
def test_views__are_within_two_grey_levels_of_pillows(size: tuple[int, int], interpolation: str) -> None:
    preprocessing = Preprocessing(256, 224, interpolation, (0.5,) * 3, (0.5,) * 3)
    data = jpeg(photo(*size))
    for view in range(4):
        pixels, reference = (
            view_pixels(decode(data, "a.jpg"), preprocessing, digest=bytes(32), view=view)
            for decode in (decode_fast, decode_image)
        )
        assert (pixels.dtype, pixels.shape, pixels.flags.writeable) == (np.uint8, (224, 224, 3), True)
        difference = np.abs(pixels.astype(int) - reference)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01


def test_resize__is_antialiased() -> None:
    stripes = np.zeros((900, 1200, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    image = Image.fromarray(stripes)
    decoded = decode_fast(jpeg(image, quality=100, subsampling=0), "a.jpg")
    fast, reference = np.array(decoded.resize((300, 225), 2)), np.asarray(image.resize((300, 225), 2))
    assert np.abs(fast.astype(int) - reference).max() <= 4  # JPEG's own loss is in this
    aliased = functional.resize(functional.pil_to_tensor(image), [225, 300], antialias=False)
    assert np.abs(aliased.permute(1, 2, 0).numpy().astype(int) - reference).max() > 50


def test_crop__beyond_the_picture_is_black() -> None:
    data = jpeg(photo(60, 50))
    cropped, reference = (np.array(d(data, "").crop((-5, -7, 70, 66))) for d in (decode_fast, decode_image))
    np.testing.assert_array_equal(cropped, reference)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        jpeg()[: len(jpeg()) // 2],
        jpeg()[:-2],
        jpeg()[:1500] + bytes(1024) + jpeg()[2524:],
        jpeg()[:20],
        b"<html>",
        bytes(5000),
    ],
)
def test_decode_fast__refuses_what_pillow_refuses_in_the_same_words(data: bytes) -> None:
    assert _outcome(decode_fast, data) == _outcome(decode_image, data)
    assert isinstance(_outcome(decode_fast, data), str)


def test_decode_fast__damage_at_any_byte_has_the_outcome_that_pillow_gives_it() -> None:
    clean = jpeg(photo(60, 50), quality=80)
    rng = np.random.default_rng(0)
    kinds = {"read": 0, "left to Pillow": 0, "refused": 0}
    for place in range(0, len(clean), 3):
        data = bytearray(clean)
        data[place] = rng.choice([0, 255, int(rng.integers(256))])
        outcome = _outcome(decode_fast, bytes(data))
        assert outcome == _outcome(decode_image, bytes(data)), place
        if isinstance(outcome, str):
            kinds["refused"] += 1
        else:
            kinds["left to Pillow" if isinstance(decode_fast(bytes(data), ""), Image.Image) else "read"] += 1
    # Each of them is seen: without the second, this would not show that Pillow has the last word.
    assert min(kinds.values()) > 0


def _outcome(decode: Any, data: bytes) -> str | tuple[tuple[int, int], bytes]:
    try:
        picture = decode(data, "a.jpg")
    except DecodeError as error:
        return error.reason
    return picture.size, np.array(picture).tobytes()


@pytest.mark.real
def test_photographs__are_pillows_pixel_for_pixel(real_photos: Path) -> None:
    for path in sorted(real_photos.glob("val/*/*.jpg"))[::10]:
        data = path.read_bytes()
        np.testing.assert_array_equal(np.array(decode_fast(data, "")), np.asarray(decode_image(data, "")))
        digest = bytes(32)
        fast, reference = (
            view_pixels(d(data, ""), PREPROCESSING, digest=digest, view=0) for d in (decode_fast, decode_image)
        )
        assert np.abs(fast.astype(int) - reference).max() <= 2
