"""One folder with every odd and every bad kind of file, from the command line to a head: row i is image i."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import load_backbone
from transfercache.cache.reader import open_cache
from transfercache.cache.rows import BAD, OK
from transfercache.commands.extract import extract_features
from transfercache.commands.train import train_head
from transfercache.images.decode import load_image
from transfercache.images.transforms import eval_pixels

Run = Callable[..., Any]
Make = bytes | Callable[[Path], object]

NETWORK = ("--backbone=mobilenet_v3_small", "--weights=random")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    """Coarse noise of a tint of its own: pictures that a network of random weights tells apart."""
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 256, 3)
    return Image.fromarray(((rng.integers(0, 256, (5, 6, 3)) + tint) // 2).astype(np.uint8)).resize(size)


def bomb() -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def ycck(seed: int) -> bytes:
    data = bytearray(encode(picture(seed).convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2  # the colour transform
    return bytes(data)


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(seed), "JPEG", exif=exif)


def negative_grey_16() -> bytes:
    plain = encode(Image.new("I;16", (9, 9)), "TIFF")
    return plain.replace(struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0))


def grey_16(seed: int) -> Image.Image:
    return Image.fromarray(np.asarray(picture(seed).convert("L")).astype(np.uint16) * 257)


LARGE = encode(picture(0, (640, 480)), "JPEG")
PNG = encode(picture(1), "PNG")
FRAMES = {"save_all": True, "append_images": [picture(90)]}
HEADER = "truncated, damaged or of an unusual kind (its header cannot be read)"
NO_FORMAT = "not an image in a format that is read (JPEG, PNG, TIFF, WebP, BMP, GIF, PPM)"

#: Name, what makes the file, and why it is bad (None: it is good); in the order of the rows.
FILES: list[tuple[str, Make, str | None]] = [
    ("00 png.jpg", encode(picture(2), "PNG"), None),
    (os.fsdecode(b"01 bad\n\xe9.jpg"), b"Not found\n", "not an image (it starts like text)"),
    ("02 cmyk.jpg", encode(picture(3).convert("CMYK"), "JPEG"), None),
    ("03 truncated.jpg", LARGE[:9000], "truncated"),
    ("04 ycck.jpg", ycck(4), None),
    ("05 header.png", PNG[:9], HEADER),
    ("06 16 bits.png", encode(grey_16(5), "PNG"), None),
    ("07 negative.tif", negative_grey_16(),
     "grey of 12 bits, or with 0 for white; save it with 8 or 16 bits, 0 being black"),
    ("08 palette.png", encode(picture(6).quantize(16), "PNG", transparency=b"\x80"), None),
    ("09 zeros.jpg", bytes(5000), "nothing but zero bytes (from a torn copy or download)"),
    ("10 alpha.png", encode(picture(7).convert("RGBA"), "PNG"), None),
    ("11 hole.jpg", LARGE[:9000] + bytes(700) + LARGE[9700:], "damaged (a hole of 700 zero bytes in its image data)"),
    ("12 one bit.png", encode(picture(8).convert("1"), "PNG"), None),
    ("13 unwritten.jpg", LARGE[:9000] + bytes(9999), "damaged (a hole of 9999 zero bytes in its image data)"),
    ("14 animated.webp", encode(picture(9), "WEBP", **FRAMES), None),
    ("15 html.jpg", b"<!DOCTYPE html><html>404</html>", "not an image (it starts like HTML)"),
    ("16 rotated.jpg", rotated(10), None),
    ("17 svg.png", b"<svg/>", "not an image of pixels (it starts like XML or SVG)"),
    ("18 1x1.jpg", encode(picture(11, (1, 1)), "JPEG"), None),
    ("19 heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC, AVIF or video file; convert it to JPEG or PNG"),
    ("20 1x20000.png", encode(picture(12, (1, 20_000)), "PNG"), None),
    ("21 pdf.jpg", b"%PDF-1.4\n\xe2\xe3\xcf\xd3\n", NO_FORMAT),
    ("22 flat.jpg", encode(Image.new("RGB", (1600, 1200), "white"), "JPEG", optimize=True), None),
    ("23 bomb.png", bomb(), "more than 178 million pixels"),
    ("24 link.jpg", lambda path: path.symlink_to("00 png.jpg"), None),
    ("25 dangling.jpg", lambda path: path.symlink_to("nowhere.jpg"), "cannot be read (No such file or directory)"),
    ("26 two\nlines.jpg", encode(picture(13), "JPEG"), None),
    ("27 self.jpg", lambda path: path.symlink_to(path.name), "cannot be read (Too many levels of symbolic links)"),
    (os.fsdecode(b"28 caf\xe9.jpg"), encode(picture(14), "BMP"), None),
    ("29 pipe.jpg", os.mkfifo, "not a regular file"),
    ("30 empty.jpg", b"", "empty file"),
    ("31 same as hole.jpg", lambda path: shutil.copy(path.with_name("11 hole.jpg"), path),
     "damaged (a hole of 700 zero bytes in its image data)"),
    ("32 float.tif", encode(Image.new("F", (9, 9)), "TIFF"),
     "32-bit floating-point grey, whose range is unknown; save it with 8 or 16 bits"),
]  # fmt: skip

ODD = "train/cat"
PLAIN = [f"{folder}/{i}.png" for folder in ("train/dog", "val/cat", "val/dog") for i in range(4)]
PATHS = [f"{ODD}/{name}" for name, _, _ in FILES] + [f"{ODD}/99 folder.jpg/inside.jpg", *PLAIN]
REASONS = {f"{ODD}/{name}": reason for name, _, reason in FILES if reason is not None}
GOOD = [path for path in PATHS if path not in REASONS]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/cat with the files above, what is no row, and a loop; all other folders with plain images."""
    folder = tmp_path / "photos"
    (folder / ODD / "99 folder.jpg").mkdir(parents=True)
    for name, make, _ in FILES:
        path = folder / ODD / name
        if isinstance(make, bytes):
            path.write_bytes(make)
        else:
            make(path)
    (folder / ODD / "99 folder.jpg" / "inside.jpg").write_bytes(encode(picture(15), "JPEG"))
    (folder / ODD / "loop").symlink_to(folder / ODD)
    for name in (".hidden.jpg", "._00 png.jpg", "animated.gif"):
        (folder / ODD / name).write_bytes(PNG)
    for i, path in enumerate(PLAIN):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture(20 + i).save(folder / path)
    return folder


def test_bad_images__are_listed_and_all_others_are_done_and_kept(tlc: Run, photos: Path) -> None:
    ended = tlc("extract-features", photos, *NETWORK, "--json")
    assert ended.code == 3
    document = json.loads(ended.out)
    bad = [{"path": path, "reason": reason} for path, reason in REASONS.items()]
    assert document["bad"] == bad
    n_distinct = len(GOOD) - 1  # the link leads to one of them
    assert (document["rows"], document["computed"]) == (len(PATHS), n_distinct)
    lines = ended.err.splitlines()
    shown = [f"tlc: {path}: {reason}" for path, reason in REASONS.items()]
    shown[0] = rf"tlc: {ODD}/01 bad\n\udce9.jpg: not an image (it starts like text)"
    assert lines[0].startswith("engine ")
    assert lines[1:12] == [*shown[:10], f"tlc: and {len(bad) - 10} more unreadable images, in the document"]
    assert f"tlc: left out: {ODD}/._00 png.jpg and 1 more (hidden)" in lines
    assert f"tlc: left out: {ODD}/animated.gif (not an image by its extension .gif)" in lines

    again = tlc("extract-features", photos, *NETWORK, "--json", "--on-bad=skip")
    assert again.code == 0
    document = json.loads(again.out)
    assert (document["bad"], document["computed"], document["reused"]) == (bad, 0, n_distinct)
    # Where no document lists them, stderr does.
    assert tlc("extract-features", photos, *NETWORK).err.splitlines()[: len(shown)] == shown


def test_row_i__is_image_i(tlc: Run, photos: Path) -> None:
    cache = open_cache(json.loads(tlc("extract-features", photos, *NETWORK, "--json").out)["cache"])
    assert list(cache.rows.path) == PATHS
    assert cache.rows.status.tolist() == [BAD if path in REASONS else OK for path in PATHS]
    assert list(cache.rows.reason) == [REASONS.get(path, "") for path in PATHS]
    table = cache.table()
    assert list(table.paths) == GOOD
    assert table.row.tolist() == [PATHS.index(path) for path in GOOD]

    backbone = load_backbone("mobilenet_v3_small", weights="random")
    engine = EagerEngine(backbone, torch.device("cpu"))
    pixels = (eval_pixels(load_image(photos / path, path), backbone.preprocessing) for path in GOOD)
    alone = np.concatenate([engine.embed(image[None]) for image in pixels])
    scale = alone.std()  # of random weights: about 1e-9
    np.testing.assert_allclose(table.features / scale, alone / scale, atol=1e-3)
    # No other image would have passed for it, but for the link's target.
    distance = np.abs(alone[:, None] - alone[None]).max(axis=2) / scale
    twins = [(i, j) for i, j in np.argwhere(distance < 0.1).tolist() if i < j]
    assert twins == [(GOOD.index(f"{ODD}/00 png.jpg"), GOOD.index(f"{ODD}/24 link.jpg"))]


def test_head__sees_good_rows_alone(photos: Path, tmp_path: Path) -> None:
    words = {"backbone": "mobilenet_v3_small", "weights": "random"}
    mixed = extract_features(photos, **words, on_bad="skip")
    assert mixed.arrays("train")[1].tolist() == [path.startswith("train/dog") for path in GOOD if "train/" in path]
    head = train_head(mixed, C=1.0, out=tmp_path / "head")
    for path in REASONS:
        (photos / path).unlink()
    clean = extract_features(photos, **words, cache_dir=tmp_path / "clean")
    assert (clean.bad, clean.rows) == ((), len(GOOD))
    expected = train_head(clean, C=1.0, out=tmp_path / "expected")
    assert (head.n_train, expected.n_train) == (len(GOOD) - 8, len(GOOD) - 8)
    assert head.linear_head is not None
    assert expected.linear_head is not None
    scale = expected.linear_head.weight.std()
    np.testing.assert_allclose(head.linear_head.weight / scale, expected.linear_head.weight / scale, atol=1e-3)
    assert head.reported is not None
    assert head.reported.n == 8
