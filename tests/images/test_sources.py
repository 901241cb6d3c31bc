from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from transfercache.errors import DataError
from transfercache.images.sources import read_paths, read_source
from transfercache.splits import Split

Write = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def images_in(folder: Path, write_image: Write, *paths: str) -> None:
    for number, path in enumerate(paths):
        write_image(folder / path, number)


def test_read_source__class_folders_in_the_row_order_of_image_folder(photos: Path, write_image: Write) -> None:
    # Nested folders, whose order ImageFolder takes from the path as text ('-' sorts before '/'), and odd names.
    names = ["b/2.JPG", "b/10.jpeg", "b/x/1.png", "b/x-y/1.png", "b/x/y/1.webp", "b/a.tiff", "A/ü.bmp", "c d/1.jpg"]
    images_in(photos, write_image, *names)
    (photos / "b" / "notes.txt").write_text("no image")
    manifest = read_source(photos)
    reference = ImageFolder(str(photos))
    assert [str(manifest.path_of(row)) for row in range(manifest.n_rows)] == [path for path, _ in reference.samples]
    assert manifest.labels.tolist() == reference.targets
    assert list(manifest.class_names) == reference.classes
    assert manifest.skipped == {"not an image by its extension .txt": ("b/notes.txt", 1)}
    assert (manifest.name, manifest.root, manifest.has_given_split) == ("photos", photos, False)
    assert set(manifest.split.tolist()) == {Split.NONE}


def test_read_source__records_the_status_of_each_file(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "b/2.jpg")
    manifest = read_source(photos)
    status = os.stat(photos / "b/2.jpg")
    assert manifest.stat[1].tolist() == [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def test_read_source__given_splits_share_their_classes(photos: Path, write_image: Write) -> None:
    paths = ["train/b/1.jpg", "train/a/2.jpg", "val/a/3.jpg", "val/c/4.jpg", "test/b/5.jpg"]
    images_in(photos, write_image, *paths)
    manifest = read_source(photos)
    assert manifest.paths == ("train/a/2.jpg", "train/b/1.jpg", "val/a/3.jpg", "val/c/4.jpg", "test/b/5.jpg")
    assert manifest.class_names == ("a", "b", "c")
    assert manifest.labels.tolist() == [0, 1, 0, 2, 1]
    assert manifest.split.tolist() == [Split.TRAIN, Split.TRAIN, Split.VAL, Split.VAL, Split.TEST]
    assert manifest.has_given_split


def test_read_source__test_images_without_classes_are_unlabelled(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "train/a/1.jpg", "train/b/2.jpg", "test/3.jpg")
    manifest = read_source(photos)
    assert manifest.labels.tolist() == [0, 1, -1]
    assert manifest.split[2] == Split.TEST


def test_read_source__a_folder_beside_the_splits_is_named(
    photos: Path, write_image: Write, caplog: pytest.LogCaptureFixture
) -> None:
    images_in(photos, write_image, "train/a/1.jpg", "val/a/2.jpg", "extra/a/3.jpg")
    with caplog.at_level(logging.WARNING):
        assert read_source(photos).n_rows == 2
    assert "so extra/ beside it is not read" in caplog.text


@pytest.mark.parametrize(
    ("names", "has"),
    [(["train", "valid"], "train/, valid/"), (["train"], "train/"), (["test"], "test/")],
)
def test_read_source__split_folders_of_other_names(
    photos: Path, write_image: Write, names: list[str], has: str
) -> None:
    images_in(photos, write_image, *[f"{name}/a/1.jpg" for name in names])
    with pytest.raises(DataError, match=f"photos: has {has}, but splits are named train/ with val/ or test/"):
        read_source(photos)


def test_read_source__flat_folder_is_unlabelled(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "b.jpg", "a.png")
    (photos / "empty").mkdir()
    (photos / "readme.md").write_text("x")
    manifest = read_source(f"{photos}/")
    assert manifest.paths == ("a.png", "b.jpg")
    assert manifest.labels.tolist() == [-1, -1]
    assert manifest.class_names == ()
    assert manifest.skipped == {"not an image by its extension .md": ("readme.md", 1)}


def test_read_source__skips_hidden_files_and_counts_each_kind_once(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "a/._1.jpg", "b/2.jpg", "b/.h.png", ".cache/x/3.jpg", "loose.jpg")
    for name in ("a/anim.gif", "b/other.GIF", "b/Thumbs.db", "b/README"):
        (photos / name).write_bytes(b"x")
    manifest = read_source(photos)
    assert manifest.paths == ("a/1.jpg", "b/2.jpg")
    assert manifest.class_names == ("a", "b")
    assert manifest.skipped == {
        "hidden": ("a/._1.jpg", 2),
        "not an image by its extension .gif": ("a/anim.gif", 2),
        "not an image by its extension .db": ("b/Thumbs.db", 1),
        "not an image by its extension": ("b/README", 1),
        "beside the class folders": ("loose.jpg", 1),
    }


def test_read_source__an_empty_class_folder_stays_a_class(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "c/2.jpg")
    (photos / "b").mkdir()
    manifest = read_source(photos)
    assert manifest.class_names == ("a", "b", "c")
    assert manifest.labels.tolist() == [0, 2]


def test_read_source__follows_links_but_no_loop(photos: Path, tmp_path: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "b/2.jpg")
    images_in(tmp_path / "elsewhere", write_image, "3.jpg")
    (photos / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "a" / "up").symlink_to(photos / "a")
    (photos / "b" / "root").symlink_to(photos)
    (photos / "whole").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    manifest = read_source(photos)
    assert manifest.paths == ("a/1.jpg", "a/more/3.jpg", "b/2.jpg")
    assert manifest.class_names == ("a", "b", "whole")


def test_read_source__loop_below_a_class_is_listed_once(photos: Path, write_image: Write) -> None:
    # ImageFolder follows it until the system calls it too many links, and lists each image some forty times.
    images_in(photos, write_image, "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    (photos / "a" / "deep" / "loop").symlink_to(photos / "a")
    assert len(ImageFolder(str(photos)).samples) > 40
    manifest = read_source(photos)
    assert manifest.paths == ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    assert manifest.labels.tolist() == [0, 0, 1]
    assert read_paths([photos]).paths == manifest.paths


def make_unreadable(folder: Path) -> dict[str, str]:
    """Put entries that are no files into a folder; returns their names, sorted, and the reason of each."""
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "device.jpg").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "self.jpg").symlink_to("self.jpg")
    return {
        "dangling.jpg": "cannot be read (No such file or directory)",
        "device.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
        "self.jpg": "cannot be read (Too many levels of symbolic links)",
    }


def test_read_source__unreadable_entries_are_rows_with_a_reason(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "b/2.jpg", "b/z.jpg")
    reasons = make_unreadable(photos / "b")
    manifest = read_source(photos)
    assert manifest.paths == ("a/1.jpg", "b/2.jpg", *(f"b/{name}" for name in reasons), "b/z.jpg")
    assert manifest.unreadable == dict(enumerate(reasons.values(), start=2))
    assert manifest.labels.tolist() == [0, *[1] * 6]


def test_read_source__unreadable_entries_of_a_csv_and_of_the_command_line(
    photos: Path, write_image: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(photos / "1.jpg")
    reasons = make_unreadable(photos)
    names = ["1.jpg", *reasons]
    (photos / "rows.csv").write_text("\n".join(["path", *names]))
    monkeypatch.chdir(photos)
    expected = dict(enumerate(reasons.values(), start=1))
    in_csv = {row: f"{reason} (rows.csv, line {row + 2})" for row, reason in expected.items()}
    for manifest, unreadable in ((read_source("rows.csv"), in_csv), (read_paths(names), expected)):
        assert manifest.paths == tuple(names)
        assert manifest.unreadable == unreadable


def test_read_source__folder_called_jpg_is_a_folder(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg", "a/2.jpg/3.jpg", "a/4.jpg")
    (photos / "a" / "0.jpg").mkdir()
    manifest = read_source(photos)
    reference = ImageFolder(str(photos))
    assert manifest.paths == ("a/1.jpg", "a/4.jpg", "a/2.jpg/3.jpg")
    assert [str(manifest.path_of(row)) for row in range(3)] == [path for path, _ in reference.samples]
    assert (manifest.unreadable, manifest.skipped) == ({}, {})


def test_read_source__empty_folder_called_jpg_beside_images_is_no_class(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "1.jpg")
    (photos / "0.jpg").mkdir()
    manifest = read_source(photos)
    assert (manifest.paths, manifest.class_names, manifest.unreadable) == (("1.jpg",), (), {})


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"two\nlines.jpg", b"\xff\n.jpg", b" .jpg", b'a,"b".jpg'])
def test_read_source__odd_file_name(photos: Path, write_image: Write, name: bytes) -> None:
    images_in(photos, write_image, "a/.hidden.jpg")
    path = write_image(photos / "a" / "1.jpg").rename(os.fsdecode(os.fsencode(photos / "a") + b"/" + name))
    manifest = read_source(photos)
    assert [os.fsencode(path) for path in manifest.paths] == [b"a/" + name]
    assert manifest.path_of(0).read_bytes() == path.read_bytes()
    quoted = name.replace(b'"', b'""')
    (photos / "rows.csv").write_bytes(b'path,label\n"a/' + quoted + b'",x\n')
    assert read_source(photos / "rows.csv").paths == manifest.paths


def test_read_source__name_is_cleaned(tmp_path: Path, write_image: Write) -> None:
    images_in(tmp_path / "My Photos (2)", write_image, "a/1.jpg")
    assert read_source(tmp_path / "My Photos (2)").name == "my-photos-2"


def test_read_source__relative_path_and_home(photos: Path, write_image: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    images_in(photos, write_image, "a/1.jpg")
    monkeypatch.chdir(photos / "a")
    monkeypatch.setenv("HOME", str(photos.parent))
    assert read_source("..").root == photos
    assert read_source("~/photos").name == "photos"


def test_read_source__empty_folder(photos: Path) -> None:
    (photos / "a").mkdir()
    (photos / "a" / "x.gif").write_bytes(b"x")
    with pytest.raises(
        DataError,
        match=r"photos: no image in it \(looked for \.jpg .*; 1 other files, such as a/x\.gif\); give a folder",
    ):
        read_source(photos)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "hymenopterra",
            r"^hymenopterra: no such folder or \.csv \(did you mean hymenoptera\?\); give a folder of images",
        ),
        ("nowhere/photos", r"^nowhere/photos: no such folder or \.csv; give .* or one of digits, hymenoptera$"),
    ],
)
def test_read_source__missing(data: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(data)


def test_read_source__a_single_file(photos: Path, write_image: Write) -> None:
    message = r"1\.jpg: neither a folder nor a \.csv; give the folder that it lies in, or a \.csv that lists files$"
    with pytest.raises(DataError, match=message):
        read_source(write_image(photos / "1.jpg"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_read_source__folder_without_permission(photos: Path, write_image: Write) -> None:
    images_in(photos, write_image, "a/1.jpg")
    (photos / "a").chmod(0)
    try:
        with pytest.raises(DataError, match=r"a: cannot be listed \(Permission denied\)"):
            read_source(photos)
    finally:
        (photos / "a").chmod(0o755)


@pytest.fixture
def csv_path(photos: Path, write_image: Write) -> Path:
    images_in(photos, write_image, "1.jpg", "sub/2.jpg", "3.data", "4.jpg")
    return photos / "Rows.csv"


def test_read_source__csv_rows_in_their_order(csv_path: Path) -> None:
    csv_path.write_text("group,path,split,label\np2,sub/2.jpg,Train,b\n,1.jpg,val,a\np1,3.data,test,b\np2,4.jpg,,\n")
    manifest = read_source(csv_path)
    assert manifest.name == "rows-csv"
    assert manifest.root == csv_path.parent
    assert manifest.paths == ("sub/2.jpg", "1.jpg", "3.data", "4.jpg")
    assert manifest.class_names == ("a", "b")
    assert manifest.labels.tolist() == [1, 0, 1, -1]
    assert manifest.split.tolist() == [Split.TRAIN, Split.VAL, Split.TEST, Split.NONE]
    assert manifest.group.tolist() == [0, -1, 1, 0]
    assert manifest.component.tolist() == [0, 1, 2, 0]
    assert manifest.has_given_split


@pytest.mark.parametrize("text", ["path\n1.jpg\n4.jpg\n", "path,label,split\n1.jpg,,\n4.jpg,,\n"])
def test_read_source__csv_without_labels_is_unlabelled(csv_path: Path, text: str) -> None:
    csv_path.write_text(text)
    manifest = read_source(csv_path)
    assert manifest.labels.tolist() == [-1, -1]
    assert manifest.class_names == ()
    assert not manifest.has_given_split


def test_read_source__csv_paths_may_lead_outside(csv_path: Path, tmp_path: Path, write_image: Write) -> None:
    outside = write_image(tmp_path / "other" / "5.jpg")
    csv_path.write_text(f"path,label\n{outside},a\n../other/5.jpg,b\n")
    manifest = read_source(csv_path)
    assert manifest.paths == (str(outside), "../other/5.jpg")
    assert manifest.path_of(0) == outside
    assert manifest.stat[:, 0].tolist() == [outside.stat().st_size] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n1.jpg,a\n", r"has no column 'path' \(its columns: 'file', 'label'\)"),
        (
            "path,label\nno.jpg,a\nno2.jpg,b\n",
            r"line 2: 'no\.jpg' does not exist, nor does any other file that it lists; paths are rel",
        ),
        (
            "path,label,split\n1.jpg,a,valid\n",
            r"line 2: split 'valid' is none of train, val, test \(did you mean val\?",
        ),
        ("path,label,split\n1.jpg,a,train\n4.jpg,b,\n", r"line 3: split '' is none of train, val, test"),
        (
            "path,label\n1.jpg,a\n4.jpg,b\n1.jpg,b\n",
            r"line 2 labels '1\.jpg' 'a' and line 4 'b'; an image has one label",
        ),
        ("path,label\n", r"no row below the header"),
        ("path,label\n1.jpg,a\n,b\n", r"line 3: its path is empty; name a file there, or remove the line"),
        ("path\n1.jpg\n4\0.jpg\n", r"line 3: '4\\x00\.jpg' holds a zero byte, as no path does; correct it"),
    ],
)
def test_read_source__csv_that_is_wrong(csv_path: Path, text: str, message: str) -> None:
    csv_path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_source(csv_path)
    assert str(caught.value).startswith(f"{csv_path}: ")


def test_read_source__csv_row_that_is_a_folder_or_a_dangling_link_is_unreadable(csv_path: Path) -> None:
    (csv_path.parent / "dangling.jpg").symlink_to("gone")
    csv_path.write_text("path\nsub\ndangling.jpg\n")
    reasons = {
        0: "not a regular file (Rows.csv, line 2)",
        1: "cannot be read (No such file or directory) (Rows.csv, line 3)",
    }
    assert read_source(csv_path).unreadable == reasons


def test_read_source__csv_row_whose_file_is_missing_is_unreadable(csv_path: Path) -> None:
    csv_path.write_text("path,label\n1.jpg,a\nno.jpg,a\n\nsub/no.jpg,b\n")
    manifest = read_source(csv_path)
    assert manifest.paths == ("1.jpg", "no.jpg", "sub/no.jpg")
    assert manifest.unreadable == {
        1: "does not exist (Rows.csv, line 3)",
        2: "does not exist (Rows.csv, line 5)",
    }


def test_read_paths__files_and_folders_in_the_given_order(
    photos: Path, write_image: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_in(photos, write_image, "z.jpg", "a/2.jpg", "a/1.jpg", "a/deep/0.jpg", "odd.dat")
    (photos / "a" / "x.txt").write_text("x")
    monkeypatch.chdir(photos)
    manifest = read_paths(["z.jpg", "a/", Path("odd.dat"), photos / "z.jpg"])
    assert manifest.paths == ("z.jpg", "a/1.jpg", "a/2.jpg", "a/deep/0.jpg", "odd.dat", str(photos / "z.jpg"))
    assert all(manifest.path_of(row).is_file() for row in range(manifest.n_rows))
    assert set(manifest.labels.tolist()) == {-1}
    assert (manifest.name, manifest.root) == ("images", photos)
    assert manifest.skipped == {"not an image by its extension .txt": ("a/x.txt", 1)}


@pytest.mark.parametrize(
    "names", [["1.jpg", "b/2.jpg", "b/c/3.jpg"], ["test/a/1.jpg", "train/a/2.jpg", "valid/a/3.jpg"]]
)
def test_read_paths__a_single_folder_is_the_data_of_that_folder_with_every_image_below(
    photos: Path, write_image: Write, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    images_in(photos, write_image, *names, ".cache/4.jpg")
    (photos / "loop").symlink_to(photos)
    monkeypatch.chdir(photos.parent)
    manifest = read_paths(["photos/"])
    assert (manifest.name, manifest.root, manifest.paths) == ("photos", photos, tuple(names))
    assert set(manifest.labels.tolist()) == {-1}


def test_read_paths__missing_and_empty(photos: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jpg: no such file or folder"):
        read_paths([photos / "no.jpg"])
    with pytest.raises(DataError, match="photos: no image in it"):
        read_paths([photos])


def test_read_source__scan_of_many_files_takes_one_status_each(
    photos: Path, write_image: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_in(photos, write_image, *[f"{name}/{number}.jpg" for name in "ab" for number in range(20)])
    calls: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **options: calls.append(args) or real(*args, **options))
    manifest = read_source(photos)
    assert manifest.n_rows == 40
    assert len(calls) < 10  # the folders; a file's own status comes from the directory entry
    np.testing.assert_array_equal(manifest.stat[:, 0] > 0, np.ones(40, dtype=bool))


@pytest.mark.real
def test_read_source__ants_and_bees(real_photos: Path) -> None:
    manifest = read_source(real_photos)
    for split, folder in ((Split.TRAIN, "train"), (Split.VAL, "val")):
        reference = ImageFolder(str(real_photos / folder))
        rows = np.flatnonzero(manifest.split == split)
        assert [str(manifest.path_of(row)) for row in rows.tolist()] == [path for path, _ in reference.samples]
        assert manifest.labels[rows].tolist() == reference.targets
    assert (manifest.n_rows, manifest.class_names) == (397, ("ants", "bees"))
    assert manifest.skipped == {"not an image by its extension .gif": ("train/ants/imageNotFound.gif", 1)}
