from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from transfercache.cache.rows import Rows


def test_rows__round_trip_is_exact(make_extraction: Any) -> None:
    rows = make_extraction(bad=3).rows(path=("", "a b/é.jpg", "\udcff\udc80.png", *(f"{i}\n" for i in range(7))))
    again = Rows.from_bytes(rows.to_bytes())
    assert again.path == rows.path
    assert again.reason == rows.reason == ("", "", "", "truncated", *[""] * 6)
    for name in ("size", "mtime_ns", "ctime_ns", "inode", "digest", "view", "label", "split", "group"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    for name in ("status", "shard", "slot"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    assert again.to_bytes() == rows.to_bytes()


def test_rows__empty(make_extraction: Any) -> None:
    rows = make_extraction(n_images=1).rows()
    arrays = {name: value[:0] for name, value in vars(rows).items()}
    assert len(Rows.from_bytes(Rows(**arrays).to_bytes())) == 0


def in_views(rows: Rows, entries: dict[int, list[int]], **changes: Any) -> Rows:
    """Entries of the images named, each in the views listed and so in slots of its own; some columns changed."""
    index = [image for image, views in entries.items() for _ in views]
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    taken = {name: tuple(v[i] for i in index) if isinstance(v, tuple) else v[index] for name, v in values.items()}
    taken["view"] = np.array([view for views in entries.values() for view in views], np.uint8)
    taken["slot"] = np.arange(len(index))
    return Rows(**{**taken, **changes})


def test_row__counts_images_not_views(extraction: Any) -> None:
    rows = in_views(extraction.rows(), {0: [0, 1], 1: [0], 2: [0, 3]})
    assert rows.row.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"path": ("a", "b", "c")},
        {"size": np.array([1, 2, 3])},
        {"mtime_ns": np.array([1, 2, 3])},
        {"ctime_ns": np.array([1, 2, 3])},
        {"inode": np.array([1, 2, 3])},
        {"digest": np.eye(3, 32, dtype=np.uint8)},
        {"label": np.array([0, 1, 0])},
        {"split": np.array([1, 2, 1], np.uint8)},
        {"group": np.array([5, 6, 7])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rows__views_of_one_row_differ_in_nothing_else(extraction: Any, changes: dict[str, Any]) -> None:
    # Another split or label for one view would carry an image from training into what is reported.
    rows = extraction.rows()
    assert len(in_views(rows, {0: [0, 1], 1: [0]})) == 3
    with pytest.raises(ValueError, match=rf"^{next(iter(changes))} of row 1 is not that of its view 0$"):
        in_views(rows, {0: [0, 1], 1: [0]}, **changes)


def test_rows__a_bad_row_has_view_0_alone(extraction: Any) -> None:
    bad = {"status": np.array([0, 1], np.uint8), "reason": ("", "torn"), "shard": np.array([0, -1], np.int32)}
    with pytest.raises(ValueError, match="view of row 1 is out of range"):
        in_views(extraction.rows(), {0: [0, 1]}, slot=np.array([0, -1]), **bad)
    bad = {"status": np.array([1, 0], np.uint8), "reason": ("torn", ""), "shard": np.array([-1, 0], np.int32)}
    with pytest.raises(ValueError, match="status of row 1 is not that of its view 0"):
        in_views(extraction.rows(), {0: [0, 1]}, slot=np.array([-1, 0]), **bad)


def test_known_files__first_views_with_a_digest(extraction: Any) -> None:
    digests = extraction.digests.copy()
    digests[3] = 0
    rows = in_views(extraction.rows(digest=digests), {0: [0, 1], 2: [0], 3: [0]})
    assert rows.known_files() == {
        "train/é0.jpg": (1000, 10, 20, 30, digests[0].tobytes()),
        "train/é2.jpg": (1002, 12, 22, 32, digests[2].tobytes()),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": np.zeros(3, np.int64)}, r"size must be int64 \[10\], got int64 \(3,\)"),
        ({"label": np.zeros(10, np.int32)}, "label must be int64"),
        ({"digest": np.zeros((10, 31), np.uint8)}, r"digest must be uint8 \[10, 32\]"),
        ({"reason": ("",)}, "1 reasons for 10 rows"),
        ({"view": np.array([1] + [0] * 9, np.uint8)}, "view of row 0 is out of range"),
        ({"view": np.array([0, 2, 1] + [0] * 7, np.uint8)}, "view of row 2 is out of range"),
        ({"path": ("a\0b", *"bcdefghij")}, "path of row 0 is out of range"),
        ({"size": np.array([0, -1] + [0] * 8)}, "size of row 1"),
        ({"label": np.array([0, -2] + [0] * 8)}, "label of row 1"),
        ({"split": np.array([0, 0, 4] + [0] * 7, np.uint8)}, "split of row 2"),
        ({"group": np.array([-1] * 10)}, "group of row 0"),
        ({"status": np.array([2] * 10, np.uint8)}, "status of row 0"),
        ({"reason": ("why", *[""] * 9)}, "reason of row 0"),
        ({"status": np.array([1] + [0] * 9, np.uint8), "reason": ("why", *[""] * 9)}, "shard of row 0"),
        ({"shard": np.array([0] * 9 + [-1], np.int32)}, "shard of row 9"),
        ({"slot": np.array([0] * 9 + [-5])}, "slot of row 9"),
    ],
)
def test_rows__values_out_of_range(extraction: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extraction.rows(**changes)


def _forged(rows: Rows, change: Callable[[dict[str, Any]], Any]) -> bytes:
    arrays = safetensors.numpy.load(rows.to_bytes())
    change(arrays)
    return safetensors.numpy.save(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("inode"), "has the arrays"),
        (lambda a: a.update(extra=np.zeros(1)), "has the arrays"),
        (lambda a: a.update(path_offsets=a["path_offsets"][::-1].copy()), "path: its offsets do not run"),
        (lambda a: a.update(path_offsets=a["path_offsets"] + 1), "path: its offsets do not run"),
        (lambda a: a.update(path_offsets=np.array([0, 1 << 60])), "path: its offsets do not run"),
        (lambda a: a.update(path_offsets=np.zeros(0, np.int64)), "path: its bytes must be"),
        (lambda a: a.update(path_offsets=a["path_offsets"].astype(np.int32)), "path: its bytes must be"),
        (lambda a: a.update(reason_bytes=np.zeros((2, 2), np.uint8)), "reason: its bytes must be"),
        (lambda a: a.update(slot=a["slot"].astype(np.float64)), "slot must be int64"),
        (
            lambda a: a.update(path_offsets=np.append(a["path_offsets"], a["path_offsets"][-1])),
            r"size must be .*\[11\]",
        ),
    ],
)
def test_from_bytes__lies(extraction: Any, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows.from_bytes(_forged(extraction.rows(), change))


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}trailing"])
def test_from_bytes__not_safetensors(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a rows file"):
        Rows.from_bytes(data)


def test_check_against__labels_and_places(extraction: Any) -> None:
    rows = extraction.rows()
    rows.check_against(("ant", "bee"), {0: 10})
    with pytest.raises(ValueError, match="label 1 with 1 class names"):
        rows.check_against(("ant",), {0: 10})
    with pytest.raises(ValueError, match="in shard 0, which is not there or not finished"):
        rows.check_against(("ant", "bee"), {})
    with pytest.raises(ValueError, match="beyond the 9 rows of shard 0"):
        rows.check_against(("ant", "bee"), {0: 9})
