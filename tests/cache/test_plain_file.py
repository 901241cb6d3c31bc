from __future__ import annotations

import os
from pathlib import Path

import pytest

from transfercache.cache.plain_file import opened_plain, read_plain
from transfercache.errors import CacheError


def test_read_plain__regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"seven b")
    assert read_plain(tmp_path / "file", max_bytes=7) == b"seven b"


def test_read_plain__larger_than_the_limit(tmp_path: Path) -> None:
    with open(tmp_path / "bomb", "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space, and must not be read
    with pytest.raises(CacheError, match=r"bomb: 1099511627776 bytes, more than the 100 that tlc reads; remove"):
        read_plain(tmp_path / "bomb", max_bytes=100)


def test_opened_plain__link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(CacheError, match="link: is a link; remove the folder"), opened_plain(tmp_path / "link"):
        pass


def test_opened_plain__fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CacheError, match="fifo: not a regular file"), opened_plain(tmp_path / "fifo"):
        pass


def test_opened_plain__folder_and_missing(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a regular file"), opened_plain(tmp_path):
        pass
    with pytest.raises(CacheError, match=r"gone: cannot be opened \(No such file"), opened_plain(tmp_path / "gone"):
        pass
