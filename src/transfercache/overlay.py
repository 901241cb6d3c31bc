"""A file of labels laid over rows by their paths, and the CSV reading that it shares with CSV data."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from transfercache.errors import DataError, did_you_mean

#: difflib compares a word with every candidate: beyond this it would take longer than the reading.
_MAX_CANDIDATES = 2000


def read_columns(
    csv_path: Path,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    verbatim: Sequence[str] = ("path",),
) -> tuple[list[int], dict[str, list[str]]]:
    """Return the line number of each row (from 1, the header included) and its columns as text, in file order.

    Of `optional`, those that the header has. Values lose the blanks around them, but for those of `verbatim`. UTF-8,
    with or without a byte order mark; bytes that are not UTF-8 are kept with surrogateescape, as in file names. Blank
    lines are passed over. Raises DataError naming file and line or column.
    """
    try:
        with open(csv_path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            places = _places(csv_path, header, required, optional)
            lines: list[int] = []
            columns: dict[str, list[str]] = {name: [] for name in places}
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{csv_path}: line {reader.line_num} has {len(values)} values, the header {len(header)}; "
                        "put quotes around values that hold commas"
                    )
                lines.append(reader.line_num)
                for name, place in places.items():
                    columns[name].append(values[place] if name in verbatim else values[place].strip())
            return lines, columns
    except csv.Error as error:
        raise DataError(f"{csv_path}: line {reader.line_num} is not CSV ({error})") from error
    except OSError as error:
        raise DataError(f"{csv_path}: cannot be read ({error.strerror}); check the path") from error


def _places(csv_path: Path, header: list[str], required: Sequence[str], optional: Sequence[str]) -> dict[str, int]:
    for name in required:
        if name not in header:
            has = ", ".join(map(repr, header)) or "none"
            raise DataError(f"{csv_path}: has no column {name!r} (its columns: {has}); name it in the first line")
    return {name: header.index(name) for name in (*required, *optional) if name in header}


def overlay(
    paths: Sequence[str], labels: npt.NDArray[np.int64], class_names: Sequence[str], csv_path: Path
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return labels int64 [N] and class names, with those of the file `csv_path` (`path,label`) laid over.

    A path is written as in `paths`; rows that the file does not name keep their label, and an empty label takes it
    away. Blanks around a label matter only where they tell two classes apart, as the names of folders may have them.
    Where there are no classes yet, the file's labels are the classes, sorted. Raises DataError naming the line of an
    unknown path, an unknown class, or a path that is given two labels.
    """
    lines, columns = read_columns(csv_path, required=("path", "label"), verbatim=("path", "label"))
    given = columns["label"]
    names = tuple(class_names) or tuple(sorted({label.strip() for label in given} - {""}))
    n_bare = Counter(name.strip() for name in names)
    codes = {name.strip(): code for code, name in enumerate(names) if n_bare[name.strip()] == 1}
    codes |= {name: code for code, name in enumerate(names)} | {"": -1}
    given = [label if label in codes else label.strip() for label in given]
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows_of.setdefault(path, []).append(row)
    fixed = labels.copy()
    first: dict[str, int] = {}
    for line, path, label in zip(lines, columns["path"], given, strict=True):
        if path not in rows_of:
            raise DataError(
                f"{csv_path}: line {line} names {path!r}, which is not in the data{_similar(path, paths)}; "
                "write paths relative to the data's folder"
            )
        if label not in codes:
            raise DataError(
                f"{csv_path}: line {line} has the label {label!r}, which is no class of the data"
                f"{did_you_mean(label, names)}; its classes: {', '.join(names)}"
            )
        if first.setdefault(path, codes[label]) != codes[label]:
            raise DataError(f"{csv_path}: line {line} labels {path!r} a second time, differently; keep one of the two")
        fixed[rows_of[path]] = codes[label]
    return fixed, names


def _similar(path: str, paths: Iterable[str]) -> str:
    name = PurePosixPath(path).name
    same_name = list(islice((known for known in paths if PurePosixPath(known).name == name), 3))
    if same_name:
        return f" (did you mean {' or '.join(same_name)}?)"
    return did_you_mean(path, islice(paths, _MAX_CANDIDATES))
