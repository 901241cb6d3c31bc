"""An image's bytes where they lie; without Pillow, because a manifest, which heads read too, names such files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transfercache.errors import DecodeError


@dataclass(frozen=True, slots=True)
class HashedFile:
    """An image where it lies, and what its bytes have to be."""

    path: Path
    shown: str  # the path that errors name
    digest: bytes | None  # the SHA-256 of its bytes (32 bytes); None: they have been compared

    def read(self) -> bytes:
        """Return the file's bytes; raises DecodeError where it cannot be read, or is not what was hashed."""
        data = read_image_bytes(self.path, self.shown)
        if self.digest is not None and hashlib.sha256(data).digest() != self.digest:
            raise DecodeError(self.shown, "it changed while it was being read; run the same command again")
        return data


def read_image_bytes(path: Path, shown: str) -> bytes:
    """Return the bytes of a file; raises DecodeError, naming it as `shown`, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(shown, f"cannot be read ({error.strerror or error})") from error
