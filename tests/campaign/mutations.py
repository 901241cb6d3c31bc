"""Changes of a cache folder drawn from a seed: bytes and files as they get damaged, and lies under right checksums."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from transfercache.errors import CacheError, ResourceError

from .hostile import (
    N_VIEWS,
    Arrays,
    change_catalogue,
    change_rows,
    change_shard,
    claim_rows,
    make_hollow,
    read_json,
    read_small,
    rewrite,
    rows_bytes,
    sign_rows,
)

_NUMBERS: tuple[Any, ...] = (0, -1, 1, 2, 3, 7, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 63, (1 << 63) - 1)
_SCALARS: tuple[Any, ...] = (
    *_NUMBERS,
    10**400,
    -(1 << 63),
    0.5,
    -0.0,
    1e308,
    True,
    False,
    None,
    "",
    "é",
    "\ud800",
    "../x",
)
_HUGE = 30_000
_TYPES = ("uint8", "int8", "int32", "int64", "uint64", "float16", "float32", "float64", "bool")
# A longer file than any of a small cache by far, up to one that no process can map.
_SIZES = (1 << 12, 1 << 20, 1 << 32, 5 << 30, 1 << 42)


@dataclass
class Mutation:
    """What was done to a folder, and whose word no longer counts: the rows file's, or the rows' own checksums'."""

    done: list[str] = field(default_factory=list)
    is_rows_forged: bool = False
    is_content_forged: bool = False


def mutate(folder: Path, seed: int) -> Mutation:
    """Change one to three things of a folder. What an earlier change has made impossible is left out."""
    rng, mutation = random.Random(seed), Mutation()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(_CHANGES)
        with contextlib.suppress(*_NO_LONGER_POSSIBLE):
            mutation.done.append(f"{change.__name__}: {change(folder, rng, mutation)}")
    return mutation


# A forger cannot read what an earlier change has broken.
_NO_LONGER_POSSIBLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    StopIteration,
    CacheError,
    ResourceError,
    safetensors.SafetensorError,
    struct.error,
)


def _a_file(folder: Path, rng: random.Random) -> Path:
    """Any file, those that matter more often than the labels and the lock."""
    names = sorted(path.name for path in folder.iterdir())
    return folder / rng.choices(names, [1 if name.startswith((".", "CACHEDIR")) else 6 for name in names])[0]


# Damage: of bytes.


def change_bytes(folder: Path, rng: random.Random, _: Mutation) -> str:
    path = _a_file(folder, rng)
    data = bytearray(read_small(path))
    at = rng.randrange(len(data) or 1)
    length = rng.choice((1, 2, 8, 64, rng.randrange(1, len(data) + 2)))
    what = rng.choice(("flip", "insert", "delete", "repeat", "zero", "random", "cut", "extend", "reverse"))
    part = bytes(data[at : at + length])
    if what == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[at:]
    elif what == "extend":
        data += bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    else:
        data[at : at + (0 if what == "insert" else length)] = {
            "insert": rng.randbytes(length),
            "delete": b"",
            "repeat": part + part,
            "zero": bytes(len(part)),
            "random": rng.randbytes(len(part)),
            "reverse": part[::-1],
        }[what]
    rewrite(path, bytes(data))
    return f"{what} {length} at {at} of {path.name}"


# Damage: of whole files.


def swap_files(folder: Path, rng: random.Random, _: Mutation) -> str:
    one, other = _a_file(folder, rng), _a_file(folder, rng)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    return f"{one.name} and {other.name}"


def copy_over(folder: Path, rng: random.Random, _: Mutation) -> str:
    one, other = _a_file(folder, rng), _a_file(folder, rng)
    rewrite(other, read_small(one))
    return f"{one.name} to {other.name}"


def replace_file(folder: Path, rng: random.Random, _: Mutation) -> str:
    path = _a_file(folder, rng)
    data = read_small(path)
    path.unlink()
    what = rng.choice(tuple(_REPLACEMENTS))
    _REPLACEMENTS[what](path, data, rng)
    return f"{path.name} by {what}"


def _by_link(path: Path, data: bytes, _: random.Random) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    elsewhere.write_bytes(data)
    path.symlink_to(elsewhere)


def _by_hard_link(path: Path, data: bytes, _: random.Random) -> None:
    elsewhere = path.parent.parent / f"linked-{path.name}"
    elsewhere.write_bytes(data)
    path.hardlink_to(elsewhere)


def _by_hollow(path: Path, data: bytes, rng: random.Random) -> None:
    path.write_bytes(data if rng.random() < 0.5 else b"")
    make_hollow(path, rng.choice(_SIZES))


def _by_socket(path: Path, _: bytes, __: random.Random) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        # Under a short name: a socket's holds a hundred bytes.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


_REPLACEMENTS: dict[str, Callable[[Path, bytes, random.Random], Any]] = {
    "a link": _by_link,
    "a hard link": _by_hard_link,
    "a link to itself": lambda path, _, __: path.symlink_to(path.name),
    "a link to zeros without end": lambda path, _, __: path.symlink_to("/dev/zero"),
    "a FIFO": lambda path, _, __: os.mkfifo(path),
    "a socket": _by_socket,
    "a folder": lambda path, _, __: path.mkdir(),
    "an empty file": lambda path, _, __: path.write_bytes(b""),
    "a hollow file": _by_hollow,
    "nothing": lambda path, _, __: None,
}


# Lies: of the catalogue.


def lie_in_catalogue(folder: Path, rng: random.Random, _: Mutation) -> str:
    said = ""

    def lie(value: dict[str, Any]) -> None:
        nonlocal said
        parent, key = _a_place(value, rng)
        what = rng.choice(tuple(_LIES))
        said = f"{what} at {key!r}"
        _LIES[what](parent, key, rng)

    change_catalogue(folder, lie)
    return said


def _a_place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """Walk down to any place in the JSON: a container, and a key or index of it."""
    parent, key = value, rng.choice(sorted(value))
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(sorted(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def _put(make: Callable[[Any, random.Random], Any]) -> Callable[[Any, Any, random.Random], None]:
    def put(parent: Any, key: Any, rng: random.Random) -> None:
        parent[key] = make(parent[key], rng)

    return put


def _nested(rng: random.Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice((8, 11, 12, 13, 500))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _altered(value: Any, rng: random.Random) -> Any:
    """The same kind of value, a little off."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, value + 64, value // 2, float(value), str(value)))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, int(value)))
    if isinstance(value, str):
        return rng.choice((value + "0", value[:-1], value.upper(), value[::-1], value * 2, value + "\n", value + "\0"))
    if isinstance(value, list):
        return rng.choice(
            (value + value[-1:], value[:-1], value[::-1], value * 3, dict(enumerate(value)), tuple(value))
        )
    return rng.choice(({**value, "more": 1}, list(value), list(value.values()), dict.fromkeys(value)))


_LIES: dict[str, Callable[[Any, Any, random.Random], Any]] = {
    "another value": _put(lambda _, rng: rng.choice(_SCALARS)),
    "another number": _put(lambda _, rng: rng.choice(_NUMBERS)),
    "an altered value": _put(_altered),
    "an altered value again": _put(_altered),
    "a huge list": _put(lambda value, _: [value] * _HUGE if not isinstance(value, (dict, list)) else [0] * _HUGE),
    "a huge string": _put(lambda _, rng: rng.choice("0é/") * _HUGE),
    "a deep value": _put(lambda _, rng: _nested(rng)),
    "nothing": lambda parent, key, _: parent.pop(key),
}


def claim_other_rows(folder: Path, rng: random.Random, mutation: Mutation) -> str:
    """A shard of another number of rows, with extents that fit, in a file of the size that they need."""
    number, n_rows = rng.randrange(3), rng.choice((1, 3, 4, 5, 9, 11, 1000, 10**6, 10**9, 1 << 31, 1 << 40))
    size = claim_rows(folder, number, n_rows)
    path = folder / f"shard-{number:05}.h5"
    if rng.random() < 0.8:
        make_hollow(path, size)
    return f"{n_rows} in shard {number}"


# Lies: of the rows file.


def lie_in_rows(folder: Path, rng: random.Random, mutation: Mutation) -> str:
    said = ""

    def lie(arrays: Arrays) -> None:
        nonlocal said
        name, what = rng.choice(sorted(arrays)), rng.choice(tuple(_ARRAY_LIES))
        said = f"{what} in {name}"
        arrays[name] = _ARRAY_LIES[what](arrays[name], rng)

    mutation.is_rows_forged = True
    change_rows(folder, lie)
    return said


def _with_number(array: np.ndarray, rng: random.Random) -> np.ndarray:
    changed = array.copy()
    number = rng.choice([value for value in (*_NUMBERS, -(1 << 63)) if isinstance(value, int)])
    at = rng.randrange(array.size)
    with np.errstate(over="ignore"):
        changed.reshape(-1)[at] = np.array(number % (1 << 64), np.uint64).astype(array.dtype)
    return changed


_ARRAY_LIES: dict[str, Callable[[np.ndarray, random.Random], np.ndarray]] = {
    "another type": lambda a, rng: a.astype(rng.choice(_TYPES)),
    "another number": _with_number,
    "another number again": _with_number,
    "one more": lambda a, _: np.concatenate([a, a[-1:]]),
    "one less": lambda a, _: a[:-1],
    "none": lambda a, _: a[:0],
    "another order": lambda a, rng: a[np.random.default_rng(rng.getrandbits(32)).permutation(len(a))],
    "all equal": lambda a, rng: np.repeat(a[[rng.randrange(len(a))]], len(a), axis=0),
    "another shape": lambda a, rng: a.reshape(rng.choice(((1, -1), (-1, 1), (-1,), (1, -1, 1)))),
    "very many": lambda a, _: np.repeat(a, _HUGE, axis=0),
    "a slot or so further": lambda a, rng: a + np.array(rng.choice((1, N_VIEWS))).astype(a.dtype),
}


def reorder_rows(folder: Path, rng: random.Random, mutation: Mutation) -> str:
    """Another order of all entries, or some of them twice: the texts stay."""

    def reorder(arrays: Arrays) -> None:
        n_rows = len(arrays["view"])
        order = (
            [rng.randrange(n_rows) for _ in range(n_rows)] if rng.random() < 0.5 else rng.sample(range(n_rows), n_rows)
        )
        for name, array in arrays.items():
            if not name.startswith(("path_", "reason_")):
                arrays[name] = array[order]

    mutation.is_rows_forged = True
    change_rows(folder, reorder)
    return "entries"


def lie_in_rows_bytes(folder: Path, rng: random.Random, mutation: Mutation) -> str:
    """Other bytes of the rows file, or other words in its header, under its new digest."""
    mutation.is_rows_forged = True
    data = bytearray(rows_bytes(folder))
    if rng.random() < 0.3:
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        sign_rows(folder, bytes(data))
        return f"flip at {at}"
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    parent, key = _a_place(header, rng)
    what = rng.choice((*_LIES, "another dtype"))
    if what == "another dtype":
        name = rng.choice(sorted(header))
        header[name]["dtype"] = rng.choice(("BF16", "F8_E4M3", "F4", "U64", "C64", "BOOL", "I4", "", "u8"))
    else:
        _LIES[what](parent, key, rng)
    words = json.dumps(header).encode()
    claimed = rng.choice((len(words), len(words), len(words), len(words) + 1, 1 << 62, 0))
    sign_rows(folder, struct.pack("<Q", claimed) + words + bytes(data[8 + length :]))
    return f"{what} at {key!r}, {claimed} of {len(words)}"


# Lies: of a shard.


def lie_in_shard(folder: Path, rng: random.Random, mutation: Mutation) -> str:
    number = rng.randrange(3)
    what = rng.choice(("features", "digests", "views"))

    def lie(arrays: Arrays) -> None:
        array = arrays[what]
        if what == "features":
            array[rng.randrange(len(array))] = rng.choice((0.0, 1.0, np.nan, np.inf, -0.0))
        elif what == "digests":
            array[rng.randrange(len(array))] = rng.choice((0, 255, array[rng.randrange(len(array))]))
        else:
            array[rng.randrange(len(array))] = rng.choice((0, 1, 2, 255))

    mutation.is_content_forged = True
    # A row of another content is not the one that was published either.
    mutation.is_rows_forged = True
    change_shard(folder, number, lie)
    return f"{what} of shard {number}"


def swap_shards(folder: Path, rng: random.Random, _: Mutation) -> str:
    """Two finished shards under each other's names, and a catalogue that agrees."""

    def swap(value: dict[str, Any]) -> None:
        one, other = value["shards"][0], value["shards"][1]
        one["file"], other["file"] = other["file"], one["file"]
        value["shards"][:2] = [other, one]

    (folder / "shard-00000.h5").rename(folder / "aside")
    (folder / "shard-00001.h5").rename(folder / "shard-00000.h5")
    (folder / "aside").rename(folder / "shard-00001.h5")
    change_catalogue(folder, swap)
    return "0 and 1"


def lie_about_finished(folder: Path, rng: random.Random, _: Mutation) -> str:
    """A finished shard as an unfinished one, or the other way round."""
    number, digest = rng.randrange(3), rng.choice(("", "ab" * 32))
    change_catalogue(folder, lambda value: value["shards"][number].update(finished=bool(digest), digest=digest))
    return f"shard {number} {bool(digest)}"


def add_shards(folder: Path, rng: random.Random, _: Mutation) -> str:
    """A shard again, under other numbers: as files, as links to one file, or as names alone."""
    n_more, what = rng.choice((1, 50)), rng.choice(("files", "links", "names"))
    entry = read_json(folder)["shards"][rng.randrange(3)]
    data = read_small(folder / entry["file"])
    names = [f"shard-{number:05}.h5" for number in range(99_999 - n_more, 99_999)]
    for name in names:
        if what == "files":
            (folder / name).write_bytes(data)
        elif what == "links":
            (folder / name).hardlink_to(folder / entry["file"])
    change_catalogue(folder, lambda value: value["shards"].extend({**entry, "file": name} for name in names))
    return f"{n_more} as {what}"


_CHANGES: tuple[Callable[[Path, random.Random, Mutation], str], ...] = (
    *(change_bytes,) * 6,
    *(lie_in_catalogue,) * 6,
    *(lie_in_rows,) * 4,
    *(lie_in_rows_bytes,) * 3,
    *(replace_file,) * 3,
    *(lie_in_shard,) * 2,
    claim_other_rows,
    reorder_rows,
    swap_files,
    copy_over,
    swap_shards,
    lie_about_finished,
    add_shards,
)
