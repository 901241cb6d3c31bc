"""`Slots`: every planned row of a cache folder by content and view, whether it was computed, and its features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.catalogue import ShardEntry
from transfercache.cache.plain_file import MEND
from transfercache.cache.shard import BoolArray, ShardReader
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


def read_slots(folder: Path, shards: Sequence[ShardEntry], *, prove: bool = False) -> Slots:
    """Read the plans of all shards, and scan the checksums of the unfinished ones.

    Rows of a finished shard were proved when it was finished, and are again when they are first read; with `prove` they
    are now: a row that fails, and all of a shard that cannot be read, count as not computed.
    """
    shards = [entry for entry in shards if not prove or _can_be_read(folder / entry.file, entry)]
    readers = [ShardReader(folder / entry.file, entry) for entry in shards]
    n_rows = [entry.n_rows for entry in shards]
    is_trusted = [entry.finished and not prove for entry in shards]
    valid = [r.written() if trusted else r.valid() for trusted, r in zip(is_trusted, readers, strict=True)]
    return Slots(
        digest=np.concatenate([np.empty((0, 32), np.uint8), *(reader.digests for reader in readers)]),
        view=np.concatenate([np.empty(0, np.uint8), *(reader.views for reader in readers)]),
        shard=np.repeat(np.array([entry.number for entry in shards], np.int32), np.array(n_rows, np.int64)),
        slot=np.concatenate([np.empty(0, np.int64), *map(np.arange, n_rows)]),
        valid=np.concatenate([np.empty(0, bool), *valid]),
        readers={entry.number: reader for entry, reader in zip(shards, readers, strict=True)},
    )


def _can_be_read(path: Path, entry: ShardEntry) -> bool:
    try:
        ShardReader(path, entry)
    except CacheError as error:
        logger.warning("its rows are made again: %s", error)
        return False
    return True
