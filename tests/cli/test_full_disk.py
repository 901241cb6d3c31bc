"""Disks that take no more: exit code 6 and one line, and nothing half written is left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# Less than the checkpoint of a head, and than any network.
_LIMIT_BYTES = 4096


@contextmanager
def _file_limit() -> Iterator[None]:
    """Let the system refuse a file at its 4096th byte (EFBIG), as a full disk does anywhere; Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoint__is_refused_and_leaves_no_folder(tlc: Run, made: Path, tmp_path: Path) -> None:
    words = ("--weights=random", "--backbone=mobilenet_v3_small", "--unfreeze=none", "--epochs=2", "--out=m")
    with _file_limit():
        ended = tlc("finetune", made / "pets", *words)
    assert (ended.code, ended.out) == (6, "")
    assert ended.err.splitlines()[-1] == (
        "tlc: m.checkpoints/000002-000000000000.pt: cannot be written (File too large); choose another path"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["torchvision", "safetensors"])
def test_export__is_refused_and_an_older_file_stays(tlc: Run, made: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "net").write_text("older")
    with _file_limit():
        ended = tlc("export", made / "head.safetensors", f"--format={name}", "--out=net")
    assert (ended.code, ended.out, ended.err) == (
        6,
        "",
        "tlc: net: cannot be written (File too large); choose another path\n",
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
@pytest.mark.parametrize("words", ["cache list", "cache list --json", "doctor --json", "--help"])
def test_stdout__is_refused_in_one_line(tmp_path: Path, words: str) -> None:
    def ended(redirection: str, unbuffered: str) -> subprocess.CompletedProcess[str]:
        code = "from transfercache.cli.main import run; run()"
        return subprocess.run(
            ["bash", "-c", f'"$PYTHON" -c "{code}" {words} {redirection}'],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": unbuffered},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    reason = "the output or a temporary file cannot be written (No space left on device)"
    for unbuffered in ("", "1"):
        done = ended(">/dev/full", unbuffered)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("next: ")]
        assert (done.returncode, lines) == (6, [f"tlc: {reason}; free some space and run the same command again"])
    assert ended(">/dev/full 2>&1", "").returncode == 6
