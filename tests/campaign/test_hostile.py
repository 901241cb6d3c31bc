"""Each hostile file by name: an error of the tree that says what is wrong, soon, and in little memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.slots import read_slots
from transfercache.cache.verify import verify_folder
from transfercache.errors import CacheError, ResourceError

from . import hostile
from .reading import CLEAN, Original, in_forks, read_all

# Forking with threads about is safe here: the child runs no code but ours, and ends by _exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# Of most file systems.
PAGE = 4096


@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_hostile_file__is_refused(tmp_path: Path, name: str) -> None:
    make, message = hostile.HOSTILE[name]
    folder = hostile.make_cache(tmp_path)
    make(folder)

    def read(_: int) -> str:
        return f"{_refusal(_read_table, folder)}\n{_refusal(_read_slots, folder)}"

    ((_, outcome),) = in_forks(read, [0], per_fork=1)
    assert re.search(message, outcome), outcome


def test_verify__of_a_hollow_shard__ends_soon(tmp_path: Path) -> None:
    folder = hostile.make_cache(tmp_path)
    hostile.a_billion_rows_that_are_not_there(folder)

    def verify(_: int) -> str:
        return "\n".join(verify_folder(folder).problems)

    ((_, outcome),) = in_forks(verify, [0], per_fork=1, max_seconds=2)
    assert "hardly any of its" in outcome, outcome


def test_copy_with_holes__of_a_valid_cache__is_read(tmp_path: Path) -> None:
    """As `cp --sparse=always` makes one: pages of zeros take no space."""
    folder = hostile.make_cache(tmp_path)
    original = Original.of(folder)
    for path in folder.glob("shard-*"):
        data = path.read_bytes()
        path.unlink()
        with open(path, "wb") as file:
            for start in range(0, len(data), PAGE):
                page = data[start : start + PAGE]
                file.write(page) if page.strip(b"\0") else file.seek(len(page), os.SEEK_CUR)
            file.truncate(len(data))
    assert read_all(folder, original, is_by_path=True, is_by_content=True) == CLEAN


def _read_table(folder: Path) -> None:
    open_cache(folder).table()


def _read_slots(folder: Path) -> None:
    read_slots(folder, read_catalogue(folder).shards)


def _refusal(read: Callable[[Path], None], folder: Path) -> str:
    try:
        read(folder)
    except (CacheError, ResourceError) as error:
        return str(error)
    return "read without an error"
