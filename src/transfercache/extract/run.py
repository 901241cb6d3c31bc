"""From a manifest to a published cache: plan, fill what is missing, then say which row lies where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfercache.backbones.engines import Engine
from transfercache.cache.rows import BAD, OK, Rows
from transfercache.cache.store import Store
from transfercache.extract.loop import fill_shard
from transfercache.extract.plan import EVAL_VIEW, NEW_SHARD, Plan, plan_extraction, slot_of
from transfercache.images.manifest import Manifest
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch


@dataclass(frozen=True)
class Outcome:
    """View rows computed and reused, and the reasons of the manifest rows that are bad."""

    computed: int
    reused: int
    bad: dict[int, str]


def extract_into(
    store: Store,
    manifest: Manifest,
    make_engine: Callable[[], Engine],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    watch: Stopwatch,
    describe_run: Callable[[Outcome], Mapping[str, Any]],
) -> Outcome:
    """Compute the embeddings that `store` lacks and publish the rows of `manifest`; hashed, split and labelled.

    The store is locked for the whole time. An interruption leaves what was committed: the next call goes on from it.
    `describe_run` makes the provenance record of a run, an interrupted one's too: its seconds are part of the cost.
    """
    with store.writing():
        before = store.slots()
        plan = plan_extraction(manifest, before, unfinished=_unfinished(store))
        reasons = dict(manifest.unreadable)
        if plan.n_pending:
            try:
                reasons |= _fill(
                    store,
                    plan,
                    manifest,
                    make_engine(),
                    preprocessing,
                    batch_size=batch_size,
                    workers=workers,
                    watch=watch,
                )
            except BaseException:
                n_committed = int(store.slots().valid.sum() - before.valid.sum())
                store.record(describe_run(Outcome(n_committed, plan.n_reused, bad={})))
                raise
        for shard in _unfinished(store):
            store.finish_shard(shard)
        rows = _publishable_rows(manifest, slot_of(store.slots()), reasons)
        bad = {row: rows.reason[row] for row in np.flatnonzero(rows.status == BAD).tolist()}
        outcome = Outcome(computed=_n_computed(plan, manifest, bad), reused=plan.n_reused, bad=bad)
        store.publish(
            rows, class_names=manifest.class_names, run=describe_run(outcome), has_given_split=manifest.has_given_split
        )
    return outcome


def _unfinished(store: Store) -> list[int]:
    return [entry.number for entry in store.catalogue.shards if not entry.finished]


def _fill(
    store: Store,
    plan: Plan,
    manifest: Manifest,
    engine: Engine,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    watch: Stopwatch,
) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for planned, pending in plan.pending.items():
        shard = planned
        if planned == NEW_SHARD:
            views = np.full(len(plan.new_digests), EVAL_VIEW, dtype=np.uint8)
            shard = store.begin_shard(plan.new_digests, views, batch_size=batch_size)
        with store.writer(shard) as writer:
            # An interrupted shard keeps the grid it was begun with, so that its rows are bit-identical.
            reasons |= fill_shard(
                writer,
                pending,
                manifest,
                engine,
                preprocessing,
                batch_size=store.entry(shard).batch_size,
                workers=workers,
                watch=watch,
            )
    return reasons


def _n_computed(plan: Plan, manifest: Manifest, bad: Mapping[int, str]) -> int:
    rows = [image.row for pending in plan.pending.values() for image in pending]
    return sum(row not in bad for row in rows)


def _publishable_rows(
    manifest: Manifest, slots: Mapping[tuple[bytes, int], tuple[int, int]], reasons: Mapping[int, str]
) -> Rows:
    """Place every manifest row at its slot; a row without one is bad, for the reason of its first copy."""
    n_rows = manifest.n_rows
    places = [slots.get((digest.tobytes(), EVAL_VIEW), (-1, -1)) for digest in manifest.digests]
    shard, slot = np.array(places, dtype=np.int64).reshape(n_rows, 2).T
    reason_of_content = {manifest.digests[row].tobytes(): reason for row, reason in reasons.items()}
    is_bad = (shard < 0) | ~manifest.is_readable()
    reason = [
        reasons.get(row) or reason_of_content[manifest.digests[row].tobytes()] if is_bad[row] else ""
        for row in range(n_rows)
    ]
    return Rows(
        path=manifest.paths,
        size=manifest.size,
        mtime_ns=manifest.mtime_ns,
        ctime_ns=manifest.ctime_ns,
        inode=manifest.inode,
        digest=manifest.digests,
        view=np.full(n_rows, EVAL_VIEW, dtype=np.uint8),
        label=manifest.labels,
        split=manifest.split,
        group=manifest.component(),
        status=np.where(is_bad, BAD, OK).astype(np.uint8),
        reason=tuple(reason),
        shard=np.where(is_bad, -1, shard).astype(np.int32),
        slot=np.where(is_bad, -1, slot),
    )
