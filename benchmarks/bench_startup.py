"""What a person waits for beside the arithmetic: whole processes of `tlc`, against importing numpy and h5py.

Run: .venv/bin/python benchmarks/bench_startup.py [--repeats 7]
Prints JSON: median, minimum and maximum wall seconds of each process, and their ratios to the peer's median. The
processes take turns, so that a drift of the machine's speed falls on all alike. The cache is made: 397 rows of 512
features, two classes, as large as the ants and bees of the tutorial.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from made_cache import make_cache
from turns import TLC, Finished, in_turns, run_process, spread

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


def main(repeats: int) -> dict[str, object]:
    """Measure and return what is printed."""
    with tempfile.TemporaryDirectory() as folder:
        cache = str(made(Path(folder)))
        commands = {
            PEER: [sys.executable, "-c", "import numpy, h5py"],
            "tlc --help": [*TLC, "--help"],
            "tlc train-head CACHE --solver logistic": [*TLC, "train-head", cache, "--solver", "logistic"],
        }
        sides = {name: partial(run_process, words, folder=folder) for name, words in commands.items()}
        finished: dict[str, list[Finished]] = in_turns(sides, repeats=repeats)
    seconds = {name: spread([one.seconds for one in runs]) for name, runs in finished.items()}
    peer = seconds[PEER]["median"]
    figures = {name: {**values, "ratio": round(values["median"] / peer, 2)} for name, values in seconds.items()}
    return {"n": repeats, "seconds": figures, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    print(json.dumps(main(parser.parse_args().repeats), indent=1))
