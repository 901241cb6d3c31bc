"""From a manifest to a published cache: plan, gather and compute what is missing, then say which row lies where."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from transfercache.cache.blocks import rows_within
from transfercache.cache.catalogue import ShardEntry
from transfercache.cache.neighbours import Neighbour
from transfercache.cache.provenance import Run
from transfercache.cache.rows import BAD, OK, Rows
from transfercache.cache.shard import ShardWriter
from transfercache.cache.slots import RowKey, Slots, row_keys
from transfercache.cache.store import Store
from transfercache.cache.upkeep import replace_shards
from transfercache.errors import CacheError, ResourceError
from transfercache.extract.loop import Embedder, PendingView, fill_shard
from transfercache.extract.parity import check_parity, trusted_neighbours
from transfercache.extract.plan import NEW_SHARD, Plan, plan_extraction
from transfercache.images.manifest import Manifest

logger = logging.getLogger(__name__)

# Copied at once.
_BYTES_PER_COPY = 2 << 20


@dataclass(frozen=True)
class Outcome:
    """View rows computed, reused and checked (computed again for comparison), and why manifest rows are bad."""

    computed: int
    reused: int
    checked: int
    bad: dict[int, str]


@dataclass(eq=False)
class ExtractionRun:
    """Computes what a store lacks of a manifest (hashed, split, labelled), and publishes its rows.

    Rows that a cache of the same spec beside it holds are copied from there. `describe_run` makes the provenance record
    of a run, an interrupted one's too: its seconds are part of the cost.
    """

    store: Store
    embedder: Embedder
    n_views: int
    batch_size: int
    prove: bool  # every row that the store holds; what is damaged is made again
    describe_run: Callable[[Outcome], Run]
    _n_copied: int = field(default=0, init=False)
    _n_checked: int = field(default=0, init=False)
    _proved: set[ShardEntry] = field(default_factory=set, init=False)  # finished, and whole

    def run(self) -> Outcome:
        """Do what there is to do; where that is nothing, nothing is locked, so that a read-only cache can be used.

        Else the store is locked for the whole time, and an interruption leaves what was committed: the next run goes
        on from it. Raises CacheError where rows made by other versions are not those that would be made here.
        """
        return self._done_already() or self._run_locked()

    def _done_already(self) -> Outcome | None:
        store = self.store
        slots = self._slots()
        plan = self._plan(slots)
        # On a read-only disk bad images are not tried again, and times that have changed are not kept.
        is_writable = os.access(store.folder, os.W_OK)
        if is_writable and not store.is_tidy():
            return None
        published = None if is_writable else store.rows()
        known_bad = {} if published is None else _known_bad(self.embedder.manifest, published)
        if self._unfinished() or slots.damaged or any(item.row not in known_bad for item in plan.items()):
            return None
        rows = self._rows(slots, known_bad)
        if published is None or not rows.has_same_content(published):
            manifest = self.embedder.manifest
            if not store.has_published(
                rows, class_names=manifest.class_names, has_given_split=manifest.has_given_split
            ):
                return None
        self._check_parity(slots, plan)
        outcome = Outcome(0, plan.n_held, self._n_checked, rows.bad)
        if self._n_checked:
            # On a read-only disk, or beside a writer, the next run checks again.
            with suppress(ResourceError), store.writing():
                store.record(self.describe_run(outcome))
        return outcome

    def _run_locked(self) -> Outcome:
        store, manifest = self.store, self.embedder.manifest
        with store.writing():
            before = self._slots()
            plan = self._plan(before)
            # Before anything is recorded: a record by these makers would vouch for all rows.
            self._check_parity(before, plan)
            run = None
            try:
                reasons = self._fill(plan, before)
                for shard in self._unfinished():
                    if shard not in before.damaged:
                        store.finish_shard(shard)
                after = store.slots(prove=before.damaged)
                rows = self._rows(after, reasons)
                outcome = self._outcome(plan, before, after, bad=rows.bad)
                run = self.describe_run(outcome)
                is_new = store.publish(
                    rows, class_names=manifest.class_names, run=run, has_given_split=manifest.has_given_split
                )
                if not is_new and self._n_checked:
                    store.record(run)
            except BaseException:
                if run is None or run not in store.catalogue.provenance:  # publishing may fail after it is on record
                    after = store.slots(prove=before.damaged)
                    store.record(self.describe_run(self._outcome(plan, before, after, bad={})))
                raise
            # Not inside: the run is on record, and this only moves rows.
            replace_shards(store, [entry for entry in store.catalogue.shards if entry.number in before.damaged])
            return outcome

    def _slots(self) -> Slots:
        """Read the slots, with `prove` each shard proved unless it has been: hashing one reads all of it."""
        entries = self.store.catalogue.shards if self.prove else ()
        left = [entry for entry in entries if entry not in self._proved]
        slots = self.store.slots(prove={entry.number for entry in left})
        self._proved.update(entry for entry in left if entry.finished and entry.number not in slots.damaged)
        return slots

    def _rows(self, slots: Slots, reasons: Mapping[int, str]) -> Rows:
        manifest = self.embedder.manifest
        return place_rows(manifest, slots, {**manifest.unreadable, **reasons}, n_views=self.n_views)

    def _check_parity(self, slots: Slots, plan: Plan) -> None:
        own = Neighbour(self.store.folder, self.store.catalogue, slots, list(plan.wanted))
        self._n_checked += check_parity(own, self.embedder, plan.wanted)

    def _unfinished(self) -> list[int]:
        return [entry.number for entry in self.store.catalogue.shards if not entry.finished]

    def _plan(self, slots: Slots) -> Plan:
        return plan_extraction(self.embedder.manifest, slots, unfinished=self._unfinished(), n_views=self.n_views)

    def _outcome(self, plan: Plan, before: Slots, after: Slots, *, bad: dict[int, str]) -> Outcome:
        n_new = int(after.valid.sum() - before.valid.sum())
        return Outcome(n_new - self._n_copied, plan.n_held + self._n_copied, self._n_checked, bad)

    def _fill(self, plan: Plan, before: Slots) -> dict[int, str]:
        """Fill the planned slots from the caches beside this one, and from the images; returns {row: why it is bad}."""
        neighbours = list(self._neighbours(plan, before))
        reasons: dict[int, str] = {}
        for planned, pending in plan.pending.items():
            shard = planned
            if planned == NEW_SHARD:
                shard = self.store.begin_shard(plan.new_digests, plan.new_views, batch_size=self.batch_size)
            with self.store.writer(shard) as writer:
                left = dict(zip(self._keys(pending), pending, strict=True))
                for neighbour in neighbours:
                    self._copy(writer, left, neighbour)
                # An interrupted shard keeps the grid it was begun with, so that its rows are bit-identical.
                batch_size = self.store.entry(shard).batch_size
                with self.embedder.watch.stage("loop"):
                    reasons |= fill_shard(writer, list(left.values()), self.embedder, batch_size=batch_size)
        return reasons

    def _keys(self, pending: Sequence[PendingView]) -> list[RowKey]:
        digests = self.embedder.manifest.digests[[item.row for item in pending]]
        return row_keys(digests, np.array([item.view for item in pending], dtype=np.uint8))

    def _neighbours(self, plan: Plan, before: Slots) -> Iterator[Neighbour]:
        keys = self._keys(list(plan.items()))
        store = self.store
        found = trusted_neighbours(
            store.folder.parent,
            self.embedder,
            {key: plan.wanted[key] for key in keys},
            dim=store.catalogue.dim,
            beside=store.folder,
        )
        # The record of a check vouches for all rows of this cache: it is none where its own could not be checked.
        is_vouched = bool(self._n_checked) or not before.valid.any()
        for neighbour, n_checked in found:
            self._n_checked += n_checked if is_vouched else 0
            yield neighbour

    def _copy(self, writer: ShardWriter, left: dict[RowKey, PendingView], neighbour: Neighbour) -> None:
        """Copy the rows of `left` that a neighbour holds, and take them out of it."""
        found = [key for key in neighbour.keys if key in left]
        n_copied = 0
        try:
            with self.embedder.watch.stage("copy"):
                n_rows = rows_within(_BYTES_PER_COPY, neighbour.catalogue.dim)
                for start in range(0, len(found), n_rows):
                    keys = found[start : start + n_rows]
                    features = neighbour.slots.take(keys)
                    writer.write(np.array([left.pop(key).slot for key in keys], dtype=np.int64), features)
                    n_copied += len(keys)
        except CacheError as error:
            logger.warning("computed instead of taken from there: %s", error)
        if n_copied:
            writer.commit()
            self._n_copied += n_copied
            self.store.record(*neighbour.shares(n_copied))


def place_rows(manifest: Manifest, slots: Slots, reasons: Mapping[int, str], *, n_views: int) -> Rows:
    """Place each view of each manifest row at its slot; a row that lacks one is bad, for the reason of its content."""
    n_rows = manifest.n_rows
    view = np.tile(np.arange(n_views, dtype=np.uint8), n_rows)
    keys = row_keys(np.repeat(manifest.digests, n_views, axis=0), view)
    index = np.array([slots.held.get(key, -1) for key in keys], dtype=np.int64).reshape(n_rows, n_views)
    is_bad = (index < 0).any(axis=1) | ~manifest.is_readable()
    reason_of_content = {manifest.digests[row].tobytes(): reason for row, reason in reasons.items()}
    reason = [
        reasons.get(row) or reason_of_content[manifest.digests[row].tobytes()] if is_bad[row] else ""
        for row in range(n_rows)
    ]
    # A bad row has one entry, of view 0.
    row, own_view = np.nonzero(~is_bad[:, None] | (np.arange(n_views) == 0))
    # A bad row's place is the -1 that stands behind the last slot.
    at = np.where(is_bad[row], -1, index[row, own_view])
    size, mtime_ns, ctime_ns, inode = manifest.stat[row].T
    return Rows(
        path=tuple(manifest.paths[i] for i in row.tolist()),
        size=size,
        mtime_ns=mtime_ns,
        ctime_ns=ctime_ns,
        inode=inode,
        digest=manifest.digests[row],
        view=own_view.astype(np.uint8),
        label=manifest.labels[row],
        split=manifest.split[row],
        group=manifest.component[row],
        status=np.where(is_bad[row], BAD, OK).astype(np.uint8),
        reason=tuple(reason[i] for i in row.tolist()),
        shard=np.append(slots.shard, np.int32(-1))[at],
        slot=np.append(slots.slot, -1)[at],
    )


def _known_bad(manifest: Manifest, published: Rows) -> dict[int, str]:
    """Return {manifest row: reason} of the images whose bytes were found bad when these rows were published."""
    bad = {published.digest[i].tobytes(): published.reason[i] for i in np.flatnonzero(published.status == BAD)}
    found = ((row, bad.get(digest.tobytes())) for row, digest in enumerate(manifest.digests))
    return {row: reason for row, reason in found if reason is not None}
