"""Which rows train, which select and which report; and the folds: rows of one group never straddle any of them."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from transfercache.arrays import BoolArray, Int64Array, UInt8Array
from transfercache.errors import UsageError
from transfercache.randomness import derive_rng

#: In the result of `assign_folds`: a row that is in the training part of every fold.
ALWAYS_TRAIN = -1


class Split(IntEnum):
    """The code of a row's split, as stored (uint8)."""

    NONE = 0  # unlabelled rows of data without splits: extracted and scored, never trained on
    TRAIN = 1
    VAL = 2
    TEST = 3


SPLIT_NAMES = {"train": Split.TRAIN, "val": Split.VAL, "test": Split.TEST}


class Roles(NamedTuple):
    """What each of N rows is for."""

    is_train: BoolArray  # [N]
    is_reported: BoolArray  # [N]
    reported: Split | None  # the split of these


def divide_roles(split: UInt8Array, labels: Int64Array) -> Roles:
    """Return which rows train and which are reported, of those whose label is not -1: the ones that can be used.

    Reported is test where it has such rows, else val, else nothing.
    """
    is_in = {code: (split == code) & (labels >= 0) for code in (Split.TRAIN, Split.VAL, Split.TEST)}
    reported = next((code for code in (Split.TEST, Split.VAL) if is_in[code].any()), None)
    is_reported = np.zeros(len(labels), dtype=np.bool_) if reported is None else is_in[reported]
    return Roles(is_in[Split.TRAIN], is_reported, reported)


def join_groups(group: Int64Array, content: UInt8Array) -> Int64Array:
    """Join rows of one group and rows of equal bytes into components, numbered by their first row.

    `group` int64 [N], -1 where the data names none; `content` uint8 [N, 32], all zero where unknown (such rows
    equal no other). Returns int64 [N]: the index of the first row of the row's component.
    """
    n_rows = len(group)
    alone = np.arange(n_rows, dtype=np.int64)
    known = content.any(axis=1)
    _, content_id = np.unique(content.view("V32").ravel() if n_rows else content[:, :0].ravel(), return_inverse=True)
    # Rows without a group or a digest get a number of their own, beyond those in use.
    links = [
        np.where(group >= 0, group, n_rows + alone + (group.max(initial=0) + 1)),
        np.where(known, content_id.reshape(-1), n_rows + alone),
    ]
    indices = [np.unique(link, return_inverse=True)[1].reshape(-1) for link in links]
    component = alone.copy()
    while True:
        before = component.copy()
        for index in indices:
            smallest = np.full(n_rows, n_rows, dtype=np.int64)
            np.minimum.at(smallest, index, component)
            component = smallest[index]
        if np.array_equal(before, component):
            return component


def majority_labels(labels: Int64Array, component: Int64Array) -> Int64Array:
    """Return int64 [N]: for each row the most frequent label of its component (ties: the smallest; -1: none)."""
    labelled = labels >= 0
    if not labelled.any():
        return np.full(len(labels), -1, dtype=np.int64)
    _, index = np.unique(component, return_inverse=True)
    n_labels = int(labels.max()) + 1
    pairs, counts = np.unique(index[labelled] * n_labels + labels[labelled], return_counts=True)
    of_pair, label = np.divmod(pairs, n_labels)
    # Last in (component, count, -label) order wins: of repeated places the last assignment stays.
    order = np.lexsort((-label, counts, of_pair))
    majority = np.full(int(index.max()) + 1, -1, dtype=np.int64)
    majority[of_pair[order]] = label[order]
    return majority[index]


def check_val_fraction(val_fraction: float) -> None:
    """Raise UsageError for what is no share of the rows."""
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be at least 0 and below 1, for example 0.2")


def hash_split(
    labels: Int64Array, component: Int64Array, content: UInt8Array, *, val_fraction: float, seed: int
) -> UInt8Array:
    """Split labelled rows into train and val by content, so that adding a file moves at most one other.

    Per class, whole components with the lowest SHA-256 of (seed, smallest content digest) go to val until it is as
    close as it gets to `val_fraction` of the class's rows. A component that alone would more than double that stays
    in train, unless every one would: then the smallest goes. A class with a single component stays in train. Returns
    uint8 [N].
    """
    split = np.where(labels >= 0, Split.TRAIN, Split.NONE).astype(np.uint8)
    majority = majority_labels(labels, component)
    for label in np.unique(majority[majority >= 0]):
        rows = np.flatnonzero(majority == label)
        members: dict[int, list[int]] = {}
        for row in rows.tolist():
            members.setdefault(int(component[row]), []).append(row)
        if len(members) < 2 or val_fraction <= 0:
            continue
        target = max(1, int(val_fraction * len(rows) + 0.5))
        order = sorted(members, key=lambda item: _split_key(content[members[item]], seed))
        movable = [key for key in order if len(members[key]) <= 2 * target] or [
            min(order, key=lambda k: len(members[k]))
        ]
        taken = 0
        for key in movable[:-1] if len(movable) == len(order) else movable:
            size = len(members[key])
            # Stop rather than pass over: a later, smaller one in its place would let one new file move several.
            if taken and taken + size / 2 > target:
                break
            split[members[key]] = np.where(labels[members[key]] >= 0, Split.VAL, Split.NONE)
            taken += size
    return split


def _split_key(content: UInt8Array, seed: int) -> bytes:
    smallest = min(row.tobytes() for row in content)
    return hashlib.sha256(f"{seed}:".encode() + smallest).digest()


def complete_split(
    split: UInt8Array,
    labels: Int64Array,
    component: Int64Array,
    content: UInt8Array,
    *,
    val_fraction: float,
    seed: int,
) -> UInt8Array:
    """Return `split` with the labelled rows that are in none put into one, as `hash_split` does; others stay.

    A component that is already in a split takes its new rows there, so that it does not straddle.
    """
    missing = (split == Split.NONE) & (labels >= 0)
    if not missing.any():
        return split
    settled = {int(key): value for key, value in zip(component, split, strict=True) if value != Split.NONE}
    is_fresh = np.array([int(key) not in settled for key in component.tolist()])
    drawn = hash_split(np.where(is_fresh, labels, -1), component, content, val_fraction=val_fraction, seed=seed)
    completed = split.copy()
    completed[missing] = [
        drawn[row] if is_fresh[row] else settled[int(component[row])] for row in np.flatnonzero(missing).tolist()
    ]
    return completed


def count_straddling(split: UInt8Array, labels: Int64Array, component: Int64Array) -> int:
    """Count the components whose labelled rows a given split divides between train, val and test.

    `labels` int64 [N] is -1 where a row has none, or is not readable.
    """
    assigned = (split != Split.NONE) & (labels >= 0)
    pairs = np.unique(np.stack([component[assigned], split[assigned].astype(np.int64)]), axis=1)
    _, counts = np.unique(pairs[0], return_counts=True)
    return int(np.sum(counts > 1))


def _only_homes(labels: Int64Array, component: Int64Array) -> Int64Array:
    """Return the components that hold all rows of some class; training without them would not know that class."""
    labelled = labels >= 0
    homes = np.unique(np.stack([component[labelled], labels[labelled]]), axis=1)  # int64 [2, pairs]
    classes, n_homes = np.unique(homes[1], return_counts=True)
    only: Int64Array = homes[0][np.isin(homes[1], classes[n_homes == 1])]
    return only


def assign_folds(labels: Int64Array, component: Int64Array, *, n_folds: int, seed: int) -> tuple[Int64Array, int]:
    """Deal rows into stratified folds that never divide a component.

    A class with fewer components than folds is held out in that many of them; a component that holds all there is of
    a class is in the training part of every fold (ALWAYS_TRAIN), so that no fold is asked for a class it has never
    seen. Returns the fold of each row, int64 [N], and the number of folds (0 where no class can be held out).
    """
    components, first, index, sizes = np.unique(component, return_index=True, return_inverse=True, return_counts=True)
    label_of = majority_labels(labels, component)[first]
    label_of[np.isin(components, _only_homes(labels, component))] = -1
    classes, n_components = np.unique(label_of[label_of >= 0], return_counts=True)
    n_used = min(n_folds, int(n_components.max(initial=0)))
    fold_of = np.full(len(components), ALWAYS_TRAIN, dtype=np.int64)
    totals = np.zeros(max(n_used, 1), dtype=np.int64)
    by_class = np.argsort(label_of, kind="stable")
    ends = np.cumsum(n_components) + int(np.sum(label_of < 0))
    for label, count, end in zip(classes.tolist(), n_components.tolist(), ends.tolist(), strict=True):
        if count < 2:
            continue
        members = by_class[end - count : end]
        members = members[derive_rng(seed, "folds", label).permutation(count)]
        # Large components first, each to the fold that holds least of this class, then least of all.
        members = members[np.argsort(-sizes[members], kind="stable")]
        held = np.zeros(n_used, dtype=np.int64)
        for run in np.split(members, np.flatnonzero(np.diff(sizes[members])) + 1):
            fold_of[run] = _deal(len(run), int(sizes[run[0]]), held, totals)
    return fold_of[index], n_used if (fold_of >= 0).any() else 0


def _deal(n: int, size: int, held: Int64Array, totals: Int64Array) -> Int64Array:
    """Return int64 [n]: the fold of each of n components of one size, one after the other to the least full; adds them.

    `held` and `totals` [folds] are what a fold holds of the class and of all. The j-th component that a fold gets finds
    it j sizes fuller in both, so that all turns can be sorted at once.
    """
    turn = np.arange(n) * size
    fold = np.repeat(np.arange(len(held)), n)
    order = np.lexsort((fold, (totals[:, None] + turn).ravel(), (held[:, None] + turn).ravel()))[:n]
    dealt = np.bincount(fold[order], minlength=len(held)) * size
    held += dealt
    totals += dealt
    return fold[order]
