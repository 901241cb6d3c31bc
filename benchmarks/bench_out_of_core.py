"""Heads on a cache that need not fit into memory: time, passes, and the peak of `tlc train-head` processes.

Run: .venv/bin/python benchmarks/bench_out_of_core.py [--rows 1281167] [--dim 512] [--classes 1000] [--C 0.01]
Prints JSON. The cache is made, block by block (Gaussian classes, rows sorted by class, 4 % of them held out), or is the
one that --folder holds already. Each solver once, as a process of its own: `process_s` from its start to its end, of
that `load_s` and `fit_s`, and `peak_gib` of its memory (ru_maxrss). `passes` are those over all training rows; the
starts on parts of the rows are in the time alone.

`times_arithmetic` is the time of the fit over that of the arithmetic of its passes at the machine's sgemm rate, the
best of a large product before and after: 4 N D K for a pass of `logistic` (logits, gradient), 2 N D^2 for the one of
`ridge` (Gram matrix), whose whole path of penalties comes from that pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from made_cache import make_cache
from turns import TLC, run_process, sgemm_gflops

from transfercache.cache.catalogue import read_catalogue
from transfercache.environment import describe_environment
from transfercache.splits import Split

#: The share of rows held out, as of ImageNet's own 50,000 among 1,331,167.
_HELD_OUT = 0.04
#: Distance of class means over the noise of a column, and how fast columns shrink: classes overlap, as real ones do.
_SEPARATION = 0.2
_DECAY = -0.25


@dataclass(frozen=True, eq=False)
class MadeRows:
    """float32 [N, D] that is made when it is read, so that it never lies in memory."""

    labels: np.ndarray  # int64 [N], sorted
    means: np.ndarray  # float32 [C, D]

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        return len(self.labels), self.means.shape[1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return float32 [B, D]; a block has a generator of its own."""
        labels = self.labels[rows]
        noise = np.random.default_rng((1, rows.start)).standard_normal((len(labels), self.shape[1]), np.float32)
        scale = np.arange(1, self.shape[1] + 1, dtype=np.float32) ** _DECAY
        return np.ascontiguousarray((self.means[labels] + noise) * scale)


def make(folder: Path, *, n_rows: int, dim: int, n_classes: int) -> None:
    """Write the cache under `folder`."""
    rng = np.random.default_rng(0)
    means = (_SEPARATION * rng.standard_normal((n_classes, dim))).astype(np.float32)
    labels = np.sort(rng.integers(n_classes, size=n_rows))
    split = np.where(rng.random(n_rows) < _HELD_OUT, Split.VAL, Split.TRAIN).astype(np.uint8)
    make_cache(folder, MadeRows(labels, means), labels, split)


def made_cache(folder: Path, *, n_rows: int, dim: int, n_classes: int) -> Path:
    """Return the cache under `folder`, made there by a process of its own, whose memory counts nowhere."""
    if not list(folder.glob("made-*")):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make, folder, n_rows=n_rows, dim=dim, n_classes=n_classes).result()
    (cache,) = folder.glob("made-*")
    return cache


def train(cache: Path, folder: Path, solver: str, *words: str) -> dict[str, Any]:
    """Run `train-head` once, and return its figures beside the machine's rate of now."""
    catalogue = read_catalogue(cache)
    before = sgemm_gflops()
    out = str(folder / f"{solver}.safetensors")
    finished = run_process([*TLC, "train-head", str(cache), "--solver", solver, "--out", out, "--json", *words])
    gflops = max(before, sgemm_gflops())
    document = json.loads(finished.stdout)
    chosen, seconds = document["chosen"], document["seconds"]
    dim, n_classes = catalogue.dim, len(catalogue.class_names)
    operations = 2 * dim**2 if solver == "ridge" else 4 * dim * n_classes
    arithmetic = chosen["passes"] * document["n_train"] * operations / gflops / 1e9  # seconds
    return {
        "process_s": round(finished.seconds, 2),
        "load_s": round(seconds["load"], 2),
        "fit_s": round(seconds["fit"], 2),
        "peak_gib": round(finished.peak_bytes / 2**30, 3),
        "passes": chosen["passes"],
        "relative_gap": chosen.get("relative_gap"),  # null: a closed form
        "C": chosen["C"],
        "accuracy": document["reported"]["accuracy"],
        "sgemm_gflops": round(gflops, 1),
        "arithmetic_s": round(arithmetic, 3),
        "times_arithmetic": round(seconds["fit"] / arithmetic, 2),
    }


def main(folder: Path, *, n_rows: int, dim: int, n_classes: int, C: str) -> dict[str, Any]:
    """Measure and return what is printed."""
    cache = made_cache(folder, n_rows=n_rows, dim=dim, n_classes=n_classes)
    with tempfile.TemporaryDirectory() as heads:
        figures = {
            "ridge": train(cache, Path(heads), "ridge"),
            "logistic": train(cache, Path(heads), "logistic", "--C", C),
        }
    catalogue = read_catalogue(cache)
    return {
        "rows": sum(shard.n_rows for shard in catalogue.shards),
        "dim": catalogue.dim,
        "classes": len(catalogue.class_names),
        "cache_gib": round(sum(path.stat().st_size for path in cache.iterdir()) / 2**30, 3),
        "n": 1,
        **figures,
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--C", default="0.01", help="of logistic")
    parser.add_argument("--folder", type=Path, help="keeps the cache there; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = (given.folder or Path(temporary)).absolute()
        printed = main(where, n_rows=given.rows, dim=given.dim, n_classes=given.classes, C=given.C)
    print(json.dumps(printed, indent=1))
