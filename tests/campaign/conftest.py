"""What the campaigns share: a process to fork extractors from, made images, the check of a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfercache.cache.verify import verify_folder

from .forks import Forks, forking

# Long before any scan: a file younger than two seconds is hashed at every one, and its record says so.
_OLD_NS = 1_700_000_000_000_000_000


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    if sys.platform != "linux":
        pytest.skip("a process that has loaded torch can be forked on Linux alone")
    with forking() as process:
        yield process


def find_problems(folder: Path) -> tuple[str, ...]:
    """All that `tlc cache verify` finds wrong with a folder; one that is not there, or empty, is no cache yet."""
    if not folder.exists() or not any(folder.iterdir()):
        return ()
    return verify_folder(folder).problems


def write_photo(path: Path, seed: int) -> None:
    """A small PNG of noise, last changed long ago; equal seeds are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    make_old(path)


def make_old(path: Path) -> None:
    os.utime(path, ns=(_OLD_NS, _OLD_NS))


def write_photos(folder: Path, seeds: range) -> Path:
    """Photographs in two classes: cat/ has the even seeds, dog/ the odd ones, and a file's name is its seed."""
    for seed in seeds:
        write_photo(folder / ("cat", "dog")[seed % 2] / f"{seed:02}.png", seed)
    return folder
