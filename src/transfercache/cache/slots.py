"""`Slots`: every planned row of a cache folder by content and view, whether it was computed, and its features."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.arrays import BoolArray
from transfercache.cache.catalogue import ShardEntry
from transfercache.cache.plain_file import MEND
from transfercache.cache.shard import ShardReader, shard_digest
from transfercache.errors import CacheError

logger = logging.getLogger(__name__)

#: A row's identity under one spec: 32 bytes of content digest, then the view's byte.
RowKey = bytes
_KEY_BYTES = 33


def row_keys(digests: npt.NDArray[np.uint8], views: npt.NDArray[np.uint8]) -> list[RowKey]:
    """Return the key of each row, for digests uint8 [n, 32] and views uint8 [n]."""
    whole = np.concatenate([digests, views[:, None]], axis=1, dtype=np.uint8).tobytes()
    return [whole[start : start + _KEY_BYTES] for start in range(0, len(whole), _KEY_BYTES)]


@dataclass(frozen=True, eq=False)
class Slots:
    """S planned rows in the order of shards and slots; reading them needs no lock."""

    digest: npt.NDArray[np.uint8]  # uint8 [S, 32]
    view: npt.NDArray[np.uint8]  # uint8 [S]
    shard: npt.NDArray[np.int32]  # int32 [S], number of the shard
    slot: npt.NDArray[np.int64]  # int64 [S], row of that shard
    valid: BoolArray  # bool [S]: it has been computed
    readers: dict[int, ShardReader]  # by number
    damaged: tuple[int, ...] = ()  # numbers of shards that are not what was finished, where that was asked

    @cached_property
    def held(self) -> dict[RowKey, int]:
        """The computed rows: key -> index into the arrays."""
        valid = np.flatnonzero(self.valid)
        return dict(zip(row_keys(self.digest[valid], self.view[valid]), valid.tolist(), strict=True))

    def place(self, index: int) -> tuple[int, int]:
        """Return shard and slot of the row at an index."""
        return int(self.shard[index]), int(self.slot[index])

    def take(self, keys: Sequence[RowKey]) -> npt.NDArray[np.float32]:
        """Return the proved features of these held rows, float32 [len(keys), D].

        Raises CacheError where one fails its proof or is not finite.
        """
        index = np.array([self.held[key] for key in keys], dtype=np.int64)
        dim = next(iter(self.readers.values())).features.shape[1]
        features = np.empty((len(index), dim), np.float32)
        for number in np.unique(self.shard[index]).tolist():
            at = np.flatnonzero(self.shard[index] == number)
            reader, slots = self.readers[number], self.slot[index[at]]
            features[at] = reader.take(slots)
            if not reader.is_finite[slots].all():
                raise CacheError(f"{reader.path}: a row is not finite; {MEND}")
        return features


def planned_keys(folder: Path, shards: Sequence[ShardEntry]) -> set[RowKey]:
    """Return the keys of all slots, computed or not: their space is taken. No feature is read."""
    readers = [ShardReader(folder / entry.file, entry) for entry in shards]
    return {key for reader in readers for key in row_keys(reader.digests, reader.views)}


def read_slots(folder: Path, shards: Sequence[ShardEntry], *, prove: Collection[int] = ()) -> Slots:
    """Read the plans of all shards, and scan the checksums of the unfinished ones.

    Rows of a finished shard were proved when it was finished, and are again when they are first read. Of the shards
    with the numbers `prove` the file is hashed now; where that is not the finished one, the shard is `damaged`, and
    each row has to prove itself. Such a shard that cannot be read is left out, and damaged too.
    """
    found: list[tuple[ShardEntry, ShardReader, BoolArray]] = []
    damaged = []
    for entry in shards:
        path, is_trusted = folder / entry.file, entry.finished
        try:
            reader = ShardReader(path, entry)
            if entry.number in prove and entry.finished:
                is_trusted = shard_digest(path, entry) == entry.digest
        except (CacheError, OSError) as error:
            if entry.number not in prove:
                raise
            logger.warning("its rows are made again: %s", error)
            damaged.append(entry.number)
            continue
        if entry.finished and not is_trusted:
            damaged.append(entry.number)
        found.append((entry, reader, reader.written() if is_trusted else reader.valid()))
    n_rows = [entry.n_rows for entry, _, _ in found]
    return Slots(
        digest=np.concatenate([np.empty((0, 32), np.uint8), *(reader.digests for _, reader, _ in found)]),
        view=np.concatenate([np.empty(0, np.uint8), *(reader.views for _, reader, _ in found)]),
        shard=np.repeat(np.array([entry.number for entry, _, _ in found], np.int32), np.array(n_rows, np.int64)),
        slot=np.concatenate([np.empty(0, np.int64), *map(np.arange, n_rows)]),
        valid=np.concatenate([np.empty(0, bool), *(valid for _, _, valid in found)]),
        readers={entry.number: reader for entry, reader, _ in found},
        damaged=tuple(damaged),
    )
