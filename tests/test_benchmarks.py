"""Each benchmark runs once, tiny; what it prints about time is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, *words: str, folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_benchmark__is_run_here() -> None:
    assert sorted(path.name for path in BENCHMARKS.glob("bench_*.py")) == [
        "bench_cache.py",
        "bench_compare.py",
        "bench_startup.py",
        "bench_storage_dtype.py",
        "bench_views.py",
    ]


def test_bench_startup(tmp_path: Path) -> None:
    printed = run("bench_startup.py", "--repeats=1", folder=tmp_path)
    assert printed["n"] == 1
    assert set(printed["seconds"]) == {
        "python -c 'import numpy, h5py'",
        "tlc --help",
        "tlc train-head CACHE --solver logistic",
    }


def test_bench_cache(tmp_path: Path) -> None:
    printed = run("bench_cache.py", "--rows=3000", "--dim=16", "--repeats=1", "--folder=.", folder=tmp_path)
    assert (printed["rows"], printed["dim"], printed["n"]) == (3000, 16, 1)
    assert printed["write"]["share_of_raw"]["median"] > 0
    assert printed["write"]["closing_proof"]["median_s"] > 0
    assert printed["read"]["share_of_raw"]["median"] > 0
    assert printed["shuffled"]["times_in_order"]["median"] > 0


def test_bench_views(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_views.py", "photos", "--weights=random", "--views=1,2", "--seeds=1", folder=tmp_path)
    assert list(printed["views"]) == ["1", "2"]
    assert "accuracy_of_the_mean_of_views" in printed["views"]["2"]["logistic"]


def test_bench_storage_dtype(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_storage_dtype.py", "photos", "--weights=random", "--seeds=1", "--repeats=1", folder=tmp_path)
    assert printed["rows"] == 16
    assert 0 < printed["largest_relative_difference"] < 1e-3
    assert printed["float16"]["shard_bytes"] < printed["float32"]["shard_bytes"]


def _write_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = rng.normal(level, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def test_bench_compare(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_compare.py", "photos", "--weights=random", "--repeats=1", folder=tmp_path)
    assert list(printed["strategies"]) == ["tutorial-frozen", "knn", "logistic", "linear"]
    assert set(printed["strategies"]["logistic"]["again"]) == {"seconds", "times_faster"}
