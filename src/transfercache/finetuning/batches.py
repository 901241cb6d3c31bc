"""Rows in, batches of inputs out: decoded in threads a bounded way ahead, in an order that the threads do not touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL.Image import Image, fromarray

from transfercache.errors import DecodeError
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.trivial import trivial_augment
from transfercache.images.ahead import run_ahead
from transfercache.images.decode import load_image
from transfercache.images.manifest import Manifest
from transfercache.images.transforms import eval_pixels, train_pixels
from transfercache.randomness import derive_rng
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]

#: Batches that may lie decoded and waiting: enough to hide an image that takes long, little memory (19 MB at 224 px).
PREFETCHED_BATCHES = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step takes."""

    rows: Int64Array  # int64 [B], manifest rows
    inputs: npt.NDArray[np.generic]  # [B, ...]: of images their pixels, uint8 [B, crop, crop, 3]


class Reader(Protocol):
    """Where the batches of a run come from; what it has `bad` (row -> reason) it leaves out."""

    bad: dict[int, str]

    def readable(self, rows: Int64Array) -> Int64Array:
        """Return `rows` without those known to be bad, in the same order."""
        ...

    def training_batches(self, rows: Int64Array, epoch: int, *, after: int | None = None) -> Iterator[Batch]:
        """Yield the epoch's batches of `rows`, those that come after the row `after` in its order."""
        ...

    def eval_batches(self, rows: Int64Array) -> Iterator[Batch]:
        """Yield the rows in their order, as they are evaluated."""
        ...


@dataclass
class ImageReader:
    """Reads rows of a manifest as batches, and remembers in `bad` (row -> reason) those that cannot be read."""

    manifest: Manifest
    preprocessing: Preprocessing
    options: FinetuneOptions
    stopwatch: Stopwatch
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bad.update(self.manifest.unreadable)

    def readable(self, rows: Int64Array) -> Int64Array:
        """Return `rows` without those known to be bad, in the same order."""
        return rows[[row not in self.bad for row in rows.tolist()]]

    def training_batches(self, rows: Int64Array, epoch: int, *, after: int | None = None) -> Iterator[Batch]:
        """Yield the epoch's augmented batches: order and crops depend on seed, epoch and row, not on the threads.

        Those up to the row `after`, which ended a batch, are left out without being read.
        """
        order = derive_rng(self.options.seed, "order", epoch).permutation(rows)
        start = 0 if after is None else int(np.flatnonzero(order == after)[0]) + 1

        def load(row: int) -> UInt8Array:
            if self.options.augment == "none":
                return eval_pixels(self._image(row), self.preprocessing)
            rng = derive_rng(self.options.seed, "augment", epoch, row)
            area = self.options.crop_area
            pixels = train_pixels(self._image(row), self.preprocessing, rng, least_area=area)
            return pixels if self.options.augment == "crop" else np.array(trivial_augment(fromarray(pixels), rng))

        return group_images(self._images(order[start:], load), self.options.batch_size)

    def eval_batches(self, rows: Int64Array) -> Iterator[Batch]:
        """Yield the rows in their order, through the eval transform."""

        def load(row: int) -> UInt8Array:
            return eval_pixels(self._image(row), self.preprocessing)

        return group_images(self._images(self.readable(rows), load), self.options.batch_size)

    def _image(self, row: int) -> Image:
        return load_image(self.manifest.path_of(row), self.manifest.paths[row])

    def _images(self, rows: Int64Array, load: Callable[[int], UInt8Array]) -> Iterator[tuple[int, UInt8Array]]:
        """Yield (row, uint8 [crop, crop, 3]) in the order of `rows`; a bad image is noted and left out."""

        def timed(row: int) -> UInt8Array:
            with self.stopwatch.stage("decode"):
                return load(row)

        window = PREFETCHED_BATCHES * self.options.batch_size
        for row, loaded in run_ahead(rows.tolist(), timed, workers=self.options.workers, window=window):
            try:
                pixels = loaded.result()
            except DecodeError as error:
                self.bad[row] = error.reason
                continue
            yield row, pixels


def group_images(images: Iterable[tuple[int, UInt8Array]], batch_size: int) -> Iterator[Batch]:
    """Yield batches of `batch_size`, the last one smaller, or one image larger.

    One image left over joins the batch before it: batch norm in train mode has no variance over a single image, and
    a step on one image would weigh as much as a step on a whole batch.
    """
    largest = batch_size + 1 if batch_size > 1 else 1
    held: list[tuple[int, UInt8Array]] = []
    for image in images:
        held.append(image)
        if len(held) > largest:
            yield _stack(held[:batch_size])
            del held[:batch_size]
    if held:
        yield _stack(held)


def _stack(images: list[tuple[int, UInt8Array]]) -> Batch:
    rows, pixels = zip(*images, strict=True)
    return Batch(np.array(rows, dtype=np.int64), np.stack(pixels))
