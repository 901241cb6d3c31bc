"""The cache folder for writing: which folder is whose, shards begun and finished, rows published; all under a lock."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.arrays import BoolArray
from transfercache.cache.catalogue import FILE_NAME, MAX_RUNS, Catalogue, RowsEntry, ShardEntry, read_catalogue
from transfercache.cache.layout import create_shard
from transfercache.cache.plain_file import opened_plain, read_plain
from transfercache.cache.provenance import Run
from transfercache.cache.reader import read_rows
from transfercache.cache.rows import MAX_BYTES, OK, Rows
from transfercache.cache.shard import ShardReader, ShardWriter
from transfercache.cache.slots import Slots, read_slots
from transfercache.errors import CacheError, ResourceError
from transfercache.files import locked, resource_errors, sha256_bytes, sha256_file, write_atomic
from transfercache.spec import ExtractSpec

# https://bford.info/cachedir: backup tools pass over a folder with this file.
_CACHEDIR_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder is a cache made by tlc (transfercache); every file in it can be made anew.\n"
    b"# See https://bford.info/cachedir/\n"
)
#: The writer's lock, and the files beside it that every cache folder has, with their content.
LOCK = ".lock"
LABELS = {"CACHEDIR.TAG": _CACHEDIR_TAG, ".gitignore": b"*\n"}
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
#: What a writer makes and replaces; one that the catalogue does not name is a leftover of a crash.
REPLACEABLE = re.compile(r"shard-\d{5}\.h5|rows-[0-9a-f]{8}\.safetensors|\..+\.\d+\.tmp")
_READ_ONLY = 0o444
_MAX_SHARDS = 100_000
# A folder's name holds two such parts and stays below the 255 bytes of a file name.
_MAX_NAME_PART = 80


def find(cache_dir: Path, *, data_name: str, data_root: Path, spec: ExtractSpec) -> Path | None:
    """Return the cache folder of this data root and spec under `cache_dir`, or None.

    Raises CacheError where a folder of the wanted name cannot be trusted.
    """
    stem = _folder_stem(data_name, spec)
    pattern = re.compile(re.escape(stem) + r"(?:-([2-9]|[1-9]\d{1,5}))?")
    names = [entry.name for entry in cache_dir.iterdir()] if cache_dir.is_dir() else []
    matches = sorted((int(match[1] or 1), name) for name in names if (match := pattern.fullmatch(name)))
    for folder in (cache_dir / name for _, name in matches):
        if is_begun(folder):
            continue
        catalogue = read_catalogue(folder)
        if catalogue.spec == spec and catalogue.data_root == str(data_root):
            return folder
    return None


def find_or_create(
    cache_dir: Path,
    *,
    data_name: str,
    data_root: Path,
    spec: ExtractSpec,
    canaries: npt.NDArray[np.float32],
) -> Store:
    """Return the store of this data root and spec, in a new folder where there is none; canaries float32 [4, D].

    Raises CacheError where a folder of the wanted name cannot be trusted, ResourceError where the folder cannot be
    made.
    """
    catalogue = Catalogue(spec=spec, data_name=data_name, data_root=str(data_root), canaries=canaries)
    return Store(find(cache_dir, data_name=data_name, data_root=data_root, spec=spec) or _create(cache_dir, catalogue))


def folder_pattern(spec: ExtractSpec) -> str:
    """Return a glob that the names of all folders of this spec match; their catalogues decide."""
    return f"*-{_spec_part(spec)}*"


def _folder_stem(data_name: str, spec: ExtractSpec) -> str:
    return f"{_name_part(data_name) or 'data'}-{_spec_part(spec)}"


def _spec_part(spec: ExtractSpec) -> str:
    return f"{_name_part(spec.backbone)}-{_name_part(spec.boundary)}-{spec.digest()[:8]}"


def _name_part(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:_MAX_NAME_PART]


def is_begun(folder: Path) -> bool:
    """Whether making this folder was interrupted before its first catalogue: nothing of worth is in it."""
    expected = {LOCK, *LABELS}
    return folder.is_dir() and all(name in expected or _TEMPORARY.fullmatch(name) for name in os.listdir(folder))


def _create(cache_dir: Path, catalogue: Catalogue) -> Path:
    stem = _folder_stem(catalogue.data_name, catalogue.spec)
    number = 0
    while True:
        number += 1
        folder = cache_dir / (stem if number == 1 else f"{stem}-{number}")
        with resource_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not is_begun(folder):
            continue
        with locked(folder / LOCK, what=str(folder)):
            if (folder / FILE_NAME).exists():  # another process was faster
                continue
            for name, content in LABELS.items():
                write_atomic(folder / name, content)
            write_atomic(folder / FILE_NAME, catalogue.to_bytes())
            return folder


class Store:
    """One cache folder. Reading needs nothing; every change needs the lock: ``with store.writing(): ...``.

    Any step may be the last one before a crash: the next `writing` finds a valid cache and removes what is left over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalogue = read_catalogue(folder)
        self._is_writing, self._is_saved = False, True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock for the block; raises LockedError at once where another process holds it."""
        with locked(self.folder / LOCK, what=str(self.folder)):
            self.catalogue = read_catalogue(self.folder)
            self._tidy()
            self._is_writing, self._is_saved = True, True
            try:
                yield
                self._save()
            finally:
                self._is_writing = False

    def rows(self) -> Rows | None:
        """Return the published rows, or None before the first extraction has ended."""
        return None if self.catalogue.rows is None else read_rows(self.folder, self.catalogue)

    def entry(self, number: int) -> ShardEntry:
        """Return the catalogue's entry of one shard."""
        return next(entry for entry in self.catalogue.shards if entry.number == number)

    def slots(self, *, prove: Collection[int] = ()) -> Slots:
        """Return every planned row; scans the checksums of unfinished shards, and proves those numbered `prove`."""
        return read_slots(self.folder, self.catalogue.shards, prove=prove)

    def begin_shard(self, digests: npt.NDArray[np.uint8], views: npt.NDArray[np.uint8], *, batch_size: int) -> int:
        """Lay out a shard for these rows (digests [n, 32], views [n], n > 0), record it, and return its number.

        The plan lies in the shard itself, so that a resumed run knows it before any rows file exists. Raises
        ResourceError where the disk is full, before the first row and with nothing left behind.
        """
        self._check_writing()
        number = self.catalogue.shards[-1].number + 1 if self.catalogue.shards else 0
        if number >= _MAX_SHARDS:
            raise CacheError(f"{self.folder}: {_MAX_SHARDS} shards are all it can hold; make it anew in one run")
        path = self.folder / f"shard-{number:05d}.h5"
        catalogue = self.catalogue
        entry = create_shard(
            path,
            digests=digests,
            views=views,
            row_shape=catalogue.row_shape,
            dtype=catalogue.spec.storage_dtype,
            batch_size=batch_size,
        )
        try:
            self._replace(shards=(*catalogue.shards, entry))
        except ResourceError:
            # The catalogue on the disk decides whether the new shard stays.
            self.catalogue = read_catalogue(self.folder)
            self._tidy()
            raise
        return number

    @contextmanager
    def writer(self, number: int) -> Iterator[ShardWriter]:
        """Open an unfinished shard for writing rows: ``with store.writer(number) as writer: ...``."""
        self._check_writing()
        entry = self.entry(number)
        if entry.finished:
            raise ValueError(f"{entry.file} is finished and never changes again")
        path = self.folder / entry.file
        with opened_plain(path, os.O_RDWR) as descriptor:
            yield ShardWriter(path, entry, descriptor)

    def finish_shard(self, number: int) -> BoolArray:
        """Prove every written row, sync, and mark the shard as finished; returns the rows it has, bool [n].

        A slot whose row fails its proof becomes one that was never written. A shard without a row is dropped. The
        catalogue says so when rows are published, or the writing ends: a finished shard that no row is in is one that
        none needs, so a crash between the two must leave it unfinished.
        """
        with self.writer(number) as writer:
            valid = writer.clear_torn()
        entry = self.entry(number)
        kept = [other for other in self.catalogue.shards if other.number != number]
        if valid.any():
            kept.append(replace(entry, finished=True, digest=sha256_file(self.folder / entry.file)))
        self.catalogue = replace(self.catalogue, shards=tuple(sorted(kept, key=lambda shard: shard.number)))
        self._is_saved = False
        return valid

    def record(self, *runs: Run) -> None:
        """Add runs to the provenance: one that ended before it could publish too has kept rows, and has a cost."""
        self._check_writing()
        if not self._is_saved:  # what was finished and could not be published is still unfinished
            self.catalogue = read_catalogue(self.folder)
        self._replace(provenance=(*self.catalogue.provenance, *runs)[-MAX_RUNS:])

    def has_published(self, rows: Rows, *, class_names: tuple[str, ...], has_given_split: bool) -> bool:
        """Whether the cache has just these rows, and their file is whole."""
        now, entry = self.catalogue, _rows_entry(rows.to_bytes())
        if (now.class_names, now.has_given_split, now.rows) != (class_names, has_given_split, entry):
            return False
        try:
            return sha256_bytes(read_plain(self.folder / entry.file, max_bytes=MAX_BYTES)) == entry.sha256
        except CacheError:
            return False

    def publish(
        self, rows: Rows, *, class_names: tuple[str, ...], run: Run | None, has_given_split: bool = False
    ) -> bool:
        """Make `rows` the cache's rows in one step, and add `run` to its provenance; returns whether it changed.

        None is for rows that moved: no image was embedded. Publishing what is already there changes nothing and records
        no run. Raises ValueError where a row is not what the finished shards hold.
        """
        self._check_writing()
        if self.has_published(rows, class_names=class_names, has_given_split=has_given_split):
            self._save()
            return False
        self._check_places(rows, class_names)
        data, before = rows.to_bytes(), self.catalogue
        published = _rows_entry(data)
        write_atomic(self.folder / published.file, data)
        self._replace(
            rows=published,
            class_names=class_names,
            has_given_split=has_given_split,
            provenance=(*before.provenance, *(() if run is None else (run,)))[-MAX_RUNS:],
        )
        self._tidy()
        return True

    def drop_shards(self, numbers: Collection[int]) -> None:
        """Remove these shards and their files; raises ValueError where a published row lies in one of them."""
        self._check_writing()
        rows = self.rows()
        if rows is not None and np.isin(rows.shard, list(numbers)).any():
            raise ValueError(f"{self.folder}: a row lies in one of the shards {sorted(numbers)}")
        if numbers:
            self._replace(shards=tuple(entry for entry in self.catalogue.shards if entry.number not in numbers))
            self._tidy()

    def _check_places(self, rows: Rows, class_names: tuple[str, ...]) -> None:
        finished = {entry.number: entry for entry in self.catalogue.shards if entry.finished}
        rows.check_against(class_names, {number: entry.n_rows for number, entry in finished.items()})
        for number in np.unique(rows.shard[rows.status == OK]).tolist():
            at = np.flatnonzero(rows.shard == number)
            shard = ShardReader(self.folder / finished[number].file, finished[number])
            slots = rows.slot[at]
            if not shard.written()[slots].all() or shard.differs(slots, rows.digest[at], rows.view[at]).any():
                raise ValueError(f"a row is not the one that {shard.path.name} holds in its slot")

    def _check_writing(self) -> None:
        if not self._is_writing:
            raise RuntimeError("the cache changes only inside `with store.writing():`")

    def _replace(self, **changes: Any) -> None:
        catalogue = replace(self.catalogue, **changes)
        write_atomic(self.folder / FILE_NAME, catalogue.to_bytes())
        self.catalogue, self._is_saved = catalogue, True

    def _save(self) -> None:
        if not self._is_saved:
            self._replace()
            self._tidy()

    def _tidy(self) -> None:
        """Remove our files that the catalogue does not name, and make those read-only that it calls finished."""
        with resource_errors(self.folder):
            for path in self._leftovers():
                path.unlink()
            for entry in self.catalogue.shards:
                path = self.folder / entry.file
                # What is no file of ours is refused when it is read, and replaced when the cache is mended.
                if entry.finished and path.is_file() and not path.is_symlink():
                    with opened_plain(path) as descriptor:
                        os.fchmod(descriptor, _READ_ONLY)

    def is_tidy(self) -> bool:
        """Whether no crash has left a file here that the catalogue does not name."""
        return not self._leftovers()

    def _leftovers(self) -> list[Path]:
        paths = map(self.folder.joinpath, leftovers(self.catalogue, os.listdir(self.folder)))
        return [path for path in paths if not path.is_dir()]


def leftovers(catalogue: Catalogue, names: Iterable[str]) -> list[str]:
    """Return those of a folder's names that a crash left: what a writer makes, and the catalogue does not name."""
    in_force = {entry.file for entry in catalogue.shards} | {getattr(catalogue.rows, "file", "")}
    return [name for name in names if REPLACEABLE.fullmatch(name) and name not in in_force]


def _rows_entry(data: bytes) -> RowsEntry:
    sha256 = sha256_bytes(data)
    return RowsEntry(file=f"rows-{sha256[:8]}.safetensors", sha256=sha256)
