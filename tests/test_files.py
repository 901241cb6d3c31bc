from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from transfercache.errors import LockedError, ResourceError
from transfercache.files import locked, resource_errors, sha256_bytes, sha256_file, write_atomic


def test_write_atomic__replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for data in (b"one", b"two" * 100_000):
        write_atomic(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sha256_file(tmp_path / "file") == sha256_bytes(data)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("none/file", "No such file or directory"), ("taken/file", "Not a directory"), ("folder", "Is a directory")],
)
def test_write_atomic__to_a_place_that_cannot_be__is_a_resource_error(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match=rf"{path}: cannot be written \({reason}\); choose another path"):
        write_atomic(tmp_path / path, b"data")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "taken"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EDQUOT, "the disk is full; free some space and run the same command again"),
        (errno.EROFS, r"cannot be written \(Read-only file system\); choose another path"),
        (errno.EFBIG, r"cannot be written \(File too large\); choose another path"),
    ],
)
def test_resource_errors__name_the_path_and_the_way_out(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(ResourceError, match=f"{tmp_path}: {message}"), resource_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_resource_errors__as_torch_raises_them(tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResourceError, match=f"{tmp_path}: the disk is full"), resource_errors(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="of its own"), resource_errors(tmp_path):
        raise RuntimeError("of its own")


def test_resource_errors__of_what_lies_below__are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), resource_errors(tmp_path):
        (tmp_path / "a" / "b").read_bytes()


def test_locked__twice__names_what_is_at_work(tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".lock", what="the cache"),
        pytest.raises(LockedError, match="the cache: another process is writing to it; wait for it to end"),
        locked(tmp_path / ".lock", what="the cache"),
    ):
        pass
    with locked(tmp_path / ".lock", what="the cache"):
        pass
