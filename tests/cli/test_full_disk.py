"""Disks that take no more: exit code 6 and one line, and nothing half written is left."""

from __future__ import annotations

import resource
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
