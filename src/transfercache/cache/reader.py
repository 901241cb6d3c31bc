"""`open_cache`: a cache folder for reading, validated before anything in it is believed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.blocks import ArrayBlocks
from transfercache.cache.catalogue import FILE_NAME, Catalogue, read_catalogue
from transfercache.cache.plain_file import MEND, read_plain
from transfercache.cache.provenance import Run
from transfercache.cache.rows import MAX_BYTES, OK, Rows
from transfercache.cache.shard import ShardReader
from transfercache.cache.table import FeatureTable
from transfercache.errors import CacheError, DataError, UsageError, did_you_mean
from transfercache.files import sha256_bytes
from transfercache.spec import ExtractSpec
from transfercache.splits import SPLIT_NAMES


def is_cache(path: Path) -> bool:
    """Whether `path` is a folder with a catalogue, whatever that is worth."""
    return (path / FILE_NAME).is_file()


def open_cache(path: str | Path) -> Cache:
    """Open the cache folder that `extract-features` named; needs no lock and no right to write.

    Raises CacheError, with the next step, where it is no cache folder, is not finished, is of another schema, or
    holds anything that fails its checks. Feature rows are proved when they are first read.
    """
    folder = Path(path)
    catalogue = read_catalogue(folder)
    while True:
        try:
            return Cache(folder, catalogue)
        except CacheError:
            # A writer may have published between our two reads and removed the rows file that we were looking for.
            again = read_catalogue(folder)
            if again.rows == catalogue.rows:
                raise
            catalogue = again


def read_rows(folder: Path, catalogue: Catalogue) -> Rows:
    """Read and validate the rows file that the catalogue names; raises CacheError."""
    if catalogue.rows is None:
        raise CacheError(f"{folder}: its extraction is not finished: run the same extract-features again")
    path = folder / catalogue.rows.file
    data = read_plain(path, max_bytes=MAX_BYTES, advice=MEND)
    if sha256_bytes(data) != catalogue.rows.sha256:
        raise CacheError(f"{path}: fails its checksum; {MEND}")
    try:
        rows = Rows.from_bytes(data)
        rows.check_against(catalogue.class_names, {s.number: s.n_rows for s in catalogue.shards if s.finished})
    except ValueError as error:
        raise CacheError(f"{path}: {error}; {MEND}") from error
    return rows


class Cache:
    """A finished cache: its rows in memory, its shards mapped; `table` and `arrays` give features."""

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        self.catalogue = catalogue
        self.rows = read_rows(folder, catalogue)

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r}: {self.n_rows} images, {self.n_bad} bad, {self.catalogue.dim} features)"

    @property
    def spec(self) -> ExtractSpec:
        """What the rows depend on besides the images."""
        return self.catalogue.spec

    @property
    def data_name(self) -> str:
        """The data's name, as in the folder's."""
        return self.catalogue.data_name

    @property
    def data_root(self) -> Path:
        """The folder that the rows' paths are relative to."""
        return Path(self.catalogue.data_root)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes [C] in the order of the labels."""
        return self.catalogue.class_names

    @property
    def canaries(self) -> npt.NDArray[np.float32]:
        """The network's embeddings of four made images, float32 [4, D]."""
        return self.catalogue.canaries

    @property
    def provenance(self) -> tuple[Run, ...]:
        """One record a run that changed the cache, oldest first."""
        return self.catalogue.provenance

    @property
    def n_rows(self) -> int:
        """Images, bad ones included."""
        return self.rows.n_images

    @property
    def n_bad(self) -> int:
        """Images that could not be read."""
        return len(self.rows.bad)

    def table(self, split: str | None = None, *, labelled_only: bool = False) -> FeatureTable:
        """Return the good rows of one split (None: of all), in the order of the manifest, copied into memory.

        Raises UsageError for an unknown split, DataError for one that the data does not have, and CacheError where a
        row fails its proof or is not finite.
        """
        table = self.stored_table(split, labelled_only=labelled_only)
        return replace(table, blocks=ArrayBlocks(table.features))

    def stored_table(self, split: str | None = None, *, labelled_only: bool = False) -> FeatureTable:
        """Return the same with its features left in the shards: they are proved when they are read, and may not fit."""
        rows = self.rows
        chosen = rows.status == OK
        if split is not None:
            chosen &= self._in_split(split)
        if labelled_only:
            chosen &= rows.label >= 0
        index = np.flatnonzero(chosen)
        return FeatureTable(
            blocks=CacheBlocks(self, index),
            labels=rows.label[index],
            split=rows.split[index],
            view=rows.view[index],
            group=rows.group[index],
            row=rows.row[index],
            class_names=self.class_names,
            spec=self.spec,
            paths=tuple(compress(rows.path, chosen)),
        )

    def arrays(self, split: str | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return features float32 [N, D] and labels int64 [N], for any estimator.

        A named split gives its labelled rows alone; without one every good row is given, -1 where unlabelled.
        """
        table = self.table(split, labelled_only=split is not None)
        return table.features, table.labels

    def _in_split(self, split: str) -> npt.NDArray[np.bool_]:
        if split not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise UsageError(f"unknown split {split!r}{did_you_mean(split, SPLIT_NAMES)}; known: {known}")
        chosen = self.rows.split == SPLIT_NAMES[split]
        if not chosen.any():
            there = [name for name, code in SPLIT_NAMES.items() if (self.rows.split == code).any()]
            raise DataError(f"{self.folder}: its data has no split {split!r}; it has {', '.join(there) or 'none'}")
        return np.asarray(chosen)

    @cached_property
    def _shards(self) -> dict[int, ShardReader]:
        """The finished shards by number, mapped at the first read, so that each row is proved once."""
        return {s.number: ShardReader(self.folder / s.file, s) for s in self.catalogue.shards if s.finished}

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the features of `rows` at `index`, float32 [N, D]; raises CacheError where one fails its proof."""
        rows = self.rows
        numbers = rows.shard[index]
        parts = {}
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            shard, slots = self._shards[number], rows.slot[index[at]]
            differs = shard.differs(slots, rows.digest[index[at]], rows.view[index[at]])
            if differs.any():
                path = rows.path[index[at[np.argmax(differs)]]]
                raise CacheError(f"{shard.path}: does not hold the features of {path}; {MEND}")
            parts[number] = (at, shard.take(slots))
            if not shard.is_finite[slots].all():
                path = rows.path[index[at[np.argmin(shard.is_finite[slots])]]]
                raise CacheError(
                    f"{path}: its features are not finite (NaN or infinity); "
                    "look at the image, remove it, and extract again"
                )
        if len(parts) == 1:
            return next(taken for _, taken in parts.values())
        features = np.empty((len(index), self.catalogue.dim), np.float32)
        for at, taken in parts.values():
            features[at] = taken
        return features


@dataclass(frozen=True, eq=False)
class CacheBlocks:
    """Rows of a cache, read from its shards each time; what was read does not stay mapped, so memory is bounded."""

    cache: Cache
    index: npt.NDArray[np.int64]  # [N], into the cache's rows

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        return len(self.index), self.cache.catalogue.dim

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return float32 [stop - start, D]; raises CacheError where a row fails its proof or is not finite."""
        return self.cache.read(self.index[start:stop])

    def take(self, index: npt.NDArray[np.int64]) -> CacheBlocks:
        """Return the rows at `index`, int64 [M], in that order, without reading them."""
        return CacheBlocks(self.cache, self.index[index])
