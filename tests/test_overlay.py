from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from transfercache.errors import DataError
from transfercache.overlay import overlay, read_columns

PATHS = ("ants/1.jpg", "ants/2.jpg", "bees/1.jpg", "bees/3.jpg")
LABELS = np.array([0, 0, 1, 1], dtype=np.int64)
CLASSES = ("ants", "bees")


@pytest.fixture
def csv_path(tmp_path: Path) -> Path:
    return tmp_path / "fixes.csv"


def test_overlay__changes_the_named_rows_alone(csv_path: Path) -> None:
    csv_path.write_text("label,path,note\nbees,ants/2.jpg,wrong\n,bees/3.jpg,unclear\n")
    labels, names = overlay(PATHS, LABELS, CLASSES, csv_path)
    np.testing.assert_array_equal(labels, [0, 1, 1, -1])
    assert names == CLASSES
    np.testing.assert_array_equal(LABELS, [0, 0, 1, 1])


def test_overlay__defines_the_classes_where_there_are_none(csv_path: Path) -> None:
    csv_path.write_text("path,label\nants/1.jpg,wasp\nbees/1.jpg,fly\nbees/3.jpg,\n")
    labels, names = overlay(PATHS, np.full(4, -1), (), csv_path)
    assert names == ("fly", "wasp")
    np.testing.assert_array_equal(labels, [1, -1, 0, -1])


def test_overlay__blanks_around_a_class_matter_only_where_they_tell_two_apart(csv_path: Path) -> None:
    csv_path.write_text("path,label\nants/1.jpg, bees\nbees/1.jpg,ants\nbees/3.jpg,ants \nbees/3.jpg, ants\n")
    labels, names = overlay(PATHS, LABELS, ("ants ", "bees"), csv_path)
    np.testing.assert_array_equal(labels, [1, 0, 0, 0])
    assert names == ("ants ", "bees")
    csv_path.write_text("path,label\nbees/1.jpg,ants\nbees/3.jpg,ants \n")
    labels, _ = overlay(PATHS, LABELS, ("bees", "ants", "ants "), csv_path)
    np.testing.assert_array_equal(labels, [0, 0, 1, 2])
    csv_path.write_text("path,label\nbees/1.jpg,ants\n")
    with pytest.raises(DataError, match="has the label 'ants', which is no class of the data"):
        overlay(PATHS, LABELS, (" ants", "ants "), csv_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n3.jpg,ants\n", r"line 2 names '3\.jpg', which is not in the data \(did you mean bees/3\.jpg\?\)"),
        ("path,label\nants/22.jpg,ants\n", r"\(did you mean ants/2\.jpg or .*\?\); write paths relative to the data's"),
        (
            "path,label\nants/1.jpg,beees\n",
            r"line 2 has the label 'beees', .* \(did you mean bees\?\); its classes: ants",
        ),
        ("path,label\nants/1.jpg,ants\nants/1.jpg,bees\n", r"line 3 labels 'ants/1\.jpg' a second time, differently"),
        ("path,class\nants/1.jpg,ants\n", r"has no column 'label' \(its columns: 'path', 'class'\)"),
    ],
)
def test_overlay__wrong_file(csv_path: Path, text: str, message: str) -> None:
    csv_path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        overlay(PATHS, LABELS, CLASSES, csv_path)
    assert str(caught.value).startswith(f"{csv_path}: ")


def test_read_columns__byte_order_mark_quotes_and_blank_lines(csv_path: Path) -> None:
    csv_path.write_bytes('\ufeffpath, label\r\n"a,b.jpg", x \r\n\r\n c.jpg,é\r\n'.encode())
    lines, columns = read_columns(csv_path, required=("path",), optional=("label", "split"))
    assert lines == [2, 4]
    assert columns == {"path": ["a,b.jpg", " c.jpg"], "label": ["x", "é"]}


def test_read_columns__bytes_that_are_not_utf8_survive(csv_path: Path) -> None:
    csv_path.write_bytes(b"path\ncaf\xe9.jpg\n")
    assert read_columns(csv_path, required=("path",))[1] == {"path": ["caf\udce9.jpg"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"has no column 'path' \(its columns: none\)"),
        (b"path;label\na;b\n", r"\(its columns: 'path;label'\)"),
        (b"path,label\na.jpg,x,y\n", r"line 2 has 3 values, the header 2; put quotes around values that hold commas"),
        (b'path\na.jpg\n"b"x\n', r"line 3 is not CSV"),
        (b"path\n" + b"a" * 200_000, r"line 2 is not CSV \(field larger than field limit"),
    ],
)
def test_read_columns__wrong_file(csv_path: Path, data: bytes, message: str) -> None:
    csv_path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_columns(csv_path, required=("path",))


def test_read_columns__missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read \(No such file or directory\)"):
        read_columns(tmp_path / "none.csv", required=("path",))
