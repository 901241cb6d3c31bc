"""Real processes, ended in the middle of an extraction; then the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.commands.extract import extract_features
from transfercache.errors import CacheError

N_IMAGES = 16
DEADLINE_SECONDS = 120

Start = Callable[..., "subprocess.Popen[str]"]


def _words(photos: Path, cache_dir: Path) -> list[str]:
    return ["extract-features", str(photos), "--weights=random", "--batch-size=2", f"--cache-dir={cache_dir}", "--json"]


def _n_held(cache_dir: Path) -> int:
    """Rows in the shard that is being written, as the next run will find them."""
    try:
        (folder,) = cache_dir.iterdir()
        return int(Store(folder).slots().valid.sum())
    except (ValueError, FileNotFoundError, CacheError):  # no folder or no catalogue yet
        return 0


def _end_in_the_middle(process: subprocess.Popen[str], cache_dir: Path, sent: signal.Signals) -> tuple[str, str]:
    """Send the signal as soon as a few rows are there, and wait for the end."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while _n_held(cache_dir) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    return process.communicate(timeout=DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, draw_photos: Callable[..., Path]) -> Path:
    """The cache of the same photographs, extracted in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    photos = draw_photos(folder / "pets", N_IMAGES // 2)
    return extract_features(photos, weights="random", batch_size=2, cache_dir=folder / "cache").cache


@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (
            signal.SIGTERM,
            143,
            "tlc: told to end (SIGTERM); what was computed is kept, and the same command goes on from there\n",
        ),
        (
            signal.SIGINT,
            130,
            "tlc: interrupted; what was computed is kept, and the same command goes on from there\n",
        ),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGINT"],
)
def test_extraction__ended_in_the_middle__goes_on_from_there(
    start: Start,
    draw_photos: Callable[..., Path],
    tmp_path: Path,
    tlc: Callable[..., Any],
    undisturbed: Path,
    sent: signal.Signals,
    code: int,
    line: str,
) -> None:
    photos, cache_dir = draw_photos(tmp_path / "pets", N_IMAGES // 2), tmp_path / "cache"
    process = start(*_words(photos, cache_dir))
    out, err = _end_in_the_middle(process, cache_dir, sent)
    assert (process.returncode, out) == (code, "")
    assert err.startswith("engine ")
    assert err.partition("\n")[2] == line
    n_held = _n_held(cache_dir)
    assert 4 <= n_held < N_IMAGES
    (folder,) = cache_dir.iterdir()
    with pytest.raises(CacheError, match="its extraction is not finished: run the same extract-features again"):
        open_cache(folder)

    again = tlc(*_words(photos, cache_dir))
    assert again.code == 0
    document = json.loads(again.out)
    assert (document["computed"], document["reused"]) == (N_IMAGES - n_held, n_held)
    features, labels = open_cache(folder).arrays()
    expected, expected_labels = open_cache(undisturbed).arrays()
    assert features.tobytes() == expected.tobytes()
    assert labels.tolist() == expected_labels.tolist()
    assert (folder / "shard-00000.h5").read_bytes() == (undisturbed / "shard-00000.h5").read_bytes()


def test_second_writer__is_told_that_another_is_at_work(
    start: Start, draw_photos: Callable[..., Path], tmp_path: Path, tlc: Callable[..., Any]
) -> None:
    photos, cache_dir = draw_photos(tmp_path / "pets", N_IMAGES // 2), tmp_path / "cache"
    process = start(*_words(photos, cache_dir))
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while _n_held(cache_dir) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        ended = tlc(*_words(photos, cache_dir))
        (folder,) = cache_dir.iterdir()
        assert (ended.code, ended.out) == (6, "")
        assert ended.err == (
            f"tlc: {folder}: another process is writing to it; wait for it to end, then run this again\n"
        )
    finally:
        process.kill()
        process.communicate()
