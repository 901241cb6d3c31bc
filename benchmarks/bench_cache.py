"""How fast a cache is written, proved and read, against raw files of the same bytes on the same disk.

Run: .venv/bin/python benchmarks/bench_cache.py [--rows 100000] [--dim 512] [--repeats 5] [--folder WHERE]
Prints JSON. The two sides of each ratio take turns, so that a drift of the machine's speed falls on both alike.

write     ShardWriter.write and commit in blocks of 1,024 rows, into a shard laid out before; its peer: pwrite of the
          same blocks into a preallocated file, with fdatasync as often. The closing proof of all rows is told apart.
read      all rows in order, after a first read has proved them, and the same as a table (paths, labels, a look for
          values that are not finite); their peer: a copy out of a numpy memory map.
shuffled  all rows once in random order, 512 at a time, as a solver's minibatches take them, against the same in order.
Both files are in the system's page cache when they are read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from made_cache import COMMIT_ROWS, make_cache
from turns import in_turns, ratios, timed

from transfercache.cache.layout import create_shard
from transfercache.cache.reader import open_cache
from transfercache.cache.shard import ShardReader, ShardWriter
from transfercache.environment import describe_environment

BATCH_ROWS = 512

Array = np.ndarray


def write_ours(folder: Path, features: Array) -> tuple[float, float]:
    """Return the seconds of writing all rows durably, and those of their closing proof."""
    path = folder / "shard-00000.h5"
    n_rows, dim = features.shape
    digests, views = np.random.default_rng(0).integers(0, 256, (n_rows, 32), np.uint8), np.zeros(n_rows, np.uint8)
    entry = create_shard(path, digests=digests, views=views, row_shape=(dim,), dtype="float32", batch_size=32)
    descriptor = os.open(path, os.O_RDWR)
    try:
        writer = ShardWriter(path, entry, descriptor)

        def write() -> None:
            for start in range(0, n_rows, COMMIT_ROWS):
                block = features[start : start + COMMIT_ROWS]
                writer.write(np.arange(start, start + len(block)), block)
                writer.commit()

        return timed(write), timed(lambda: require(ShardReader(path, entry).valid().all()))
    finally:
        os.close(descriptor)
        path.unlink()


def require(is_right: object) -> None:
    """End the benchmark where what it measures is wrong."""
    if not is_right:
        raise SystemExit("a row fails its checksum")


def write_raw(folder: Path, features: Array) -> float:
    """Return the seconds of writing the same bytes into a preallocated file, with as many commits."""
    path = folder / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, features.nbytes)
        os.fsync(descriptor)

        def write() -> None:
            for start in range(0, len(features), COMMIT_ROWS):
                os.pwrite(descriptor, features[start : start + COMMIT_ROWS].data, start * features.strides[0])
                os.fdatasync(descriptor)

        return timed(write)
    finally:
        os.close(descriptor)
        path.unlink()


def measure_writing(folder: Path, features: Array, *, repeats: int) -> dict[str, object]:
    """Time durable writing and the proof that follows it."""
    proofs: list[float] = []

    def ours() -> float:
        seconds, proof = write_ours(folder, features)
        proofs.append(proof)
        return seconds

    seconds = in_turns({"tlc": ours, "raw": lambda: write_raw(folder, features)}, repeats=repeats)
    gigabytes = features.nbytes / 1e9
    return {**ratio(seconds["raw"], seconds["tlc"], gigabytes), "closing_proof": speed(proofs[1:], gigabytes)}


def measure_reading(folder: Path, features: Array, *, repeats: int) -> dict[str, object]:
    """Time reading in order, after the first proof, and in random order."""
    n_rows = len(features)
    split = np.ones(n_rows, np.uint8)
    cache = open_cache(make_cache(folder, features, np.arange(n_rows) % 2, split))
    (entry,) = cache.catalogue.shards
    raw_path = folder / "raw"
    features.tofile(raw_path)
    raw = np.memmap(raw_path, np.float32, "r", shape=features.shape)
    first = timed(cache.table)
    require(np.array_equal(cache.table().features, features))
    shard = ShardReader(cache.folder / entry.file, entry)
    shard.take(np.arange(n_rows))  # proves every row
    order = np.random.default_rng(1).permutation(n_rows)

    def epoch(index: Array) -> None:
        for start in range(0, n_rows, BATCH_ROWS):
            shard.take(index[start : start + BATCH_ROWS])

    sides = {
        "raw": lambda: timed(lambda: np.array(raw)),
        "table": lambda: timed(cache.table),
        "take": lambda: timed(lambda: shard.take(np.arange(n_rows))),
        "in order": lambda: timed(lambda: epoch(np.arange(n_rows))),
        "shuffled": lambda: timed(lambda: epoch(order)),
    }
    seconds = in_turns(sides, repeats=repeats)
    gigabytes = features.nbytes / 1e9
    return {
        "first_read_with_proof_gb_per_s": round(gigabytes / first, 2),
        "read": ratio(seconds["raw"], seconds["take"], gigabytes),
        "read_as_table": ratio(seconds["raw"], seconds["table"], gigabytes),
        "shuffled": {
            "times_in_order": ratios(seconds["shuffled"], seconds["in order"]),
            **speed(seconds["shuffled"], gigabytes),
        },
    }


def ratio(raw: list[float], ours: list[float], gigabytes: float) -> dict[str, object]:
    """Return our speed as a share of the raw one, pair by pair, and both in GB/s."""
    return {"share_of_raw": ratios(raw, ours), "tlc": speed(ours, gigabytes), "raw": speed(raw, gigabytes)}


def speed(seconds: list[float], gigabytes: float) -> dict[str, float]:
    """Return the median of GB/s and its range."""
    return {
        "gb_per_s": round(gigabytes / statistics.median(seconds), 2),
        "median_s": round(statistics.median(seconds), 4),
    }


def main(*, n_rows: int, dim: int, repeats: int, folder: str | None) -> dict[str, object]:
    """Measure and return what is printed."""
    features = np.random.default_rng(0).standard_normal((n_rows, dim)).astype(np.float32)
    with tempfile.TemporaryDirectory(dir=folder) as where:
        path = Path(where).resolve()
        figures = {
            "write": measure_writing(path, features, repeats=repeats),
            **measure_reading(path, features, repeats=repeats),
        }
    return {"rows": n_rows, "dim": dim, "n": repeats, **figures, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure; the system's temporary one by default")
    given = parser.parse_args()
    figures = main(n_rows=given.rows, dim=given.dim, repeats=given.repeats, folder=given.folder)
    print(json.dumps(figures, indent=1))
