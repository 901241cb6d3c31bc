"""Ends the writer, as SIGKILL would, before every single call that changes a file; then runs it again."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.reader import open_cache
from transfercache.errors import CacheError

from ..killing import run_and_kill

# Forking with threads about is safe here: the child runs no code but ours, and ends by _exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _served(folder: Path) -> np.ndarray | None:
    """The features that a reader is given, None where it is told that there are none yet."""
    try:
        return open_cache(folder).table().features
    except CacheError as error:
        if re.search(r"is not finished: run the same|not a cache folder; make one", str(error)):
            return None
        raise


@pytest.mark.parametrize("is_torn", [False, True])
def test_extraction__killed_before_every_change(tmp_path: Path, make_extraction: Any, is_torn: bool) -> None:
    extraction = make_extraction(n_images=9, bad=4)
    undisturbed = _contents(extraction.run(tmp_path / "undisturbed"))
    expected = extraction.features[np.arange(9) != 4]
    n_written = []
    for before_call in itertools.count():
        cache_dir = tmp_path / str(before_call)
        work = functools.partial(extraction.run, cache_dir)
        if not run_and_kill(work, before_call=before_call, is_torn=is_torn):
            break
        for folder in cache_dir.iterdir() if cache_dir.exists() else ():
            served = _served(folder)
            assert served is None or np.array_equal(served, expected)
        written: list[int] = []
        folder = extraction.run(cache_dir, written=written)
        assert _contents(folder) == undisturbed
        assert list(cache_dir.iterdir()) == [folder]
        n_written.append(len(written))
    # 8 good rows in batches of 4, 3 and 1: the later the kill, the fewer are written again.
    assert n_written == sorted(n_written, reverse=True)
    assert set(n_written) >= {8, 4, 1, 0}
    assert len(n_written) > 45


def test_publishing__killed_before_every_change(tmp_path: Path, make_extraction: Any) -> None:
    extraction, relabelled = make_extraction(n_images=9), make_extraction(n_images=9)
    relabelled.label = 1 - extraction.label
    labels = []
    for before_call in itertools.count():
        folder = extraction.run(tmp_path / str(before_call))
        work = functools.partial(relabelled.run, folder.parent)
        was_killed = run_and_kill(work, before_call=before_call, is_torn=False)
        table = open_cache(folder).table()
        np.testing.assert_array_equal(table.features, extraction.features)
        labels.append(table.labels.tolist())
        relabelled.run(folder.parent)
        assert open_cache(folder).table().labels.tolist() == relabelled.label.tolist()
        assert len(list(folder.glob("rows-*"))) == 1
        if not was_killed:
            break
    # Old labels until the one moment of change, new ones from there.
    n_old = labels.index(relabelled.label.tolist())
    assert labels == [extraction.label.tolist()] * n_old + [relabelled.label.tolist()] * (len(labels) - n_old)
    assert 3 < n_old < len(labels) - 1
