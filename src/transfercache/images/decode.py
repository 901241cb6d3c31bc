"""From a file's bytes to an RGB image, or to one clear reason why not; the one place that decodes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from transfercache.errors import DecodeError

#: Where Pillow itself refuses (twice its MAX_IMAGE_PIXELS): 512 MiB as RGB.
MAX_PIXELS = 178_956_970

# By content, whatever the extension says; JPEG covers the MPO files of phones. Left out on purpose: EPS, for
# instance, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# What Pillow's readers have been seen to raise on damaged files; MemoryError is not the file's fault.
_PILLOW_ERRORS = (
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


def load_image(path: Path, shown: str) -> Image.Image:
    """Read and decode one file; `shown` is the path that errors name. See `decode_image`."""
    return decode_image(read_image_bytes(path, shown), shown)


def read_image_bytes(path: Path, shown: str) -> bytes:
    """Return the bytes of a file; raises DecodeError, naming it as `shown`, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(shown, f"cannot be read ({error.strerror or error})") from error


def decode_image(data: bytes, path: str) -> Image.Image:
    """Return the image as Pillow RGB, upright by its EXIF orientation; the first frame of an animation.

    Transparency is dropped, as `convert("RGB")` in torchvision's loader does. 16-bit grey is scaled to 8 bits
    (65535 -> 255), where `convert` would clip it. Raises DecodeError with a short reason; a truncated file is an
    error. Threads may call it; it silences Pillow's own warnings for the process.
    """
    _silence_pillow()
    if not data:
        raise DecodeError(path, "empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise DecodeError(path, f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
            opened.load()
            with suppress(*_PILLOW_ERRORS):  # damaged metadata is no reason to lose the pixels
                ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened, path)
    except UnidentifiedImageError as error:
        raise DecodeError(path, _what_it_is(data)) from error
    except Image.DecompressionBombError as error:
        raise DecodeError(path, f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except _PILLOW_ERRORS as error:
        raise DecodeError(path, _damage(error)) from error


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
    return image.convert("RGB")


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
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "not an image (it starts like HTML)"
    if start.startswith((b"<?xml", b"<svg")):
        return "not an image of pixels (it starts like XML or SVG)"
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file; convert it to JPEG or PNG"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")):
        return "truncated or damaged (its header cannot be read)"
    if not set(data[:1024]) - set(range(0x20, 0x7F)) - set(b"\t\r\n\f"):
        return "not an image (it starts like text)"
    return "not an image in a format that is read (JPEG, PNG, TIFF, WebP, BMP, GIF, PPM)"
