"""docs/images.md: each line of its table is made as a file, and tlc must do and say what stands there."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfercache.errors import DecodeError, ResourceError
from transfercache.images.decode import Decoder, pick_decoder
from transfercache.images.files import read_image_bytes
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.scan import IMAGE_EXTENSIONS
from transfercache.images.sources import read_source
from transfercache.spec import DECODERS, Preprocessing

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "images.md"

READS, LISTS, LEAVES, LOOKS = "reads", "lists", "leaves", "looks"


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 100) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(width: int, height: int, *, depth: int, colour_type: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def grey_tiff(tag: int, written: int, wanted: int) -> bytes:
    """A TIFF of 16-bit grey in which Pillow has `written` one tag, and it is now `wanted`."""
    plain = encode(Image.new("I;16", (2, 2)), "TIFF")
    return plain.replace(struct.pack("<HHIH", tag, 3, 1, written), struct.pack("<HHIH", tag, 3, 1, wanted))


def ycck() -> bytes:
    data = bytearray(encode(Image.new("CMYK", (9, 9)), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2  # the colour transform
    return bytes(data)


def rotated(exif: bytes | None = None) -> bytes:
    upright = Image.Exif()
    upright[0x0112] = 6
    return encode(noise(), "JPEG", exif=exif or upright)


JPEG = encode(noise(), "JPEG")
PNG = encode(noise(), "PNG")
MIDDLE = len(JPEG) // 2
FRAMES = {"save_all": True, "append_images": [noise().rotate(90)]}


def named(contents: dict[str, bytes]) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).write_bytes(data) for name, data in contents.items()]


def files(*contents: bytes) -> Callable[[Path], object]:
    return named({f"{i}.jpg": data for i, data in enumerate(contents)})


def link(target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "x.jpg").symlink_to(target)


def loop(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "1.jpg").write_bytes(JPEG)
    (folder / "deep" / "up").symlink_to(folder)


def fifo_and_device(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/null")


def folder_called_jpg(folder: Path) -> None:
    (folder / "x.jpg").mkdir()
    (folder / "x.jpg" / "1.jpg").write_bytes(JPEG)


def odd_names(folder: Path) -> None:
    for name in (b"two\nlines.jpg", b"caf\xe9.jpg"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(JPEG)


def csv_without_files(folder: Path) -> None:
    (folder.parent / "rows.csv").write_text("path\na/good.png\na/none.jpg\n")


# What is there, as the document names it -> what makes it in a class folder.
CASES: dict[str, Callable[[Path], object]] = {
    "JPEG, PNG, TIFF, WebP, BMP, GIF, PPM": files(
        *(encode(noise(), kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"))
    ),
    "a wrong extension, such as a PNG called `.jpg`": files(PNG),
    "CMYK and YCCK": files(encode(Image.new("CMYK", (9, 9)), "JPEG"), ycck()),
    "16-bit grey": files(encode(Image.new("I;16", (2, 2)), "PNG")),
    "16-bit colour": files(png(1, 1, depth=16, colour_type=2, rows=bytes(7))),
    "12-bit grey, or 16-bit grey with 0 for white": files(
        grey_tiff(258, written=16, wanted=12),  # bits
        grey_tiff(262, written=1, wanted=0),  # photometric interpretation: 1 where 0 is black
    ),
    "32-bit grey outside 0 to 65535": files(encode(Image.new("I", (2, 2), -1), "TIFF")),
    "floating-point grey": files(encode(Image.new("F", (2, 2)), "TIFF")),
    "a palette, with and without transparency": files(
        encode(Image.new("P", (2, 2)), "PNG"), encode(Image.new("P", (2, 2)), "PNG", transparency=b"\x80")
    ),
    "RGBA, grey with alpha": files(*(encode(Image.new(mode, (2, 2)), "PNG") for mode in ("RGBA", "LA"))),
    "1-bit": files(encode(Image.new("1", (2, 2)), "PNG")),
    "animated, or several pages": files(
        *(encode(noise(), kind, **FRAMES) for kind in ("PNG", "WEBP", "GIF", "TIFF", "MPO"))
    ),
    "EXIF-rotated": files(rotated()),
    "damaged EXIF": files(rotated(b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 30)),
    "1x1": files(encode(noise(1), "JPEG")),
    "1x20000": files(encode(Image.new("RGB", (1, 20_000)), "PNG")),
    "an evenly coloured JPEG, whose data may be all zero": files(
        *(encode(Image.new("RGB", (1600, 1200)), "JPEG", **{name: True}) for name in ("optimize", "progressive"))
    ),
    "a JPEG with zeros in its EXIF, or after its end": files(
        rotated(b"Exif\0\0MM\0*" + bytes(2000)), JPEG + bytes(999)
    ),
    "truncated": files(JPEG[:MIDDLE], PNG[: len(PNG) // 2]),
    "truncated within the header": files(JPEG[:3], PNG[:9]),
    "no bytes": files(b""),
    "all bytes zero": files(bytes(5000)),
    "a JPEG with a zeroed middle": files(JPEG[:MIDDLE] + bytes(600) + JPEG[MIDDLE + 600 :]),
    "a JPEG whose rest was never written (zeros)": files(JPEG[:MIDDLE] + bytes(9999)),
    "damage that Pillow notices": files(PNG[:20_000] + bytes(600) + PNG[20_600:]),
    "HTML named `.jpg`": files(b"<!DOCTYPE html><html>404</html>"),
    "SVG or other XML": files(b"<svg/>"),
    "text": files(b"Not found\n"),
    "HEIC, AVIF, video": files(b"\0\0\0\x18ftypheic\0\0\0\0"),
    "anything else": files(b"%PDF-1.4\n\xe2\xe3\xcf\xd3\n", b"\xfe\xed\xfa\xce" * 9),
    "a decompression bomb": files(png(30_000, 30_000, depth=8, colour_type=2, rows=bytes(100))),
    "a link to an image": link("good.png"),
    "a dangling link": link("nowhere.jpg"),
    "a link to itself": link("x.jpg"),
    "a folder that is a link to one above it (a loop)": loop,
    "a FIFO, a device": fifo_and_device,
    "a folder called `.jpg`": folder_called_jpg,
    "hidden files, `._` files": named({".hidden.jpg": JPEG, "._x.jpg": bytes(99)}),
    "other extensions": named({"animated.gif": JPEG}),
    "images beside class folders": lambda folder: (folder.parent / "x.jpg").write_bytes(JPEG),
    "names with newlines or invalid UTF-8": odd_names,
    "a row of a CSV without a file": csv_without_files,
}


@dataclass(frozen=True)
class Line:
    """A line of the document's table."""

    does: str  # READS, ...
    says: str | None  # a regular expression


def read_table() -> dict[str, Line]:
    head, rows = "| what is there | what tlc does | what it says |\n|---|---|---|\n", {}
    for line in DOCUMENT.read_text().split(head)[1].split("\n\n")[0].splitlines():
        what, does, says = (cell.strip() for cell in line.strip("|").split("|"))
        pattern = re.escape(says.strip("`")).replace(r"\.\.\.", ".+")
        rows[what] = Line(does.split()[0], re.sub(r"\bN\b", r"\\d+", pattern) if says else None)
    return rows


TABLE = read_table()


def test_document__has_a_line_for_each_case_that_is_tested() -> None:
    assert list(TABLE) == list(CASES)
    assert f"(`{' '.join(IMAGE_EXTENSIONS)}`)" in DOCUMENT.read_text()


@pytest.fixture(params=DECODERS)
def decode(request: pytest.FixtureRequest) -> Decoder:
    try:
        return pick_decoder(Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, decoder=request.param))
    except ResourceError as missing:
        pytest.skip(str(missing))


def bad_rows(manifest: Manifest, decode: Decoder) -> list[str]:
    """The reasons of the rows that cannot be read, then of those that cannot be decoded."""
    reasons = list(manifest.unreadable.values())
    for row in np.flatnonzero(manifest.is_readable()).tolist():
        try:
            path = manifest.paths[row]
            pixels = np.array(decode(read_image_bytes(manifest.path_of(row), path), path))
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
        except DecodeError as error:
            reasons.append(error.reason)
    return reasons


def what_is_done(manifest: Manifest, bad: list[str]) -> str:
    if bad:
        return LISTS
    if manifest.skipped:
        return LEAVES
    return LOOKS if any(path.count("/") > 1 for path in manifest.paths) else READS


@pytest.mark.parametrize("what", CASES)
def test_document__is_what_tlc_does(what: str, decode: Decoder, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(PNG)
    CASES[what](folder)
    data = folder.parent / "rows.csv"
    manifest = hash_files(read_source(data if data.exists() else folder.parent), known={})
    bad = bad_rows(manifest, decode)
    says = [*bad, *manifest.skipped]
    line = TABLE[what]
    assert line.does == what_is_done(manifest, bad)
    assert (line.says is None) == (says == [])
    assert [reason for reason in says if not re.fullmatch(line.says or "", reason)] == []
    # All files of a case come to the same, apart from the good one beside them.
    assert (manifest.n_rows - len(bad) == 1) == bool(says)
