"""Hostile files kept as code, and the tools of their forger, who can give every checksum again."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from transfercache.cache.catalogue import FILE_NAME, STORAGE_DTYPES, Extent, read_catalogue
from transfercache.cache.provenance import Run
from transfercache.cache.rows import Rows
from transfercache.cache.shard import ShardReader, row_checksums
from transfercache.cache.store import find_or_create
from transfercache.files import sha256_bytes
from transfercache.spec import ExtractSpec, Preprocessing

# A valid cache of ours takes a few kilobytes.
MAX_BYTES = 1 << 24

DIM = 6
N_IMAGES = 9  # the last one is bad; 5 has the bytes of 2
N_VIEWS = 2
SPEC = ExtractSpec(
    backbone="made",
    weights_digest="ab" * 32,
    boundary="pooled",
    preprocessing=Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
RUN = Run(
    date="2026-01-02T03:04:05+00:00",
    computed=14,
    reused=0,
    checked=0,
    copied_from=None,
    seconds={"total": 1.5, "forward": 1.0},
    engine="eager",
    device="cpu",
    batch_size=4,
    weights={"kind": "random", "where": "seed 0"},
    machine={"processor": "made", "cores": 2},
    versions={"torch": "2.9", "pillow": "12.0"},
)

Arrays = dict[str, np.ndarray]


def make_cache(cache_dir: Path) -> Path:
    """A small valid cache that has one of everything: eight good images and a bad one in two views, three splits.

    Shard 0 holds contents 0 to 4 in both views, shard 1 contents 6 and 7, and shard 2, unfinished, has two of its four
    rows, which no entry needs yet.
    """
    rng = np.random.default_rng(1)
    store = find_or_create(
        cache_dir,
        data_name="made",
        data_root=Path("/data/made"),
        spec=SPEC,
        canaries=rng.standard_normal((4, DIM)).astype(np.float32),
    )
    digests = np.stack([np.frombuffer(hashlib.sha256(bytes([i])).digest(), np.uint8) for i in range(N_IMAGES + 2)])
    with store.writing():
        for contents in ([0, 1, 2, 3, 4], [6, 7]):
            planned, views = np.repeat(contents, N_VIEWS), np.tile(np.arange(N_VIEWS, dtype=np.uint8), len(contents))
            number = store.begin_shard(digests[planned], views, batch_size=4)
            with store.writer(number) as writer:
                writer.write(np.arange(len(views)), rng.standard_normal((len(views), DIM)).astype(np.float32))
            store.finish_shard(number)
        number = store.begin_shard(digests[[9, 10, 9, 10]], np.array([0, 0, 1, 1], np.uint8), batch_size=4)
        with store.writer(number) as writer:
            writer.write(np.array([0, 3]), rng.standard_normal((2, DIM)).astype(np.float32))
            writer.commit()
        store.publish(_rows(digests), class_names=("ant", "bee"), run=RUN)
    return store.folder


def _rows(digests: np.ndarray) -> Rows:
    image = np.array([*np.repeat(np.arange(N_IMAGES - 1), N_VIEWS), N_IMAGES - 1])
    content = np.where(image == 5, 2, image)
    is_bad = image == N_IMAGES - 1
    view = np.where(is_bad, 0, np.arange(len(image)) % N_VIEWS).astype(np.uint8)
    return Rows(
        path=tuple(f"train/é{i}.jpg" for i in image.tolist()),
        size=image + 1000,
        mtime_ns=image + 10,
        ctime_ns=image + 20,
        inode=image + 30,
        digest=digests[content],
        view=view,
        label=np.where(image == 1, -1, image % 2),
        split=(image % 3 + 1).astype(np.uint8),
        group=content,
        status=is_bad.astype(np.uint8),
        reason=tuple("truncated" if bad else "" for bad in is_bad),
        shard=np.where(is_bad, -1, content >= 6).astype(np.int32),
        slot=np.where(is_bad, -1, np.where(content >= 6, content - 6, content) * N_VIEWS + view),
    )


def rewrite(path: Path, data: bytes) -> None:
    """Put a file of these bytes in the place of one that may be read-only, a link or a FIFO."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def read_small(path: Path) -> bytes:
    """The bytes of a file; raises ValueError for what would take long, or for ever, to read."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        raise ValueError(f"{path} is no small file")
    return path.read_bytes()


def sign_catalogue(folder: Path, value: dict[str, Any]) -> None:
    """Write a catalogue of this content, under a right checksum."""
    covered = json.dumps({key: item for key, item in value.items() if key != "checksum"})[1:].encode()
    rewrite(folder / FILE_NAME, b'{"checksum":"%s",\n' % sha256_bytes(covered).encode() + covered)


def read_json(folder: Path) -> dict[str, Any]:
    """The catalogue as JSON."""
    value: dict[str, Any] = json.loads(read_small(folder / FILE_NAME))
    return value


def change_catalogue(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the catalogue's JSON, and sign it again."""
    value = read_json(folder)
    change(value)
    sign_catalogue(folder, value)


def sign_rows(folder: Path, data: bytes) -> None:
    """Put a rows file of these bytes in force."""
    sha256 = sha256_bytes(data)
    _put_rows_in_force(folder, sha256)
    rewrite(folder / f"rows-{sha256[:8]}.safetensors", data)


def _put_rows_in_force(folder: Path, sha256: str) -> None:
    (folder / read_json(folder)["rows"]["file"]).unlink(missing_ok=True)
    entry = {"file": f"rows-{sha256[:8]}.safetensors", "sha256": sha256}
    change_catalogue(folder, lambda value: value.update(rows=entry))


def rows_bytes(folder: Path) -> bytes:
    """The rows file that is in force."""
    return read_small(folder / read_json(folder)["rows"]["file"])


def change_rows(folder: Path, change: Callable[[Arrays], object]) -> None:
    """Change the arrays of the rows file, and sign it again."""
    arrays = safetensors.numpy.load(rows_bytes(folder))
    change(arrays)
    sign_rows(folder, safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def change_shard(folder: Path, number: int, change: Callable[[Arrays], object]) -> None:
    """Change features, digests and views of a shard, and give its rows, itself and the catalogue their checksums."""
    entry = next(entry for entry in read_catalogue(folder).shards if entry.number == number)
    path = folder / entry.file
    data = bytearray(read_small(path))
    shard = ShardReader(path, entry)
    arrays = {name: getattr(shard, name).copy() for name in ("features", "digests", "views")}
    change(arrays)
    checksums = row_checksums(np.arange(entry.n_rows), arrays["views"], arrays["digests"], arrays["features"])
    arrays["checksums"] = np.where(shard.checksums == 0, 0, checksums)
    for name, array in arrays.items():
        extent: Extent = getattr(entry, name)
        data[extent.offset : extent.offset + extent.length] = np.ascontiguousarray(array).tobytes()
    rewrite(path, bytes(data))
    if entry.finished:
        change_catalogue(folder, lambda value: _shard(value, number).update(digest=sha256_bytes(data)))


def _shard(value: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in value["shards"] if entry["file"] == f"shard-{number:05}.h5")
    return found


def claim_rows(folder: Path, number: int, n_rows: int) -> int:
    """Let the catalogue say that a shard has `n_rows`; return the size that its file must then have."""

    def claim(value: dict[str, Any]) -> None:
        entry = _shard(value, number)
        row_bytes = (entry["dim"] * STORAGE_DTYPES[entry["dtype"]].itemsize, 32, 1, 8)
        offset = entry["features"]["offset"]
        for name, size in zip(("features", "digests", "views", "checksums"), row_bytes, strict=True):
            entry[name] = {"offset": offset, "length": n_rows * size}
            offset += -(-n_rows * size // 64) * 64
        entry["n_rows"] = n_rows
        ends.append(offset)

    ends: list[int] = []
    change_catalogue(folder, claim)
    return ends[0]


def make_hollow(path: Path, size: int) -> None:
    """Give a file this size; what it grows by takes no space on the disk."""
    path.chmod(0o644)
    os.truncate(path, size)


# What was found, or thought of, and is now refused: each takes the folder of a valid cache.


def a_billion_rows_that_are_not_there(folder: Path) -> None:
    """A finished shard of 4 KiB on the disk that says it has a billion rows, in a sparse file of their size."""
    make_hollow(folder / "shard-00000.h5", claim_rows(folder, 0, 10**9))


def a_billion_rows_that_are_yet_to_come(folder: Path) -> None:
    """The same of an unfinished shard, whose checksums a writer scans."""
    make_hollow(folder / "shard-00002.h5", claim_rows(folder, 2, 10**9))


def twenty_thousand_entries_of_one_slot(folder: Path) -> None:
    """A rows file of entries that all lie in the first slot: a table would be a thousand times what is on the disk."""
    n_rows = 20_000

    def repeat(arrays: Arrays) -> None:
        for name, array in arrays.items():
            if not name.startswith(("path_", "reason_")):
                arrays[name] = np.repeat(array[:1], n_rows, axis=0)
        for name in ("path", "reason"):
            arrays[f"{name}_bytes"], arrays[f"{name}_offsets"] = np.zeros(0, np.uint8), np.zeros(n_rows + 1, np.int64)

    change_rows(folder, repeat)


def a_rows_file_of_holes(folder: Path) -> None:
    """Almost 4 GiB that nobody has written, under the name and digest of the real rows."""
    make_hollow(folder / read_json(folder)["rows"]["file"], (4 << 30) - 4096)


def a_dataset_far_away(folder: Path) -> None:
    """Checksums of an unfinished shard a terabyte behind its plan: too far for a process whose memory is bounded."""
    path, far = folder / "shard-00002.h5", 1 << 40
    change_catalogue(folder, lambda value: _shard(value, 2)["checksums"].update(offset=far))
    make_hollow(path, far + 4096)


def a_run_of_very_many_rows(folder: Path) -> None:
    """A record of more rows than any number type holds: what is copied from there has its share of them."""
    change_catalogue(folder, lambda value: value["provenance"][0].update(computed=10**30))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    make.__name__: (make, message)
    for make, message in (
        (a_billion_rows_that_are_not_there, r"shard-00000\.h5: hardly any of its .* bytes are on the disk"),
        (a_billion_rows_that_are_yet_to_come, r"shard-00002\.h5: hardly any of its .* bytes are on the disk"),
        (twenty_thousand_entries_of_one_slot, r"rows-.*: 20000 rows share 14 slots"),
        (a_dataset_far_away, r"shard-00002\.h5: cannot be mapped \(Cannot allocate memory\)"),
        (a_run_of_very_many_rows, r"catalogue\.json: a run's counts"),
        (a_rows_file_of_holes, r"rows-.*: hardly any of its .* bytes are on the disk"),
    )
}
