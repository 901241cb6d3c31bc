"""The rows that every strategy is given: all good training rows, and the reported ones, the same for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from tqdm import tqdm

from transfercache.arrays import BoolArray, Int64Array
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import CacheError, DataError, DecodeError
from transfercache.images.decode import decode_image
from transfercache.images.files import HashedFile
from transfercache.images.manifest import Manifest
from transfercache.images.processes import decode_ahead
from transfercache.splits import SPLIT_NAMES, Split, count_straddling, divide_roles
from transfercache.stopwatch import Stopwatch

Loaded = TypeVar("Loaded")

# Enough to bridge one slow image.
_IMAGES_AHEAD = 128


@dataclass(frozen=True, eq=False)
class ComparedRows:
    """Good, labelled training and reported rows; `manifest` holds these alone, `row` says where they came from."""

    manifest: Manifest  # n rows
    row: Int64Array  # int64 [n], ascending rows of the whole manifest
    reported_code: Split
    n_straddling: int  # groups, or sets of equal images, of all good labelled rows that the given split divides

    @property
    def is_train(self) -> BoolArray:
        """bool [n]."""
        return np.asarray(self.manifest.split == Split.TRAIN)

    @property
    def is_reported(self) -> BoolArray:
        """bool [n]."""
        return np.asarray(self.manifest.split == self.reported_code)

    @property
    def reported(self) -> str:
        """The reported split's name."""
        return next(name for name, code in SPLIT_NAMES.items() if code == self.reported_code)

    @property
    def n_train(self) -> int:
        """How many rows train."""
        return int(self.is_train.sum())

    @property
    def n_reported(self) -> int:
        """M."""
        return int(self.is_reported.sum())

    @property
    def n_train_per_class(self) -> Int64Array:
        """int64 [C]."""
        labels = self.manifest.labels[self.is_train]
        return np.bincount(labels, minlength=len(self.manifest.class_names)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """64 hex digits that change with any row's content, label, split or group, and with their order."""
        return self.manifest.rows_digest()

    def divide(self, table: FeatureTable) -> tuple[FeatureTable, FeatureTable]:
        """Return the training rows of `table` in all their views, and the reported ones in view 0, in this order.

        Raises CacheError where the table is not of this data.
        """
        first = table.subset((table.view == EVAL_VIEW) & np.isin(table.row, self.row))
        if not np.array_equal(first.row, self.row):
            raise CacheError("the cache lacks rows of this data; run the same command again")
        if not (
            np.array_equal(first.labels, self.manifest.labels) and np.array_equal(first.split, self.manifest.split)
        ):
            raise CacheError("the cache was relabelled while it was being compared; run the same command again")
        return table.subset(np.isin(table.row, self.row[self.is_train])), first.subset(self.is_reported)

    def renumber(self, table: FeatureTable) -> FeatureTable:
        """Return the compared rows of `table` in all their views, numbered as in `manifest`; raises as `divide`."""
        self.divide(table)
        compared = table.subset(np.isin(table.row, self.row))
        return replace(compared, row=np.searchsorted(self.row, compared.row))


def select_rows(manifest: Manifest, *, is_good: BoolArray) -> ComparedRows:
    """Take the good rows (bool [N]) that train or are reported; raises DataError where none is to be reported."""
    roles = divide_roles(manifest.split, np.where(is_good, manifest.labels, -1))
    if roles.reported is None:
        raise DataError(
            f"{manifest.shown}: no labelled image is held out, so nothing can be compared; "
            "give some the split val or test, or a larger --val-fraction"
        )
    row = np.flatnonzero(roles.is_train | roles.is_reported)
    # As `classes.check_classes` counts them, so that the warning and the figure agree.
    known = manifest.subset(np.flatnonzero(is_good))
    n_straddling = count_straddling(known.split, known.labels, known.component)
    return ComparedRows(manifest.subset(row), row, roles.reported, n_straddling)


def find_unreadable(manifest: Manifest, *, workers: int | None) -> dict[int, str]:
    """Decode every labelled image once; returns {row: reason} of those that cannot be, hashed or decoded."""
    bad = dict(manifest.unreadable)
    rows = np.flatnonzero((manifest.labels >= 0) & (manifest.split != Split.NONE) & manifest.is_readable())

    with closing(_each(manifest, rows, _check, workers=workers, desc="check")) as images:
        for row, checked in zip(rows.tolist(), images, strict=True):
            if isinstance(error := checked.exception(), DecodeError):
                bad[row] = error.reason
            else:
                checked.result()  # raises what is not the image's fault
    return bad


def load_pixels(
    manifest: Manifest, transform: Callable[[Image], npt.NDArray[np.uint8]], *, workers: int | None
) -> npt.NDArray[np.uint8]:
    """Return the transformed images of all rows, stacked in their order; raises DecodeError."""
    with closing(_each(manifest, np.arange(manifest.n_rows), transform, workers=workers, desc="decode")) as images:
        return np.stack([image.result() for image in images])


def _each(
    manifest: Manifest, rows: Int64Array, transform: Callable[[Image], Loaded], *, workers: int | None, desc: str
) -> Generator[Future[Loaded], None, None]:
    """Yield what the transform, which must be one that can be pickled, makes of the images of the rows."""
    progress = tqdm(total=len(rows), desc=desc, unit="img", file=sys.stderr, disable=None)
    images = decode_ahead(
        (manifest.file(row) for row in rows.tolist()),
        partial(_load, transform),
        n_images=len(rows),
        workers=workers,
        window=_IMAGES_AHEAD,
        watch=Stopwatch(),
    )
    with progress, closing(images):
        for _, loaded in images:
            yield loaded
            progress.update()


def _load(transform: Callable[[Image], Loaded], file: HashedFile) -> Loaded:
    return transform(decode_image(file.read(), file.shown))


def _check(_: Image) -> None:
    """Do nothing: that it can be decoded is all there is to know."""
