from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transfercache.errors import DataError, UsageError
from transfercache.images import manifest as manifest_module
from transfercache.images.manifest import KnownFile, Manifest, check_trainable, hash_files, split_rows
from transfercache.images.sources import read_source
from transfercache.splits import Split

Write = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path, write_image: Write) -> Path:
    """Two classes of ten different images, all an hour old."""
    for number in range(20):
        path = write_image(tmp_path / "photos" / "ab"[number // 10] / f"{number:02d}.jpg", number)
        make_old(path)
    return tmp_path / "photos"


def make_old(path: Path, seconds: float = 3600) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def hashed(folder: Path) -> Manifest:
    return hash_files(read_source(folder), known={})


def known_files(manifest: Manifest) -> dict[str, KnownFile]:
    return {
        path: (*manifest.stat[row].tolist(), manifest.digests[row].tobytes()) for row, path in enumerate(manifest.paths)
    }


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes were read."""
    names: list[str] = []
    real = manifest_module.sha256_file

    def counting(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest_module, "sha256_file", counting)
    return names


def test_hash_files__digests_of_the_bytes_in_row_order(photos: Path) -> None:
    manifest = hashed(photos)
    for row in range(manifest.n_rows):
        assert manifest.digests[row].tobytes() == hashlib.sha256(manifest.path_of(row).read_bytes()).digest()


def test_hash_files__more_files_than_one_task(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(150):
        (tmp_path / "flat" / f"{number:03d}.jpg").write_bytes(b"%d" % number)
    manifest = hashed(tmp_path / "flat")
    assert [digest.tobytes() for digest in manifest.digests] == [
        hashlib.sha256(b"%d" % number).digest() for number in range(150)
    ]


def test_hash_files__known_files_are_not_read(photos: Path, files_read: list[str]) -> None:
    first = hashed(photos)
    assert len(files_read) == 20
    files_read.clear()
    second = hash_files(read_source(photos), known=known_files(first))
    assert files_read == []
    np.testing.assert_array_equal(second.digests, first.digests)


def test_hash_files__a_change_that_only_ctime_shows_is_read(photos: Path, files_read: list[str]) -> None:
    known = known_files(hashed(photos))
    path = photos / "a" / "03.jpg"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar restore it
    files_read.clear()
    manifest = hash_files(read_source(photos), known=known)
    assert files_read == ["03.jpg"]
    assert manifest.digests[3].tobytes() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("field", range(4), ids=["size", "mtime_ns", "ctime_ns", "inode"])
def test_hash_files__each_of_the_four_fields_counts(photos: Path, files_read: list[str], field: int) -> None:
    known = known_files(hashed(photos))
    entry = list(known["b/15.jpg"])
    entry[field] += 1
    known["b/15.jpg"] = tuple(entry)
    files_read.clear()
    hash_files(read_source(photos), known=known)
    assert files_read == ["15.jpg"]


def test_hash_files__young_files_are_read_now_and_next_time(photos: Path, files_read: list[str]) -> None:
    make_old(photos / "a" / "00.jpg", seconds=1.5)
    scanned = read_source(photos)
    assert 0 <= time.time_ns() - scanned.scanned_ns < 10**9
    first = hash_files(scanned, known={})
    assert first.stat[0, 1] == -1
    files_read.clear()
    # A record made while the file was young does not vouch for it even once it is old: it may have changed within
    # the same tick of the clock, after it was hashed.
    later = replace(read_source(photos), scanned_ns=scanned.scanned_ns + 60 * 10**9)
    second = hash_files(later, known=known_files(first))
    assert files_read == ["00.jpg"]
    files_read.clear()
    hash_files(later, known=known_files(second))
    assert files_read == []
    hash_files(scanned, known=known_files(second))
    assert files_read == ["00.jpg"]


def test_hash_files__unreadable_files_keep_their_reason_and_no_digest(photos: Path) -> None:
    (photos / "a" / "dangling.jpg").symlink_to("gone.jpg")
    scanned = read_source(photos)
    (photos / "b" / "19.jpg").unlink()  # between scan and hashing
    manifest = hash_files(scanned, known={})
    assert manifest.paths[10] == "a/dangling.jpg"
    assert manifest.unreadable == dict.fromkeys((10, 20), "cannot be read (No such file or directory)")
    assert not manifest.digests[[10, 20]].any()
    assert manifest.is_readable().sum() == 19


def test_split_rows__per_class_by_content_and_without_unreadable_rows(photos: Path) -> None:
    (photos / "a" / "dangling.jpg").symlink_to("gone.jpg")
    manifest = split_rows(hashed(photos), val_fraction=0.2, split_seed=0)
    assert manifest.split[10] == Split.NONE
    good = manifest.subset(manifest.is_readable())
    for label in (0, 1):
        assert np.bincount(good.split[good.labels == label]).tolist() == [0, 8, 2]
    renamed = photos.rename(photos.with_name("renamed"))
    again = split_rows(hashed(renamed), val_fraction=0.2, split_seed=0)
    np.testing.assert_array_equal(again.split, manifest.split)


def test_split_rows__equal_bytes_and_groups_never_straddle(photos: Path) -> None:
    for number in range(10):
        (photos / "a" / f"copy{number}.jpg").write_bytes((photos / "a" / f"{number:02d}.jpg").read_bytes())
    manifest = split_rows(hashed(photos), val_fraction=0.3, split_seed=0)
    by_path = dict(zip(manifest.paths, manifest.split.tolist(), strict=True))
    assert [by_path[f"a/copy{n}.jpg"] for n in range(10)] == [by_path[f"a/{n:02d}.jpg"] for n in range(10)]


def test_component__is_joined_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    real = manifest_module.join_groups
    monkeypatch.setattr(manifest_module, "join_groups", lambda *given: joined.append(1) or real(*given))
    manifest = hashed(photos)
    assert manifest.component.tolist() == manifest.component.tolist() == list(range(20))
    assert len(joined) == 1


def test_split_rows__a_given_split_stays_and_a_wrong_fraction_is_refused(photos: Path) -> None:
    manifest = replace(hashed(photos), has_given_split=True)
    assert split_rows(manifest, val_fraction=0.2, split_seed=0) is manifest
    with pytest.raises(UsageError, match=r"--val-fraction 1\.0 must be at least 0 and below 1"):
        split_rows(manifest, val_fraction=1.0, split_seed=0)


def make_manifest(
    rows: list[tuple[int, Split]], class_names: tuple[str, ...], groups: list[int] | None = None
) -> Manifest:
    """A manifest of rows (label, split) whose files all differ."""
    n_rows = len(rows)
    digests = np.zeros((n_rows, 32), dtype=np.uint8)
    digests[:, 0] = np.arange(1, n_rows + 1)
    return Manifest(
        name="data",
        root=Path("/data"),
        paths=tuple(f"{row}.jpg" for row in range(n_rows)),
        labels=np.array([label for label, _ in rows], dtype=np.int64),
        split=np.array([split for _, split in rows], dtype=np.uint8),
        class_names=class_names,
        stat=np.zeros((n_rows, 4), dtype=np.int64),
        group=np.array(groups or [-1] * n_rows, dtype=np.int64),
        digests=digests,
        unreadable={},
        has_given_split=True,
        skipped={},
        scanned_ns=0,
    )


def both(label: int, n_train: int = 5, n_val: int = 1) -> list[tuple[int, Split]]:
    return [(label, Split.TRAIN)] * n_train + [(label, Split.VAL)] * n_val


def test_check_trainable__balanced_data_has_no_warning() -> None:
    assert check_trainable(make_manifest(both(0) + both(1), ("a", "b"))) == []


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ([], "class 'x' has no image"),
        (
            [(2, Split.VAL)] * 3,
            "class 'x' has no training image: its 3 images in val cannot be right, and each counts as wrong",
        ),
        (both(2, n_val=0), "class 'x' has no val image: its recall is unknown"),
        (both(2, n_train=3), "class 'x' has 3 training images, fewer than 5 folds: it is held out in 3 of them"),
        (both(2, n_train=1), "class 'x' has 1 training image, fewer than 5 folds: it is held out in none of them"),
    ],
)
def test_check_trainable__names_the_class(rows: list[tuple[int, Split]], warning: str) -> None:
    assert check_trainable(make_manifest(both(0) + both(1) + rows, ("a", "b", "x"))) == [warning]


def test_check_trainable__counts_groups_rather_than_images() -> None:
    groups = [-1] * 12 + [1, 1, 1, 1, 2, 2, 3]
    manifest = make_manifest(both(0) + both(1) + both(2, n_train=6), ("a", "b", "x"), groups)
    assert check_trainable(manifest) == [
        "class 'x' has 6 training images in 2 groups (or sets of copies), fewer than 5 folds: "
        "it is held out in 2 of them"
    ]


def test_check_trainable__a_class_only_in_the_selection_split() -> None:
    rows = [(label, split) for label in (0, 1) for split in [Split.TRAIN] * 5 + [Split.TEST]] + [(2, Split.VAL)]
    assert check_trainable(make_manifest(rows, ("a", "b", "x"))) == ["class 'x' has no training image"]


def test_check_trainable__nothing_is_held_out_and_rows_without_a_split() -> None:
    rows = both(0, n_val=0) + both(1, n_val=0) + [(1, Split.NONE)]
    assert check_trainable(make_manifest(rows, ("a", "b"))) == [
        "no labelled image is held out: no accuracy can be reported",
        "1 labelled images are in no split: they are scored, never trained or reported on",
    ]


def test_check_trainable__many_rare_classes_are_summed_up() -> None:
    rows = both(0) + both(1) + [row for label in range(2, 40) for row in both(label, n_train=2)]
    warnings = check_trainable(make_manifest(rows, tuple(f"{n:02d}" for n in range(40))))
    assert len(warnings) == 11
    assert warnings[-1] == "... and 28 more classes like these"


@pytest.mark.parametrize(
    ("rows", "has"),
    [(both(1), "only 'b' has any"), ([(-1, Split.NONE)], "none has any"), ([*both(0), (1, Split.VAL)], "only 'a' has")],
)
def test_check_trainable__fewer_than_two_classes(rows: list[tuple[int, Split]], has: str) -> None:
    with pytest.raises(DataError, match=rf"/data: fewer than two classes with training images \({has}"):
        check_trainable(make_manifest(rows, ("a", "b")))


def test_check_trainable__unreadable_rows_do_not_count() -> None:
    manifest = replace(make_manifest(both(0) + both(1), ("a", "b")), unreadable=dict.fromkeys(range(6, 11), "gone"))
    with pytest.raises(DataError, match="only 'a' has any"):
        check_trainable(manifest)


def test_rows_digest__is_the_same_for_ever() -> None:
    # Kept results and checkpoints are found by it.
    manifest = make_manifest(both(0) + both(1), ("a", "b"))
    assert manifest.rows_digest() == "b8cf86be29c8796f53b453033b4672b8572c96251a7f846dfb58eac033756695"
    assert manifest.subset(np.arange(11, -1, -1)).rows_digest() != manifest.rows_digest()


def test_manifest__subset_in_the_given_order() -> None:
    manifest = replace(make_manifest(both(0) + both(1), ("a", "b")), unreadable={6: "gone"})
    part = manifest.subset(np.array([11, 6, 0]))
    assert part.paths == ("11.jpg", "6.jpg", "0.jpg")
    assert part.labels.tolist() == [1, 1, 0]
    assert part.split.tolist() == [Split.VAL, Split.TRAIN, Split.TRAIN]
    assert part.unreadable == {1: "gone"}
    np.testing.assert_array_equal(part.digests, manifest.digests[[11, 6, 0]])
    assert manifest.subset(manifest.split == Split.VAL).paths == ("5.jpg", "11.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(11, dtype=np.int64)}, "labels must have one entry for each of the 12 paths"),
        ({"labels": np.full(12, 2)}, "labels must index class_names"),
        ({"labels": np.full(12, -2)}, "labels must index class_names"),
        ({"split": np.full(12, 4, dtype=np.uint8)}, "split must hold codes"),
        ({"digests": np.zeros((12, 31), dtype=np.uint8)}, "digests must be"),
        ({"stat": np.zeros((12, 3), dtype=np.int64)}, "stat must be"),
        ({"unreadable": {12: "x"}}, "unreadable must name rows"),
    ],
)
def test_manifest__invariants(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_manifest(both(0) + both(1), ("a", "b")), **change)
