"""What a cache folder holds, and what of that no row needs; read without a lock and without the features."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from transfercache.cache.catalogue import FILE_NAME, Catalogue, ShardEntry, read_catalogue
from transfercache.cache.plain_file import opened_plain
from transfercache.cache.reader import open_cache
from transfercache.cache.rows import OK, Rows
from transfercache.cache.shard import ShardReader
from transfercache.cache.slots import row_keys
from transfercache.cache.store import LABELS, LOCK, REPLACEABLE, leftovers
from transfercache.errors import CacheError, ResourceError

_TAG = "CACHEDIR.TAG"


@dataclass(frozen=True)
class Summary:
    """One line about a cache folder; None where it is not known, because it is not published or not to be trusted."""

    cache: Path
    images: int | None  # bad ones included
    views: int | None
    bad: int | None
    bytes: int  # of tlc's files
    unused: int  # bytes of them that no row needs
    finished: bool | None  # False: no extraction has ended yet
    last_run: str | None  # ISO 8601
    backbone: str | None
    boundary: str | None
    data_name: str | None
    data_root: str | None
    problem: str | None  # why it is not to be trusted


@dataclass(frozen=True, eq=False)
class Contents:
    """A cache folder as far as it can be read without its features; sizes are in bytes."""

    folder: Path
    sizes: dict[str, int]  # of tlc's own files, by name
    foreign: tuple[str, ...]  # names that are not tlc's
    catalogue: Catalogue | None  # None: not to be trusted
    rows: Rows | None  # None: not published yet, or not to be trusted
    idle: tuple[ShardEntry, ...]  # shards that no row needs
    problem: str  # why it is not to be trusted; empty where it is

    @property
    def bytes(self) -> int:
        """What tlc's files take."""
        return self.size_of(self.sizes)

    @property
    def unused(self) -> int:
        """What the slots that no row lies in take, the shards that no row needs, and the leftovers of crashes."""
        slots = sum((entry.n_rows - self.n_used(entry)) * _row_bytes(entry) for entry in self.partial)
        return slots + self.size_of([*self.leftovers, *(entry.file for entry in self.idle)])

    @property
    def leftovers(self) -> tuple[str, ...]:
        """What a crash left: tlc's files that the catalogue does not name."""
        if self.catalogue is None:
            return ()
        return tuple(leftovers(self.catalogue, self.sizes))

    @property
    def partial(self) -> list[ShardEntry]:
        """The finished shards of which some rows are used, and not all."""
        shards = self.catalogue.shards if self.catalogue else ()
        return [entry for entry in shards if entry.finished and 0 < self.n_used(entry) < entry.n_rows]

    @cached_property
    def _n_used(self) -> dict[int, int]:
        if self.rows is None:
            return {}
        places = np.unique(np.stack([self.rows.shard, self.rows.slot], axis=1)[self.rows.status == OK], axis=0)
        numbers, counts = np.unique(places[:, 0], return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def n_used(self, entry: ShardEntry) -> int:
        """Return how many slots of a shard rows lie in."""
        return self._n_used.get(entry.number, 0)

    def size_of(self, names: Iterable[str]) -> int:
        """Return what these files take, one that is not there nothing."""
        return sum(self.sizes.get(name, 0) for name in names)

    def summary(self) -> Summary:
        """Return the figures alone, without the rows."""
        catalogue, rows = self.catalogue, self.rows
        runs = catalogue.provenance if catalogue else ()
        return Summary(
            cache=self.folder,
            images=None if rows is None else rows.n_images,
            views=None if rows is None else rows.n_views,
            bad=None if rows is None else len(rows.bad),
            bytes=self.bytes,
            unused=self.unused,
            finished=catalogue.rows is not None if catalogue else None,
            last_run=runs[-1].date if runs else None,
            backbone=catalogue.spec.backbone if catalogue else None,
            boundary=catalogue.spec.boundary if catalogue else None,
            data_name=catalogue.data_name if catalogue else None,
            data_root=catalogue.data_root if catalogue else None,
            problem=self.problem or None,
        )


def cache_folders(root: Path) -> list[Path]:
    """Return the folders under `root` that are or were caches, sorted by name: none where there is no `root`.

    Raises ResourceError where it cannot be listed, or is a file.
    """
    found = [Path(entry.path) for entry in _entries(root)] if root.exists() else []
    return [folder for folder in found if folder.is_dir() and is_cache(folder)]


def is_cache(folder: Path) -> bool:
    """Whether a folder is or was a cache: it has a catalogue, or tlc's tag."""
    return os.path.lexists(folder / FILE_NAME) or has_tag(folder)


def read_contents(folder: Path) -> Contents:
    """Read catalogue and rows, and measure the files; what cannot be trusted is None, and `problem` says why."""
    sizes: dict[str, int] = {}
    foreign: tuple[str, ...] = ()
    catalogue = rows = None
    idle, problem = [], ""
    try:
        sizes, foreign = measure_files(folder)
        catalogue = read_catalogue(folder)
        if catalogue.rows is not None:
            cache = open_cache(folder)  # anew: it follows a writer that publishes meanwhile
            catalogue, rows = cache.catalogue, cache.rows
            idle = [shard for shard in catalogue.shards if _is_idle(folder, shard, rows)]
    except (CacheError, ResourceError) as error:
        problem = str(error)
    return Contents(folder, sizes, foreign, catalogue, rows, tuple(idle), problem)


def measure_files(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the bytes of tlc's own files by name, and the names of all others; raises ResourceError."""
    entries = _entries(folder)
    ours = [entry for entry in entries if _is_ours(entry)]
    sizes = {}
    for entry in ours:
        with suppress(FileNotFoundError):  # a writer has replaced it meanwhile
            sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes, tuple(entry.name for entry in entries if entry not in ours)


def has_tag(folder: Path) -> bool:
    """Whether the folder is tagged as tlc's."""
    return begins(folder / _TAG, LABELS[_TAG])


def begins(path: Path, expected: bytes) -> bool:
    """Whether `path` is a regular file that begins with these bytes."""
    try:
        with opened_plain(path) as descriptor:
            return os.pread(descriptor, len(expected), 0) == expected
    except (CacheError, ResourceError):
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be listed ({error.strerror}); look at its path and permissions"
        ) from error


def _is_ours(entry: os.DirEntry[str]) -> bool:
    is_named_so = entry.name in {FILE_NAME, LOCK, *LABELS} or REPLACEABLE.fullmatch(entry.name) is not None
    return is_named_so and not entry.is_dir(follow_symlinks=False)


def _is_idle(folder: Path, entry: ShardEntry, rows: Rows) -> bool:
    """Whether no row lies in this shard, nor will: an unfinished one waits for its extraction to go on.

    An interrupted prune leaves an unfinished shard too, of rows that are all published from elsewhere.
    """
    if (rows.shard == entry.number).any():
        return False
    if entry.finished:
        return True
    planned, good = ShardReader(folder / entry.file, entry), rows.status == OK
    return set(row_keys(rows.digest[good], rows.view[good])).issuperset(row_keys(planned.digests, planned.views))


def _row_bytes(entry: ShardEntry) -> int:
    return sum(extent.length for extent in entry.extents()) // entry.n_rows
