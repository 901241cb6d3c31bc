"""A cache of made rows, for the benchmarks that need one without images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfercache.cache.provenance import Run
from transfercache.cache.rows import OK, Rows
from transfercache.cache.store import find_or_create
from transfercache.environment import describe_environment
from transfercache.spec import ExtractSpec, Preprocessing

COMMIT_ROWS = 1024


def make_cache(
    folder: Path,
    features: npt.NDArray[np.float32],  # [N, D]
    labels: npt.NDArray[np.int64],  # [N]
    split: npt.NDArray[np.uint8],  # [N], of splits.Split
    *,
    storage_dtype: str = "float32",
) -> Path:
    """Write a published cache of these rows under `folder`, and return its own folder; commits as extraction does."""
    n_rows, dim = features.shape
    digests = np.random.default_rng(0).integers(0, 256, (n_rows, 32)).astype(np.uint8)
    preprocessing = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = ExtractSpec("resnet18", "0" * 64, "pooled", preprocessing, storage_dtype=storage_dtype)
    canaries = np.ones((4, dim), dtype=np.float32)
    store = find_or_create(folder, data_name="made", data_root=folder, spec=spec, canaries=canaries)
    with store.writing():
        shard = store.begin_shard(digests, np.zeros(n_rows, dtype=np.uint8), batch_size=32)
        with store.writer(shard) as writer:
            for start in range(0, n_rows, COMMIT_ROWS):
                stop = min(start + COMMIT_ROWS, n_rows)
                writer.write(np.arange(start, stop), features[start:stop])
                writer.commit()
        store.finish_shard(shard)
        store.publish(_rows(digests, labels, split, shard), class_names=_names(labels), run=_run(n_rows))
    return store.folder


def _names(labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(f"class {label}" for label in range(int(labels.max()) + 1))


def _rows(
    digests: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], split: npt.NDArray[np.uint8], shard: int
) -> Rows:
    n_rows = len(labels)
    stat = np.zeros(n_rows, dtype=np.int64)
    return Rows(
        path=tuple(f"{row}.png" for row in range(n_rows)),
        size=stat,
        mtime_ns=stat,
        ctime_ns=stat,
        inode=stat,
        digest=digests,
        view=np.zeros(n_rows, dtype=np.uint8),
        label=labels.astype(np.int64),
        split=split.astype(np.uint8),
        group=np.arange(n_rows),
        status=np.full(n_rows, OK, dtype=np.uint8),
        reason=("",) * n_rows,
        shard=np.full(n_rows, shard, dtype=np.int32),
        slot=np.arange(n_rows),
    )


def _run(n_rows: int) -> Run:
    return Run(
        date="2026-01-01T00:00:00+00:00",
        computed=n_rows,
        reused=0,
        checked=0,
        copied_from=None,
        seconds={"total": 0.0},
        engine="eager",
        device="none",
        batch_size=32,
        weights={"kind": "random", "where": ""},
        **describe_environment(),
    )
