"""Folders of photographs for the benchmarks: crops of given ones, each encoded anew, or made images where none are."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from transfercache.environment import n_cores
from transfercache.images.ahead import run_ahead
from transfercache.randomness import derive_rng

#: Of made images, as of most of the tutorial's photographs.
_SIZE = (500, 375)
_QUALITY = 90
#: A crop keeps at least so much of each side, so that it is about as much work as its photograph.
_LEAST_SIDE = 0.8
_ENDINGS = (".jpg", ".jpeg", ".png")
_AHEAD = 1024  # photographs under way at a time


def make_photos(folder: Path, n_images: int, *, source: Path | None) -> Path:
    """Write `n_images` JPEGs of distinct bytes in a folder a class, and return `folder`.

    The classes are those of the folders in which the photographs under `source` lie, or two. They take turns, so that
    a few images have them all; `train/` is used up before `val/`.
    """
    photographs = list_photographs(source) if source else []

    def write(number: int) -> None:
        rng = derive_rng(0, "photo", number)
        given = photographs[number % len(photographs)] if photographs else None
        image = _smooth_noise(rng) if given is None else _crop(given, rng)
        path = folder / (f"class {number % 2}" if given is None else given.parent.name) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=_QUALITY)

    for _, written in run_ahead(range(n_images), write, workers=n_cores(), window=_AHEAD):
        written.result()
    return folder


def list_photographs(source: Path) -> list[Path]:
    """Return the photographs below a folder, those of its folders in turns; ends the program where there is none."""
    photographs = [path for path in source.rglob("*") if path.suffix.lower() in _ENDINGS]
    if not photographs:
        raise SystemExit(f"{source}: holds no photographs (files that end in {', '.join(_ENDINGS)})")
    by_folder = groupby(sorted(photographs, key=lambda path: (path.parent, path.name)), key=lambda path: path.parent)
    ranked = [(folder.parent, rank, path) for folder, paths in by_folder for rank, path in enumerate(paths)]
    return [path for _, _, path in sorted(ranked)]


def _crop(path: Path, rng: np.random.Generator) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width, height = (int(side * rng.uniform(_LEAST_SIDE, 1)) for side in image.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _smooth_noise(rng: np.random.Generator) -> Image.Image:
    # Blobs with grain: pure noise would take a JPEG decoder several times as long as a photograph.
    blobs = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(blobs).resize(_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0, 4, (*image.shape[:2], 1))
    return Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))
