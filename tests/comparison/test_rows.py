from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from transfercache.backbones.registry import Backbone
from transfercache.comparison.rows import find_unreadable, load_pixels, select_rows
from transfercache.errors import CacheError, DataError, DecodeError
from transfercache.images.manifest import Manifest
from transfercache.images.transforms import grey_pixels
from transfercache.splits import Split

from .conftest import embed, read, rows_of, write_photos


def test_select_rows__training_and_reported_rows_that_are_good(manifest: Manifest) -> None:
    is_good = np.ones(manifest.n_rows, dtype=np.bool_)
    is_good[[0, 9]] = False
    rows = select_rows(manifest, is_good=is_good)
    assert rows.row.tolist() == [row for row in range(14) if row not in (0, 9)]
    assert (rows.n_train, rows.n_reported, rows.reported) == (7, 5, "val")
    assert rows.n_train_per_class.tolist() == [3, 4]
    assert rows.manifest.paths == tuple(manifest.paths[row] for row in rows.row)


def test_select_rows__val_is_neither_where_there_is_a_test_split(tmp_path: Path) -> None:
    rows = rows_of(read(write_photos(tmp_path / "photos", test=2, train=3, val=2)))
    assert rows.reported == "test"
    assert (rows.n_train, rows.n_reported) == (6, 4)
    assert set(rows.manifest.split.tolist()) == {Split.TRAIN, Split.TEST}


def test_select_rows__nothing_to_report(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"no labelled image is held out.*--val-fraction"):
        rows_of(replace(manifest, split=np.full(manifest.n_rows, Split.TRAIN, dtype=np.uint8)))


def test_digest__changes_with_everything_that_a_result_depends_on(manifest: Manifest) -> None:
    def flipped(array: np.ndarray, row: int, value: int) -> np.ndarray:
        changed = array.copy()
        changed[row] = value
        return changed

    digest = rows_of(manifest).digest
    others = [
        replace(manifest, labels=flipped(manifest.labels, 0, 1)),
        replace(manifest, digests=flipped(manifest.digests, 0, 7)),
        replace(manifest, split=flipped(manifest.split, 0, Split.VAL)),
        replace(manifest, group=flipped(flipped(manifest.group, 0, 3), 1, 3)),
        replace(manifest, class_names=("blue", "green")),
        manifest.subset(np.arange(1, manifest.n_rows)),
        manifest.subset(np.arange(manifest.n_rows)[::-1]),
    ]
    assert len({digest, *(rows_of(other).digest for other in others)}) == 8
    assert rows_of(replace(manifest, root=Path("/elsewhere"), paths=manifest.paths[::-1])).digest == digest


def test_divide__training_rows_in_all_views_and_reported_ones_in_view_0(manifest: Manifest, backbone: Backbone) -> None:
    table = embed(manifest, backbone)
    is_good = np.ones(manifest.n_rows, dtype=np.bool_)
    is_good[3] = False
    rows = select_rows(manifest, is_good=is_good)
    train, reported = rows.divide(table)
    assert train.paths + reported.paths == rows.manifest.paths
    np.testing.assert_array_equal(np.concatenate([train.features, reported.features]), table.features[is_good])

    twice = table.subset(np.repeat(np.arange(len(table)), 2))
    twice = replace(twice, view=np.tile(np.array([0, 1], dtype=np.uint8), len(table)))
    train, reported = rows.divide(twice)
    assert train.row.tolist() == np.repeat(rows.row[rows.is_train], 2).tolist()
    assert train.view.tolist() == [0, 1] * rows.n_train
    assert reported.row.tolist() == rows.row[rows.is_reported].tolist()
    assert not reported.view.any()


def test_divide__cache_of_other_data(manifest: Manifest, backbone: Backbone) -> None:
    table, rows = embed(manifest, backbone), rows_of(manifest)
    with pytest.raises(CacheError, match="lacks rows"):
        rows.divide(table.subset(np.arange(5)))
    with pytest.raises(CacheError, match="lacks rows"):
        rows.divide(table.subset(np.arange(0)))
    with pytest.raises(CacheError, match="relabelled"):
        rows.divide(replace(table, labels=1 - table.labels))


def test_n_straddling__equal_images_on_both_sides(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", train=3, val=2)
    assert rows_of(read(folder)).n_straddling == 0
    (folder / "val" / "red" / "copy.png").write_bytes((folder / "train" / "red" / "1.png").read_bytes())
    assert rows_of(read(folder)).n_straddling == 1


def test_find_unreadable__names_row_and_reason(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", train=3, val=2)
    (folder / "train" / "blue" / "1.png").write_text("plain words")
    assert find_unreadable(read(folder), workers=2) == {1: "not an image (it starts like text)"}


def test_load_pixels__order_of_the_rows(manifest: Manifest) -> None:
    pixels = load_pixels(manifest, partial(grey_pixels, side=2), workers=3)
    assert pixels.shape == (14, 2, 2)
    alone = [
        load_pixels(manifest.subset(np.array([row])), partial(grey_pixels, side=2), workers=1)[0] for row in range(14)
    ]
    np.testing.assert_array_equal(pixels, alone)


def test_load_pixels__unreadable_image(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", train=2, val=2)
    (folder / "val" / "red" / "0.png").write_bytes(b"")
    with pytest.raises(DecodeError, match=r"val/red/0.png: empty file"):
        load_pixels(read(folder), partial(grey_pixels, side=2), workers=1)
