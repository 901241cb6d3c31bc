"""Which rows a cache lacks: one join of the wanted (content digest, view) pairs with the slots that exist."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from transfercache.cache.rows import MAX_ROWS_PER_SLOT
from transfercache.cache.slots import RowKey, Slots, row_keys
from transfercache.errors import DataError
from transfercache.extract.loop import PendingView
from transfercache.images.manifest import Manifest

NEW_SHARD = -1


@dataclass(frozen=True, eq=False)
class Plan:
    """What is wanted, and what of it is missing: `pending` by shard, and what a new shard holds.

    A pair that an interrupted run had planned stays in its slot; the others go to a new shard, in the order of the
    rows and then of the views. Rows of equal bytes share one slot, filled from the first of them.
    """

    wanted: dict[RowKey, tuple[int, int]]  # key -> the first readable row of that content, and the view
    pending: dict[int, list[PendingView]]  # shard, or NEW_SHARD -> slots to fill
    new_digests: npt.NDArray[np.uint8]  # uint8 [n, 32] of the new shard, in slot order
    new_views: npt.NDArray[np.uint8]  # uint8 [n]

    def items(self) -> Iterator[PendingView]:
        """Yield all that is missing."""
        return chain.from_iterable(self.pending.values())

    @property
    def n_held(self) -> int:
        """How many view rows the cache holds already."""
        return len(self.wanted) - sum(map(len, self.pending.values()))


def plan_extraction(manifest: Manifest, slots: Slots, *, unfinished: Collection[int], n_views: int) -> Plan:
    """Join the views of the readable rows with the cache's slots; `unfinished` are the shards still open to rows.

    Raises DataError where the images are so many copies of so few that no cache may hold their rows.
    """
    wanted = wanted_rows(manifest, n_views)
    n_readable = int(manifest.is_readable().sum())
    if n_readable * n_views > MAX_ROWS_PER_SLOT * len(wanted):
        raise DataError(
            f"{manifest.shown}: {n_readable} images are copies of {len(wanted) // n_views} different ones, more than "
            f"{MAX_ROWS_PER_SLOT} of each; remove some copies"
        )
    open_slots = np.flatnonzero(~slots.valid & np.isin(slots.shard, list(unfinished)))
    planned = dict(zip(row_keys(slots.digest[open_slots], slots.view[open_slots]), open_slots.tolist(), strict=True))
    pending: dict[int, list[PendingView]] = {}
    new: list[RowKey] = []
    for key, (row, view) in wanted.items():
        if key in slots.held:
            continue
        if key in planned:
            shard, slot = slots.place(planned[key])
        else:
            shard, slot = NEW_SHARD, len(new)
            new.append(key)
        pending.setdefault(shard, []).append(PendingView(slot=slot, row=row, view=view))
    keys = np.frombuffer(b"".join(new), dtype=np.uint8).reshape(len(new), -1 if new else 33)
    return Plan(wanted, pending, new_digests=keys[:, :32], new_views=keys[:, 32])


def wanted_rows(manifest: Manifest, n_views: int) -> dict[RowKey, tuple[int, int]]:
    """Return {key: (the first readable row of that content, view)}, in the order of the rows and then of the views."""
    readable = np.flatnonzero(manifest.is_readable())
    views = np.tile(np.arange(n_views, dtype=np.uint8), len(readable))
    rows = np.repeat(readable, n_views)
    wanted: dict[RowKey, tuple[int, int]] = {}
    for key, row, view in zip(row_keys(manifest.digests[rows], views), rows.tolist(), views.tolist(), strict=True):
        wanted.setdefault(key, (row, view))
    return wanted
