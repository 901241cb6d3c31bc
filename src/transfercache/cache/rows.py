"""`Rows`: one entry per manifest row and view, as the rows file keeps them; see docs/cache-format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from transfercache.splits import Split

OK = 0
BAD = 1

#: 4 GiB hold about twenty million rows.
MAX_BYTES = 4 << 30

#: Entries of equal content share a slot. On the whole no more than so many do, else features in memory would be more
#: than a thousand times what is on the disk.
MAX_ROWS_PER_SLOT = 1000

_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "size": ("int64", ()),
    "mtime_ns": ("int64", ()),
    "ctime_ns": ("int64", ()),
    "inode": ("int64", ()),
    "digest": ("uint8", (32,)),
    "view": ("uint8", ()),
    "label": ("int64", ()),
    "split": ("uint8", ()),
    "group": ("int64", ()),
    "status": ("uint8", ()),
    "shard": ("int32", ()),
    "slot": ("int64", ()),
}
_TEXTS = ("path", "reason")


@dataclass(frozen=True, eq=False)
class Rows:
    """R entries in the order of the manifest's rows; the views of one row follow each other, view 0 first."""

    path: tuple[str, ...]  # [R] as the manifest names them; invalid UTF-8 as surrogate escapes
    size: npt.NDArray[np.int64]  # int64 [R], bytes
    mtime_ns: npt.NDArray[np.int64]  # int64 [R]
    ctime_ns: npt.NDArray[np.int64]  # int64 [R]
    inode: npt.NDArray[np.int64]  # int64 [R]
    digest: npt.NDArray[np.uint8]  # uint8 [R, 32], SHA-256 of the file's bytes; zeros where it could not be read
    view: npt.NDArray[np.uint8]  # uint8 [R]
    label: npt.NDArray[np.int64]  # int64 [R], -1 where unlabelled
    split: npt.NDArray[np.uint8]  # uint8 [R], splits.Split
    group: npt.NDArray[np.int64]  # int64 [R], component: rows that no split or fold separates share one
    status: npt.NDArray[np.uint8]  # uint8 [R], OK or BAD
    reason: tuple[str, ...]  # [R], why a row is bad; "" where it is not
    shard: npt.NDArray[np.int32]  # int32 [R], the number in the shard file's name; -1 where bad
    slot: npt.NDArray[np.int64]  # int64 [R], row of that shard; -1 where bad

    def __post_init__(self) -> None:
        for name, (dtype, row_shape) in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != np.dtype(dtype) or array.shape != (len(self), *row_shape):
                raise ValueError(f"{name} must be {dtype} {[len(self), *row_shape]}, got {array.dtype} {array.shape}")
        if len(self.reason) != len(self):
            raise ValueError(f"{len(self.reason)} reasons for {len(self)} rows")
        good = self.status == OK
        named = np.array([bool(reason) for reason in self.reason], dtype=bool)
        before = np.concatenate([np.array([255], np.uint8), self.view])[:-1]
        in_range = {
            "path": np.array(["\0" not in path for path in self.path], dtype=bool),
            "view": (self.view == 0) | ((self.view > before) & good),
            "size": self.size >= 0,
            "label": self.label >= -1,
            "split": self.split <= max(Split),
            "group": self.group >= 0,
            "status": self.status <= BAD,
            "reason": named != good,
            "shard": np.where(good, self.shard >= 0, self.shard == -1),
            "slot": np.where(good, self.slot >= 0, self.slot == -1),
        }
        for name, is_right in in_range.items():
            if not is_right.all():
                raise ValueError(f"{name} of row {int(np.argmin(is_right))} is out of range")
        self._check_views()

    def _check_views(self) -> None:
        """Raise ValueError where the views of one row differ in more than the view and its place."""
        further = np.flatnonzero(self.view)
        first = np.flatnonzero(self.view == 0)[self.row[further]]
        for name in sorted({"path", *_ARRAYS} - {"view", "shard", "slot"}):
            values = getattr(self, name)
            if name == "path":
                pairs = zip(further.tolist(), first.tolist(), strict=True)
                is_equal = np.array([values[i] == values[j] for i, j in pairs], dtype=bool)
            else:
                is_equal = (values[further] == values[first]).all(axis=tuple(range(1, values.ndim)))
            if not is_equal.all():
                raise ValueError(f"{name} of row {further[np.argmin(is_equal)]} is not that of its view 0")

    def __len__(self) -> int:
        return len(self.path)

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """The row of the manifest that each entry belongs to, int64 [R]: every one begins with its view 0."""
        return np.cumsum(self.view == 0, dtype=np.int64) - 1

    @property
    def n_images(self) -> int:
        """The images, bad ones included."""
        return int(np.sum(self.view == 0))

    @property
    def n_views(self) -> int:
        """The views of each good image, at least one."""
        return int(self.view.max(initial=0)) + 1

    @property
    def bad(self) -> dict[int, str]:
        """The images that could not be read: row of the manifest -> reason."""
        at = np.flatnonzero(self.status == BAD)
        return dict(zip(self.row[at].tolist(), (self.reason[i] for i in at.tolist()), strict=True))

    def has_same_content(self, other: Rows) -> bool:
        """Whether these rows differ from `other` at most in what the file system says of their files."""
        names = {"path", "reason", *_ARRAYS} - {"size", "mtime_ns", "ctime_ns", "inode"}
        return len(self) == len(other) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in sorted(names)
        )

    def known_files(self) -> dict[str, tuple[int, int, int, int, bytes]]:
        """Return size, mtime_ns, ctime_ns, inode and content digest by path, where the content is known."""
        first = np.flatnonzero((self.view == 0) & self.digest.any(axis=1))
        stats = np.stack([self.size, self.mtime_ns, self.ctime_ns, self.inode], axis=1)[first].tolist()
        return {
            self.path[i]: (size, mtime_ns, ctime_ns, inode, self.digest[i].tobytes())
            for i, (size, mtime_ns, ctime_ns, inode) in zip(first.tolist(), stats, strict=True)
        }

    def check_against(self, class_names: tuple[str, ...], shard_rows: Mapping[int, int]) -> None:
        """Raise ValueError unless every label names a class and every good row a slot of a finished shard.

        Nor may the rows be more than `MAX_ROWS_PER_SLOT` for each slot there is. `shard_rows` gives the number of rows
        of each finished shard by the shard's number.
        """
        if self.label.max(initial=-1) >= len(class_names):
            raise ValueError(f"label {self.label.max()} with {len(class_names)} class names")
        n_good, n_slots = int(np.sum(self.status == OK)), sum(shard_rows.values())
        if n_good > MAX_ROWS_PER_SLOT * n_slots > 0:
            raise ValueError(f"{n_good} rows share {n_slots} slots, more than {MAX_ROWS_PER_SLOT} a slot")
        for number in np.unique(self.shard[self.status == OK]).tolist():
            if number not in shard_rows:
                raise ValueError(f"a row lies in shard {number}, which is not there or not finished")
            if self.slot[self.shard == number].max() >= shard_rows[number]:
                raise ValueError(f"a row lies beyond the {shard_rows[number]} rows of shard {number}")

    def to_bytes(self) -> bytes:
        """Return the rows file: safetensors, equal rows giving equal bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        for name in _TEXTS:
            parts = [text.encode("utf-8", "surrogateescape") for text in getattr(self, name)]
            arrays[f"{name}_bytes"] = np.frombuffer(b"".join(parts), np.uint8)
            arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Rows:
        """Read an untrusted rows file; raises ValueError naming what is wrong."""
        try:
            arrays = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"not a rows file ({error})") from error
        expected = {*_ARRAYS, *(f"{name}_{part}" for name in _TEXTS for part in ("bytes", "offsets"))}
        if set(arrays) != expected:
            raise ValueError(f"has the arrays {sorted(arrays)}, expected {sorted(expected)}")
        texts = {name: _split_texts(name, arrays[f"{name}_bytes"], arrays[f"{name}_offsets"]) for name in _TEXTS}
        values = {field.name: texts.get(field.name, arrays.get(field.name)) for field in fields(cls)}
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every dtype and shape


def _split_texts(name: str, data: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> tuple[str, ...]:
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"{name}: its bytes must be uint8 [total] and its offsets int64 [R + 1]")
    if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}: its offsets do not run from 0 to {len(data)} without going back")
    whole, ends = data.tobytes(), offsets.tolist()
    return tuple(whole[start:stop].decode("utf-8", "surrogateescape") for start, stop in pairwise(ends))
