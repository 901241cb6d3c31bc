"""What float16 storage costs in accuracy and saves in bytes, against float32.

Run: .venv/bin/python benchmarks/bench_storage_dtype.py DATA [--weights PATH] [--seeds 5] [--repeats 7]
Prints JSON: bytes of the shards, the largest relative difference of a row (its length over that of the float32 row),
accuracy on the reported split over fold seeds, rows that the two heads label differently, and the seconds of reading
and proving all rows; the two sides of that ratio take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import transfercache as tc
from transfercache.environment import describe_environment

DTYPES = ("float32", "float16")


def accuracies(extraction: Any, *, seeds: int, folder: str) -> list[float]:
    """Train logistic heads with fold seeds 0, 1, ..."""
    out = f"{folder}/head.safetensors"
    return [tc.train_head(extraction, seed=seed, out=out).reported.accuracy for seed in range(seeds)]


def reading_seconds(folder: Path) -> float:
    """Return the wall seconds of opening a cache and reading all of its rows, each proved."""
    start = time.perf_counter()
    tc.open_cache(folder).table()
    return time.perf_counter() - start


def main(data: str, *, weights: str, seeds: int, repeats: int) -> dict[str, Any]:
    """Measure and return what is printed."""
    with tempfile.TemporaryDirectory() as folder:
        made = {
            dtype: tc.extract_features(data, weights=weights, storage_dtype=dtype, cache_dir=folder, on_bad="skip")
            for dtype in DTYPES
        }
        full, half = (made[dtype].table().features for dtype in DTYPES)
        seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(repeats):
            for dtype in DTYPES:
                seconds[dtype].append(reading_seconds(made[dtype].cache))
        heads = [tc.train_head(made[dtype], out=f"{folder}/{dtype}.safetensors") for dtype in DTYPES]
        labels = [head.predict(features) for head, features in zip(heads, (full, half), strict=True)]
        figures = {
            dtype: {
                "shard_bytes": sum(path.stat().st_size for path in made[dtype].cache.glob("shard-*.h5")),
                "accuracy": [round(value, 4) for value in accuracies(made[dtype], seeds=seeds, folder=folder)],
                "read_s": round(statistics.median(seconds[dtype]), 4),
            }
            for dtype in DTYPES
        }
    differences = np.linalg.norm(half - full, axis=1) / np.linalg.norm(full, axis=1)
    ratios = [a / b for a, b in zip(seconds["float16"], seconds["float32"], strict=True)]
    return {
        **figures,
        "bytes_ratio": round(figures["float16"]["shard_bytes"] / figures["float32"]["shard_bytes"], 3),
        "read_ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
        "largest_relative_difference": float(f"{differences.max():.2e}"),
        "rows_labelled_differently": int(np.sum(labels[0] != labels[1])),
        "rows": len(full),
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    figures = main(given.data, weights=given.weights, seeds=given.seeds, repeats=given.repeats)
    print(json.dumps(figures, indent=1))
