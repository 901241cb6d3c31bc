"""Which rows train, which choose the epoch, and which are reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfercache.arrays import Int64Array
from transfercache.errors import DataError
from transfercache.images.manifest import Manifest
from transfercache.randomness import derive_seed
from transfercache.splits import Split, divide_roles, hash_split


@dataclass(frozen=True, eq=False)
class DividedRows:
    """Manifest rows, int64 and ascending, that share no row."""

    train: Int64Array
    held_out: Int64Array  # empty without --select
    reported: Int64Array  # empty where no split can be reported


def divide_rows(manifest: Manifest, *, select: float | None, seed: int) -> DividedRows:
    """Take the labelled training rows, the share `select` of them held out by content, and the reported rows.

    Rows that the manifest knows to be unreadable are in none of them. Raises DataError where nothing can train, or
    nothing can be held out without dividing a group.
    """
    roles = divide_roles(manifest.split, np.where(manifest.is_readable(), manifest.labels, -1))
    train, reported_rows = np.flatnonzero(roles.is_train), np.flatnonzero(roles.is_reported)
    if not len(train):
        raise DataError(f"{manifest.shown}: no labelled training image; give train/ a folder per class, or --labels")
    if select is None:
        return DividedRows(train, train[:0], reported_rows)
    is_held_out = _draw_held_out(manifest, train, share=select, seed=seed)
    if not is_held_out.any():
        raise DataError(
            f"{manifest.shown}: every class is a single image or group, so none can be held out; use neither --select "
            "nor --try"
        )
    return DividedRows(train[~is_held_out], train[is_held_out], reported_rows)


def _draw_held_out(manifest: Manifest, train: Int64Array, *, share: float, seed: int) -> npt.NDArray[np.bool_]:
    drawn = hash_split(
        manifest.labels[train],
        manifest.component[train],
        manifest.digests[train],
        val_fraction=share,
        # Another draw than the split's own: the rows next in its order are not a sample of their own kind.
        seed=derive_seed(seed, "select"),
    )
    return np.equal(drawn, Split.VAL)
