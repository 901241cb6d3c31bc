"""Rows that another cache of the same spec holds are copied from there: moved data, subsets, slices."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.store import Store
from transfercache.cache.upkeep import prune, remove

Draw = Callable[[Path, int], None]


@pytest.fixture
def beside(extractor: Any) -> Callable[..., Any]:
    """Returns an extractor of other data into the same cache folder."""
    return lambda data, **settings: type(extractor)(data, extractor.cache_dir, **settings)


def test_moved_data__is_copied_bit_for_bit(extractor: Any, beside: Any, photos: Path, tmp_path: Path) -> None:
    extractor.run()
    before = extractor.features()
    moved = beside(photos.rename(tmp_path / "moved"))
    outcome = moved.run()
    assert (outcome.computed, outcome.reused, moved.engine.batches) == (0, 10, [])
    assert moved.folder.name.startswith("moved-made-")
    assert {path: row.tobytes() for path, row in moved.features().items()} == {
        path: row.tobytes() for path, row in before.items()
    }


def test_subset_with_a_new_image__computes_that_one(
    extractor: Any, beside: Any, photos: Path, tmp_path: Path, draw: Draw
) -> None:
    extractor.run()
    subset = tmp_path / "curated"
    shutil.copytree(photos / "dog", subset / "best")
    draw(subset / "best/new.png", 77)
    chosen = beside(subset)
    outcome = chosen.run()
    assert (outcome.computed, outcome.reused, chosen.engine.batches) == (1, 5, [1])
    served, before = chosen.features(), extractor.features()
    assert all(np.array_equal(served[f"best/{i}.png"], before[f"dog/{i}.png"]) for i in range(5, 10))


def test_slices__are_gathered(extractor: Any, beside: Any, photos: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        shutil.copytree(photos / name, tmp_path / f"only-{name}" / name)
        beside(tmp_path / f"only-{name}").run()
    outcome = extractor.run()
    assert (outcome.computed, outcome.reused, extractor.engine.batches) == (0, 10, [])


def test_unfinished_neighbour__gives_what_it_has(
    extractor: Any, beside: Any, make_engine: Any, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        extractor.run(make_engine(fails_at=1))
    copied = beside(Path(shutil.copytree(photos, tmp_path / "copied")))
    outcome = copied.run()
    assert (outcome.computed, outcome.reused, copied.engine.batches) == (6, 4, [4, 2])


def test_neighbour_of_another_spec__gives_nothing(extractor: Any, beside: Any, photos: Path, tmp_path: Path) -> None:
    extractor.run()
    half = beside(Path(shutil.copytree(photos, tmp_path / "copied")), storage_dtype="float16")
    assert half.run().computed == 10
    # The digits in a folder's name are a label: the catalogue decides.
    stem = half.folder.name.removeprefix("copied")
    half.cache_dir = tmp_path / "elsewhere"
    extractor.folder.rename(extractor.folder.with_name(f"pets{stem}"))
    shutil.copytree(extractor.cache_dir, half.cache_dir)
    shutil.rmtree(half.cache_dir / f"copied{stem}")
    assert half.run().computed == 10


@pytest.mark.parametrize("damage", ["catalogue", "row", "shard"])
def test_neighbour_that_is_damaged__is_named_and_its_rows_are_computed(
    extractor: Any, beside: Any, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    extractor.run()
    (entry,) = Store(extractor.folder).catalogue.shards
    path = extractor.folder / ("catalogue.json" if damage == "catalogue" else entry.file)
    data = bytearray(path.read_bytes())
    at = len(data) - 20 if damage == "catalogue" else entry.features.offset + 5 * 24
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data[:500] if damage == "shard" else data)
    copied = beside(Path(shutil.copytree(photos, tmp_path / "copied")))
    with caplog.at_level(logging.WARNING):
        outcome = copied.run()
    message = {
        "catalogue": f"no rows are taken from {extractor.folder.name} (",
        "shard": f"no rows are taken from {extractor.folder.name} (",
        "row": f"computed instead of taken from there: {path}: row 5 fails its checksum",
    }[damage]
    assert [record.message[: len(message)] for record in caplog.records] == [message]
    assert (outcome.computed, outcome.reused) == (10, 0)
    expected = type(extractor)(photos, tmp_path / "undisturbed")
    expected.run()
    assert all(np.array_equal(row, copied.features()[path]) for path, row in expected.features().items())


def test_folder_that_a_removal_left__is_no_neighbour(
    extractor: Any, beside: Any, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extractor.run()
    (extractor.folder / "mine.txt").touch()
    remove(extractor.folder, dry_run=False)
    assert extractor.folder.is_dir()
    assert beside(Path(shutil.copytree(photos, tmp_path / "copied"))).run().computed == 10
    assert caplog.messages == []


def test_cost__comes_with_the_rows(extractor: Any, beside: Any, photos: Path, tmp_path: Path) -> None:
    extractor.run()  # ten rows in ten seconds, by its record
    subset = tmp_path / "curated"
    shutil.copytree(photos / "dog", subset / "dog")
    beside(subset).run()
    again = beside(Path(shutil.copytree(subset, tmp_path / "again")))
    again.run()
    share, own = Store(again.folder).catalogue.provenance
    (first,) = Store(extractor.folder).catalogue.provenance
    # Copied twice, and still the first cache's: half of its rows at half of its cost.
    assert share == replace(first, computed=5, reused=0, copied_from=share.copied_from, seconds={"total": 5.0})
    assert share.copied_from == extractor.folder.name
    assert (own.computed, own.reused, own.copied_from) == (0, 5, None)


def test_interrupted_while_copying__goes_on(
    extractor: Any, beside: Any, photos: Path, tmp_path: Path, make_engine: Any, draw: Draw
) -> None:
    extractor.run()
    copied = beside(Path(shutil.copytree(photos, tmp_path / "copied")))
    draw(copied.data / "dog/new.png", 77)
    with pytest.raises(KeyboardInterrupt):
        copied.run(make_engine(fails_at=0))
    assert [run.computed for run in Store(copied.folder).catalogue.provenance] == [10, 0]
    outcome = copied.run()
    assert (outcome.computed, outcome.reused) == (1, 10)
    assert open_cache(copied.folder).n_rows == 11


def test_cost__of_a_cache_that_lost_rows_or_had_many_runs(
    extractor: Any, beside: Any, photos: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):  # two runs of five rows, a second a row
        shutil.copytree(photos / name, tmp_path / "grown" / name)
        grown = beside(tmp_path / "grown")
        grown.run()
    shutil.rmtree(tmp_path / "grown/cat")
    (tmp_path / "grown/cat").mkdir()
    grown.run()
    prune(grown.folder, dry_run=False)
    # A made shard is so small that freeing its slots frees no byte: drop the whole one that no row needs.
    assert [entry.n_rows for entry in Store(grown.folder).catalogue.shards] == [5]
    copied = beside(Path(shutil.copytree(photos / "dog", tmp_path / "dogs" / "dog")).parent)
    copied.run()
    shares = Store(copied.folder).catalogue.provenance[:-1]
    assert sum(run.computed for run in shares) == 5
    assert all(run.seconds["total"] == run.computed for run in shares)


def test_neighbour_of_another_width__gives_nothing(extractor: Any, beside: Any, photos: Path, tmp_path: Path) -> None:
    extractor.run()
    catalogue = read_catalogue(extractor.folder)
    wider = replace(catalogue, canaries=np.zeros((4, 7), np.float32), shards=(), rows=None)
    (extractor.folder / "catalogue.json").write_bytes(wider.to_bytes())
    copied = beside(Path(shutil.copytree(photos, tmp_path / "copied")))
    assert copied.run().computed == 10
