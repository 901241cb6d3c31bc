"""A shard file: rows written in place by pwrite, read by memory map and proved by checksum, without HDF5."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import BoolArray, UInt64Array
from transfercache.cache.blocks import rows_within
from transfercache.cache.catalogue import STORAGE_DTYPES, Extent, ShardEntry
from transfercache.cache.plain_file import MAX_HOLLOWNESS, MEND, check_stored, opened_plain, write_all
from transfercache.errors import CacheError, ResourceError
from transfercache.files import resource_errors

#: A slot whose checksum is this was never written; no valid checksum equals it.
NEVER_WRITTEN = 0

_DIGEST_BYTES = 1 << 20
# Far more than HDF5 writes behind the rows; a file that goes on is none that was finished, perhaps terabytes of hole.
_METADATA_BYTES = 1 << 20
# Rows proved at a time: their copy stays in the processor's cache.
_BLOCK_BYTES = 1 << 20
# Slot (two words), view (one) and content digest (eight) come before the features in the checksum.
_HEAD_WORDS = 11


def row_checksums(
    slots: npt.NDArray[Any], views: npt.NDArray[np.uint8], digests: npt.NDArray[np.uint8], features: npt.NDArray[Any]
) -> UInt64Array:
    """Return the checksum of each row, uint64 [B], from its slot, view, content digest [B, 32] and features [B, D].

    Multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): the row as 32-bit
    words, each times an odd 64-bit key, summed modulo 2^64. A change within one word always shows; see
    docs/decisions/0003-row-checksum.md. A row of an odd number of float16 values ends in half a word of zeros.
    """
    stored = np.ascontiguousarray(features, features.dtype.newbyteorder("<"))
    n_odd = stored.shape[1] * stored.itemsize % 4 // 2
    words = (np.pad(stored, ((0, 0), (0, n_odd))) if n_odd else stored).view("<u4")
    head = np.empty((len(words), _HEAD_WORDS), "<u4")
    head[:, :2] = np.asarray(slots, "<u8").reshape(-1, 1).view("<u4")
    head[:, 2] = views
    head[:, 3:] = np.ascontiguousarray(digests).view("<u4")
    keys = _keys(_HEAD_WORDS + words.shape[1])
    # einsum widens to 64 bits in its inner loop, so that no 64-bit copy of the rows is made.
    sums = np.einsum("ij,j->i", head, keys[:_HEAD_WORDS]) + np.einsum("ij,j->i", words, keys[_HEAD_WORDS:])
    return np.where(sums == NEVER_WRITTEN, np.uint64(1), sums)


def as_stored(features: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Return the features in a storage dtype, rounded to nearest even; what overflows it becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(features, STORAGE_DTYPES[dtype])


@functools.lru_cache(maxsize=2)  # a block of a few wide rows takes less time than their keys
def _keys(n_words: int) -> UInt64Array:
    """The first outputs of SplitMix64 seeded with 0 (Steele, Lea and Flood, 2014), made odd; uint64 [n_words]."""
    z = np.arange(1, n_words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


class ShardReader:
    """A shard's four datasets as read-only arrays over a memory map, bounded by the catalogue's entry.

    Raises CacheError where the file is shorter than the entry says, hollow, or anything but a regular file, and
    ResourceError where it may not be opened or does not fit into the address space.
    """

    def __init__(self, path: Path, entry: ShardEntry) -> None:
        self.path = path
        with opened_plain(path, advice=MEND) as descriptor:
            size = os.fstat(descriptor).st_size
            end = max(extent.offset + extent.length for extent in entry.extents())
            if size < end:
                raise CacheError(f"{path}: {size} bytes, but its rows end at {end}; {MEND}")
            # Its plan is written before all else, and the features of a finished one are too.
            least = max(entry.digests.length, end // MAX_HOLLOWNESS if entry.finished else 0)
            check_stored(path, descriptor, least, advice=MEND)
            try:
                self._whole = whole = mmap.mmap(descriptor, end, access=mmap.ACCESS_READ)
            except OSError as error:  # where `ulimit -v` bounds the address space
                raise ResourceError(f"{path}: cannot be mapped ({error.strerror}); allow more address space") from error

        def array(extent: Extent, dtype: str | np.dtype[Any]) -> npt.NDArray[Any]:
            kind = np.dtype(dtype)
            return np.frombuffer(whole, kind, extent.length // kind.itemsize, extent.offset)

        self._offset = entry.features.offset
        self.features = array(entry.features, STORAGE_DTYPES[entry.dtype]).reshape(entry.n_rows, entry.dim)
        self.digests = array(entry.digests, "u1").reshape(entry.n_rows, 32)  # uint8 [n, 32]
        self.views = array(entry.views, "u1")  # uint8 [n]
        self.checksums = array(entry.checksums, "<u8")  # uint64 [n]
        self._rows_at_once = rows_within(_BLOCK_BYTES, entry.dim)
        self._proved = np.zeros(entry.n_rows, dtype=bool)
        self.is_finite = np.zeros(entry.n_rows, dtype=bool)  # bool [n], of the rows that `take` has returned

    def written(self) -> BoolArray:
        """Return which slots hold a row, bool [n]; in an unfinished shard it may be a torn one."""
        return np.asarray(self.checksums != NEVER_WRITTEN)

    def valid(self) -> BoolArray:
        """Return which slots hold a row that its checksum proves, bool [n]; reads every written row."""
        valid = self.written()
        n_rows = self._rows_at_once
        for start in range(0, len(valid), n_rows):
            slots = start + np.flatnonzero(valid[start : start + n_rows])
            valid[slots] = self._agrees(slots, self.features[slots])
        return valid

    def take(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return a copy of the rows at `slots`, float32 [M, D], each proved the first time this reader returns it.

        What was read does not stay mapped. Raises CacheError naming the shard and the row where a checksum fails.
        """
        if len(slots) and not 0 <= slots.min() <= slots.max() < len(self.features):
            raise IndexError(f"slots must lie between 0 and {len(self.features) - 1}")
        taken = np.empty((len(slots), self.features.shape[1]), np.float32)
        n_rows = self._rows_at_once
        for start in range(0, len(slots), n_rows):
            block, out = slots[start : start + n_rows], taken[start : start + n_rows]
            rows = self._copy(block, out)
            if not self._proved[block].all():
                agrees = self._agrees(block, rows)
                if not agrees.all():
                    raise CacheError(f"{self.path}: row {block[np.argmin(agrees)]} fails its checksum; {MEND}")
                self._proved[block] = True
                self.is_finite[block] = _are_finite(rows)
        self._release(slots)
        return taken

    def _release(self, slots: npt.NDArray[np.int64]) -> None:
        """Let go of the mapped pages of these rows, which would count as this process's memory, read after read."""
        if len(slots):
            first, n_rows = int(slots.min()), int(np.ptp(slots)) + 1
            row_bytes = self.features.strides[0]
            start = (self._offset + first * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            stop = self._offset + (first + n_rows) * row_bytes
            self._whole.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _copy(self, slots: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Copy the rows at `slots` into `out`, float32 [M, D], in one pass; returns them as they are stored."""
        if (np.diff(slots) == 1).all() and len(slots):
            rows = self.features[slots[0] : slots[-1] + 1]
        elif self.features.dtype == out.dtype:
            # Any mode but the default writes to `out` without a copy between; the bounds were checked.
            return self.features.take(slots, axis=0, out=out, mode="clip")
        else:
            rows = self.features[slots]
        out[:] = rows
        return rows

    def differs(
        self, slots: npt.NDArray[np.int64], digests: npt.NDArray[np.uint8], views: npt.NDArray[np.uint8]
    ) -> BoolArray:
        """Return where the shard's plan is not these contents [M, 32] and views [M] at `slots`, bool [M]."""
        return np.asarray((self.digests[slots] != digests).any(axis=1) | (self.views[slots] != views))

    def _agrees(self, slots: npt.NDArray[np.int64], features: npt.NDArray[Any]) -> BoolArray:
        proof = row_checksums(slots, self.views[slots], self.digests[slots], features)
        return np.asarray(proof == self.checksums[slots])


def shard_digest(path: Path, entry: ShardEntry, progress: Callable[[int], object] = lambda n_bytes: None) -> str:
    """Return the SHA-256 of a shard's file as 64 hex digits; of one that goes on far behind its rows, some other.

    `progress` is told the bytes of each block. Read rather than mapped: a disk that fails then raises OSError.
    """
    digest, offset = hashlib.sha256(), 0
    end = max(extent.offset + extent.length for extent in entry.extents()) + _METADATA_BYTES
    with opened_plain(path, advice=MEND) as descriptor:
        while offset <= end and (block := os.pread(descriptor, _DIGEST_BYTES, offset)):
            digest.update(block)
            offset += len(block)
            progress(len(block))
    return digest.hexdigest()


def _are_finite(rows: npt.NDArray[Any]) -> BoolArray:
    """Return which rows hold neither NaN nor infinity, bool [B]."""
    # A sum is finite only if its terms are, and needs no mask of every value; it may also overflow: the second look.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(rows.sum(axis=1, dtype=np.float32))
    finite[~finite] = np.isfinite(rows[~finite]).all(axis=1)
    return np.asarray(finite)


class ShardWriter:
    """Writes rows of an unfinished shard in place, in any order, through the open `descriptor`."""

    def __init__(self, path: Path, entry: ShardEntry, descriptor: int) -> None:
        self._path, self._entry, self._descriptor = path, entry, descriptor
        self._reader = ShardReader(path, entry)

    def write(self, slots: npt.NDArray[Any], features: npt.NDArray[np.float32]) -> None:
        """Write the features [B, D] of the planned rows at `slots`, int [B], replacing what is there.

        A row counts only when all of it has reached the file: its checksum says so. Raises ResourceError where the
        disk refuses, ValueError where the shapes or slots are not the plan's.
        """
        entry, reader = self._entry, self._reader
        if features.shape != (len(slots), entry.dim):
            raise ValueError(f"features {features.shape} for {len(slots)} rows of width {entry.dim}")
        if len(slots) and not 0 <= slots.min() <= slots.max() < entry.n_rows:
            raise ValueError(f"slots must lie between 0 and {entry.n_rows - 1}")
        stored = as_stored(features, entry.dtype)
        checksums = row_checksums(slots, reader.views[slots], reader.digests[slots], stored)
        self._write_rows(entry.features, slots, stored)
        self._write_rows(entry.checksums, slots, checksums)

    def commit(self) -> None:
        """Return when every row written so far is on the disk; after that no crash or power cut takes it back."""
        with resource_errors(self._path):
            getattr(os, "fdatasync", os.fsync)(self._descriptor)  # macOS has no fdatasync

    def clear_torn(self) -> BoolArray:
        """Mark every slot whose row fails its checksum as never written, commit, and return the valid ones."""
        valid = self._reader.valid()
        torn = np.flatnonzero(self._reader.written() & ~valid)
        self._write_rows(self._entry.checksums, torn, np.full(len(torn), NEVER_WRITTEN, np.uint64))
        self.commit()
        return valid

    def _write_rows(self, extent: Extent, slots: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write one value (a feature row or a checksum) per slot, consecutive slots at once."""
        row_bytes = extent.length // self._entry.n_rows
        ends = [*(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
        start = 0
        with resource_errors(self._path):
            for stop in ends:
                if stop > start:
                    offset = extent.offset + int(slots[start]) * row_bytes
                    write_all(self._descriptor, np.ascontiguousarray(values[start:stop]), offset)
                start = stop
