"""Single flipped bits of a real extracted cache, in every part of its files: `verify` finds each of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from transfercache.cache.catalogue import FILE_NAME, ShardEntry, read_catalogue
from transfercache.cache.reader import open_cache

from .conftest import find_problems, write_photos
from .forks import BACKBONE, ENGINE, Command, Ended, Forks

# In each part, of each storage dtype: a tenth of those of --campaign.
N_FLIPS = 4

Place = tuple[str, int]  # name of a file, and a byte of it


# Without trained weights the other one's embeddings are too small for float16.
BACKBONES = {"float32": BACKBONE, "float16": "resnet18"}


@pytest.fixture(scope="module", params=BACKBONES)
def extracted(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs in two views, then six more: two finished shards."""
    folder, dtype = tmp_path_factory.mktemp(request.param), request.param
    words = [
        f"--backbone={BACKBONES[dtype]}",
        ENGINE,
        "--weights=random",
        "--views=2",
        f"--storage-dtype={dtype}",
        "--json",
    ]
    for seeds in (range(12), range(18)):
        data = write_photos(folder / "pets", seeds)
        ended = forks.run(Command(["extract-features", str(data), *words, f"--cache-dir={folder / 'cache'}"]))
        assert ended.code == 0, ended.err
    made = Path(json.loads(ended.out)["cache"])
    assert [(entry.n_rows, entry.finished) for entry in read_catalogue(made).shards] == [(24, True), (12, True)]
    assert find_problems(made) == ()
    return made


@pytest.fixture(scope="module")
def found(figures: list[str]) -> Iterator[Counter[str]]:
    """How many flips were found, by part."""
    counts = Counter[str]()
    yield counts
    figures.append("flipped bits, all found: " + ", ".join(f"{n} in {part}" for part, n in counts.items()))


def _in_dataset(name: str) -> Callable[[Path], Iterator[Place]]:
    def places(folder: Path) -> Iterator[Place]:
        for entry in read_catalogue(folder).shards:
            extent = getattr(entry, name)
            yield from ((entry.file, i) for i in range(extent.offset, extent.offset + extent.length))

    return places


def _in_header(folder: Path) -> Iterator[Place]:
    """All that HDF5 has written for itself, and what lies between the datasets to align them."""
    for entry in read_catalogue(folder).shards:
        yield from ((entry.file, i) for i in np.flatnonzero(~_is_in_dataset(folder, entry)).tolist())


def _is_in_dataset(folder: Path, entry: ShardEntry) -> np.ndarray:
    covered = np.zeros((folder / entry.file).stat().st_size, bool)
    for extent in entry.extents():
        covered[extent.offset : extent.offset + extent.length] = True
    return covered


def _in_file(pattern: str) -> Callable[[Path], Iterator[Place]]:
    def places(folder: Path) -> Iterator[Place]:
        (path,) = folder.glob(pattern)
        yield from ((path.name, i) for i in range(path.stat().st_size))

    return places


PARTS: dict[str, Callable[[Path], Iterator[Place]]] = {
    "HDF5 header": _in_header,
    "digests": _in_dataset("digests"),
    "views": _in_dataset("views"),
    "checksums": _in_dataset("checksums"),
    "features": _in_dataset("features"),
    "rows file": _in_file("rows-*"),
    "catalogue": _in_file(FILE_NAME),
}


def _flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.chmod(0o644)
    path.write_bytes(data)


def _verify(forks: Forks, folder: Path) -> Ended:
    return forks.run(Command(["cache", "verify", str(folder)]))


@pytest.mark.parametrize("part", PARTS)
def test_flipped_bit__is_found(
    extracted: Path, tmp_path: Path, forks: Forks, part: str, scale: int, found: Counter[str]
) -> None:
    folder = tmp_path / extracted.name
    shutil.copytree(extracted, folder)
    places = list(PARTS[part](folder))
    dtype = read_catalogue(folder).spec.storage_dtype
    rng = np.random.default_rng(list(f"{part} {dtype}".encode()))
    n_flips = N_FLIPS * scale
    missed = []
    for number, flipped in enumerate(rng.choice(len(places) * 8, n_flips, replace=False).tolist()):
        at, bit = divmod(flipped, 8)
        name, offset = places[at]
        _flip(folder / name, offset, bit)
        problems = find_problems(folder)
        if not any(name in problem for problem in problems):
            missed.append((name, offset, bit, problems))
        if number % 20 == 0:  # a process of its own takes a hundred times as long
            ended = _verify(forks, folder)
            assert (ended.code, ended.out) == (4, "")
            assert name in ended.err
            assert "Traceback" not in ended.err
        _flip(folder / name, offset, bit)
    assert missed == []
    assert find_problems(folder) == ()
    # What is whole again is served again.
    served, expected = open_cache(folder).table(), open_cache(extracted).table()
    assert served.features.tobytes() == expected.features.tobytes()
    found[part] += n_flips


def test_verify__of_a_whole_cache(extracted: Path, forks: Forks) -> None:
    assert _verify(forks, extracted).code == 0
