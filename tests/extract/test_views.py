"""Views are rows: each drawn from the image's bytes and its own number, computed once, kept when others come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.extract.loop import Embedder, PendingView
from transfercache.images import decode, processes
from transfercache.images.decode import decode_image, load_image
from transfercache.images.manifest import hash_files
from transfercache.images.sources import read_source
from transfercache.images.transforms import eval_pixels, train_pixels, view_pixels
from transfercache.randomness import derive_rng
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch

Draw = Callable[[Path, int], None]


def _views(extractor: Any) -> dict[tuple[str, int], bytes]:
    """(Path, view) -> the features served for it."""
    table = open_cache(extractor.folder).table()
    keys = zip(table.paths, table.view.tolist(), strict=True)
    return {key: features.tobytes() for key, features in zip(keys, table.features, strict=True)}


def test_view_pixels__eval_then_mirror_then_drawn(photos: Path, spec: ExtractSpec) -> None:
    image = load_image(photos / "cat/0.png", "0")
    expected = eval_pixels(image, spec.preprocessing)
    digest = bytes(range(32))
    views = [view_pixels(image, spec.preprocessing, digest=digest, view=view) for view in range(4)]
    np.testing.assert_array_equal(views[0], expected)
    np.testing.assert_array_equal(views[1], expected[:, ::-1])
    for view in (2, 3):
        drawn = train_pixels(image, spec.preprocessing, derive_rng(0, "view", digest.hex(), view))
        np.testing.assert_array_equal(views[view], drawn)
    assert len({view.tobytes() for view in views}) == 4
    other = view_pixels(image, spec.preprocessing, digest=bytes(32), view=2)
    assert other.tobytes() != views[2].tobytes()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (32, 4), (3, 9)])
def test_views__do_not_depend_on_order_batch_or_workers(
    photos: Path, make_engine: Any, spec: ExtractSpec, batch_size: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 1)  # the nine are processes
    manifest = hash_files(read_source(photos), known={})
    engine = make_engine()

    def means(pending: list[PendingView], batch_size: int, workers: int) -> dict[tuple[int, int], bytes]:
        batches = Embedder(manifest, spec, lambda: engine, workers, Stopwatch()).embed(pending, batch_size=batch_size)
        return {
            (view.row, view.view): features[:3].tobytes()
            for batch in batches
            for view, features in zip(batch.views, batch.features, strict=True)
        }

    pending = [PendingView(slot, slot // 4, slot % 4) for slot in range(40)]
    backwards = [PendingView(39 - slot, slot // 4, slot % 4) for slot in range(40)]
    expected = means(pending, 4, 2)
    assert len(expected) == 40
    assert means(backwards, batch_size, workers) == expected


def test_views__from_one_to_four__compute_three_and_leave_the_first_alone(extractor: Any, spec: ExtractSpec) -> None:
    extractor.run()
    one = _views(extractor)
    shard = extractor.folder / "shard-00000.h5"
    before = shard.read_bytes()
    extractor.n_views = 4
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (30, 10)
    assert shard.read_bytes() == before
    four = _views(extractor)
    assert list(four) == [(path, view) for path, _ in one for view in range(4)]
    assert {key: four[key] for key in one} == one
    for (path, view), features in four.items():
        data = (extractor.data / path).read_bytes()
        pixels = view_pixels(decode_image(data, path), spec.preprocessing, digest=sha256(data).digest(), view=view)
        np.testing.assert_allclose(np.frombuffer(features, "<f4")[:3], pixels.mean(axis=(0, 1)), rtol=1e-6)
    rows = open_cache(extractor.folder).rows
    # All views of an image share its group, so that no split or fold separates them.
    assert len(set(zip(rows.row.tolist(), rows.group.tolist(), strict=True))) == 10
    assert extractor.run().computed == 0


def test_views__an_image_is_decoded_once_for_those_in_one_batch(
    extractor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def counted(data: bytes, path: str) -> Any:
        decoded.append(path)
        return decode_image(data, path)

    monkeypatch.setattr(decode, "decode_image", counted)
    extractor.n_views = 4
    extractor.run()
    assert sorted(decoded) == sorted(open_cache(extractor.folder).table().paths[::4])


def test_views__fewer__are_kept_for_later(extractor: Any) -> None:
    extractor.n_views = 3
    extractor.run()
    three = _views(extractor)
    extractor.n_views = 1
    assert extractor.run().computed == 0
    assert list(_views(extractor)) == [key for key in three if key[1] == 0]
    extractor.n_views = 3
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 30)
    assert _views(extractor) == three


def test_views__of_a_bad_image__are_one_row(extractor: Any, photos: Path) -> None:
    (photos / "cat/2.png").write_bytes(b"")
    extractor.n_views = 3
    outcome = extractor.run()
    assert (outcome.computed, outcome.bad) == (27, {2: "empty file"})
    cache = open_cache(extractor.folder)
    assert (cache.n_rows, cache.n_bad, len(cache.rows)) == (10, 1, 28)
    assert cache.table().row.tolist() == [row for row in range(10) if row != 2 for _ in range(3)]


def test_views__of_equal_bytes__share_their_slots(extractor: Any, photos: Path) -> None:
    shutil.copy(photos / "cat/0.png", photos / "dog/copy.png")
    extractor.n_views = 3
    assert extractor.run().computed == 30
    served = _views(extractor)
    assert [served["dog/copy.png", view] for view in range(3)] == [served["cat/0.png", view] for view in range(3)]
    assert [entry.n_rows for entry in Store(extractor.folder).catalogue.shards] == [30]


def test_views__interrupted__are_bit_identical_after_all(extractor: Any, make_engine: Any, tmp_path: Path) -> None:
    undisturbed = type(extractor)(extractor.data, tmp_path / "undisturbed", n_views=3)
    undisturbed.run()
    extractor.n_views = 3
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=4))
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (14, 16)
    assert _views(extractor) == _views(undisturbed)
    shards = [(item.folder / "shard-00000.h5").read_bytes() for item in (extractor, undisturbed)]
    assert shards[0] == shards[1]


def test_storage_dtype__float16_is_the_rounded_row_in_half_the_bytes(extractor: Any, tmp_path: Path) -> None:
    extractor.run()
    half = type(extractor)(extractor.data, tmp_path / "half", storage_dtype="float16")
    half.run()
    (full_entry,), (entry,) = (Store(item.folder).catalogue.shards for item in (extractor, half))
    assert (entry.dtype, entry.features.length * 2) == ("float16", full_entry.features.length)
    expected = {path: row.astype(np.float16).astype(np.float32) for path, row in extractor.features().items()}
    served = half.features()
    assert {row.dtype for row in served.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(served[path], row) for path, row in expected.items())


def test_storage_dtype__a_value_that_overflows_names_the_image(
    extractor: Any, make_engine: Any, photos: Path, draw: Draw
) -> None:
    class Loud(make_engine):
        """Gives the brightest of each batch's images a value beyond float16."""

        def embed(self, pixels: np.ndarray) -> np.ndarray:
            features = super().embed(pixels)
            features[features[:, :3].sum(axis=1).argmax(), 2] = 65520.0
            return np.asarray(features)

    extractor.storage_dtype = "float16"
    outcome = extractor.run(Loud())
    assert len(outcome.bad) == 3  # one a batch
    assert set(outcome.bad.values()) == {
        "its embedding reaches 6.552e+04, beyond what float16 holds; use --storage-dtype float32"
    }
    assert outcome.computed == 7
    assert np.isfinite(open_cache(extractor.folder).table().features).all()
    extractor.storage_dtype = "float32"
    assert extractor.run(Loud()).bad == {}


def test_storage_dtype__a_row_that_vanishes_names_the_image(extractor: Any, make_engine: Any) -> None:
    class Faint(make_engine):
        def embed(self, pixels: np.ndarray) -> np.ndarray:
            return np.full_like(super().embed(pixels), 1e-9)

    extractor.storage_dtype = "float16"
    outcome = extractor.run(Faint())
    assert set(outcome.bad.values()) == {
        "its embedding reaches 1e-09, beyond what float16 holds; use --storage-dtype float32"
    }
    assert len(outcome.bad) == 10
