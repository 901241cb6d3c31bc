from __future__ import annotations

import io
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.shard import ShardWriter
from transfercache.errors import ResourceError
from transfercache.extract.loop import EmbeddedBatch, Embedder, PendingView
from transfercache.images.manifest import hash_files
from transfercache.images.sources import read_source
from transfercache.spec import ExtractSpec, Preprocessing
from transfercache.stopwatch import Stopwatch

PREPROCESSING = Preprocessing(resize=8, crop=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
SPEC = ExtractSpec(backbone="made", weights_digest="0" * 64, boundary="pooled", preprocessing=PREPROCESSING)


def _embed(photos: Path, engine: Any, pending: list[PendingView], watch: Stopwatch) -> list[EmbeddedBatch]:
    manifest = hash_files(read_source(photos), known={})
    return list(Embedder(manifest, SPEC, lambda: engine, 2, watch).embed(pending, batch_size=4))


def test_embed__places_each_slot_on_the_grid(photos: Path, make_engine: Any) -> None:
    pending = [PendingView(slot=9, row=0), PendingView(slot=2, row=7), PendingView(slot=11, row=3)]
    watch = Stopwatch()
    batches = _embed(photos, make_engine(), pending, watch)
    assert [[view.slot for view in batch.views] for batch in batches] == [[2], [9, 11]]
    # Column 3 is the position in the batch, column 4 the batch's length.
    assert [batch.features[:, 3:5].tolist() for batch in batches] == [[[2, 4]], [[1, 4], [3, 4]]]
    assert set(watch.seconds()) == {"decode", "forward", "total"}


def test_embed__a_batch_without_a_readable_image__is_not_computed(photos: Path, make_engine: Any) -> None:
    for i in range(4):
        (photos / f"cat/{i}.png").write_bytes(b"")
    engine = make_engine()
    batches = _embed(photos, engine, [PendingView(slot=row, row=row) for row in range(6)], Stopwatch())
    assert [batch.bad for batch in batches] == [dict.fromkeys(range(4), "empty file"), {}]
    assert [batch.features.shape for batch in batches] == [(0, 0), (2, 6)]
    assert engine.batches == [2]


def test_embed__of_an_engine_that_fails__ends_its_threads(photos: Path, make_engine: Any) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        _embed(
            photos,
            make_engine(fails_at=1, error=ZeroDivisionError),
            [PendingView(slot=row, row=row) for row in range(10)],
            Stopwatch(),
        )
    assert threading.active_count() == before


def test_embed__of_nothing__is_nothing(photos: Path, make_engine: Any) -> None:
    assert _embed(photos, make_engine(), [], Stopwatch()) == []


def test_embed__rows_do_not_depend_on_their_company(photos: Path, make_engine: Any) -> None:
    alone = _embed(photos, make_engine(), [PendingView(slot=5, row=5)], Stopwatch())[0].features[0]
    together = _embed(photos, make_engine(), [PendingView(slot=row, row=row) for row in range(8)], Stopwatch())
    np.testing.assert_array_equal(together[1].features[1], alone)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_embed__on_a_terminal__tells_pace_bottleneck_and_time_left(
    photos: Path, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    watch = Stopwatch({"forward": 1000.0})
    _embed(photos, make_engine(), [PendingView(slot=row, row=row) for row in range(10)], watch)
    last = sys.stderr.getvalue().split("\r")[-1]
    assert re.search(r"extract: 100%.* 10/10 \[00:0\d<00:00, +[\d.]+img/s, limited by forward\]", last)


def test_embed__off_a_terminal__is_silent(photos: Path, make_engine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    _embed(photos, make_engine(), [PendingView(slot=row, row=row) for row in range(10)], Stopwatch())
    assert capfd.readouterr() == ("", "")


def test_fill_shard__computes_while_it_writes(
    extractor: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write waits until the second batch is computed: one after the other would never end."""
    write, second = ShardWriter.write, threading.Event()

    class Announcing(make_engine):
        def embed(self, pixels: np.ndarray) -> np.ndarray:
            features = super().embed(pixels)
            if len(self.batches) == 2:
                second.set()
            return features

    def late(self: ShardWriter, *args: Any) -> None:
        assert second.wait(timeout=30)
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", late)
    assert extractor.run(Announcing()).computed == 10


def test_fill_shard__a_write_that_fails__ends_it_and_keeps_what_was_written(
    extractor: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write, n_writes = threading.active_count(), ShardWriter.write, 0

    def full(self: ShardWriter, *args: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == 2:
            raise ResourceError("no space left on the disk")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(ResourceError, match="no space left"):
            extractor.run()
    assert threading.active_count() == before
    assert extractor.run().computed == 4  # the second batch: the others were written
