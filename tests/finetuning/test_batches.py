from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.finetuning.batches import Batch, ImageReader, in_batches
from transfercache.finetuning.options import FinetuneOptions
from transfercache.images import processes
from transfercache.images.decode import load_image
from transfercache.images.transforms import eval_pixels
from transfercache.stopwatch import Stopwatch

from .conftest import PIXELS, MakePhotos, read


def _reader(folder: Path, **options: Any) -> ImageReader:
    return ImageReader(FinetuneOptions(**options), Stopwatch(), read(folder), PIXELS)


def _pixels(batches: list[Batch]) -> dict[int, bytes]:
    return {row: image.tobytes() for batch in batches for row, image in zip(batch.rows, batch.inputs, strict=True)}


@pytest.mark.parametrize(
    ("n_images", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (5, 4, [5]), (1, 4, [1]), (0, 4, []), (3, 1, [1, 1, 1])],
)
def test_in_batches__one_left_over_joins_the_batch_before(n_images: int, batch_size: int, sizes: list[int]) -> None:
    batches = list(in_batches(iter(range(n_images)), batch_size))
    assert [len(batch) for batch in batches] == sizes
    assert [row for batch in batches for row in batch] == list(range(n_images))


def test_training_batches__depend_on_seed_and_epoch_and_not_on_the_workers(
    make_photos: MakePhotos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 1)
    folder = make_photos(train=6)
    rows = np.arange(12)
    runs = {
        name: list(_reader(folder, batch_size=5, **options).training_batches(rows, epoch))
        for name, options, epoch in [
            ("one thread", {"workers": 1}, 1),
            ("four threads", {"workers": 4}, 1),
            ("nine processes", {"workers": 9}, 1),
            ("trivial", {"workers": 1, "augment": "trivial"}, 1),
            ("trivial, four threads", {"workers": 4, "augment": "trivial"}, 1),
            ("wide crops", {"workers": 1, "crop_area": 0.9}, 1),
            ("next epoch", {}, 2),
            ("other seed", {"seed": 1}, 1),
        ]
    }
    orders = {name: np.concatenate([batch.rows for batch in run]).tolist() for name, run in runs.items()}
    assert sorted(orders["one thread"]) == rows.tolist()
    assert orders["one thread"] == orders["four threads"] == orders["nine processes"]
    assert len({tuple(order) for order in orders.values()}) == 3
    pixels = {name: _pixels(run) for name, run in runs.items()}
    assert pixels["one thread"] == pixels["four threads"] == pixels["nine processes"]
    assert pixels["wide crops"] != pixels["one thread"]
    assert pixels["trivial"] == pixels["trivial, four threads"] != pixels["one thread"]
    assert all(pixels["one thread"][row] != pixels["next epoch"][row] for row in rows.tolist())
    assert all(pixels["one thread"][row] != pixels["other seed"][row] for row in rows.tolist())


def test_eval_batches__are_the_eval_transform_in_order(make_photos: MakePhotos) -> None:
    reader = _reader(make_photos(train=3), batch_size=4)
    rows = np.array([4, 1, 0])
    (batch,) = reader.eval_batches(rows)
    assert batch.rows.tolist() == [4, 1, 0]
    for row, pixels in zip(rows.tolist(), batch.inputs, strict=True):
        expected = eval_pixels(load_image(reader.manifest.path_of(row), ""), PIXELS)
        np.testing.assert_array_equal(pixels, expected)


def test_training_batches__bad_images_are_noted_once_and_left_out(make_photos: MakePhotos) -> None:
    folder = make_photos(train=4)
    (folder / "train" / "green" / "1.png").write_text("<html>404</html>")
    (folder / "train" / "red" / "0.png").write_bytes(b"")
    reader = _reader(folder, batch_size=2)
    batches = list(reader.training_batches(np.arange(8), 1))
    assert [len(batch.rows) for batch in batches] == [2, 2, 2]
    assert reader.bad == {1: "not an image (it starts like HTML)", 4: "empty file"}
    assert reader.readable(np.arange(8)).tolist() == [0, 2, 3, 5, 6, 7]


def test_readable__rows_that_the_manifest_knows_to_be_unreadable_are_never_opened(make_photos: MakePhotos) -> None:
    manifest = replace(read(make_photos(train=2)), unreadable={3: "cannot be read (Permission denied)"})
    reader = ImageReader(FinetuneOptions(), Stopwatch(), manifest, PIXELS)
    assert reader.bad == {3: "cannot be read (Permission denied)"}
    assert [batch.rows.tolist() for batch in reader.eval_batches(np.arange(4))] == [[0, 1, 2]]


def test_batches__a_file_that_was_replaced_since_it_was_hashed_is_bad(make_photos: MakePhotos) -> None:
    folder = make_photos(train=3)
    reader = _reader(folder, batch_size=8)
    other, replaced = folder / "train" / "green" / "0.png", folder / "train" / "red" / "1.png"
    replaced.write_bytes(other.read_bytes())
    (batch,) = reader.training_batches(np.arange(6), 1)
    assert sorted(batch.rows.tolist()) == [0, 1, 2, 3, 5]
    assert reader.bad == {4: "it changed while it was being read; run the same command again"}
    # Each file is hashed once: an epoch is not to wait for more.
    other.write_bytes(replaced.read_bytes() + b"more")
    assert [batch.rows.tolist() for batch in reader.eval_batches(np.arange(6))] == [[0, 1, 2, 3, 5]]


def test_training_batches__closed_early_leaves_no_thread(make_photos: MakePhotos) -> None:
    batches = _reader(make_photos(train=8), batch_size=2, workers=3).training_batches(np.arange(16), 1)
    next(batches)
    assert any(thread.name.startswith("ahead") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("n_done", [1, 2])
def test_training_batches__after_a_row_are_the_rest_of_the_epoch_and_no_other_is_read(
    make_photos: MakePhotos, n_done: int
) -> None:
    reader, rows = _reader(make_photos(train=7), batch_size=4), np.arange(14)
    whole = list(reader.training_batches(rows, 2))
    done = [row for batch in whole[:n_done] for row in batch.rows.tolist()]
    for row in done:
        reader.manifest.path_of(row).unlink()
    rest = list(reader.training_batches(rows, 2, after=done[-1]))
    assert [batch.rows.tolist() for batch in rest] == [batch.rows.tolist() for batch in whole[n_done:]]
    assert _pixels(rest) == _pixels(whole[n_done:])
    assert reader.bad == {}
