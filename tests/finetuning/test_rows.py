from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from transfercache.errors import DataError
from transfercache.finetuning.rows import divide_rows

from .conftest import MakePhotos, read


def test_divide_rows__reports_test_and_never_trains_on_val(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=3, val=2, test=1))
    rows = divide_rows(manifest, select=None, seed=0)
    shown = [[manifest.paths[row].split("/")[0] for row in part] for part in (rows.train, rows.held_out, rows.reported)]
    assert shown == [["train"] * 6, [], ["test"] * 2]


def test_divide_rows__unlabelled_and_unreadable_rows_are_left_out(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=3, val=2))
    labels = manifest.labels.copy()
    labels[[0, 6]] = -1
    rows = divide_rows(replace(manifest, labels=labels, unreadable={1: "gone"}), select=None, seed=0)
    assert (rows.train.tolist(), rows.reported.tolist()) == ([2, 3, 4, 5], [7, 8, 9])


def test_divide_rows__a_test_split_of_which_no_file_can_be_read_leaves_val_to_report(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=3, val=2, test=1))
    gone = {row: "gone" for row, path in enumerate(manifest.paths) if path.startswith("test/")}
    rows = divide_rows(replace(manifest, unreadable=gone), select=None, seed=0)
    assert {manifest.paths[row].split("/")[0] for row in rows.reported} == {"val"}


def test_divide_rows__select_holds_out_a_share_of_each_class_from_training_alone(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=8, val=2))
    rows = divide_rows(manifest, select=0.25, seed=0)
    assert np.bincount(manifest.labels[rows.held_out]).tolist() == [2, 2]
    assert sorted([*rows.train, *rows.held_out]) == list(range(16))
    again = divide_rows(manifest, select=0.25, seed=0)
    other = divide_rows(manifest, select=0.25, seed=1)
    assert again.held_out.tolist() == rows.held_out.tolist() != other.held_out.tolist()


def test_divide_rows__select_never_divides_a_group(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=8))
    grouped = replace(manifest, group=np.arange(16) // 2)
    for seed in range(5):
        held_out = divide_rows(grouped, select=0.25, seed=seed).held_out
        assert np.bincount(held_out // 2, minlength=8).tolist().count(2) == len(held_out) // 2 == 2


def test_divide_rows__nothing_to_hold_out(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(train=1))
    with pytest.raises(
        DataError, match=r"photos: every class is a single image or group.*use neither --select nor --try"
    ):
        divide_rows(manifest, select=0.2, seed=0)


def test_divide_rows__nothing_to_train_on(make_photos: MakePhotos) -> None:
    manifest = read(make_photos(val=2, test=1))
    with pytest.raises(DataError, match=r"photos: no labelled training image; give train/ a folder per class"):
        divide_rows(manifest, select=None, seed=0)
