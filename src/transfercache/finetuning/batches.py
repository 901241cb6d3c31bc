"""Rows in, batches of inputs out: decoded a bounded way ahead, in an order that those that decode do not touch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Int64Array, UInt8Array
from transfercache.errors import DecodeError
from transfercache.finetuning.augment import Augmentation
from transfercache.finetuning.options import FinetuneOptions
from transfercache.images.files import HashedFile
from transfercache.images.manifest import Manifest
from transfercache.images.processes import decode_ahead
from transfercache.randomness import derive_rng
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

Item = TypeVar("Item")

#: Batches that may lie decoded and waiting: enough to hide an image that takes long, little memory (19 MB at 224 px).
PREFETCHED_BATCHES = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step takes."""

    rows: Int64Array  # int64 [B], manifest rows
    inputs: npt.NDArray[np.generic]  # [B, ...]: of images their pixels, uint8 [B, crop, crop, 3]


@dataclass
class Reader(ABC):
    """Where the batches of a run come from; what it has `bad` (row -> reason) it leaves out."""

    options: FinetuneOptions
    stopwatch: Stopwatch
    bad: dict[int, str] = field(default_factory=dict, init=False)

    def readable(self, rows: Int64Array) -> Int64Array:
        """Return `rows` without those known to be bad, in the same order."""
        return leave_out(rows, self.bad)

    def training_batches(
        self, rows: Int64Array, epoch: int, *, after: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the epoch's batches: order and augmentation depend on seed, epoch and row, not on the workers.

        Those up to the row `after`, which ended a batch, are left out without being read.
        """
        order = derive_rng(self.options.seed, "order", epoch).permutation(rows)
        start = 0 if after is None else int(np.flatnonzero(order == after)[0]) + 1
        return self._batches(order[start:], epoch)

    def eval_batches(self, rows: Int64Array) -> Generator[Batch, None, None]:
        """Yield the rows in their order, as the eval transform shows them."""
        return self._batches(self.readable(rows), None)

    @abstractmethod
    def _batches(self, rows: Int64Array, epoch: int | None) -> Generator[Batch, None, None]:
        """Yield `rows` in their order, augmented as in this epoch; None: as the eval transform shows them."""


@dataclass
class ImageReader(Reader):
    """Reads rows of a manifest as pixels, and notes those that cannot be read, or are not what was hashed."""

    manifest: Manifest
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        self.bad.update(self.manifest.unreadable)
        #: bool [N]: compared with its digest, once in a process.
        self._is_checked = np.zeros(self.manifest.n_rows, dtype=np.bool_)

    def _batches(self, rows: Int64Array, epoch: int | None) -> Generator[Batch, None, None]:
        for images in in_batches(self._images(rows, epoch), self.options.batch_size):
            numbers, pixels = zip(*images, strict=True)
            yield Batch(np.array(numbers, dtype=np.int64), np.stack(pixels))

    def _images(self, rows: Int64Array, epoch: int | None) -> Iterator[tuple[int, UInt8Array]]:
        """Yield (row, uint8 [crop, crop, 3]) in the order of `rows`; a bad image is noted and left out."""
        options = self.options
        images = decode_ahead(
            ((row, self._file(row)) for row in rows.tolist()),
            Augmentation(self.preprocessing, epoch, options.augment, options.crop_area, options.seed),
            n_images=len(rows),
            workers=options.workers,
            window=PREFETCHED_BATCHES * options.batch_size,
            watch=self.stopwatch,
            is_light=options.augment != "trivial",
        )
        with closing(images):
            for (row, _), loaded in images:
                try:
                    pixels = loaded.result()
                except DecodeError as error:
                    self.bad[row] = error.reason
                    continue
                self._is_checked[row] = True
                yield row, pixels

    def _file(self, row: int) -> HashedFile:
        file = self.manifest.file(row)
        return replace(file, digest=None) if self._is_checked[row] else file


def leave_out(rows: Int64Array, bad: Collection[int]) -> Int64Array:
    """Return `rows` without the `bad` ones, in the same order."""
    return rows[[row not in bad for row in rows.tolist()]]


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield batches of `batch_size`, the last one smaller, or one item larger.

    One item left over joins the batch before it: batch norm in train mode has no variance over a single image, and
    a step on one image would weigh as much as a step on a whole batch.
    """
    largest = batch_size + 1 if batch_size > 1 else 1
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) > largest:
            yield held[:batch_size]
            del held[:batch_size]
    if held:
        yield held
