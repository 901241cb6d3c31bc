from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from transfercache.cache.catalogue import Extent, ShardEntry
from transfercache.cache.layout import create_shard
from transfercache.cache.shard import ShardReader, ShardWriter, row_checksums
from transfercache.errors import CacheError, ResourceError

GOLDEN_WORDS = struct.pack("<QI", 5, 1) + bytes(range(32)) + struct.pack("<3f", 1.0, -2.5, 0.0)
GOLDEN_CHECKSUM = bytes.fromhex("ba611c1c2f8bab5a")  # little-endian, as it stands in a shard


def _plain_checksum(row: bytes) -> int:
    """The checksum in plain Python integers, from docs/cache-format.md alone."""
    total, state = 0, 0
    for (word,) in struct.iter_unpack("<I", row):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        total += word * ((z ^ (z >> 31)) | 1)
    return total % 2**64 or 1


def _checksum(row: bytes) -> int:
    slot, view = struct.unpack_from("<QI", row)
    features = np.frombuffer(row, "<f4", offset=44)[None]
    digest = np.frombuffer(row, np.uint8, 32, 12)[None]
    return int(row_checksums(np.array([slot]), np.array([view], np.uint8), digest, features)[0])


def _create(folder: Path, extraction: Any, *, number: int = 0, dim: int = 6, n_views: int = 10) -> ShardEntry:
    return create_shard(
        folder / f"shard-{number:05d}.h5",
        digests=extraction.digests,
        views=np.arange(n_views, dtype=np.uint8),
        row_shape=(dim,),
        dtype="float32",
        batch_size=4,
    )


@pytest.fixture
def shard(tmp_path: Path, extraction: Any) -> tuple[Path, ShardEntry]:
    return tmp_path / "shard-00000.h5", _create(tmp_path, extraction)


@contextmanager
def _writer(path: Path, entry: ShardEntry) -> Iterator[ShardWriter]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield ShardWriter(path, entry, descriptor)
    finally:
        os.close(descriptor)


def test_row_checksums__golden_bytes() -> None:
    assert _checksum(GOLDEN_WORDS) == int.from_bytes(GOLDEN_CHECKSUM, "little") == _plain_checksum(GOLDEN_WORDS)


def test_row_checksums__every_flipped_bit_changes_it() -> None:
    for bit in range(len(GOLDEN_WORDS) * 8):
        flipped = bytearray(GOLDEN_WORDS)
        flipped[bit // 8] ^= 1 << bit % 8
        if 9 <= bit // 8 < 12:  # the view is one byte, widened to a word
            continue
        assert _checksum(bytes(flipped)) != _checksum(GOLDEN_WORDS)


def test_row_checksums__zero_is_never_valid() -> None:
    # Slot 0, view 0, no content and no features: the sum itself is 0.
    assert _checksum(bytes(44 + 12)) == _plain_checksum(bytes(44 + 12)) == 1


def test_create_shard__is_an_hdf5_file_with_aligned_datasets_and_no_row(
    shard: tuple[Path, ShardEntry], extraction: Any
) -> None:
    path, entry = shard
    assert [extent.offset % 64 for extent in entry.extents()] == [0, 0, 0, 0]
    with h5py.File(path) as file:
        assert {name: (d.shape, d.dtype.str) for name, d in file.items()} == {
            "features": ((10, 6), "<f4"),
            "digests": ((10, 32), "|u1"),
            "views": ((10,), "|u1"),
            "checksums": ((10,), "<u8"),
        }
        assert {name: file[name].id.get_offset() for name in file} == {
            name: getattr(entry, name).offset for name in file
        }
        np.testing.assert_array_equal(file["digests"], extraction.digests)
        np.testing.assert_array_equal(file["views"], np.arange(10))
    assert not ShardReader(path, entry).written().any()
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert [item.name for item in path.parent.iterdir()] == ["shard-00000.h5"]


def test_create_shard__equal_plans_give_equal_bytes(
    tmp_path: Path, shard: tuple[Path, ShardEntry], extraction: Any
) -> None:
    _create(tmp_path, extraction, number=1)
    assert (tmp_path / "shard-00001.h5").read_bytes() == shard[0].read_bytes()


def test_create_shard_and_commit__order_of_what_reaches_the_disk(
    tmp_path: Path, extraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: calls.append(name) or call(*args)

    for name in ("posix_fallocate", "pwrite", "fsync", "fdatasync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    entry = _create(tmp_path, extraction)
    # The plan is on the disk before it has a name, and the name before anything refers to it.
    assert calls == ["posix_fallocate", "pwrite", "pwrite", "fsync", "replace", "fsync"]
    calls.clear()
    with _writer(tmp_path / entry.file, entry) as writer:
        writer.write(np.arange(4), extraction.features[:4])
        writer.commit()
    assert calls == ["pwrite", "pwrite", "fdatasync"]


def test_create_shard__disk_full(tmp_path: Path, extraction: Any) -> None:
    with pytest.raises(ResourceError, match=r"shard-00000\.h5: the disk is full; free some space"):
        _create(tmp_path, extraction, dim=1 << 50)
    assert list(tmp_path.iterdir()) == []


def test_create_shard__plan_of_unequal_lengths(tmp_path: Path, extraction: Any) -> None:
    with pytest.raises(ValueError, match=r"a plan of digests \(10, 32\) and views \(9,\)"):
        _create(tmp_path, extraction, n_views=9)


def test_write__any_order(shard: tuple[Path, ShardEntry], extraction: Any) -> None:
    path, entry = shard
    with _writer(path, entry) as writer:
        for slots in ([9, 0, 1, 2, 5], [8], [], [4, 3]):
            writer.write(np.array(slots, np.int64), extraction.features[slots])
        writer.commit()
    reader = ShardReader(path, entry)
    assert np.flatnonzero(~reader.valid()).tolist() == [6, 7]
    order = np.array([3, 9, 1, 1, 8])
    np.testing.assert_array_equal(reader.take(order), extraction.features[order])
    np.testing.assert_array_equal(reader.take(np.arange(0, 6)), extraction.features[:6])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:6], extraction.features[:6])
        np.testing.assert_array_equal(file["checksums"], reader.checksums)


def test_write__wrong_shapes(shard: tuple[Path, ShardEntry], extraction: Any) -> None:
    with _writer(*shard) as writer:
        with pytest.raises(ValueError, match=r"features \(2, 6\) for 3 rows of width 6"):
            writer.write(np.arange(3), extraction.features[:2])
        for slots in ([-1], [10]):
            with pytest.raises(ValueError, match="slots must lie between 0 and 9"):
                writer.write(np.array(slots), extraction.features[:1])


def test_take__torn_row_is_not_served(shard: tuple[Path, ShardEntry], extraction: Any) -> None:
    path, entry = shard
    with _writer(path, entry) as writer:
        writer.write(np.arange(10), extraction.features)
        # A power cut may keep a row's checksum and lose the end of its features.
        os.pwrite(writer._descriptor, bytes(8), entry.features.offset + 3 * 24 + 16)
    reader = ShardReader(path, entry)
    assert np.flatnonzero(~reader.valid()).tolist() == [3]
    np.testing.assert_array_equal(reader.take(np.array([2, 4])), extraction.features[[2, 4]])
    with pytest.raises(CacheError, match=r"shard-00000\.h5: row 3 fails its checksum; mend it with: tlc"):
        reader.take(np.arange(10))


def test_take__rows_that_were_swapped(shard: tuple[Path, ShardEntry], extraction: Any) -> None:
    path, entry = shard
    with _writer(path, entry) as writer:
        writer.write(np.arange(10), extraction.features)
    data = bytearray(path.read_bytes())
    for extent, size in ((entry.features, 24), (entry.digests, 32), (entry.views, 1), (entry.checksums, 8)):
        a, b = (slice(extent.offset + i * size, extent.offset + (i + 1) * size) for i in (1, 2))
        data[a], data[b] = data[b], data[a]
    path.write_bytes(data)
    with pytest.raises(CacheError, match="row 1 fails its checksum"):
        ShardReader(path, entry).take(np.arange(10))


def test_clear_torn__becomes_never_written(shard: tuple[Path, ShardEntry], extraction: Any) -> None:
    path, entry = shard
    with _writer(path, entry) as writer:
        writer.write(np.arange(5), extraction.features[:5])
        for slot in (1, 4):
            os.pwrite(writer._descriptor, b"\xff", entry.features.offset + slot * 24)
        assert np.flatnonzero(writer.clear_torn()).tolist() == [0, 2, 3]
    assert np.flatnonzero(ShardReader(path, entry).written()).tolist() == [0, 2, 3]


def test_shard_reader__file_shorter_than_the_entry(shard: tuple[Path, ShardEntry]) -> None:
    path, entry = shard
    far = replace(entry, checksums=Extent(1 << 60, 80))
    with pytest.raises(CacheError, match=rf"{path.stat().st_size} bytes, but its rows end at {(1 << 60) + 80}"):
        ShardReader(path, far)
    os.truncate(path, entry.checksums.offset + 79)
    with pytest.raises(CacheError, match="bytes, but its rows end at"):
        ShardReader(path, entry)
