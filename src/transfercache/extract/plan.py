"""Which rows a cache lacks: one join of the wanted (content digest, view) pairs with the slots that exist."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfercache.cache.store import Slots
from transfercache.extract.loop import PendingImage
from transfercache.images.manifest import Manifest

EVAL_VIEW = 0
NEW_SHARD = -1


@dataclass(frozen=True)
class Plan:
    """What to compute: `pending` by shard, and what a new shard holds.

    A pair that an interrupted run had planned stays in its slot; the others go to a new shard, in the order of the
    rows. Rows of equal bytes share one slot, filled from the first of them.
    """

    pending: dict[int, list[PendingImage]]  # shard, or NEW_SHARD -> slots to fill
    new_digests: npt.NDArray[np.uint8]  # uint8 [n, 32] of the new shard, in slot order
    n_reused: int  # distinct (digest, view) pairs that the cache holds already

    @property
    def n_pending(self) -> int:
        """How many embeddings are to be computed."""
        return sum(map(len, self.pending.values()))


def plan_extraction(manifest: Manifest, slots: Slots, *, unfinished: Collection[int]) -> Plan:
    """Join the manifest's readable rows with the cache's slots; `unfinished` are the shards still open to rows."""
    wanted = first_rows(manifest)
    known = slot_of(slots)
    planned = {
        (slots.digest[i].tobytes(), int(slots.view[i])): (int(slots.shard[i]), int(slots.slot[i]))
        for i in np.flatnonzero(~slots.valid & np.isin(slots.shard, list(unfinished)))
    }
    pending: dict[int, list[PendingImage]] = {}
    new: list[bytes] = []
    for digest, row in wanted.items():
        key = (digest, EVAL_VIEW)
        if key in known:
            continue
        shard, slot = planned.get(key, (NEW_SHARD, len(new)))
        if shard == NEW_SHARD:
            new.append(digest)
        pending.setdefault(shard, []).append(PendingImage(slot=slot, row=row))
    new_digests = np.frombuffer(b"".join(new), dtype=np.uint8).reshape(-1, 32)
    n_pending = sum(map(len, pending.values()))
    return Plan(pending, new_digests, n_reused=len(wanted) - n_pending)


def first_rows(manifest: Manifest) -> dict[bytes, int]:
    """Return {content digest: the first readable row that has it}, in row order."""
    rows: dict[bytes, int] = {}
    for row in range(manifest.n_rows):
        if row not in manifest.unreadable:
            rows.setdefault(manifest.digests[row].tobytes(), row)
    return rows


def slot_of(slots: Slots) -> dict[tuple[bytes, int], tuple[int, int]]:
    """Return {(content digest, view): (shard, slot)} of the rows that the cache holds."""
    valid = np.flatnonzero(slots.valid)
    return {(slots.digest[i].tobytes(), int(slots.view[i])): (int(slots.shard[i]), int(slots.slot[i])) for i in valid}
