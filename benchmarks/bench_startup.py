"""What a person waits for beside the arithmetic: whole processes of `tlc`, against importing numpy and h5py.

Run: .venv/bin/python benchmarks/bench_startup.py [--repeats 7]
Prints JSON: median, minimum and maximum wall seconds of each process, and their ratios to the peer's median. The
processes take turns, so that a drift of the machine's speed falls on all alike. The cache is made: 397 rows of 512
features, two classes, as large as the ants and bees of the tutorial.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from transfercache.cache.rows import OK, Rows
from transfercache.cache.store import find_or_create
from transfercache.environment import describe_environment
from transfercache.randomness import derive_rng
from transfercache.spec import ExtractSpec, Preprocessing
from transfercache.splits import Split

PEER = "python -c 'import numpy, h5py'"
N_TRAIN, N_VAL, DIM = 244, 153, 512


def make_cache(folder: Path) -> Path:
    """Write a cache of two Gaussian classes that overlap a little, and return its folder."""
    rng = derive_rng(0, "bench-startup")
    n_rows = N_TRAIN + N_VAL
    labels = rng.integers(0, 2, n_rows)
    features = rng.standard_normal((n_rows, DIM)).astype(np.float32) + 0.2 * labels[:, None].astype(np.float32)
    digests = rng.integers(0, 256, (n_rows, 32)).astype(np.uint8)
    preprocessing = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = ExtractSpec("resnet18", "0" * 64, "pooled", preprocessing)
    canaries = np.ones((4, DIM), dtype=np.float32)
    store = find_or_create(folder, data_name="made", data_root=folder, spec=spec, canaries=canaries)
    stat = np.zeros(n_rows, dtype=np.int64)
    with store.writing():
        shard = store.begin_shard(digests, np.zeros(n_rows, dtype=np.uint8), batch_size=32)
        with store.writer(shard) as writer:
            writer.write(np.arange(n_rows), features)
        store.finish_shard(shard)
        rows = Rows(
            path=tuple(f"{row}.png" for row in range(n_rows)),
            size=stat,
            mtime_ns=stat,
            ctime_ns=stat,
            inode=stat,
            digest=digests,
            view=np.zeros(n_rows, dtype=np.uint8),
            label=labels,
            split=np.where(np.arange(n_rows) < N_TRAIN, Split.TRAIN, Split.VAL).astype(np.uint8),
            group=np.arange(n_rows),
            status=np.full(n_rows, OK, dtype=np.uint8),
            reason=("",) * n_rows,
            shard=np.full(n_rows, shard, dtype=np.int32),
            slot=np.arange(n_rows),
        )
        store.publish(
            rows, class_names=("a", "b"), run={"computed": n_rows, "weights": {"kind": "random", "where": ""}}
        )
    return store.folder


def measure(commands: dict[str, list[str]], *, repeats: int, folder: str) -> dict[str, list[float]]:
    """Return the wall seconds of each command, run in turns after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):
        for name, words in commands.items():
            start = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True, cwd=folder)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(repeats: int) -> dict[str, object]:
    """Measure and return what is printed."""
    tlc = str(Path(sys.executable).with_name("tlc"))
    with tempfile.TemporaryDirectory() as folder:
        cache = str(make_cache(Path(folder)))
        commands = {
            PEER: [sys.executable, "-c", "import numpy, h5py"],
            "tlc --help": [tlc, "--help"],
            "tlc train-head CACHE --solver logistic": [tlc, "train-head", cache, "--solver", "logistic"],
        }
        seconds = measure(commands, repeats=repeats, folder=folder)
    peer = statistics.median(seconds[PEER])
    figures = {
        name: {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "ratio": round(statistics.median(values) / peer, 2),
        }
        for name, values in seconds.items()
    }
    return {"n": repeats, "seconds": figures, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    print(json.dumps(main(parser.parse_args().repeats), indent=1))
