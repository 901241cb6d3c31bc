"""What heads say of training rows that they have not seen: one fit a fold, each in the settings already chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from transfercache.arrays import Float32Array, Int64Array
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import DataError
from transfercache.heads.linear_head import LinearHead
from transfercache.heads.select import divide_folds

Fit = Callable[[FeatureTable], LinearHead]


class OutOfFold(NamedTuple):
    """Images of a table that could be held out, in its order, and what a head without them says of each."""

    rows: Int64Array  # [M], indices of the table, view 0
    logits: Float32Array  # [M, C]


def out_of_fold(table: FeatureTable, fit: Fit, *, seed: int) -> OutOfFold:
    """Fit each fold's training rows, all views, and return the logits of the images held out of it.

    The folds are those of the choice of C by the same seed, where that was on all rows. An image whose component holds
    all that there is of a class is never held out, nor is one whose fold would lack a class. Raises DataError where
    that leaves none.
    """
    folds = divide_folds(table.labels, table.group, table.view == EVAL_VIEW, seed=seed)
    if not folds:
        raise DataError("no class has two images (or groups), one of which could be held out; add images")
    logits = [
        fit(table.subset(fold.train)).logits(table.subset(fold.held).features)
        for fold in tqdm(folds, desc="held out", file=sys.stderr, disable=None, leave=False)
    ]
    rows = np.concatenate([fold.held for fold in folds])
    order = np.argsort(rows)
    return OutOfFold(rows[order], np.concatenate(logits)[order])
