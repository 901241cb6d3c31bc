from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfercache.cache import slots as slots_module
from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.cache.upkeep import prune
from transfercache.cache.verify import verify_folder
from transfercache.errors import CacheError, ResourceError
from transfercache.extract import run as run_module
from transfercache.spec import ExtractSpec

Draw = Callable[[Path, int], None]


def test_extraction__serves_each_image_under_its_path(extractor: Any, photos: Path) -> None:
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, outcome.bad) == (10, 0, {})
    assert extractor.engine.batches == [4, 4, 2]
    served = extractor.features()
    assert list(served) == [f"cat/{i}.png" for i in range(5)] + [f"dog/{i}.png" for i in range(5, 10)]
    for i, (path, features) in enumerate(served.items()):
        mean = np.asarray(Image.open(photos / path)).mean(axis=(0, 1))
        # Mean colour, position on the grid, length of the (padded) batch, one.
        np.testing.assert_allclose(features, [*mean, i % 4, 4, 1], rtol=1e-6)
    table = open_cache(extractor.folder).table()
    assert table.labels.tolist() == [0] * 5 + [1] * 5
    assert table.class_names == ("cat", "dog")
    assert [np.sum(table.split[table.labels == label] == 2) for label in (0, 1)] == [1, 1]


def test_extraction__again__computes_nothing_and_leaves_the_shard_alone(extractor: Any) -> None:
    extractor.run()
    shard = extractor.folder / "shard-00000.h5"
    before = (shard.read_bytes(), shard.stat().st_mtime_ns)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 10)
    assert extractor.engine.batches == []
    assert (shard.read_bytes(), shard.stat().st_mtime_ns) == before


@pytest.mark.parametrize("n_batches", [0, 1, 2])
def test_resume__after_an_interruption__is_bit_identical(
    extractor: Any, make_engine: Any, tmp_path: Path, n_batches: int
) -> None:
    undisturbed = type(extractor)(extractor.data, tmp_path / "undisturbed")
    undisturbed.run()
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=n_batches))
    held = Store(extractor.folder).slots().valid
    assert held.tolist() == [True] * (4 * n_batches) + [False] * (10 - 4 * n_batches)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (10 - 4 * n_batches, 4 * n_batches)
    # The interrupted run's cost is on record beside the last one's.
    assert [run.computed for run in Store(extractor.folder).catalogue.provenance] == [
        4 * n_batches,
        outcome.computed,
    ]
    assert extractor.engine.batches == [4, 4, 2][n_batches:]
    assert _bytes(extractor) == _bytes(undisturbed)
    assert (extractor.folder / "shard-00000.h5").read_bytes() == (undisturbed.folder / "shard-00000.h5").read_bytes()


def test_resume__with_rows_missing_within_batches__keeps_the_grid(extractor: Any, draw: Draw, tmp_path: Path) -> None:
    undisturbed = type(extractor)(extractor.data, tmp_path / "undisturbed")
    undisturbed.run()
    # 1 and 6 could not be read in a first run, in the middle of their batches, and that run did not end either.
    good = {name: (extractor.data / name).read_bytes() for name in ("cat/1.png", "dog/6.png")}

    def damage() -> None:
        for name in good:
            (extractor.data / name).write_bytes(b"torn")

    extractor.before_decoding = damage
    with pytest.raises(KeyboardInterrupt):
        extractor.run(type(extractor.engine)(fails_at=2))
    for name, data in good.items():
        (extractor.data / name).write_bytes(data)
    extractor.before_decoding = lambda: None
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (4, 6)
    assert extractor.engine.batches == [1, 1, 2]
    assert _bytes(extractor) == _bytes(undisturbed)


def test_resume__after_the_data_changed__fills_what_is_still_wanted(
    extractor: Any, make_engine: Any, draw: Draw
) -> None:
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=1))
    (extractor.data / "dog/9.png").unlink()
    draw(extractor.data / "dog/new.png", 100)
    outcome = extractor.run()
    # 4 to 8 in their old slots, the new one in a shard of its own; 9 stays out.
    assert (outcome.computed, outcome.reused) == (6, 4)
    assert extractor.engine.batches == [4, 1, 1]
    assert [entry.n_rows for entry in Store(extractor.folder).catalogue.shards] == [10, 1]
    assert len(extractor.features()) == 10


def test_equal_bytes__share_one_slot(extractor: Any, photos: Path) -> None:
    shutil.copy(photos / "cat/0.png", photos / "cat/copy.png")
    shutil.copy(photos / "cat/0.png", photos / "dog/copy.png")
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (10, 0)
    served = extractor.features()
    assert len(served) == 12
    assert served["cat/copy.png"].tobytes() == served["dog/copy.png"].tobytes() == served["cat/0.png"].tobytes()
    rows = open_cache(extractor.folder).rows
    at = {path: i for i, path in enumerate(rows.path)}
    assert len({int(rows.slot[at[name]]) for name in ("cat/0.png", "cat/copy.png", "dog/copy.png")}) == 1
    # Nor does a split separate them.
    assert len({int(rows.split[at[name]]) for name in ("cat/0.png", "cat/copy.png", "dog/copy.png")}) == 1


def test_changed_file__alone_is_computed(extractor: Any, photos: Path, draw: Draw) -> None:
    extractor.run()
    before = extractor.features()
    draw(photos / "cat/3.png", 77)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (1, 9)
    after = extractor.features()
    mean = np.asarray(Image.open(photos / "cat/3.png")).mean(axis=(0, 1))
    np.testing.assert_allclose(after["cat/3.png"][:3], mean, rtol=1e-6)
    assert {path for path in after if after[path].tobytes() != before[path].tobytes()} == {"cat/3.png"}


def test_changed_file__of_the_same_size_and_time__is_noticed(extractor: Any, photos: Path, draw: Draw) -> None:
    path = photos / "cat/3.png"
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path.with_suffix(".bmp"))
    path.unlink()
    path = path.with_suffix(".bmp")
    old = path.stat()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns - 10_000_000_000))
    extractor.run()
    stamp = path.stat().st_mtime_ns
    Image.new("RGB", (8, 8), (30, 20, 10)).save(path)
    os.utime(path, ns=(stamp, stamp))
    # Size and mtime are as before; ctime is not.
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (1, 9)
    np.testing.assert_allclose(extractor.features()["cat/3.bmp"][:3], [30, 20, 10])


def test_added_file__alone_is_computed_in_a_new_shard(extractor: Any, photos: Path, draw: Draw) -> None:
    extractor.run()
    before = extractor.features()
    draw(photos / "cat/00.png", 50)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (1, 10)
    after = extractor.features()
    assert list(after)[:3] == ["cat/0.png", "cat/00.png", "cat/1.png"]
    assert all(after[path].tobytes() == before[path].tobytes() for path in before)
    assert [entry.n_rows for entry in Store(extractor.folder).catalogue.shards] == [10, 1]


def test_removed_file__leaves_the_table_and_comes_back_for_nothing(extractor: Any, photos: Path, draw: Draw) -> None:
    extractor.run()
    (photos / "dog/7.png").unlink()
    assert (extractor.run().computed, len(extractor.features())) == (0, 9)
    draw(photos / "dog/7.png", 7)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 10)


def test_moved_class__relabels_without_computing(extractor: Any, photos: Path) -> None:
    extractor.run()
    (photos / "cat/0.png").rename(photos / "dog/0.png")
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 10)
    table = open_cache(extractor.folder).table()
    assert table.labels[table.paths.index("dog/0.png")] == 1


def test_bad_images__are_listed_and_tried_again(extractor: Any, photos: Path, draw: Draw) -> None:
    (photos / "cat/2.png").write_text("just words")
    (photos / "dog/6.png").unlink()
    (photos / "dog/6.png").symlink_to(photos / "nowhere.png")
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (8, 0)
    assert outcome.bad == {
        2: "not an image (it starts like text)",
        6: "cannot be read (No such file or directory)",
    }
    cache = open_cache(extractor.folder)
    assert (cache.n_rows, cache.n_bad, len(cache.table())) == (10, 2, 8)
    assert extractor.run().bad == outcome.bad
    draw(photos / "cat/2.png", 2)
    again = extractor.run()
    assert (again.computed, again.reused, set(again.bad)) == (1, 8, {6})
    np.testing.assert_allclose(extractor.features()["cat/2.png"][3:], [0, 4, 1])


def test_copies_of_a_bad_image__are_each_listed(extractor: Any, photos: Path) -> None:
    for name in ("cat/2.png", "dog/6.png"):
        (photos / name).write_text("the same words")
    outcome = extractor.run()
    assert outcome.bad == dict.fromkeys((2, 6), "not an image (it starts like text)")


def test_no_readable_image__is_published_without_a_shard(extractor: Any, photos: Path) -> None:
    for path in photos.glob("*/*.png"):
        path.write_bytes(b"")
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 0)
    assert outcome.bad == dict.fromkeys(range(10), "empty file")
    assert list(extractor.folder.glob("shard*")) == []
    assert open_cache(extractor.folder).n_bad == 10


def test_file_that_changes_between_hashing_and_decoding__is_bad(extractor: Any, photos: Path, draw: Draw) -> None:
    extractor.before_decoding = lambda: draw(photos / "cat/1.png", 99)
    outcome = extractor.run()
    assert outcome.bad == {1: "it changed while it was being read; run the same command again"}
    assert (outcome.computed, outcome.reused) == (9, 0)
    extractor.before_decoding = lambda: None
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, outcome.bad) == (1, 9, {})
    mean = np.asarray(Image.open(photos / "cat/1.png")).mean(axis=(0, 1))
    np.testing.assert_allclose(extractor.features()["cat/1.png"][:3], mean, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embedding_that_is_not_finite__is_bad(extractor: Any, make_engine: Any, value: float) -> None:
    engine = make_engine()
    embed = engine.embed

    def spoilt(pixels: np.ndarray) -> np.ndarray:
        features = embed(pixels)
        if len(engine.batches) == 2:
            features[1, 0] = value
        return features

    engine.embed = spoilt
    outcome = extractor.run(engine)
    assert outcome.bad == {5: "its embedding is not finite (NaN or infinity); are the weights damaged?"}
    assert (outcome.computed, outcome.reused) == (9, 0)
    assert len(extractor.features()) == 9


def test_flipped_bit_in_an_unfinished_shard__is_computed_again(extractor: Any, make_engine: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=2))
    entry = Store(extractor.folder).catalogue.shards[0]
    with open(extractor.folder / entry.file, "r+b") as file:
        file.seek(entry.features.offset + 3 * 6 * 4)  # the first value of slot 3
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (3, 7)
    assert extractor.engine.batches == [1, 2]


def _bytes(extractor: Any) -> dict[str, bytes]:
    return {path: features.tobytes() for path, features in extractor.features().items()}


def _damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_prove__damaged_rows_alone_are_computed_again(extractor: Any) -> None:
    extractor.run()
    before = _bytes(extractor)
    (entry,) = Store(extractor.folder).catalogue.shards
    for slot in (2, 7):
        _damage(extractor.folder / entry.file, entry.features.offset + slot * 24)
    assert extractor.run().computed == 0  # what looks unchanged is proved when it is read
    with pytest.raises(CacheError, match="row 2 fails its checksum; mend it with: tlc extract-features DATA --verify-"):
        _bytes(extractor)
    extractor.prove = True
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, extractor.engine.batches) == (2, 8, [2])
    extractor.prove = False
    assert extractor.run().computed == 0
    after = _bytes(extractor)
    # Columns 3 and 4 of the made engine tell the place in the batch, which is another one now.
    assert [path for path in before if after[path] != before[path]] == ["cat/2.png", "dog/7.png"]
    assert all(after[path][:12] == before[path][:12] for path in before)
    assert verify_folder(extractor.folder).problems == ()
    assert [entry.number for entry in Store(extractor.folder).catalogue.shards] == [1, 2]


@pytest.mark.parametrize("name", ["replace_shards", "_tidy"])
def test_prove__interrupted_once_it_is_on_record__is_recorded_once(
    extractor: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    extractor.run()
    (entry,) = Store(extractor.folder).catalogue.shards
    _damage(extractor.folder / entry.file, entry.features.offset + 2 * 24)
    publish = Store.publish

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def publish_and_be_interrupted(store: Store, *words: Any, **options: Any) -> bool:
        monkeypatch.setattr(Store, "_tidy", interrupted)
        return publish(store, *words, **options)

    extractor.prove = True
    with monkeypatch.context() as monkeypatch:
        if name == "_tidy":  # the last that publishing does
            monkeypatch.setattr(Store, "publish", publish_and_be_interrupted)
        else:
            monkeypatch.setattr(run_module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            extractor.run()
    assert [run.computed for run in read_catalogue(extractor.folder).provenance] == [10, 1]


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:1000])


def _replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.h5")
    path.symlink_to(path.parent.parent / "elsewhere.h5")


@pytest.mark.parametrize(
    ("damage", "n_computed"),
    [
        (lambda path: _damage(path, 20), 0),  # HDF5's header: every row is as it was
        (lambda path: path.write_bytes(b""), 10),
        (_truncate, 10),
        (Path.unlink, 10),
        (_replace_by_link, 10),
    ],
    ids=["header", "empty", "truncated", "gone", "link"],
)
def test_prove__a_damaged_shard_is_replaced(extractor: Any, damage: Callable[[Path], object], n_computed: int) -> None:
    extractor.run()
    before = _bytes(extractor)
    shard = extractor.folder / "shard-00000.h5"
    shard.chmod(0o644)
    damage(shard)
    assert verify_folder(extractor.folder).problems
    extractor.prove = True
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (n_computed, 10 - n_computed)
    assert verify_folder(extractor.folder).problems == ()
    assert _bytes(extractor) == before
    assert not shard.exists()
    before_again = sorted(path.name for path in extractor.folder.iterdir())
    assert extractor.run().reused == 10
    assert sorted(path.name for path in extractor.folder.iterdir()) == before_again


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_prove__reads_each_whole_shard_once(
    extractor: Any, make_engine: Any, draw: Draw, monkeypatch: pytest.MonkeyPatch, is_interrupted: bool
) -> None:
    extractor.run()
    draw(extractor.data / "dog/new.png", 100)
    hashed: list[str] = []
    real = slots_module.shard_digest
    monkeypatch.setattr(slots_module, "shard_digest", lambda path, entry: hashed.append(path.name) or real(path, entry))
    extractor.prove = True
    if is_interrupted:
        with pytest.raises(KeyboardInterrupt):
            extractor.run(make_engine(fails_at=0))
    else:
        assert extractor.run().computed == 1
    assert hashed == ["shard-00000.h5"]


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_rows_file_that_is_damaged__is_written_again(extractor: Any, damage: str) -> None:
    extractor.run()
    before = _bytes(extractor)
    (rows,) = extractor.folder.glob("rows-*")
    content = rows.read_bytes()
    if damage == "gone":
        rows.unlink()
    else:
        _damage(rows, 300)
    with pytest.raises(CacheError, match=r"rows-[0-9a-f]{8}\.safetensors: .*"):
        open_cache(extractor.folder)
    extractor.prove = True
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 10)
    assert rows.read_bytes() == content
    assert _bytes(extractor) == before


def test_touched_file__is_hashed_and_not_computed(extractor: Any, photos: Path) -> None:
    extractor.run()
    before = _bytes(extractor)
    os.utime(photos / "cat/0.png", ns=(10**18, 10**18))
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, extractor.engine.batches) == (0, 10, [])
    assert open_cache(extractor.folder).rows.mtime_ns[0] == 10**18  # its new time vouches for it from now on
    assert _bytes(extractor) == before


def test_edit_of_the_same_size_in_the_same_second__is_computed(extractor: Any, photos: Path) -> None:
    changed = photos / "cat/0.png"
    extractor.run()
    status = changed.stat()
    Image.fromarray(np.random.default_rng(500).integers(1, 256, (8, 8, 3), dtype=np.uint8)).save(changed)
    assert changed.stat().st_size == status.st_size  # noise does not compress
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (1, 9)


def test_renamed_files_and_moved_splits__compute_nothing(extractor: Any, tmp_path: Path, photos: Path) -> None:
    data = tmp_path / "split"
    for name, split in (("cat", "train"), ("dog", "val")):
        shutil.copytree(photos / name, data / split / name)
    given = type(extractor)(data, tmp_path / "given")
    given.run()
    before = given.features()
    (data / "train/dog").mkdir()
    (data / "val/dog/7.png").rename(data / "train/dog/renamed.png")
    (data / "train/cat/1.png").rename(data / "train/dog/was a cat.png")
    outcome = given.run()
    assert (outcome.computed, outcome.reused, given.engine.batches) == (0, 10, [])
    after = given.features()
    assert after["train/dog/renamed.png"].tobytes() == before["val/dog/7.png"].tobytes()
    assert after["train/dog/was a cat.png"].tobytes() == before["train/cat/1.png"].tobytes()
    table = open_cache(given.folder).table()
    told = dict(zip(table.paths, zip(table.split.tolist(), table.labels.tolist(), strict=True), strict=True))
    assert told["train/dog/renamed.png"] == (1, 1)
    assert told["train/dog/was a cat.png"] == (1, 1)


def test_changed_transform_flag__is_another_cache(extractor: Any, spec: ExtractSpec) -> None:
    extractor.run()
    first = extractor.folder
    extractor.preprocessing = replace(spec.preprocessing, antialias=False)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (10, 0)
    assert extractor.folder != first
    assert read_catalogue(extractor.folder).spec.preprocessing.antialias is False


def test_interrupted_between_finishing_and_publishing__keeps_all_and_its_cost(
    extractor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    publish = Store.publish
    monkeypatch.setattr(Store, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extractor.run()
    monkeypatch.setattr(Store, "publish", publish)
    catalogue = read_catalogue(extractor.folder)
    assert [(run.computed, run.seconds["total"]) for run in catalogue.provenance] == [(10, 10.0)]
    assert [entry.finished for entry in catalogue.shards] == [False]
    assert prune(extractor.folder, dry_run=False).bytes == 0
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (0, 10)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate], ids=["gone", "truncated"])
def test_prove__an_unfinished_shard_that_cannot_be_read__is_replaced(
    extractor: Any, make_engine: Any, damage: Callable[[Path], object]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=1))
    damage(extractor.folder / "shard-00000.h5")
    with pytest.raises(CacheError, match="mend it with: tlc extract-features DATA --verify-content"):
        extractor.run()
    extractor.prove = True
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused) == (10, 0)
    assert verify_folder(extractor.folder).problems == ()
    assert [entry.number for entry in Store(extractor.folder).catalogue.shards] == [1]


def test_read_only_cache__with_a_bad_image_and_new_times__is_used(
    extractor: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "cat/2.png").write_bytes(b"no image")
    extractor.run()
    before = {path: path.read_bytes() for path in extractor.folder.iterdir()}
    for path in photos.glob("*/*.png"):  # copied again: another inode, another time
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)

    def refuse(*_: object, **__: object) -> None:
        raise ResourceError("read-only")

    monkeypatch.setattr("transfercache.cache.store.locked", refuse)
    with pytest.raises(ResourceError):  # where it may be written, the bad image is tried again
        extractor.run()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, outcome.bad) == (0, 9, {2: "not an image (it starts like text)"})
    assert {path: path.read_bytes() for path in extractor.folder.iterdir()} == before
    (photos / "cat/3.png").rename(photos / "cat/renamed.png")
    with pytest.raises(ResourceError):  # that could not be kept
        extractor.run()
