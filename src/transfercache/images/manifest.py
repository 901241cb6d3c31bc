"""Which files there are, what each is labelled and which split it is in; and their content digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfercache.arrays import Int64Array, UInt8Array
from transfercache.classes import check_classes
from transfercache.environment import n_cores
from transfercache.errors import DataError, UsageError
from transfercache.files import sha256_file
from transfercache.images.ahead import run_ahead
from transfercache.images.files import HashedFile
from transfercache.splits import Split, check_val_fraction, complete_split, join_groups

#: A file may change again within its time stamp's granularity (2 s on FAT), so a younger one proves nothing.
_YOUNG_NS = 2_000_000_000
#: In `mtime_ns` of a file that was young when it was hashed: no later scan finds it unchanged.
_UNTRUSTED_MTIME = -1
_ROWS_PER_TASK = 64
# What a part's name keeps of the data's, so that the part's number stays within a folder's name.
_PART_NAME = 60


#: What an earlier scan recorded of one file: size, mtime_ns, ctime_ns, inode, and the SHA-256 of its bytes (32 bytes).
KnownFile = tuple[int, int, int, int, bytes]


@dataclass(frozen=True, eq=False)
class Manifest:
    """The rows of one DATA, one per file, in the source's order."""

    name: str  # [a-z0-9._-]: stands in the names of caches and models
    root: Path  # absolute
    paths: tuple[str, ...]  # [N] POSIX, relative to root (or absolute); surrogateescape where not UTF-8
    labels: Int64Array  # int64 [N], -1: unlabelled
    split: UInt8Array  # uint8 [N], of splits.Split
    class_names: tuple[str, ...]  # sorted; a label is an index into it
    stat: Int64Array  # int64 [N, 4]: size in bytes, mtime_ns, ctime_ns, inode
    group: Int64Array  # int64 [N], -1: the data names none
    digests: UInt8Array  # uint8 [N, 32], SHA-256 of the file's bytes; zeros: unknown
    unreadable: Mapping[int, str]  # row -> reason
    has_given_split: bool
    skipped: Mapping[str, tuple[str, int]]  # why files were not taken -> the first of them, and how many
    scanned_ns: int  # when the scan began, before any file was looked at
    given: str = ""  # DATA in its user's words: that of a .csv is not its root

    def __post_init__(self) -> None:
        n_rows = len(self.paths)
        for name in ("labels", "split", "group"):
            if getattr(self, name).shape != (n_rows,):
                raise ValueError(f"{name} must have one entry for each of the {n_rows} paths")
        if self.stat.shape != (n_rows, 4) or self.digests.shape != (n_rows, 32):
            raise ValueError(f"stat must be int64 [{n_rows}, 4], and digests must be uint8 [{n_rows}, 32]")
        if n_rows and not (self.labels.min() >= -1 and self.labels.max() < len(self.class_names)):
            raise ValueError("labels must index class_names, or be -1")
        if n_rows and self.split.max() > max(Split):
            raise ValueError("split must hold codes of splits.Split")
        if any(not 0 <= row < n_rows for row in self.unreadable):
            raise ValueError("unreadable must name rows")

    @property
    def n_rows(self) -> int:
        """The number of files."""
        return len(self.paths)

    @property
    def shown(self) -> str:
        """What messages call this data."""
        return self.given or str(self.root)

    def path_of(self, row: int) -> Path:
        """Return where the file of `row` lies."""
        return self.root / self.paths[row]

    def subset(self, rows: npt.NDArray[np.bool_] | Int64Array) -> Manifest:
        """Return the manifest of these rows (a mask, or indices in the wanted order), with the same classes."""
        index = np.arange(self.n_rows)[rows]
        reasons = ((new, self.unreadable.get(old)) for new, old in enumerate(index.tolist()))
        arrays = ("labels", "split", "stat", "group", "digests")
        return replace(
            self,
            paths=tuple(self.paths[row] for row in index.tolist()),
            unreadable={row: reason for row, reason in reasons if reason is not None},
            **{name: getattr(self, name)[index] for name in arrays},
        )

    @cached_property
    def component(self) -> Int64Array:
        """int64 [N]: rows of one group or of equal bytes share a number, that of their first row."""
        component = join_groups(self.group, self.digests)
        component.flags.writeable = False  # it is shared
        return component

    def rows_digest(self) -> str:
        """Return 64 hex digits that change with any row's content, label, split or group, and with their order."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for array in (self.digests, self.labels, self.split, self.component):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def file(self, row: int) -> HashedFile:
        """Return the file of `row`, with its digest."""
        return HashedFile(self.path_of(row), self.paths[row], self.digests[row].tobytes())

    def is_readable(self) -> npt.NDArray[np.bool_]:
        """Return bool [N]: the rows that `unreadable` does not name."""
        readable = np.ones(self.n_rows, dtype=np.bool_)
        readable[list(self.unreadable)] = False
        return readable


def hash_files(manifest: Manifest, *, known: Mapping[str, KnownFile]) -> Manifest:
    """Return `manifest` with every file's digest, reading those that `known` (a KnownFile by path) cannot vouch for.

    A file is taken as known where size, mtime, ctime and inode are as recorded, and it is more than two seconds
    older than the scan. A younger file may yet change without a new time stamp: its `mtime_ns` becomes -1 here, so
    that the record of this scan vouches for nothing. A file that cannot be read joins `unreadable`.
    """
    digests = np.zeros((manifest.n_rows, 32), dtype=np.uint8)
    stat = manifest.stat.copy()
    stat[stat[:, 1] > manifest.scanned_ns - _YOUNG_NS, 1] = _UNTRUSTED_MTIME
    stats = stat.tolist()
    to_read: list[int] = []
    for row, path in enumerate(manifest.paths):
        record = known.get(path)
        if row in manifest.unreadable:
            continue
        if record is not None and record[1] != _UNTRUSTED_MTIME and list(record[:4]) == stats[row]:
            digests[row] = np.frombuffer(record[4], dtype=np.uint8)
        else:
            to_read.append(row)
    unreadable = dict(manifest.unreadable)
    for row, digest, reason in _digests(manifest, to_read):
        if reason:
            unreadable[row] = reason
        else:
            digests[row] = np.frombuffer(digest, dtype=np.uint8)
    return replace(manifest, digests=digests, stat=stat, unreadable=unreadable)


def _digests(manifest: Manifest, rows: list[int]) -> Iterator[tuple[int, bytes, str]]:
    """Yield row, digest and, where the file cannot be read, the reason."""
    root = os.fspath(manifest.root)

    def digest_block(block: list[int]) -> list[tuple[int, bytes, str]]:
        return [(row, *_digest_file(os.path.join(root, manifest.paths[row]))) for row in block]

    # Blocks of rows, because handing each over would take longer than hashing a small file.
    blocks = [rows[start : start + _ROWS_PER_TASK] for start in range(0, len(rows), _ROWS_PER_TASK)]
    progress = tqdm(total=len(rows), desc="hashing", unit="file", file=sys.stderr, disable=None)
    # Closing: Ctrl-C ends after the blocks in hand.
    with progress, closing(run_ahead(blocks, digest_block, workers=n_cores(), window=2 * n_cores())) as ahead:
        for block, digested in ahead:
            yield from digested.result()
            progress.update(len(block))


def _digest_file(path: str) -> tuple[bytes, str]:
    try:
        return bytes.fromhex(sha256_file(Path(path))), ""
    except OSError as error:
        return b"", f"cannot be read ({error.strerror or error})"


def split_rows(manifest: Manifest, *, val_fraction: float, split_seed: int) -> Manifest:
    """Return `manifest` with its labelled rows split into train and val by content; a given split stays.

    Rows that an earlier call split stay where they are. Needs the digests (`hash_files`). Unreadable rows have none,
    so they are in no split. See `splits.complete_split`.
    """
    check_val_fraction(val_fraction)
    if manifest.has_given_split:
        return manifest
    labels = np.where(manifest.is_readable(), manifest.labels, -1)
    split = complete_split(
        manifest.split, labels, manifest.component, manifest.digests, val_fraction=val_fraction, seed=split_seed
    )
    return replace(manifest, split=split)


def take_part(manifest: Manifest, part: str, *, batch_size: int) -> Manifest:
    """Return the I-th of N slices of a manifest, for "I/N": neighbouring rows, in whole batches.

    Where `batch_size` is the device's own, no file is unreadable and none has the bytes of another, a row is embedded
    in the place that it has without slices. Raises UsageError for other words, DataError where a slice would be empty.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--part {part!r} must be I/N, for example 1/4, with I from 1 to N")
    number, n_parts = int(match[1]), int(match[2])
    n_batches = -(-manifest.n_rows // batch_size)
    if n_parts > n_batches:
        raise DataError(
            f"{manifest.shown}: {manifest.n_rows} images are {n_batches} batches of {batch_size}, "
            f"too few for {n_parts} parts; ask for {n_batches} at most, or a smaller --batch-size"
        )
    start, stop = (k * n_batches // n_parts * batch_size for k in (number - 1, number))
    rows = np.arange(start, min(stop, manifest.n_rows))
    return replace(manifest.subset(rows), name=f"{manifest.name[:_PART_NAME]}-part{number}of{n_parts}")


def check_trainable(manifest: Manifest) -> list[str]:
    """Return one warning for each class that is empty, one-sided or rare; see `classes.check_classes`."""
    return check_classes(
        labels=np.where(manifest.is_readable(), manifest.labels, -1),
        split=manifest.split,
        component=manifest.component,
        class_names=manifest.class_names,
        where=manifest.shown,
    )
