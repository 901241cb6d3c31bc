"""The real command on a file system of a few pages, full at one moment after another; then there is space again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from transfercache.cache.catalogue import FILE_NAME, read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.errors import CacheError

from .conftest import find_problems, make_old, write_photos
from .forks import BACKBONE, ENGINE, Command, Ended, Forks, empty_disk, forking

N_IMAGES = 48
# So many rows, sharing those images' slots, that the rows file is larger than what is kept free beside a shard.
N_COPIES = 700
N_NEW = 30
PAGE_KIB = 4
ROOMY_KIB, ROOMY_INODES = 4096, 1000
# What must be free for a shard beside its rows: cache/layout.py asks for it before HDF5 begins.
HEADER_KIB = 64
# Full at so many moments of an extraction: a tenth of those of --campaign.
N_MOMENTS = 6

DISK_FULL = r"tlc: (?P<path>[^\n]+): the disk is full; free some space and run the same command again\n"


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs at `place` in a mount namespace that ends with the process that forks in it: nothing stays mounted."""

    place: Path
    forks: Forks  # whose commands find the disk at `place`
    enter: tuple[str, ...]  # words before a command that is to run in that namespace

    @property
    def path(self) -> Path:
        """Where this process, which is not in the namespace, finds the disk, to read from it."""
        return Path(f"/proc/{self.forks.pid}/root{self.place}")

    def resize(self, kib: int, *, n_inodes: int = ROOMY_INODES) -> None:
        """Change its size, and how many files it can hold."""
        options = f"remount,size={kib}k,nr_inodes={n_inodes}"
        subprocess.run([*self.enter, "mount", "-o", options, str(self.place)], check=True)

    def clear(self) -> None:
        """Make it empty and roomy again."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.resize(ROOMY_KIB)

    def used_kib(self) -> int:
        there = os.statvfs(self.path)
        return (there.f_blocks - there.f_bfree) * there.f_frsize // 1024


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    if shutil.which("unshare") is None:
        pytest.skip("a small file system needs unshare, which Linux alone has")
    place = tmp_path_factory.mktemp("disk")
    # Root needs a namespace for its mount alone, anybody else one of users around it.
    refused = []
    for unshare, nsenter in ((["-m"], ["-m"]), (["-rm"], ["-U", "--preserve-credentials", "-m"])):
        mount = [
            *("unshare", *unshare),
            "sh",
            "-c",
            f'mount -t tmpfs -o nr_inodes={ROOMY_INODES} none "{place}" && exec "$@"',
            "sh",
        ]
        tried = subprocess.run([*mount, "true"], capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            with forking(mount) as forks:
                yield SmallDisk(place, forks, ("nsenter", "-t", str(forks.pid), *nsenter))
            return
        refused.append(tried.stderr.strip())
    pytest.skip(f"neither root's mounts nor user namespaces are permitted here: {'; '.join(refused)}")


@pytest.fixture
def disk(mounted: SmallDisk) -> Iterator[SmallDisk]:
    mounted.clear()
    yield mounted
    mounted.clear()


@dataclass(frozen=True)
class Undisturbed:
    """Data, and the cache that its extraction leaves where there is space."""

    data: Path
    cache: Path

    @property
    def shards(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.cache.glob("shard-*"))}

    def kib(self, pattern: str) -> int:
        """What the files of a name take, in whole pages."""
        sizes = [path.stat().st_size for path in self.cache.glob(pattern)]
        return sum(-(-size // (PAGE_KIB * 1024)) * PAGE_KIB for size in sizes)

    def needed_kib(self, n_rows: int) -> int:
        """What must be free before a shard of so many rows is laid out."""
        dim = read_catalogue(self.cache).dim
        return -(-n_rows * (dim * 4 + 41) // 1024) + HEADER_KIB + PAGE_KIB


def _extract(forks: Forks, data: Path, cache_dir: Path, *, fill_at: int | None = None) -> Ended:
    words = [
        f"--backbone={BACKBONE}",
        ENGINE,
        "--weights=random",
        "--batch-size=4",
        "--json",
        f"--cache-dir={cache_dir}",
    ]
    return forks.run(Command(["extract-features", str(data), *words], fill_at=fill_at, fill=str(cache_dir)))


def _made(forks: Forks, data: Path, cache_dir: Path) -> Undisturbed:
    ended = _extract(forks, data, cache_dir)
    assert ended.code == 0, ended.err
    return Undisturbed(data, Path(json.loads(ended.out)["cache"]))


def _photos(folder: Path) -> Path:
    """48 photographs and 700 copies of one of them, in class folders."""
    write_photos(folder, range(N_IMAGES))
    for i in range(N_COPIES):
        make_old(Path(shutil.copy(folder / "cat" / "00.png", folder / "cat" / f"copy-{i:03}.png")))
    return folder


@pytest.fixture(scope="module")
def first(mounted: SmallDisk, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("first")
    return _made(mounted.forks, _photos(folder / "pets"), folder / "cache")


@pytest.fixture(scope="module")
def published(mounted: SmallDisk, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The cache of those photographs; its data has since grown by 30 more."""
    folder = tmp_path_factory.mktemp("second")
    made = _made(mounted.forks, _photos(folder / "pets"), folder / "cache")
    write_photos(made.data, range(N_IMAGES, N_IMAGES + N_NEW))
    return made


@pytest.fixture(scope="module")
def grown(mounted: SmallDisk, published: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What a second extraction makes of it."""
    after = tmp_path_factory.mktemp("after")
    shutil.copytree(published.cache, after / published.cache.name)
    return _made(mounted.forks, published.data, after)


def _served(folder: Path) -> dict[str, bytes]:
    table = open_cache(folder).table()
    return {path: features.tobytes() for path, features in zip(table.paths, table.features, strict=True)}


def _check_refusal(ended: Ended, named: str) -> None:
    """Exit code 6 and one line that names the file."""
    assert (ended.code, ended.out) == (6, "")
    match = re.fullmatch(DISK_FULL, ended.err)
    assert match is not None, ended.err
    assert re.fullmatch(named, Path(match["path"]).name), ended.err


def _check_end(disk: SmallDisk, expected: Undisturbed, *, n_left: int) -> None:
    """With space again the same command computes what is left, and the shards are those of an undisturbed run."""
    again = _extract(disk.forks, expected.data, disk.place)
    assert again.code == 0, again.err
    assert json.loads(again.out)["computed"] == n_left
    folder = disk.path / expected.cache.name
    assert {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))} == expected.shards
    assert _served(folder) == _served(expected.cache)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected.cache))
    assert find_problems(folder) == ()


# What has its space, and what has not; which file is named; how many rows are then safe.
FIRST = {
    "labels": (lambda first: PAGE_KIB, r"\.gitignore", 0),
    "first catalogue": (lambda first: _labels(first) + 16, r"catalogue\.json", 0),
    "shard": (lambda first: _labels(first) + 2 * first.kib("catalogue.json") + 8, r"shard-00000\.h5", 0),
    "shard and record": (lambda first: _labels(first) + first.kib("catalogue.json") + 8, r"catalogue\.json", 0),
    "rows": (
        lambda first: _labels(first) + first.kib("catalogue.json") + first.needed_kib(N_IMAGES),
        r"rows-[0-9a-f]{8}\.safetensors",
        N_IMAGES,
    ),
    "last catalogue": (
        lambda first: _labels(first) + sum(map(first.kib, ("catalogue.json", "shard-*", "rows-*"))) + 20,
        r"catalogue\.json",
        N_IMAGES,
    ),
}


def _labels(first: Undisturbed) -> int:
    return first.kib("CACHEDIR.TAG") + first.kib(".gitignore")


@pytest.mark.parametrize("moment", FIRST)
def test_first_extraction__disk_full__goes_on_after_space_is_made(
    disk: SmallDisk, first: Undisturbed, moment: str
) -> None:
    kib, named, n_safe = FIRST[moment]
    disk.resize(kib(first))
    _check_refusal(_extract(disk.forks, first.data, disk.place), named)
    folder = disk.path / first.cache.name
    assert find_problems(folder) == ()
    assert [path for path in folder.iterdir() if path.name.endswith(".tmp")] == []
    with pytest.raises(CacheError, match=r"is not finished: run the same|not a cache folder; make one"):
        open_cache(folder)
    if n_safe:
        assert int(Store(folder).slots().valid.sum()) == n_safe
    disk.resize(ROOMY_KIB)
    _check_end(disk, first, n_left=N_IMAGES - n_safe)


SECOND = {
    "anything": (lambda grown: 8, r"catalogue\.json", 0),
    "shard": (lambda grown: grown.kib("catalogue.json") + 8, r"shard-00001\.h5", 0),
    "rows": (lambda grown: grown.needed_kib(N_NEW), r"rows-[0-9a-f]{8}\.safetensors", N_NEW),
    "last catalogue": (
        lambda grown: grown.kib("shard-00001.h5") + grown.kib("rows-*") + 20,
        r"catalogue\.json",
        N_NEW,
    ),
}


@pytest.mark.parametrize("moment", SECOND)
def test_second_extraction__disk_full__serves_what_was_published(
    disk: SmallDisk, published: Undisturbed, grown: Undisturbed, moment: str
) -> None:
    kib, named, n_safe = SECOND[moment]
    folder = disk.path / published.cache.name
    shutil.copytree(published.cache, folder)
    disk.resize(disk.used_kib() + kib(grown))
    _check_refusal(_extract(disk.forks, grown.data, disk.place), named)
    assert find_problems(folder) == ()
    assert _served(folder) == _served(published.cache)
    assert int(Store(folder).slots().valid.sum()) == N_IMAGES + n_safe
    disk.resize(ROOMY_KIB)
    _check_end(disk, grown, n_left=N_NEW - n_safe)


def test_first_extraction__full_at_any_moment__keeps_every_row(
    disk: SmallDisk, first: Undisturbed, scale: int, figures: list[str]
) -> None:
    """Another program takes all the space that is left, before one call after another."""
    calls = _extract(disk.forks, first.data, disk.place).calls
    shutil.rmtree(disk.path / first.cache.name)
    first_row = next(i for i, call in enumerate(calls) if call.name == "fdatasync")
    moments = np.linspace(0, len(calls) - 1, N_MOMENTS * scale).astype(int).tolist()
    codes = []
    for fill_at in moments:
        ended = _extract(disk.forks, first.data, disk.place, fill_at=fill_at)
        codes.append(ended.code)
        if ended.code:
            _check_refusal(ended, r".*")
        empty_disk(disk.path)
        folder = disk.path / first.cache.name
        assert find_problems(folder) == ()
        begun = (folder / FILE_NAME).exists() and bool(read_catalogue(folder).shards)
        n_safe = int(Store(folder).slots().valid.sum()) if begun else 0
        # The space of a shard is its own before its first row: none is lost, whatever happens to the disk after that.
        assert n_safe == (N_IMAGES if begun else 0)
        assert begun or fill_at < first_row
        _check_end(disk, first, n_left=N_IMAGES - n_safe)
        shutil.rmtree(folder)
    assert set(codes) == {0, 6}
    figures.append(f"disk full: at {len(moments)} moments of an extraction, {codes.count(6)} of them refused with 6")


def test_first_extraction__no_inodes_left__is_a_full_disk_too(disk: SmallDisk, first: Undisturbed, scale: int) -> None:
    refused = []
    for n_files in range(1, 9) if scale > 1 else (1, 4, 8):
        # The folder of the disk counts as one, and so does the cache's.
        disk.resize(ROOMY_KIB, n_inodes=1 + n_files)
        ended = _extract(disk.forks, first.data, disk.place)
        if ended.code:
            _check_refusal(ended, r".*")
        refused.append(ended.code == 6)
        disk.resize(ROOMY_KIB)
        assert find_problems(disk.path / first.cache.name) == ()
        again = _extract(disk.forks, first.data, disk.place)
        assert again.code == 0
        assert _served(disk.path / first.cache.name) == _served(first.cache)
        disk.clear()
    assert set(refused) == {True, False}
