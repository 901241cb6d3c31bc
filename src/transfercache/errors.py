"""The error tree; each class owns its exit code, and its message names the value and the next step.

TlcError                1  a bug in tlc, unless a subclass says otherwise
  UsageError            2  the command's words are off
    DivergenceError        rates at which the loss stops being a number
  DataError             3  nothing to read, a missing column, fewer than two trainable classes
    DecodeError            one file is not a readable image
  ArtefactError         4  a file that tlc wrote, or should have: torn, altered, hostile, of another schema
    CacheError             ... of a cache folder
      DamageError          what is wrong with caches that were proved
    ModelError             ... of a MODEL file
  WeightsError          5  weights: not there, of another architecture, digest wrong
    DownloadError          a download: unreachable, or its digest is wrong
  ResourceError         6  disk full, no permission, out of memory, a missing extra or device
    OutOfMemoryError       a batch of images does not fit into the device's memory
    LockedError            another writer is at work
  Terminated          143  SIGTERM, as batch systems send it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class TlcError(Exception):
    """Base of every error that tlc raises on purpose."""

    exit_code = 1


class UsageError(TlcError):
    """The words of the command are off: an unknown backbone, strategy or split."""

    exit_code = 2


class DivergenceError(UsageError):
    """The loss stopped being a number in `epoch`, after `passes` images through the network and `seconds` in all."""

    def __init__(self, message: str, *, epoch: int, passes: int, seconds: float) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.passes = passes
        self.seconds = seconds


class DataError(TlcError):
    """The data cannot be used as it is."""

    exit_code = 3


class DecodeError(DataError):
    """One file is not a readable image; `reason` is the part of the message after the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.path, self.reason)  # processes that decode send it


class ArtefactError(TlcError):
    """A file that tlc wrote, or claims to have written, cannot be trusted or is of another schema."""

    exit_code = 4


class CacheError(ArtefactError):
    """A cache folder is torn, altered, hostile, of another schema, or not of this data."""


class DamageError(CacheError):
    """Caches were proved and some are damaged; `document` says what of each was proved, in plain JSON."""

    def __init__(self, message: str, *, document: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.document = document


class ModelError(ArtefactError):
    """A MODEL file is torn, altered, hostile or of another schema."""


class WeightsError(TlcError):
    """Backbone weights are missing, of another architecture, or not those that were asked for."""

    exit_code = 5


class DownloadError(WeightsError):
    """A download is unreachable, or its digest is wrong."""


class ResourceError(TlcError):
    """Disk full, no permission, out of memory, a missing extra or an absent device."""

    exit_code = 6


class OutOfMemoryError(ResourceError):
    """A batch of images does not fit into the device's memory."""


class LockedError(ResourceError):
    """Another process is writing to this cache."""


class Terminated(TlcError):
    """SIGTERM arrived; what was committed to a cache is kept."""

    exit_code = 143


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' for the closest of `known`, or '' where none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
