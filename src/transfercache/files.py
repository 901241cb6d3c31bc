"""Files that are whole or not there: atomic replace, sync, SHA-256, and the operating system's lock."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from transfercache.errors import LockedError, ResourceError

_READ_BYTES = 1 << 20

_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
# The path has a file where a folder should be, a folder where the file should be, or leads nowhere.
_WRONG_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (POSIX: a rename is not, until its directory is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a crash, sees the old file or the new one, never a part.

    Raises ResourceError where the disk is full or the folder cannot be written; the old file is kept.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write, which replaces `path` when the block ends well; else the old file stays.

    Raises ResourceError as `write_atomic` does, and at once where `path` is a folder.
    """
    temporary = _temporary(path)
    with resource_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        try:
            yield temporary
            with open(temporary, "ab") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Make the folder of `path`, and prove that a file can be made there before hours of work go into it.

    Raises ResourceError naming `path`, also where it is a folder.
    """
    with resource_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path)
        probe.touch()
        probe.unlink()


def check_readable(path: Path) -> None:
    """Prove that `path` can be read: torch and safetensors take what the system refuses for damaged or not there.

    Raises ResourceError naming `path` and what the system says.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.read(1)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be read ({error.strerror}); change its permissions, or get the file again"
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals about `path` into a ResourceError with a next step."""
    try:
        yield
    except (OSError, RuntimeError) as raised:
        # torch.save raises a RuntimeError of its own over what the system refused.
        error = raised if isinstance(raised, OSError) else raised.__context__
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: the disk is full; free some space and run the same command again") from error
        if error.errno in (*_NO_PERMISSION, errno.EFBIG) or (error.errno in _WRONG_PLACE and _is_about(error, path)):
            raise ResourceError(f"{path}: cannot be written ({error.strerror}); choose another path") from error
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """Whether it is `path`, its temporary sibling or a folder above it that is refused, and nothing below it."""
    named = Path(str(error.filename))
    return named.parent == path.parent or named in path.parents


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, *, what: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the operating system's lock on `path` for the block; a dead holder keeps none.

    Raises LockedError at once where another process holds it; with `on_wait` calls that, and waits for it to end.
    """
    lock = filelock.FileLock(path)
    with resource_errors(path):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            if on_wait is None:
                raise LockedError(
                    f"{what}: another process is writing to it; wait for it to end, then run this again"
                ) from error
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
