"""Files of a cache folder as untrusted input: regular files only, never a link, a FIFO or a device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfercache.errors import CacheError, ResourceError

#: The next step that ends every message about a cache that cannot be trusted.
REMAKE = "remove the folder and make it anew with: tlc extract-features DATA"
#: The same where the catalogue is sound: what is damaged is then computed, or written, again.
MEND = "mend it with: tlc extract-features DATA --verify-content"

#: What tlc writes is digests in the main, and they do not compress: where fewer of a file's bytes than one in so many
#: are on the disk, the rest is holes that would be read as zeros, into memory.
MAX_HOLLOWNESS = 1000

# O_NONBLOCK: opening a FIFO for reading would otherwise wait for a writer that never comes.
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def opened_plain(path: Path, flags: int = os.O_RDONLY, *, advice: str = REMAKE) -> Iterator[int]:
    """Give a descriptor of the regular file `path` for the block; `advice` ends the message of an error.

    Raises CacheError where it is missing, a link or not a regular file, ResourceError where it may not be opened.
    """
    try:
        descriptor = os.open(path, flags | _OPEN_FLAGS)
    except PermissionError as error:
        raise ResourceError(f"{path}: cannot be opened ({error.strerror}); change its permissions") from error
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
        raise CacheError(f"{path}: {reason}; {advice}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CacheError(f"{path}: not a regular file; {advice}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_plain(path: Path, *, max_bytes: int, advice: str = REMAKE) -> bytes:
    """Return the bytes of the regular file `path`, whose size is compared with the limit before it is read.

    Raises CacheError where it is larger than `max_bytes` or hollow, and what `opened_plain` raises.
    """
    with opened_plain(path, advice=advice) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise CacheError(f"{path}: {size} bytes, more than the {max_bytes} that tlc reads; {advice}")
        check_stored(path, descriptor, size // MAX_HOLLOWNESS, advice=advice)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(size)


def check_stored(path: Path, descriptor: int, n_bytes: int, *, advice: str = REMAKE) -> None:
    """Raise CacheError unless so many bytes of a file were ever written: holes take no space, and read as zeros."""
    stored = end = 0
    try:
        while stored < n_bytes:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            stored += end - start
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data behind `end`
            size = os.fstat(descriptor).st_size
            raise CacheError(f"{path}: hardly any of its {size} bytes are on the disk; {advice}") from error
        # Else the file system does not know of holes, and has none.
    os.lseek(descriptor, 0, os.SEEK_SET)


def write_all(descriptor: int, data: npt.NDArray[Any], offset: int) -> None:
    """Write the bytes of a C-contiguous array at `offset`; the system may take less than it is given at a time."""
    left = data.reshape(-1).view(np.uint8).data
    while len(left):
        n_written = os.pwrite(descriptor, left, offset)
        left, offset = left[n_written:], offset + n_written
