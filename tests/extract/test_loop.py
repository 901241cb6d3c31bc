from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.extract.loop import EmbeddedBatch, PendingImage, embed_images
from transfercache.images.manifest import hash_files
from transfercache.images.sources import read_source
from transfercache.spec import Preprocessing
from transfercache.stopwatch import Stopwatch

PREPROCESSING = Preprocessing(resize=8, crop=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def _embed(photos: Path, engine: Any, pending: list[PendingImage], watch: Stopwatch) -> list[EmbeddedBatch]:
    manifest = hash_files(read_source(photos), known={}, scanned_ns=0)
    batches = embed_images(pending, manifest, engine, PREPROCESSING, batch_size=4, workers=2, watch=watch)
    return list(batches)


def test_embed_images__places_each_slot_on_the_grid(photos: Path, make_engine: Any) -> None:
    pending = [PendingImage(slot=9, row=0), PendingImage(slot=2, row=7), PendingImage(slot=11, row=3)]
    watch = Stopwatch()
    batches = _embed(photos, make_engine(), pending, watch)
    assert [[image.slot for image in batch.images] for batch in batches] == [[2], [9, 11]]
    # Column 3 is the position in the batch, column 4 the batch's length.
    assert [batch.features[:, 3:5].tolist() for batch in batches] == [[[2, 4]], [[1, 4], [3, 4]]]
    assert set(watch.seconds()) == {"decode", "forward", "total"}


def test_embed_images__a_batch_without_a_readable_image__is_not_computed(photos: Path, make_engine: Any) -> None:
    for i in range(4):
        (photos / f"cat/{i}.png").write_bytes(b"")
    engine = make_engine()
    batches = _embed(photos, engine, [PendingImage(slot=row, row=row) for row in range(6)], Stopwatch())
    assert [batch.bad for batch in batches] == [dict.fromkeys(range(4), "empty file"), {}]
    assert [batch.features.shape for batch in batches] == [(0, 0), (2, 6)]
    assert engine.batches == [2]


def test_embed_images__of_an_engine_that_fails__ends_its_threads(photos: Path, make_engine: Any) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        _embed(
            photos,
            make_engine(fails_at=1, error=ZeroDivisionError),
            [PendingImage(slot=row, row=row) for row in range(10)],
            Stopwatch(),
        )
    assert threading.active_count() == before


def test_embed_images__of_nothing__is_nothing(photos: Path, make_engine: Any) -> None:
    assert _embed(photos, make_engine(), [], Stopwatch()) == []


def test_embed_images__rows_do_not_depend_on_their_company(photos: Path, make_engine: Any) -> None:
    alone = _embed(photos, make_engine(), [PendingImage(slot=5, row=5)], Stopwatch())[0].features[0]
    together = _embed(photos, make_engine(), [PendingImage(slot=row, row=row) for row in range(8)], Stopwatch())
    np.testing.assert_array_equal(together[1].features[1], alone)
