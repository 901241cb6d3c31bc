"""A reader of caches written from docs/cache-format.md alone, with Python's standard library alone.

It imports nothing of the package, so that it proves two things: that the page is enough to read a cache in another
language, and, where both readers agree on a cache, that the package does what the page says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

MASK = 2**64 - 1
LARGEST_CATALOGUE, LARGEST_ROWS_FILE = 16 * 2**20, 4 * 2**30
DEEPEST = 12
MOST_RUNS = 1000
MOST_ENTRIES_OF_A_SLOT = 1000
FEATURE_TYPES = {"float32": (4, "f"), "float16": (2, "e")}
DATASETS = ("features", "digests", "views", "checksums")
EXTENT = {"offset": int, "length": int}
SHARD = {"file": str, "n_rows": int, "dim": int, "dtype": str, "batch_size": int, "finished": bool, "digest": str}
SHARD |= dict.fromkeys(DATASETS, dict)
RUN = {"date": str, "computed": int, "reused": int, "checked": int, "copied_from": (str, NoneType), "seconds": dict}
RUN |= {"engine": str, "device": str, "batch_size": int, "weights": dict, "machine": dict, "versions": dict}
CATALOGUE = {"format": str, "schema_version": int, "spec": dict, "data_name": str, "data_root": str, "rows": object}
CATALOGUE |= {"class_names": list, "has_given_split": bool, "canaries": list, "shards": list, "provenance": list}
CODES = {"U8": (1, "B"), "I32": (4, "i"), "I64": (8, "q")}
COLUMNS = {"size": "I64", "mtime_ns": "I64", "ctime_ns": "I64", "inode": "I64", "digest": "U8", "view": "U8"}
COLUMNS |= {"label": "I64", "split": "U8", "group": "I64", "status": "U8", "shard": "I32", "slot": "I64"}
ARRAYS = COLUMNS | {"path_bytes": "U8", "path_offsets": "I64", "reason_bytes": "U8", "reason_offsets": "I64"}


class NotACache(ValueError):
    """The folder breaks a rule of the document."""


@dataclass(frozen=True)
class Entry:
    """One image in one view; `features` are there for a good one."""

    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: bytes
    view: int
    label: int
    split: int
    group: int
    status: int
    reason: bytes
    shard: int
    slot: int
    features: tuple[float, ...] | None


@dataclass(frozen=True)
class DocumentCache:
    """All that a cache says."""

    data_name: str
    data_root: str
    class_names: list[str]
    spec: dict[str, Any]
    canaries: list[list[float]]
    provenance: list[dict[str, Any]]
    entries: list[Entry]


def read_cache(folder: Path) -> DocumentCache:
    """Read and check the whole of a cache."""
    with _mapped(folder / "catalogue.json", LARGEST_CATALOGUE) as data:
        value = _catalogue(data[:])
    canaries = _canaries(value["canaries"])
    shards = {_number(shard): _checked_shard(shard, len(canaries[0])) for shard in _objects(value["shards"], SHARD)}
    _require(list(shards) == sorted(shards) and len(shards) == len(value["shards"]), "the shards are out of order")
    _require(len({shard["dtype"] for shard in shards.values()}) <= 1, "the shards differ in dtype")
    rows: list[dict[str, Any]] = []
    if value["rows"] is not None:
        rows = _rows(folder, _typed(value["rows"], {"file": str, "sha256": str}), len(value["class_names"]))
    wanted: dict[int, set[int]] = {number: set() for number in shards}
    for row in rows:
        if row["status"] == 0:
            shard = shards.get(row["shard"])
            _require(shard is not None and shard["finished"], "a good row lies in no finished shard")
            _require(0 <= row["slot"] < shards[row["shard"]]["n_rows"], "a row lies outside its shard")
            wanted[row["shard"]].add(row["slot"])
    room = sum(shard["n_rows"] for shard in shards.values() if shard["finished"])
    _require(sum(row["status"] == 0 for row in rows) <= MOST_ENTRIES_OF_A_SLOT * room, "too many entries for the slots")
    slots = {number: _slots(folder, shard, wanted[number]) for number, shard in shards.items()}
    entries = []
    for row in rows:
        features = None
        if row["status"] == 0:
            digest, view, features = slots[row["shard"]][row["slot"]]
            _require((digest, view) == (row["digest"], row["view"]), "a row is not what its slot holds")
        entries.append(Entry(**row, features=features))
    names = ("data_name", "data_root", "class_names", "spec", "provenance")
    return DocumentCache(**{name: value[name] for name in names}, canaries=canaries, entries=entries)


def row_checksum(slot: int, view: int, digest: bytes, features: bytes) -> int:
    """The checksum of a row, of its features' bytes as they lie in the shard."""
    data = struct.pack("<QI", slot, view) + digest + features + bytes(-len(features) % 4)
    total = 0
    for i, word in enumerate(struct.unpack(f"<{len(data) // 4}I", data)):
        z = (i + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        total += word * ((z ^ (z >> 31)) | 1)
    return total & MASK or 1


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise NotACache(message)


@contextmanager
def _mapped(path: Path, largest: int) -> Iterator[mmap.mmap]:
    """The bytes of a regular file that is no link (and, not to wait for one, no pipe)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise NotACache(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        _require(stat.S_ISREG(status.st_mode), f"{path.name} is no regular file")
        _require(0 < status.st_size <= largest, f"{path.name} has {status.st_size} bytes")
        data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    with data:
        yield data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len(dict(pairs)) == len(pairs), "a key occurs twice")
    return dict(pairs)


def _finite(text: str) -> float:
    _require(math.isfinite(float(text)), f"{text} is no number")
    return float(text)


def _json(data: bytes) -> Any:
    depth = 0
    for bracket in re.findall(rb"[\[{}\]]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)):
        depth += 1 if bracket in b"[{" else -1
        _require(depth <= DEEPEST, "the JSON is nested too deep")
    try:
        text = data.decode("ascii")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise NotACache(f"bad JSON: {error}") from error


def _typed(value: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """An object of exactly these keys, each with a value of exactly its type (so that true is no integer)."""
    _require(type(value) is dict and value.keys() == types.keys(), f"not an object of {', '.join(types)}")
    for key, kind in types.items():
        _require(kind is object or type(value[key]) in (kind if isinstance(kind, tuple) else (kind,)), f"bad {key}")
    return value


def _objects(values: list[Any], types: dict[str, Any]) -> list[dict[str, Any]]:
    return [_typed(value, types) for value in values]


def _catalogue(data: bytes) -> dict[str, Any]:
    first = re.match(rb'\{"checksum":"([0-9a-f]{64})",\n', data)
    if first is None:
        raise NotACache("the catalogue's first line is no checksum")
    _require(hashlib.sha256(data[first.end() :]).hexdigest() == first[1].decode(), "the catalogue fails its checksum")
    value: dict[str, Any] = _json(data)
    del value["checksum"]
    version = value.get("schema_version")
    _require(type(version) is int and version == 1, f"schema_version is {version!r}")
    _typed(value, CATALOGUE)
    _require(value["format"] == "transfercache", "the format has another name")
    _require(value["data_root"].startswith("/"), "the data root is not absolute")
    surrogates = re.findall("[\ud800-\udfff]", value["data_root"])
    _require(all("\udc80" <= character <= "\udcff" for character in surrogates), "the data root is no path")
    _require(all(type(name) is str for name in value["class_names"]), "a class name is no string")
    _require(len(value["provenance"]) <= MOST_RUNS, "too many runs")
    for run in _objects(value["provenance"], RUN):
        _check_run(run)
    return value


def _check_run(run: dict[str, Any]) -> None:
    try:
        datetime.fromisoformat(run["date"])
    except ValueError as error:
        raise NotACache("a run's date is not ISO 8601") from error
    _require(min(run["computed"], run["reused"], run["checked"]) >= 0, "a run counts fewer than no rows")
    _require(run["batch_size"] >= 1, "a run has no batch")
    _require("total" in run["seconds"], "a run has no total")
    for name, kinds in {"seconds": (int, float), "weights": (str,), "machine": (str, int), "versions": (str,)}.items():
        _require(all(type(value) in kinds for value in run[name].values()), f"bad {name} of a run")


def _canaries(values: list[Any]) -> list[list[float]]:
    _require(len(values) == 4, "not four canaries")
    for value in values:
        _require(type(value) is str and re.fullmatch("([0-9a-f]{8})+", value) is not None, "a canary is not float32")
    _require(len({len(value) for value in values}) == 1, "the canaries differ in width")
    canaries = [list(struct.unpack(f"<{len(value) // 8}f", bytes.fromhex(value))) for value in values]
    _require(all(math.isfinite(x) for canary in canaries for x in canary), "a canary is not finite")
    return canaries


def _number(shard: dict[str, Any]) -> int:
    name = re.fullmatch(r"shard-([0-9]{5})\.h5", shard["file"])
    if name is None:
        raise NotACache("a shard has another name")
    return int(name[1])


def _widths(shard: dict[str, Any]) -> dict[str, int]:
    """The bytes of a slot in each dataset."""
    return {"features": shard["dim"] * FEATURE_TYPES[shard["dtype"]][0], "digests": 32, "views": 1, "checksums": 8}


def _checked_shard(shard: dict[str, Any], dim: int) -> dict[str, Any]:
    """A shard whose record can be true, whatever its file is."""
    _require(shard["n_rows"] >= 1 and shard["batch_size"] >= 1, "a shard or batch of no rows")
    _require(shard["dim"] == dim and shard["dtype"] in FEATURE_TYPES, "a shard has another width or dtype")
    _require(re.fullmatch("[0-9a-f]{64}" if shard["finished"] else "", shard["digest"]) is not None, "bad digest")
    for name, width in _widths(shard).items():
        extent = _typed(shard[name], EXTENT)
        _require(extent["offset"] >= 0 and extent["offset"] % 64 == 0, f"{name} begin at no multiple of 64")
        _require(extent["length"] == shard["n_rows"] * width, f"{name} have another length")
    for a, b in itertools.pairwise(sorted((shard[name] for name in DATASETS), key=lambda extent: extent["offset"])):
        _require(a["offset"] + a["length"] <= b["offset"], "datasets overlap")
    return shard


def _slots(folder: Path, shard: dict[str, Any], wanted: set[int]) -> dict[int, tuple[bytes, int, tuple[float, ...]]]:
    """Digest, view and features of the wanted slots of a shard, each slot proven by its checksum."""
    slots = {}
    with _mapped(folder / shard["file"], 2**63) as data:
        ends = [shard[name]["offset"] + shard[name]["length"] for name in DATASETS]
        _require(max(ends) <= len(data), f"{shard['file']} is too short")
        if shard["finished"]:
            _require(hashlib.sha256(data).hexdigest() == shard["digest"], f"{shard['file']} fails its digest")
        for slot in sorted(wanted):
            starts = [(shard[name]["offset"] + slot * width, width) for name, width in _widths(shard).items()]
            raw, digest, view, stored = [data[start : start + width] for start, width in starts]
            right = row_checksum(slot, view[0], digest, raw)
            _require(int.from_bytes(stored, "little") == right, f"slot {slot} of {shard['file']} fails its checksum")
            features = struct.unpack(f"<{shard['dim']}{FEATURE_TYPES[shard['dtype']][1]}", raw)
            _require(all(math.isfinite(x) for x in features), "a feature is not finite")
            slots[slot] = (digest, view[0], features)
    return slots


def _rows(folder: Path, record: dict[str, str], n_classes: int) -> list[dict[str, Any]]:
    """The entries of the rows file, as the fields of `Entry` but for the features."""
    sha256 = record["sha256"]
    _require(re.fullmatch("[0-9a-f]{64}", sha256) is not None, "bad digest of the rows file")
    _require(record["file"] == f"rows-{sha256[:8]}.safetensors", "the rows file has another name")
    with _mapped(folder / record["file"], LARGEST_ROWS_FILE) as data:
        _require(hashlib.sha256(data).hexdigest() == sha256, "the rows file fails its digest")
        columns = _arrays(data)
    digests = columns["digest"]
    columns["digest"] = [digests[i : i + 32] for i in range(0, len(digests), 32)]
    for name in ("path", "reason"):
        columns[name] = _texts(columns.pop(f"{name}_bytes"), columns.pop(f"{name}_offsets"))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row in rows:
        _require(-1 <= row["label"] < n_classes and row["split"] <= 3 and row["status"] <= 1, "a row is out of range")
        _require(b"\0" not in row["path"], "a path holds a zero byte")
        _require(row["size"] >= 0, "a file has a negative size")
        if row["status"] == 0:
            _require(row["reason"] == b"", "a good row has a reason to be bad")
        else:
            _require((row["view"], row["shard"], row["slot"]) == (0, -1, -1), "a bad row has a view or a slot")
            _require(row["reason"] != b"", "a bad row has no reason")
    _require(not rows or rows[0]["view"] == 0, "a row begins with another view than 0")
    for before, row in itertools.pairwise(rows):
        if row["view"] > 0:
            _require(before["view"] < row["view"], "views are out of order")
            shared = row.keys() - {"view", "shard", "slot"}
            _require(all(before[name] == row[name] for name in shared), "views of a row differ")
    return rows


def _arrays(data: mmap.mmap) -> dict[str, Any]:
    """The arrays of a safetensors file: uint8 as bytes, the others as tuples of integers."""
    _require(len(data) >= 8, "the rows file has no header")
    start = 8 + int.from_bytes(data[:8], "little")
    _require(start <= len(data) and data[8:9] == b"{", "the rows file has no header")
    header = _json(data[8:start])
    header.pop("__metadata__", None)
    _typed(header, dict.fromkeys(ARRAYS, dict))
    for array in _objects(list(header.values()), {"dtype": str, "shape": list, "data_offsets": list}):
        numbers = [*array["shape"], *array["data_offsets"]]
        _require(all(type(n) is int and n >= 0 for n in numbers), "an array has a bad shape or place")
        _require(len(array["shape"]) >= 1 and len(array["data_offsets"]) == 2, "an array has a bad shape or place")
    n = header["view"]["shape"][0]
    shapes = {name: [n] for name in COLUMNS} | {"digest": [n, 32]}
    shapes |= {name: [n + 1] for name in ("path_offsets", "reason_offsets")}
    shapes |= {name: header[name]["shape"][:1] for name in ("path_bytes", "reason_bytes")}
    arrays: dict[str, Any] = {}
    end = 0
    for name, array in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (first, last), (width, code) = array["data_offsets"], CODES[ARRAYS[name]]
        _require((array["dtype"], array["shape"]) == (ARRAYS[name], shapes[name]), f"{name} is another array")
        _require(first == end and last - first == width * math.prod(array["shape"]), f"{name} lies elsewhere")
        _require(start + last <= len(data), f"{name} is cut off")
        raw = data[start + first : start + last]
        arrays[name] = raw if code == "B" else struct.unpack(f"<{len(raw) // width}{code}", raw)
        end = last
    _require(start + end == len(data), "bytes after the last array")
    return {name: arrays[name] for name in ARRAYS}


def _texts(data: bytes, offsets: tuple[int, ...]) -> list[bytes]:
    _require(offsets[0] == 0 and offsets[-1] == len(data), "offsets do not cover their texts")
    _require(all(a <= b for a, b in itertools.pairwise(offsets)), "offsets go back")
    return [data[a:b] for a, b in itertools.pairwise(offsets)]
