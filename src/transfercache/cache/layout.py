"""The layout of a shard file: made once, whole, before its first row; the only place that calls HDF5."""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from transfercache.cache.catalogue import ALIGNMENT_BYTES, STORAGE_DTYPES, Extent, ShardEntry
from transfercache.cache.plain_file import opened_plain, write_all
from transfercache.files import replacing

# More than HDF5's own metadata takes.
_HEADER_BYTES = 1 << 16
_COPY_BYTES = 1 << 20


def create_shard(
    path: Path,
    *,
    digests: npt.NDArray[np.uint8],
    views: npt.NDArray[np.uint8],
    row_shape: tuple[int, ...],
    dtype: str,
    batch_size: int,
) -> ShardEntry:
    """Lay out a shard for the planned rows (digests [n, 32], views [n]) with no row written; return where it lies.

    Where `row_shape` is not (D,), HDF5 shows the features as [n, *row_shape]; their bytes are those of [n, D].
    The file appears under its name only when its space is allocated and its plan is on the disk. Raises
    ResourceError, and leaves nothing behind, where the disk is full.
    """
    n_rows = len(digests)
    if digests.shape != (n_rows, 32) or views.shape != (n_rows,):
        raise ValueError(f"a plan of digests {digests.shape} and views {views.shape}")
    with replacing(path) as temporary:
        needed = shard_bytes(n_rows, dim=math.prod(row_shape), dtype=dtype)
        # Asked first because HDF5 does not fail cleanly on a full disk.
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        places = lay_out(temporary, n_rows=n_rows, row_shape=row_shape, dtype=dtype)
        entry = ShardEntry(path.name, n_rows, math.prod(row_shape), dtype, batch_size, *places)
        with opened_plain(temporary, os.O_RDWR) as descriptor:
            _allocate(descriptor)
            write_all(descriptor, np.ascontiguousarray(digests), entry.digests.offset)
            write_all(descriptor, np.ascontiguousarray(views), entry.views.offset)
    return entry


def shard_bytes(n_rows: int, *, dim: int, dtype: str) -> int:
    """Return what a shard of so many rows takes at most: features, digests, views, checksums, and HDF5's metadata."""
    return n_rows * (dim * STORAGE_DTYPES[dtype].itemsize + 32 + 1 + 8) + _HEADER_BYTES


def lay_out(
    path: Path, *, n_rows: int, row_shape: tuple[int, ...], dtype: str
) -> tuple[Extent, Extent, Extent, Extent]:
    """Create the HDF5 file with its four empty datasets; return their extents in the order of the catalogue."""
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "features": (STORAGE_DTYPES[dtype], (n_rows, *row_shape)),
        "digests": (np.dtype("u1"), (n_rows, 32)),
        "views": (np.dtype("u1"), (n_rows,)),
        "checksums": (np.dtype("<u8"), (n_rows,)),
    }
    # Contiguous and allocated at once, so that offsets are final; without fill or times, so that equal plans give
    # equal bytes.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    # HDF5's own locks fail on some shared disks; the cache folder has a lock, and this name is ours alone.
    extents = []
    with h5py.File(path, "w", locking=False, alignment_threshold=1, alignment_interval=ALIGNMENT_BYTES) as file:
        for name, (kind, shape) in shapes.items():
            space, type_id = h5py.h5s.create_simple(shape), h5py.h5t.py_create(kind)
            dataset = h5py.h5d.create(file.id, name.encode(), type_id, space, dcpl=properties)
            extents.append(Extent(dataset.get_offset(), kind.itemsize * math.prod(shape)))
    features, digests, views, checksums = extents
    return features, digests, views, checksums


def _allocate(descriptor: int) -> None:
    """Reserve the whole file's space, so that writing a row in place never meets a full disk."""
    size = os.fstat(descriptor).st_size
    if sys.platform == "darwin":  # has no posix_fallocate; what HDF5 wrote is kept, the rest is written as zeros
        for offset in range(0, size, _COPY_BYTES):
            write_all(descriptor, np.frombuffer(os.pread(descriptor, _COPY_BYTES, offset), np.uint8), offset)
    else:
        os.posix_fallocate(descriptor, 0, size)
