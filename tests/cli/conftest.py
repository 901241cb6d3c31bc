from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfercache.cli.main import run
from transfercache.commands.extract import extract_features
from transfercache.commands.train import train_head


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, stdout, and stderr (log lines after the rest)."""

    code: int
    out: str
    err: str


def write_photos(folder: Path, n_per_class: int, *, class_names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Class folders of small noisy images, each class brighter than the one before it."""
    for label, name in enumerate(class_names):
        (folder / name).mkdir(parents=True)
        for i in range(n_per_class):
            pixels = np.random.default_rng([label, i]).integers(50 * label, 50 * label + 90, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def draw_photos() -> Callable[..., Path]:
    return write_photos


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pets/ (six cats, six dogs), its cache in cache/, and head.safetensors; never to be changed."""
    folder = tmp_path_factory.mktemp("made")
    photos = write_photos(folder / "pets", 6)
    extraction = extract_features(photos, weights="random", batch_size=4, cache_dir=folder / "cache")
    train_head(extraction, C=1.0, out=folder / "head.safetensors")
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy of the made cache, for a test that changes it."""
    (source,) = (made / "cache").iterdir()
    return Path(shutil.copytree(source, tmp_path / "copied" / source.name))


@pytest.fixture
def tlc(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> Callable[..., Ended]:
    """Runs a command line in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str | Path) -> Ended:
        caplog.clear()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tlc", *map(str, words)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                run()
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        log = "".join(f"tlc: {message}\n" for message in caplog.messages)
        return Ended(code, captured.out, captured.err + log)

    return command


# A shell starts what runs in its background deaf to it, and its children with it.
_HEAR_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command line in a process of its own, in tmp_path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    def command(*words: str | Path, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", f"{_HEAR_CTRL_C}; from transfercache.cli.main import run; run()", *map(str, words)],
            cwd=tmp_path,
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )

    return command
