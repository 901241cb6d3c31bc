"""From a file's bytes to an RGB image, or to one clear reason why not; the one place that decodes."""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from transfercache.errors import DecodeError, ResourceError
from transfercache.images.files import read_image_bytes
from transfercache.images.jpeg import hole_bytes
from transfercache.images.transforms import Picture
from transfercache.spec import Preprocessing

#: Takes a file's bytes and the path that errors name; raises DecodeError. Threads may call it.
Decoder = Callable[[bytes, str], Picture]

#: Where Pillow itself refuses (twice its MAX_IMAGE_PIXELS): 512 MiB as RGB.
MAX_PIXELS = 178_956_970
_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"

# By content, whatever the extension says; JPEG covers the MPO files of phones. Left out on purpose: EPS, for
# instance, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

#: What Pillow calls a JPEG file; that of a phone holds several.
JPEG_FORMATS = ("JPEG", "MPO")

#: What Pillow's readers have been seen to raise on damaged files; MemoryError is not the file's fault.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_PILLOW_MODULES = r"PIL\."

_MARKUP = (
    ((b"<!doctype html", b"<html", b"<head"), "not an image (it starts like HTML)"),
    ((b"<?xml", b"<svg"), "not an image of pixels (it starts like XML or SVG)"),
)


def load_image(path: Path, shown: str) -> Image.Image:
    """Read and decode one file; `shown` is the path that errors name. See `decode_image`."""
    return decode_image(read_image_bytes(path, shown), shown)


def decode_image(data: bytes, path: str, *, least_side: int | None = None) -> Image.Image:
    """Return the image as Pillow RGB, upright by its EXIF orientation; the first frame of an animation.

    Transparency is dropped, as `convert("RGB")` in torchvision's loader does. 16-bit grey is scaled to 8 bits
    (65535 -> 255), where `convert` would clip it. With `least_side` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
    size, the smallest at which its shorter side has as many pixels. Raises DecodeError with a short reason; a truncated
    file is an error. Threads may call it; it silences Pillow's own warnings for the process.
    """
    with opened_image(data, path) as opened:
        if least_side is not None:
            opened.draft(None, (least_side, least_side))
        # In one piece: Pillow moves what is left of the file after every 64 KiB, a third of the time of a large one.
        opened.decodermaxblock = len(data)
        opened.load()
        with suppress(*PILLOW_ERRORS):  # damaged metadata is no reason to lose the pixels
            ImageOps.exif_transpose(opened, in_place=True)
        return _to_rgb(opened, path)


@contextmanager
def opened_image(data: bytes, path: str) -> Iterator[ImageFile]:
    """Give the image with its header read and found fit to be decoded; what decoding raises becomes a DecodeError."""
    _silence_pillow()
    if not data:
        raise DecodeError(path, "empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            _check_before_decoding(opened, data, path)
            yield opened
    except UnidentifiedImageError as error:
        raise DecodeError(path, _what_it_is(data)) from error
    except Image.DecompressionBombError as error:
        raise DecodeError(path, _TOO_LARGE) from error
    except PILLOW_ERRORS as error:
        raise DecodeError(path, _damage(error)) from error


def _check_before_decoding(image: Image.Image, data: bytes, path: str) -> None:
    """Refuse what Pillow would take too much memory for, or would decode into a wrong picture without a word."""
    if image.width * image.height > MAX_PIXELS:  # Pillow's own limit can be switched off
        raise DecodeError(path, _TOO_LARGE)
    if image.format in JPEG_FORMATS and (hole := hole_bytes(data)):
        raise DecodeError(path, f"damaged (a hole of {hole} zero bytes in its image data)")
    # Pillow scales no 12-bit TIFF to 16 bits, so that it comes out nearly black, and inverts no 16-bit negative.
    tags = getattr(image, "tag_v2", {})
    is_negative = tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode.startswith("I;16") and (is_negative or tags.get(BITSPERSAMPLE, (16,)) != (16,)):
        raise DecodeError(path, "grey of 12 bits, or with 0 for white; save it with 8 or 16 bits, 0 being black")


def _silence_pillow() -> None:
    """Keep a filter for Pillow's warnings in front: they tell of metadata, and reach no one who could act.

    `warnings.catch_warnings` swaps global state and must not be used in threads.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or getattr(first[3], "pattern", None) != _PILLOW_MODULES:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "F":
        raise DecodeError(path, "32-bit floating-point grey, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey_from_16_bit(image, path).convert("RGB")
    # A transparent colour changes no pixel of the result, and palettes with several of them only raise warnings.
    image.info.pop("transparency", None)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_from_16_bit(image: Image.Image, path: str) -> Image.Image:
    values = np.asarray(image)  # [H, W]: uint16 of either byte order, or int32
    if values.dtype.kind == "i" and (values.min() < 0 or values.max() > 0xFFFF):
        raise DecodeError(path, "grey values outside 0 to 65535; save it with 8 or 16 bits")
    # 65535 = 255 x 257; half of 257 is added to round.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _damage(error: BaseException) -> str:
    if isinstance(error, EOFError) or "truncat" in str(error).lower():
        return "truncated"
    return f"damaged ({str(error) or type(error).__name__})"


def _what_it_is(data: bytes) -> str:
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginnings, reason in _MARKUP:
        if start.startswith(beginnings):
            return reason
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file; convert it to JPEG or PNG"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")):
        return "truncated, damaged or of an unusual kind (its header cannot be read)"
    if not data.strip(b"\0"):
        return "nothing but zero bytes (from a torn copy or download)"
    if not set(data[:1024]) - set(range(0x20, 0x7F)) - set(b"\t\r\n\f"):
        return "not an image (it starts like text)"
    return "not an image in a format that is read (JPEG, PNG, TIFF, WebP, BMP, GIF, PPM)"


def pick_decoder(preprocessing: Preprocessing) -> Decoder:
    """Return what decodes under `preprocessing.decoder`; raises ResourceError where it cannot be loaded.

    `docs/images.md` says what each of these policies does to the pixels.
    """
    if preprocessing.decoder == "pillow":
        return decode_image
    if preprocessing.decoder == "draft":
        return functools.partial(decode_image, least_side=preprocessing.resize)
    return load_fast()


def load_fast() -> Decoder:
    """Return TorchCodec's decoding; raises ResourceError where that cannot be loaded."""
    try:
        from transfercache.images.fast import decode_fast
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its libraries are of another torch
        reason = str(error).partition("\n")[0]
        raise ResourceError(
            f"images are to be decoded by TorchCodec (--decode fast), which cannot be loaded ({reason}); "
            "install it: pip install 'transfercache[fast]'"
        ) from error
    return decode_fast
