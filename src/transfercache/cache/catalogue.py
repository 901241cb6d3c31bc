"""catalogue.json: what a cache folder holds, under a checksum of its own; see docs/cache-format.md."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.cache.plain_file import REMAKE, read_plain
from transfercache.cache.provenance import Run
from transfercache.errors import CacheError, DataError
from transfercache.files import sha256_bytes
from transfercache.spec import ExtractSpec
from transfercache.strict_json import each, parse, take

FILE_NAME = "catalogue.json"
_FORMAT = "transfercache"
SCHEMA_VERSION = 1
N_CANARIES = 4
#: Every dataset starts on a cache line, so that none is unaligned for its dtype.
ALIGNMENT_BYTES = 64

#: Numpy's dtype for each storage dtype that a shard may have.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}

# 100,000 class names or 10,000 shards fit; what is larger is no catalogue of ours.
_MAX_BYTES = 16 << 20
#: Numbers a row: those of the canaries, written as hex digits, are to leave room in a catalogue.
MAX_DIM = 450_000
#: A thousand records of a kilobyte each leave room for the rest.
MAX_RUNS = 1000

_SHARD_FILE = re.compile(r"shard-(\d{5})\.h5")
_ROWS_FILE = re.compile(r"rows-([0-9a-f]{8})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIRST_LINE = re.compile(rb'\{"checksum":"([0-9a-f]{64})",\n')


@dataclass(frozen=True)
class Extent:
    """Where a dataset's bytes lie in its file: `offset` and `length` in bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard file: where its four datasets lie, and, once it is `finished`, the SHA-256 of the whole file."""

    file: str
    n_rows: int
    dim: int
    dtype: str  # a key of STORAGE_DTYPES
    batch_size: int
    features: Extent  # dtype [n_rows, dim]
    digests: Extent  # uint8 [n_rows, 32]
    views: Extent  # uint8 [n_rows]
    checksums: Extent  # uint64 [n_rows]
    finished: bool = False
    digest: str = ""  # 64 hex digits once finished

    def __post_init__(self) -> None:
        if not _SHARD_FILE.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a shard file")
        if min(self.n_rows, self.dim, self.batch_size) < 1 or self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"{self.file}: {self.n_rows} x {self.dim} {self.dtype!r} is no shape and dtype of a shard")
        row_bytes = (self.dim * STORAGE_DTYPES[self.dtype].itemsize, 32, 1, 8)
        extents = self.extents()
        if [extent.length for extent in extents] != [self.n_rows * size for size in row_bytes]:
            raise ValueError(f"{self.file}: a dataset's length is not that of {self.n_rows} x {self.dim} {self.dtype}")
        ordered = sorted(extents, key=lambda extent: extent.offset)
        if any(extent.offset % ALIGNMENT_BYTES for extent in extents):
            raise ValueError(f"{self.file}: a dataset does not start at a multiple of {ALIGNMENT_BYTES} bytes")
        if ordered[0].offset < 0 or any(a.offset + a.length > b.offset for a, b in pairwise(ordered)):
            raise ValueError(f"{self.file}: datasets overlap")
        if bool(_SHA256.fullmatch(self.digest)) != self.finished:
            raise ValueError(f"{self.file}: a finished shard has a digest, an unfinished one has none")

    @property
    def number(self) -> int:
        """The number in the file's name, by which the rows refer to this shard."""
        return int(self.file[6:11])

    def extents(self) -> tuple[Extent, Extent, Extent, Extent]:
        """Return the extents of features, digests, views and checksums."""
        return self.features, self.digests, self.views, self.checksums

    @classmethod
    def from_json(cls, value: Any) -> ShardEntry:
        """Build an entry from untrusted JSON; raises ValueError naming what is wrong."""
        fields = dict.fromkeys(("features", "digests", "views", "checksums"), dict)
        integers = dict.fromkeys(("n_rows", "dim", "batch_size"), int)
        taken = take(
            value, "a shard", {**fields, **integers, "file": str, "dtype": str, "finished": bool, "digest": str}
        )
        for name in fields:
            taken[name] = Extent(**take(taken[name], f"a shard's {name}", {"offset": int, "length": int}))
        return cls(**taken)


@dataclass(frozen=True)
class RowsEntry:
    """The rows file that is in force: its name and the SHA-256 of its bytes, as 64 hex digits."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        match = _ROWS_FILE.fullmatch(self.file)
        if match is None or not _SHA256.fullmatch(self.sha256) or match[1] != self.sha256[:8]:
            raise ValueError(f"{self.file!r} is not the name of a rows file with the digest {self.sha256!r}")


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Everything a cache folder holds but the rows; replaced whole, and decided by nothing but its own content."""

    spec: ExtractSpec
    data_name: str
    data_root: str  # absolute; invalid UTF-8 as surrogate escapes
    canaries: npt.NDArray[np.float32]  # float32 [4, D]: the network's embeddings of four made images
    class_names: tuple[str, ...] = ()  # [C], in the order of the rows' labels
    has_given_split: bool = False  # False: the split was drawn by content, and may be drawn again
    shards: tuple[ShardEntry, ...] = ()  # ordered by number
    rows: RowsEntry | None = None  # None until the first extraction has ended
    provenance: tuple[Run, ...] = ()  # one a run that changed something, oldest first

    def __post_init__(self) -> None:
        if self.canaries.ndim != 2 or len(self.canaries) != N_CANARIES or self.canaries.dtype != np.float32:
            raise ValueError(f"canaries must be float32 [{N_CANARIES}, D], got {self.canaries.shape}")
        if not self.data_root.startswith("/"):
            raise ValueError(f"data_root {self.data_root!r} is not absolute")
        for text in (self.data_root, self.data_name, *self.class_names):
            text.encode("utf-8", "surrogateescape")  # raises ValueError for any other surrogate
        if self.rows is not None and not self.provenance:
            raise ValueError("there are rows, and no run that made them")
        if len(self.provenance) > MAX_RUNS:
            raise ValueError(f"{len(self.provenance)} runs, more than {MAX_RUNS}")
        if self.spec.storage_dtype not in STORAGE_DTYPES:
            raise ValueError(f"storage_dtype {self.spec.storage_dtype!r} is none of {', '.join(STORAGE_DTYPES)}")
        if math.prod(self.row_shape) != self.dim:
            raise ValueError(f"rows of {self.spec.boundary} are not {self.dim} wide")
        if any(a.number >= b.number for a, b in pairwise(self.shards)):
            raise ValueError("the shards' numbers do not increase")
        for shard in self.shards:
            if (shard.dim, shard.dtype) != (self.dim, self.spec.storage_dtype):
                raise ValueError(f"{shard.file}: of another width or dtype than the cache")

    @property
    def dim(self) -> int:
        """The width D of a feature row."""
        return int(self.canaries.shape[1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """What a row holds: (D,), or the shape of its activations, of D numbers in all."""
        return self.spec.row_shape or (self.dim,)

    def to_bytes(self) -> bytes:
        """Return the file: a first line with the checksum, then the JSON that it covers."""
        value = {
            "format": _FORMAT,
            "schema_version": SCHEMA_VERSION,
            "spec": self.spec.to_json(),
            "data_name": self.data_name,
            "data_root": self.data_root,
            "class_names": self.class_names,
            "has_given_split": self.has_given_split,
            "canaries": [row.astype("<f4").tobytes().hex() for row in self.canaries],
            "shards": [asdict(shard) for shard in self.shards],
            "rows": None if self.rows is None else asdict(self.rows),
            "provenance": [run.to_json() for run in self.provenance],
        }
        covered = json.dumps(value, allow_nan=False, indent=1)[1:].lstrip().encode() + b"\n"
        data = b'{"checksum":"%s",\n' % sha256_bytes(covered).encode() + covered
        if len(data) > _MAX_BYTES:
            raise DataError(f"{self.data_root}: its class names take more than a catalogue's {_MAX_BYTES} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Catalogue:
        """Read an untrusted catalogue; raises ValueError naming what is wrong."""
        taken = take(_verified(data), "the catalogue", _CATALOGUE_TYPES)
        if taken["format"] != _FORMAT:
            raise ValueError(f"the catalogue's format is {taken['format']!r}")
        rows = taken["rows"]
        return cls(
            spec=ExtractSpec.from_json(taken["spec"]),
            data_name=taken["data_name"],
            data_root=taken["data_root"],
            canaries=_canaries(taken["canaries"]),
            class_names=tuple(each(taken["class_names"], str, "class_names")),
            has_given_split=taken["has_given_split"],
            shards=tuple(ShardEntry.from_json(shard) for shard in taken["shards"]),
            rows=None if rows is None else RowsEntry(**take(rows, "rows", {"file": str, "sha256": str})),
            provenance=tuple(Run.from_json(run) for run in taken["provenance"]),
        )


def read_catalogue(folder: Path) -> Catalogue:
    """Read and validate a cache folder's catalogue; raises CacheError naming the folder and the next step."""
    path = folder / FILE_NAME
    if not os.path.exists(path):  # False also where the folder may not be searched
        raise CacheError(f"{folder}: not a cache folder; make one with: tlc extract-features DATA")
    data = read_plain(path, max_bytes=_MAX_BYTES)
    try:
        return Catalogue.from_bytes(data)
    except (ValueError, OverflowError) as error:
        raise CacheError(f"{path}: {error}; {REMAKE}") from error


_CATALOGUE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("format", "data_name", "data_root"), str),
    **dict.fromkeys(("class_names", "canaries", "shards", "provenance"), list),
    "schema_version": int,
    "has_given_split": bool,
    "spec": dict,
    "rows": (dict, type(None)),
}


def _verified(data: bytes) -> Any:
    """Return the JSON of a catalogue's bytes, its checksum and schema version proved."""
    first_line = _FIRST_LINE.match(data)
    if first_line is None:
        raise ValueError("does not begin as a catalogue does")
    covered = data[first_line.end() :]
    if not covered.isascii():
        raise ValueError("is not ASCII")
    if sha256_bytes(covered).encode() != first_line[1]:
        raise ValueError("fails its checksum")
    value = parse(b"{" + covered)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        raise ValueError(f"this is a cache of schema {version}, this tlc reads schema {SCHEMA_VERSION}")
    return value


def _canaries(values: list[Any]) -> npt.NDArray[np.float32]:
    rows = [bytes.fromhex(text) for text in each(values, str, "canaries")]
    if len(rows) != N_CANARIES or len(set(map(len, rows))) != 1 or not rows[0] or len(rows[0]) % 4:
        raise ValueError(f"canaries must be {N_CANARIES} float32 rows of one width")
    canaries = np.frombuffer(b"".join(rows), "<f4").astype(np.float32).reshape(N_CANARIES, -1)
    if not np.isfinite(canaries).all():
        raise ValueError("canaries are not finite")
    return canaries
