from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache import reader as reader_module
from transfercache.cache.catalogue import Catalogue, read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.errors import CacheError, DataError, UsageError
from transfercache.files import sha256_bytes

Rewrite = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


def test_open_cache__what_was_published(finished: Path, extraction: Any, make_run: Any) -> None:
    cache = open_cache(str(finished))
    assert (cache.spec, cache.data_name, cache.data_root) == (extraction.spec, "insects", Path("/data/insects"))
    assert cache.class_names == ("ant", "bee")
    assert (cache.n_rows, cache.n_bad) == (10, 0)
    assert cache.canaries.tobytes() == extraction.canaries.tobytes()
    assert cache.provenance == (make_run(),)
    assert cache.rows.known_files()["train/é4.jpg"] == (1004, 14, 24, 34, extraction.digests[4].tobytes())
    assert repr(cache) == f"Cache('{finished}': 10 images, 0 bad, 6 features)"


def test_table__rows_in_the_order_of_the_manifest(finished: Path, extraction: Any) -> None:
    table = open_cache(finished).table()
    np.testing.assert_array_equal(table.features, extraction.features)
    assert table.features.flags.writeable
    assert table.row.tolist() == table.group.tolist() == list(range(10))
    assert table.paths == tuple(f"train/é{i}.jpg" for i in range(10))
    assert table.labels.tolist() == [0, 1] * 5
    assert (table.class_names, table.spec) == (("ant", "bee"), extraction.spec)


def test_table__split(finished: Path, extraction: Any) -> None:
    cache = open_cache(finished)
    val = cache.table("val")
    assert val.row.tolist() == [2, 5, 8]
    np.testing.assert_array_equal(val.features, extraction.features[[2, 5, 8]])
    with pytest.raises(UsageError, match=r"unknown split 'vall' \(did you mean val\?\); known: train, val, test"):
        cache.table("vall")
    with pytest.raises(DataError, match="its data has no split 'test'; it has train, val"):
        cache.table("test")


def test_table__bad_and_unlabelled_rows(tmp_path: Path, make_extraction: Any) -> None:
    extraction = make_extraction(bad=5)
    extraction.label = np.where(np.arange(10) < 3, -1, 1)
    cache = open_cache(extraction.run(tmp_path))
    assert (cache.n_rows, cache.n_bad) == (10, 1)
    assert cache.table().row.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert cache.table("val").row.tolist() == [2, 8]
    assert cache.table(labelled_only=True).row.tolist() == [3, 4, 6, 7, 8, 9]
    features, labels = cache.arrays("val")
    assert labels.tolist() == [1]
    np.testing.assert_array_equal(features, extraction.features[[8]])
    assert cache.arrays()[1].tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1]


def test_table__rows_of_several_shards_and_equal_content(
    finished: Path, extraction: Any, make_extraction: Any, make_run: Any
) -> None:
    more = make_extraction(n_images=14)
    store = Store(finished)
    with store.writing():
        number = store.begin_shard(more.digests[10:], np.zeros(4, np.uint8), batch_size=4)
        with store.writer(number) as writer:
            writer.write(np.arange(4), more.features[10:])
        store.finish_shard(number)
        content = np.array([13, 0, 12, 1, 11, 2, 2, 3, 10, 10, 4, 9, 5, 6])
        shard, slot = (content >= 10).astype(np.int32), content % 10
        rows = more.rows(digest=more.digests[content], shard=shard, slot=slot)
        store.publish(rows, class_names=("ant", "bee"), run=make_run())
    cache = open_cache(finished)
    np.testing.assert_array_equal(cache.table().features, more.features[content])
    np.testing.assert_array_equal(cache.table("val").features, more.features[content[[2, 5, 8, 11]]])


def test_open_cache__not_a_cache(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(CacheError, match="not a cache folder; make one with: tlc extract-features DATA"):
            open_cache(path)


def test_open_cache__not_finished(tmp_path: Path, extraction: Any) -> None:
    steps = extraction.steps(tmp_path)
    while next(steps) != "finished":
        pass
    steps.close()
    (folder,) = tmp_path.iterdir()
    with pytest.raises(CacheError, match="not finished: run the same extract-features again"):
        open_cache(folder)


def test_open_cache__another_schema(finished: Path, rewrite_catalogue: Rewrite) -> None:
    rewrite_catalogue(finished, lambda c: c.update(schema_version=2))
    message = "this is a cache of schema 2, this tlc reads schema 1; remove the folder and make it anew with: tlc"
    with pytest.raises(CacheError, match=message):
        open_cache(finished)


def test_table__tampered_shard(finished: Path, tamper: Callable[[Path, int], None]) -> None:
    (entry,) = read_catalogue(finished).shards
    shard = finished / entry.file
    original = shard.read_bytes()
    cases = {
        entry.features.offset + 5 * 24: "row 5 fails its checksum",
        entry.checksums.offset + 6 * 8: "row 6 fails its checksum",
        entry.digests.offset + 7 * 32: "does not hold the features of train/é7.jpg",
        entry.views.offset + 8: "does not hold the features of train/é8.jpg",
    }
    for offset, message in cases.items():
        tamper(shard, offset)
        with pytest.raises(
            CacheError, match=rf"shard-00000\.h5: {message}; mend it with: tlc extract-features DATA --ver"
        ):
            open_cache(finished).table()
        shard.write_bytes(original)
    tamper(shard, entry.features.offset + 2 * 24)
    assert open_cache(finished).table("train").row.tolist() == [0, 1, 3, 4, 6, 7, 9]  # row 2 is not asked for


@pytest.mark.parametrize(
    ("pattern", "next_step"),
    [("catalogue.json", "remove the folder and make it anew"), ("rows-*", "mend it with: tlc extract-features DATA")],
)
def test_open_cache__tampered_file(
    finished: Path, tamper: Callable[[Path, int], None], pattern: str, next_step: str
) -> None:
    (path,) = finished.glob(pattern)
    tamper(path, path.stat().st_size - 3)
    with pytest.raises(CacheError, match=f"{path.name}: fails its checksum; {next_step}"):
        open_cache(finished)


def test_open_cache__files_that_are_missing_short_or_links(finished: Path, tmp_path: Path) -> None:
    shard = finished / "shard-00000.h5"
    shard.rename(tmp_path / "moved.h5")
    shard.symlink_to(tmp_path / "moved.h5")
    with pytest.raises(CacheError, match=r"shard-00000\.h5: is a link"):
        open_cache(finished).table()
    shard.unlink()
    with pytest.raises(CacheError, match=r"shard-00000\.h5: cannot be opened \(No such file"):
        open_cache(finished).table()
    shard.write_bytes(b"short")
    with pytest.raises(CacheError, match=r"shard-00000\.h5: 5 bytes, but its rows end at"):
        open_cache(finished).table()
    (rows,) = finished.glob("rows-*")
    rows.unlink()
    with pytest.raises(CacheError, match=rf"{rows.name}: cannot be opened"):
        open_cache(finished)


def test_open_cache__rows_that_lie(finished: Path, extraction: Any, rewrite_catalogue: Rewrite) -> None:
    def publish(data: bytes) -> None:
        sha256 = sha256_bytes(data)
        file = f"rows-{sha256[:8]}.safetensors"
        (finished / file).write_bytes(data)
        rewrite_catalogue(finished, lambda c: c.update(rows={"file": file, "sha256": sha256}))

    publish(extraction.rows(slot=np.arange(10) + 1).to_bytes())
    with pytest.raises(CacheError, match="a row lies beyond the 10 rows of shard 0; mend it with"):
        open_cache(finished)
    publish(extraction.rows(label=np.full(10, 2)).to_bytes())
    with pytest.raises(CacheError, match="label 2 with 2 class names"):
        open_cache(finished)
    publish(b"not safetensors at all")
    with pytest.raises(CacheError, match="not a rows file"):
        open_cache(finished)
    publish(extraction.rows(slot=np.array([1, 0, *range(2, 10)])).to_bytes())
    with pytest.raises(CacheError, match=r"does not hold the features of train/é0\.jpg"):
        open_cache(finished).table()


def test_open_cache__read_only_folder(finished: Path, extraction: Any) -> None:
    for path in finished.iterdir():
        path.chmod(0o444)
    finished.chmod(0o555)
    before = sorted(os.listdir(finished))
    try:
        np.testing.assert_array_equal(open_cache(finished).table().features, extraction.features)
        assert sorted(os.listdir(finished)) == before
    finally:
        finished.chmod(0o755)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_table__features_not_finite(tmp_path: Path, extraction: Any, value: float) -> None:
    extraction.features[2, 3] = value
    cache = open_cache(extraction.run(tmp_path))
    for _ in range(2):
        with pytest.raises(
            CacheError, match=r"^train/é2\.jpg: its features are not finite .* remove it, and extract a"
        ):
            cache.table()
    assert cache.table("train").row.tolist() == [0, 1, 3, 4, 6, 7, 9]  # the row is not asked for


def test_table__finite_features_whose_sum_overflows(tmp_path: Path, extraction: Any) -> None:
    extraction.features = np.full_like(extraction.features, 3e38)
    assert open_cache(extraction.run(tmp_path)).table().features.max() == np.float32(3e38)


def test_table__a_row_is_proved_once_a_process(
    finished: Path, extraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(finished)
    cache.table("train")
    cache.table()

    def refuse(*_: object) -> None:
        raise RuntimeError("proved twice")

    monkeypatch.setattr("transfercache.cache.shard.row_checksums", refuse)
    np.testing.assert_array_equal(cache.table().features, extraction.features)
    with pytest.raises(RuntimeError, match="proved twice"):
        open_cache(finished).table()


def test_open_cache__published_between_its_two_reads(
    finished: Path, extraction: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = read_catalogue(finished)
    store = Store(finished)
    with store.writing():
        store.publish(extraction.rows(label=np.ones(10, np.int64)), class_names=("ant", "bee"), run=make_run())
    answers = iter([stale])

    def read_stale_first(folder: Path) -> Catalogue:
        return next(answers, None) or read_catalogue(folder)

    monkeypatch.setattr(reader_module, "read_catalogue", read_stale_first)
    assert open_cache(finished).table().labels.tolist() == [1] * 10


def test_cache__unfinished_shard_beside_published_rows(finished: Path, extraction: Any) -> None:
    store = Store(finished)
    with store.writing():
        store.begin_shard(extraction.digests, np.ones(10, np.uint8), batch_size=4)
    np.testing.assert_array_equal(open_cache(finished).table().features, extraction.features)


def test_table__more_rows_than_are_proved_at_a_time(tmp_path: Path, make_extraction: Any, make_run: Any) -> None:
    extraction = make_extraction(n_images=1300)
    folder = extraction.run(tmp_path)
    np.testing.assert_array_equal(open_cache(folder).table().features, extraction.features)
    order = np.random.default_rng(2).permutation(1300)
    store = Store(folder)
    with store.writing():
        rows = extraction.rows(slot=order, digest=extraction.digests[order])
        store.publish(rows, class_names=("ant", "bee"), run=make_run())
    np.testing.assert_array_equal(open_cache(folder).table().features, extraction.features[order])


def test_reader__imports_neither_h5py_nor_torch() -> None:
    code = "import sys, transfercache.cache.reader; print({'h5py', 'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_stored_table__reads_what_is_asked_for_and_only_then(finished: Path) -> None:
    cache = open_cache(finished)
    table, stored = cache.table(), cache.stored_table()
    part = stored.subset(np.array([5, 0, 3]))
    np.testing.assert_array_equal(part.blocks.read(1, 3), table.features[[0, 3]])
    np.testing.assert_array_equal(part.features, table.features[[5, 0, 3]])
    assert part.paths == tuple(table.paths[i] for i in (5, 0, 3))


def test_stored_table__damaged_row_is_named_when_it_is_read(
    finished: Path, tamper: Callable[[Path, int], None]
) -> None:
    entry = read_catalogue(finished).shards[0]
    slot = int(open_cache(finished).rows.slot[4])
    tamper(finished / entry.file, entry.features.offset + slot * entry.features.length // entry.n_rows)
    stored = open_cache(finished).stored_table()
    stored.blocks.read(0, 4)
    with pytest.raises(CacheError, match=f"row {slot} fails its checksum"):
        stored.blocks.read(0, 5)
