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
from made_cache import make_cache

from transfercache.environment import describe_environment
from transfercache.randomness import derive_rng
from transfercache.splits import Split

PEER = "python -c 'import numpy, h5py'"
N_TRAIN, N_VAL, DIM = 244, 153, 512


def made(folder: Path) -> Path:
    """Write a cache of two Gaussian classes that overlap a little, and return its folder."""
    rng = derive_rng(0, "bench-startup")
    n_rows = N_TRAIN + N_VAL
    labels = rng.integers(0, 2, n_rows)
    features = rng.standard_normal((n_rows, DIM)).astype(np.float32) + 0.2 * labels[:, None].astype(np.float32)
    split = np.where(np.arange(n_rows) < N_TRAIN, Split.TRAIN, Split.VAL)
    return make_cache(folder, features, labels, split)


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
        cache = str(made(Path(folder)))
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
