"""Rows made by other versions are compared with what this machine makes, before any is reused or added."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache.provenance import vouch
from transfercache.cache.store import Store
from transfercache.errors import CacheError, DecodeError, LockedError, ResourceError
from transfercache.extract.parity import MIN_COSINE
from transfercache.images import decode

NEWER = {"torch": "3.0", "pillow": "12.0"}


@pytest.fixture
def turned(make_engine: Any) -> Any:
    """Returns an engine of mean colours that turns every embedding by an angle: cosine = cos(degrees)."""

    class Turned(make_engine):
        def __init__(self, degrees: float = 0.0) -> None:
            super().__init__()
            self.degrees = degrees

        def embed(self, pixels: np.ndarray) -> np.ndarray:
            x = super().embed(pixels).astype(np.float64)
            x[:, 3:5] = 0  # what depends on the batch
            # A vector of the same length at right angles to each row.
            other = np.roll(x, 1, axis=1)
            lengths = (x**2).sum(axis=1, keepdims=True)
            other -= x * (x * other).sum(axis=1, keepdims=True) / lengths
            other *= np.sqrt(lengths / (other**2).sum(axis=1, keepdims=True))
            angle = np.radians(self.degrees)
            return np.asarray(np.cos(angle) * x + np.sin(angle) * other, np.float32)

    return Turned


@pytest.fixture
def four(extractor: Any, turned: Any, photos: Path) -> Any:
    """An extraction of four images, made with older versions."""
    for path in [*photos.glob("dog/*"), photos / "cat/4.png"]:
        path.unlink()
    extractor.run(turned())
    extractor.versions = NEWER
    return extractor


def test_same_versions__check_nothing(extractor: Any) -> None:
    extractor.run()
    outcome = extractor.run()
    assert (outcome.checked, extractor.engine.batches) == (0, [])


def test_other_versions_that_agree__are_checked_once_and_recorded(four: Any, turned: Any) -> None:
    outcome = four.run(turned())
    assert (outcome.checked, outcome.computed, outcome.reused) == (4, 0, 4)
    assert four.engine.batches == [4]
    runs = Store(four.folder).catalogue.provenance
    assert [(run.computed, run.checked, run.versions["torch"]) for run in runs] == [(4, 0, "2.9"), (0, 4, "3.0")]
    for versions in (NEWER, {"torch": "2.9", "pillow": "12.0"}):  # both are known to agree now
        four.versions = versions
        assert (four.run(turned()).checked, four.engine.batches) == (0, [])


@pytest.mark.parametrize(("degrees", "is_refused"), [(0.0, False), (0.7, False), (0.9, True), (80.0, True)])
def test_other_versions__are_refused_below_the_cosine(four: Any, turned: Any, degrees: float, is_refused: bool) -> None:
    before = Store(four.folder).catalogue
    if not is_refused:
        assert four.run(turned(degrees)).checked == 4
        return
    assert np.cos(np.radians(degrees)) < MIN_COSINE["fp32"]
    with pytest.raises(CacheError) as refused:
        four.run(turned(degrees))
    message = str(refused.value)
    assert message.startswith(
        f"{four.folder}: made by engine positioned, torch 2.9, pillow 12.0; here engine positioned, torch 3.0, "
        f"pillow 12.0 computes other embeddings (cosine {np.cos(np.radians(degrees)):.5f} for cat/"
    )
    assert message.endswith("install those versions, remove the folder to make it anew, or name another --cache-dir")
    # Nothing vouches for the new versions: the next run is refused as well.
    assert Store(four.folder).catalogue.provenance == before.provenance
    with pytest.raises(CacheError, match="computes other embeddings"):
        four.run(turned(degrees))


def test_other_versions__are_refused_before_a_row_is_added(four: Any, turned: Any, photos: Path, draw: Any) -> None:
    draw(photos / "cat/new.png", 50)
    with pytest.raises(CacheError, match="computes other embeddings"):
        four.run(turned(5.0))
    assert [entry.n_rows for entry in Store(four.folder).catalogue.shards] == [4]


def test_other_engine__is_another_maker(four: Any, turned: Any) -> None:
    four.versions = {"torch": "2.9", "pillow": "12.0"}
    engine = turned()
    engine.name = "compiled"
    assert four.run(engine).checked == 4


def test_at_most_eight_rows__are_computed_again(extractor: Any, photos: Path) -> None:
    extractor.run()
    extractor.versions = NEWER

    class Constant(type(extractor.engine)):
        """Gives what the cache holds, whatever the batch."""

        def embed(self, pixels: np.ndarray) -> np.ndarray:
            self.batches.append(len(pixels))
            by_mean = {tuple(row[:3].tolist()): row for row in served}
            return np.stack([by_mean[tuple(image.mean(axis=(0, 1)).astype(np.float32).tolist())] for image in pixels])

    served = list(extractor.features().values())
    outcome = extractor.run(Constant())
    assert (outcome.checked, extractor.engine.batches) == (8, [8])


def test_neighbour_of_other_versions__is_checked_or_not_used(
    four: Any, turned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = type(four)(Path(shutil.copytree(four.data, tmp_path / "copied")), four.cache_dir, versions=NEWER)
    with caplog.at_level(logging.WARNING):
        outcome = copied.run(turned(5.0))
    assert (outcome.computed, outcome.reused) == (4, 0)
    (record,) = caplog.records
    assert record.message.startswith(f"computed instead of taken from there: {four.folder}: made by engine positioned")
    agreeing = type(four)(Path(shutil.copytree(four.data, tmp_path / "agreeing")), tmp_path / "other", versions=NEWER)
    shutil.copytree(four.folder, agreeing.cache_dir / four.folder.name)
    outcome = agreeing.run(turned())
    assert (outcome.computed, outcome.reused, outcome.checked) == (0, 4, 4)


def test_neighbour_that_is_refused__hides_no_other_that_holds_the_same_rows(
    four: Any, turned: Any, tmp_path: Path
) -> None:
    def run_copy(name: str) -> tuple[int, int]:
        copied = type(four)(Path(shutil.copytree(four.data, tmp_path / name)), four.cache_dir, versions=NEWER)
        outcome = copied.run(turned(5.0))
        return outcome.computed, outcome.reused

    assert run_copy("zoo") == (4, 0)  # the older rows are those of pets, which is asked first
    assert run_copy("copied") == (0, 4)
    assert run_copy("copied-again") == (0, 4)


def test_image_that_newer_versions_cannot_read__is_no_agreement(four: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes, path: str) -> None:
        raise DecodeError(path, "not read any more")

    monkeypatch.setattr(decode, "decode_image", refuse)
    with pytest.raises(CacheError, match=r"\(cosine 0\.00000 for cat/"):
        four.run()


@pytest.mark.parametrize("error", [ResourceError("read-only"), LockedError("another process is writing to it")])
def test_cache_that_may_not_be_written_now__is_checked_and_used(
    four: Any, turned: Any, monkeypatch: pytest.MonkeyPatch, error: ResourceError
) -> None:
    before = {path: path.read_bytes() for path in four.folder.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transfercache.cache.store.locked", refuse)
    outcome = four.run(turned())
    assert (outcome.checked, outcome.reused) == (4, 4)
    assert {path: path.read_bytes() for path in four.folder.iterdir()} == before


def test_rows_that_nothing_wanted_could_be_checked_against__are_checked_when_they_are(
    four: Any, turned: Any, photos: Path, draw: Any
) -> None:
    older = {path: path.read_bytes() for path in photos.glob("*/*.png")}
    for path in older:
        path.unlink()
    for i in range(3):
        draw(photos / f"cat/new{i}.png", 60 + i)
    # Newer versions that compute otherwise, and no row of the older ones to show it.
    outcome = four.run(turned(30.0))
    assert (outcome.computed, outcome.checked) == (3, 0)
    for path, data in older.items():
        path.write_bytes(data)
    with pytest.raises(CacheError, match="computes other embeddings"):
        four.run(turned(30.0))
    four.versions = {"torch": "2.9", "pillow": "12.0"}
    for path in older:
        path.unlink()
    with pytest.raises(CacheError, match="computes other embeddings"):
        four.run(turned())


@pytest.mark.parametrize(
    ("runs", "makers", "expected"),
    [
        ([], "a", False),
        ([("a", 4, 0)], "a", True),
        ([("a", 4, 0)], "b", False),
        ([("a", 4, 0), ("b", 1, 8)], "b", True),
        ([("a", 4, 0), ("b", 1, 8)], "a", True),
        ([("a", 4, 0), ("b", 1, 0)], "a", False),
        ([("a", 4, 0), ("b", 1, 0)], "b", False),
        ([("a", 4, 0), ("b", 1, 0), ("b", 0, 8)], "b", True),
        ([("a", 4, 0), ("b", 0, 0)], "a", True),
        ([("a", 4, 0), ("b", 0, 0)], "b", False),
    ],
)
def test_vouch(four: Any, runs: list[tuple[str, int, int]], makers: str, expected: bool) -> None:
    (made,) = Store(four.folder).catalogue.provenance
    records = [replace(made, engine=by, computed=computed, checked=checked) for by, computed, checked in runs]
    assert vouch(records, {**made.makers, "engine": makers}) == expected


def test_check_of_a_neighbour__does_not_vouch_for_rows_of_this_cache(
    four: Any, turned: Any, photos: Path, tmp_path: Path, draw: Any
) -> None:
    # This cache has rows of older versions, none of which is wanted; a neighbour's, of the same versions, are.
    other = type(four)(tmp_path / "other", four.cache_dir)
    draw(other.data / "cat/new.png", 60)
    draw(other.data / "cat/newer.png", 61)
    other.run(turned())
    for path in photos.glob("*/*.png"):
        path.unlink()
    shutil.copytree(other.data / "cat", photos / "cat", dirs_exist_ok=True)
    outcome = four.run(turned())
    assert (outcome.computed, outcome.reused, outcome.checked) == (0, 2, 0)
    assert not vouch(Store(four.folder).catalogue.provenance, {"engine": "positioned", **NEWER})
    assert four.run(turned()).checked == 2  # at the next run they are its own
