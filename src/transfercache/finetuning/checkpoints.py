"""Checkpoints of a run, in a folder of their own: killed anywhere, it goes on from the newest, and ends the same."""

from __future__ import annotations

import logging
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transfercache import config
from transfercache.backbones.weights import REFUSALS
from transfercache.environment import installed_versions
from transfercache.errors import UsageError
from transfercache.files import locked, replacing, resource_errors

SUFFIX = ".checkpoints"
# Within an epoch: what a kill costs at most, where writing takes a second.
_SECONDS_BETWEEN = 120.0
_LOCK = "lock"

logger = logging.getLogger(__name__)

State = dict[str, Any]  # nested dicts and lists of tensors, numbers and words: what torch.load takes as weights only


@dataclass
class Checkpoints:
    """The folder, and what the run depends on; `identity` is set by the run (name -> plain value) before it reads.

    The newest `keep` are kept. Without `resume` a folder with checkpoints in it is refused. A `part` of the run has
    checkpoints of its own in the same folder, under a `prefix`.
    """

    folder: Path
    keep: int = config.KEEP_CHECKPOINTS
    resume: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    _written: float = field(default_factory=time.perf_counter)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out for the block; afterwards the folder is gone if no checkpoint is in it.

        Raises UsageError at once for checkpoints that are not to be resumed, LockedError where another run writes.
        """
        with resource_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / _LOCK, what=str(self.folder)):
            if self._kept() and not self.resume:
                raise UsageError(
                    f"{self.folder}: holds the checkpoints of an unfinished run; go on with it by --resume, "
                    "or remove that folder to begin anew"
                )
            try:
                yield
            finally:
                if not self._kept():
                    for path in (*self._torn(), self.folder / _LOCK):
                        path.unlink()
                    self.folder.rmdir()

    def part(self, prefix: str, *, is_first: bool) -> Checkpoints:
        """Return the checkpoints of a part of the run; only of the first it is said that there is none to resume."""
        return Checkpoints(
            self.folder, self.keep, resume=self.resume and is_first, identity=self.identity, prefix=prefix
        )

    def newest(self) -> State | None:
        """Return the newest whole checkpoint, or None; damaged ones are named in a warning and passed over.

        Raises UsageError, naming what differs, for one of another run.
        """
        for path in reversed(self._paths()):
            state = _load(path)
            if state is None:
                logger.warning("%s: torn or damaged; it is passed over", path)
                continue
            self.check_identity(path, state["identity"])
            if state["versions"] != installed_versions():
                logger.warning("%s: made by other versions of torch or what decodes; the end may differ in bits", path)
            return state
        if self.resume:
            logger.warning("%s: no checkpoint to go on from; the run begins at the first epoch", self.folder)
        return None

    def is_due(self) -> bool:
        """Whether the last one was written long enough ago for one within an epoch."""
        return time.perf_counter() - self._written >= _SECONDS_BETWEEN

    def write(self, state: State, *, epoch: int, n_trained: int) -> None:
        """Write the state of a run that has trained `n_trained` images in `epoch`, and remove the oldest.

        Raises ResourceError where the disk is full; those that are there stay.
        """
        path = self.folder / f"{self.prefix}{epoch:06d}-{n_trained:012d}.pt"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"identity": dict(self.identity), "versions": installed_versions(), **state}, file)
        for old in self._paths()[: -self.keep]:
            old.unlink()
        self._written = time.perf_counter()

    def remove(self) -> None:
        """Remove them all, the MODEL being written; or those of this part, its result being kept."""
        records = [] if self.prefix else sorted(self.folder.glob("[!0-9]*.pt"))  # of parts
        # Records last: they say what run the others are of.
        for path in (*self._paths(), *self._torn(), *records):
            path.unlink()

    def check_identity(self, path: Path, kept: Mapping[str, Any]) -> None:
        """Raise UsageError, naming what differs, where `path` was `kept` by another run."""
        names = [name for name in {**kept, **self.identity} if kept.get(name) != self.identity.get(name)]
        if names:
            differing = ", ".join(_difference(name, kept.get(name), self.identity.get(name)) for name in names)
            raise UsageError(
                f"{path}: of another run ({differing}); give all as it was then, or remove that folder to begin anew"
            )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.prefix}[0-9]*.pt"))  # without those of parts

    def _torn(self) -> list[Path]:
        """Return what runs left that were killed while they wrote."""
        return list(self.folder.glob(".*.tmp"))

    def _kept(self) -> list[Path]:
        return list(self.folder.glob("*.pt"))


def _difference(name: str, then: object, now: object) -> str:
    is_digest = any(isinstance(value, str) and len(value) == 64 for value in (then, now))
    return f"other {name}" if is_digest else f"{name} {then} then, {now} now"


def _load(path: Path) -> State | None:
    """Return what a file holds; None where a byte of it is not what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself does not look at the sums
                return None
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, *REFUSALS):
        return None
    return state
