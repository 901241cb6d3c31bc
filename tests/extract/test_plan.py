from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.slots import Slots
from transfercache.errors import DataError
from transfercache.extract.loop import PendingView
from transfercache.extract.plan import NEW_SHARD, plan_extraction, wanted_rows
from transfercache.images.manifest import Manifest, hash_files
from transfercache.images.sources import read_source


def _manifest(photos: Path) -> Manifest:
    return hash_files(read_source(photos), known={})


def _slots(manifest: Manifest, rows: list[int], *, shard: list[int], valid: list[bool]) -> Slots:
    """Slots that hold the content of these rows, numbered within each shard."""
    slot = [shard[:i].count(number) for i, number in enumerate(shard)]
    return Slots(
        digest=manifest.digests[rows],
        view=np.zeros(len(rows), np.uint8),
        shard=np.array(shard, np.int32),
        slot=np.array(slot, np.int64),
        valid=np.array(valid, bool),
        readers={},
    )


def test_plan__of_an_empty_cache__is_every_content_once(photos: Path) -> None:
    (photos / "dog/9.png").write_bytes((photos / "cat/0.png").read_bytes())
    manifest = _manifest(photos)
    plan = plan_extraction(manifest, _slots(manifest, [], shard=[], valid=[]), unfinished=[], n_views=1)
    assert plan.pending == {NEW_SHARD: [PendingView(slot=i, row=i) for i in range(9)]}
    np.testing.assert_array_equal(plan.new_digests, manifest.digests[:9])
    assert (plan.n_held, len(list(plan.items()))) == (0, 9)


def test_plan__keeps_the_slots_that_an_interrupted_run_planned(photos: Path) -> None:
    manifest = _manifest(photos)
    # Shard 0 is finished with rows 7 and 8 (8 failed its proof); shard 1 is not, and holds row 2 of 1, 2, 3.
    slots = _slots(manifest, [7, 8, 1, 2, 3], shard=[0, 0, 1, 1, 1], valid=[True, False, False, True, False])
    plan = plan_extraction(manifest, slots, unfinished=[1], n_views=1)
    assert plan.pending == {
        1: [PendingView(slot=0, row=1), PendingView(slot=2, row=3)],
        NEW_SHARD: [PendingView(slot=i, row=row) for i, row in enumerate([0, 4, 5, 6, 8, 9])],
    }
    np.testing.assert_array_equal(plan.new_digests, manifest.digests[[0, 4, 5, 6, 8, 9]])
    assert (len(list(plan.items())), plan.n_held) == (8, 2)


def test_plan__of_a_full_cache__is_nothing(photos: Path) -> None:
    manifest = _manifest(photos)
    slots = _slots(manifest, list(range(10)), shard=[0] * 10, valid=[True] * 10)
    plan = plan_extraction(manifest, slots, unfinished=[], n_views=1)
    assert (plan.pending, plan.n_held) == ({}, 10)
    assert plan.new_digests.shape == (0, 32)


def test_wanted_rows__leave_out_what_cannot_be_read(photos: Path, draw: Any) -> None:
    (photos / "cat/1.png").unlink()
    (photos / "cat/1.png").symlink_to("nowhere.png")
    manifest = _manifest(photos)
    assert list(wanted_rows(manifest, 1).values()) == [(row, 0) for row in (0, 2, 3, 4, 5, 6, 7, 8, 9)]


def test_plan__of_more_views__is_what_each_content_lacks(photos: Path) -> None:
    manifest = _manifest(photos)
    slots = _slots(manifest, [0, 1], shard=[0, 0], valid=[True, True])
    plan = plan_extraction(manifest, slots, unfinished=[], n_views=3)
    views = [(row, view) for row in range(10) for view in range(3) if (row, view) not in ((0, 0), (1, 0))]
    assert plan.pending == {NEW_SHARD: [PendingView(slot, row, view) for slot, (row, view) in enumerate(views)]}
    np.testing.assert_array_equal(plan.new_digests, manifest.digests[[row for row, _ in views]])
    assert plan.new_views.tolist() == [view for _, view in views]
    assert (len(list(plan.items())), plan.n_held) == (28, 2)


def test_plan__a_thousand_copies_of_each_image_and_no_more(photos: Path) -> None:
    manifest = _manifest(photos)
    empty = _slots(manifest, [], shard=[], valid=[])
    thousand = manifest.subset(np.repeat([0, 1], 1000))
    assert len(list(plan_extraction(thousand, empty, unfinished=[], n_views=2).items())) == 4
    message = "2001 images are copies of 2 different ones, more than 1000 of each; remove some copies"
    with pytest.raises(DataError, match=message):
        plan_extraction(manifest.subset(np.repeat([0, 1], [1000, 1001])), empty, unfinished=[], n_views=2)
