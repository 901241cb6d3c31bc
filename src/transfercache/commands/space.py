"""What an extraction is going to write: told before it does, and refused where that is too much."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from transfercache import config
from transfercache.cache.catalogue import MAX_DIM, read_catalogue
from transfercache.cache.layout import shard_bytes
from transfercache.cache.slots import planned_keys
from transfercache.errors import ResourceError, UsageError
from transfercache.extract.plan import wanted_rows
from transfercache.images.manifest import Manifest
from transfercache.report.caches import show_bytes
from transfercache.spec import POOLED, ExtractSpec

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?")


def check_space(
    manifest: Manifest,
    spec: ExtractSpec,
    *,
    dim: int,
    n_views: int,
    max_bytes: str | int | None,
    cache_dir: Path,
    folder: Path | None,
    on_line: Callable[[str], None],
) -> None:
    """Tell what a cache of these images needs beside what is at `folder`, where there is one already.

    Rows that a cache beside it holds count too: they are copied. Raises UsageError where it is more than `max_bytes`
    (None: MAX_BYTES for activations, no bound for embeddings) or a row is too wide for a cache, ResourceError where
    the disk has less.
    """
    if dim > MAX_DIM:
        raise UsageError(
            f"{spec.backbone}, {spec.boundary}: {dim:,} numbers an image, and a cache's row has at most {MAX_DIM:,}; "
            "cut it after a later stage"
        )
    if max_bytes is None and spec.boundary == POOLED:
        return
    limit = parse_bytes(config.MAX_BYTES if max_bytes is None else max_bytes)
    planned = set() if folder is None else planned_keys(folder, read_catalogue(folder).shards)
    n_rows = sum(key not in planned for key in wanted_rows(manifest, n_views))
    if not n_rows:
        return
    needed = shard_bytes(n_rows, dim=dim, dtype=spec.storage_dtype)
    root = cache_dir.absolute()
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if place.is_dir())).free
    figure = f"{spec.boundary}: {n_rows:,} rows of {show_bytes(needed / n_rows)}, {show_bytes(needed)} in all"
    if needed > limit:
        later = "" if spec.boundary == POOLED else ", or cut the network after a later stage"
        raise UsageError(
            f"{figure}, more than --max-bytes {show_bytes(limit)}; pass --max-bytes {-(-needed // 10**9)}GB, or fewer "
            f"--views{later}"
        )
    if needed > free:
        raise ResourceError(
            f"{figure}, and {cache_dir} has {show_bytes(free)} free; free some space, or name another --cache-dir"
        )
    on_line(f"{figure}; {show_bytes(free)} are free")


def parse_bytes(size: str | int) -> int:
    """Return a size in bytes of words such as 20GB or 500 MB, in powers of 1000; raises UsageError for others."""
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise UsageError(f"--max-bytes {size}: give a size such as 20GB or 500MB")
    return round(float(match[1]) * _UNITS[match[2]])
