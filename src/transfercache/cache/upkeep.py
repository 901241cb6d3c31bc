"""Freeing what no row of a cache needs, and removing whole cache folders; a crash at any moment leaves either whole."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.blocks import rows_within
from transfercache.cache.catalogue import FILE_NAME, Catalogue, ShardEntry
from transfercache.cache.contents import Contents, begins, has_tag, measure_files, read_contents
from transfercache.cache.layout import lay_out
from transfercache.cache.plain_file import MEND
from transfercache.cache.rows import Rows
from transfercache.cache.shard import ShardReader
from transfercache.cache.store import LOCK, Store, is_begun
from transfercache.errors import CacheError
from transfercache.files import locked, resource_errors

_CATALOGUE_BEGINS = b'{"checksum":"'
# As cache/store.py names folders: an empty one of another name is not taken for what a removal left.
_FOLDER_NAME = re.compile(r".+-[0-9a-f]{8}(-\d+)?")
# Removed after all others and in this order: while its catalogue or its tag is there, a folder is known as tlc's, and
# without its rows no reader takes it for valid.
_LAST = (FILE_NAME, ".gitignore", "CACHEDIR.TAG", LOCK)
# Rows copied at a time.
_BLOCK_BYTES = 2 << 20
_DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Freed:
    """What pruning or removing a cache folder freed, or would free."""

    cache: Path
    bytes: int = 0
    removed: bool = False  # the whole cache
    kept: tuple[str, ...] = ()  # names in a removed cache's folder that are not tlc's: these stay, and the folder
    passed_over: str = ""  # why nothing was done


def prune(folder: Path, *, dry_run: bool) -> Freed:
    """Free the leftovers of crashes, the shards that no row needs, and the slots of others that no row lies in.

    The used rows of a shard are copied, bit for bit, into a new one where that is smaller; both take space until the
    old one goes. The rows of an unfinished shard are kept for the extraction that goes on from there, unless all of
    them are published from elsewhere. The figure does not count what the catalogue gains or loses.

    Raises CacheError where the cache cannot be trusted, LockedError where it is being written, and ResourceError.
    """
    _check_lock(folder)
    store = Store(folder)
    before = read_contents(folder)  # taking the lock for writing removes the leftovers
    with locked(folder / LOCK, what=str(folder)) if dry_run else store.writing():
        contents = read_contents(folder)
        if contents.problem:
            raise CacheError(contents.problem)
        moves = list(_worthwhile_moves(contents))
        idle = contents.size_of(entry.file for entry in contents.idle)
        if not dry_run:
            try:
                _move(store, [shards for shards, _ in moves])
            finally:
                store.drop_shards({entry.number for entry in read_contents(folder).idle})
    return Freed(folder, before.size_of(before.leftovers) + idle + sum(gain for _, gain in moves))


def replace_shards(store: Store, shards: Sequence[ShardEntry]) -> None:
    """Copy the rows in use of these shards, bit for bit, into new ones, and drop them; `store` must be writing."""
    rows = store.rows()
    used = [entry for entry in shards if rows is not None and (rows.shard == entry.number).any()]
    grids = sorted({entry.batch_size for entry in used})
    _move(store, [[entry for entry in used if entry.batch_size == batch_size] for batch_size in grids])
    store.drop_shards({entry.number for entry in shards})


def remove(folder: Path, *, dry_run: bool) -> Freed:
    """Remove tlc's files from a cache folder, torn or whole, then the folder itself if nothing else is in it.

    Raises CacheError where it is no cache folder, LockedError where it is being written, and ResourceError.
    """
    if not is_removable(folder):
        raise CacheError(
            f"{folder}: not a cache folder, or a link to one, so nothing in it is removed; see: tlc cache list"
        )
    _check_lock(folder)
    with locked(folder / LOCK, what=str(folder)), resource_errors(folder):
        sizes, foreign = measure_files(folder)
        if not dry_run:
            for name in sorted(sizes, key=lambda name: _LAST.index(name) if name in _LAST else -1):
                (folder / name).unlink(missing_ok=True)
            if not foreign:
                folder.rmdir()
    return Freed(folder, sum(sizes.values()), removed=True, kept=foreign)


def days_since_change(folder: Path) -> float:
    """Return the age of a folder's catalogue: nothing else of it changes without that; 0 where there is none."""
    path = folder / FILE_NAME
    return (time.time() - path.lstat().st_mtime) / _DAY_SECONDS if os.path.lexists(path) else 0.0


def is_removable(folder: Path) -> bool:
    """Whether tlc made this folder: its tag or the beginning of its catalogue says so, or all but its name is gone."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    is_left_over = _FOLDER_NAME.fullmatch(folder.name) is not None and is_begun(folder)
    return is_left_over or has_tag(folder) or begins(folder / FILE_NAME, _CATALOGUE_BEGINS)


def _check_lock(folder: Path) -> None:
    if (folder / LOCK).is_symlink():
        raise CacheError(f"{folder / LOCK}: is a link; remove it and run this again")


def _worthwhile_moves(contents: Contents) -> Iterator[tuple[list[ShardEntry], int]]:
    """Yield the shards whose used rows take less in one file of their own, and how much less.

    Those of one grid share a file, because a shard says which grid its rows were computed on.
    """
    catalogue = contents.catalogue
    if catalogue is None:
        return
    for batch_size in sorted({entry.batch_size for entry in contents.partial}):
        shards = [entry for entry in contents.partial if entry.batch_size == batch_size]
        n_rows = sum(map(contents.n_used, shards))
        gain = contents.size_of(entry.file for entry in shards) - _shard_bytes(n_rows, catalogue)
        if gain > 0:
            yield shards, gain


def _shard_bytes(n_rows: int, catalogue: Catalogue) -> int:
    """Return the size of a shard of `n_rows`: HDF5's own part of it depends on them, so it is asked."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"  # a sparse file, which takes no space
        lay_out(path, n_rows=n_rows, row_shape=catalogue.row_shape, dtype=catalogue.spec.storage_dtype)
        return path.stat().st_size


def _move(store: Store, groups: list[list[ShardEntry]]) -> None:
    """Copy the used rows of each group of shards into a new shard, and publish their new places."""
    before, rows = store.catalogue, store.rows()
    if rows is None or not groups:
        return
    for shards in groups:
        rows = _copied(store, rows, shards)
    # No run: no image was embedded.
    store.publish(rows, class_names=before.class_names, run=None, has_given_split=before.has_given_split)


def _copied(store: Store, rows: Rows, shards: list[ShardEntry]) -> Rows:
    at = np.flatnonzero(np.isin(rows.shard, [entry.number for entry in shards]))
    places: npt.NDArray[np.int64]  # int64 [P, 2]: shard and slot, each once, in the order of the new slots
    places, first, new_slots = np.unique(
        np.stack([rows.shard[at], rows.slot[at]], axis=1), axis=0, return_index=True, return_inverse=True
    )
    digests, views = rows.digest[at[first]], rows.view[at[first]]
    number = store.begin_shard(digests, views, batch_size=shards[0].batch_size)
    with store.writer(number) as writer:
        for entry in shards:
            old, own = ShardReader(store.folder / entry.file, entry), np.flatnonzero(places[:, 0] == entry.number)
            if old.differs(places[own, 1], digests[own], views[own]).any():
                raise CacheError(f"{old.path}: does not hold the features of its rows; {MEND}")
            n_rows = rows_within(_BLOCK_BYTES, entry.dim)
            for start in range(0, len(own), n_rows):
                block = own[start : start + n_rows]
                writer.write(block, old.take(places[block, 1]))
    store.finish_shard(number)
    shard, slot = rows.shard.copy(), rows.slot.copy()
    shard[at], slot[at] = number, new_slots
    return replace(rows, shard=shard, slot=slot)
